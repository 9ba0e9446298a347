"""Uploads to a stand-in of the Hub, private and by revision, and loading from there."""

from __future__ import annotations

import importlib.util

import torch
from drop_in_subject import BLOCK_PLUGIN, Skip, Subject, row, without_package
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from stand_in_hub import StandInHub


PUSH = """
import sys, torch, transformers, hf_dirembed

source, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(source)
for part in (model, transformers.AutoTokenizer.from_pretrained(source)):
    part.push_to_hub("me/small", private=True)
model.half().push_to_hub("me/small", revision="half")
"""
LOAD = """
import sys, torch, transformers
from safetensors.torch import load_file

auto, inputs, dtype, options = *sys.argv[1:4], eval(sys.argv[4])
model = getattr(transformers, auto).from_pretrained("me/small", **options).eval()
assert str(model.dtype) == dtype, f"{model.dtype}, not {dtype}"
inputs = load_file(inputs)
expected = inputs.pop("expected")
difference = 0.0
if dtype == "torch.float32":
    transformers.AutoTokenizer.from_pretrained("me/small", **options)
    with torch.no_grad():
        difference = (model(**inputs)[0] - expected).abs().max().item()
print(type(model).__module__.partition(".")[0], difference, expected.abs().max().item())
"""
REFUSED = """
import sys, transformers, hf_dirembed

try:
    getattr(transformers, sys.argv[1]).from_pretrained("me/small")
except OSError as error:
    assert "private" in str(error), error
else:
    raise SystemExit("it was given to who has no token")
"""
SENTENCES = """
import sys, torch, hf_dirembed
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
model.push_to_hub("me/sentences", private=True)
again = SentenceTransformer("me/sentences", device="cpu")
assert isinstance(again[0].auto_model.get_input_embeddings(), hf_dirembed.CompressedEmbedding)
sentence = ["Snow fell on the old harbour all night long."]
assert torch.equal(*(each.encode(sentence, convert_to_tensor=True) for each in (model, again))), "it answers otherwise"
print(", ".join(type(module).__name__ for module in again))
"""


@row("Hub", "push_to_hub to a private repo and to a branch, from_pretrained by revision, with and without the plugin")
def push_to_hub(subject: Subject) -> str:
    inputs, auto = subject.work / "pushed.safetensors", subject.auto.__name__
    with torch.no_grad():
        save_file({**subject.inputs, "expected": subject.model(**subject.inputs)[0].contiguous()}, inputs)
    with StandInHub() as hub:
        hub.run(PUSH, subject.compressed, auto, cache=subject.work / "pusher")
        repo = hub.repos["me/small"]
        assert repo.private, "the repo is public"
        files, commit = repo.files(), repo.branches["main"]
        needed = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "modeling_dirembed.py"}
        assert needed <= files.keys(), needed - files.keys()
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "transformers"
        assert "dirembed" in card.data.tags
        assert 'from_pretrained("me/small"' in card.text
        cache, plugin = subject.work / "loader", "import hf_dirembed\n" + LOAD
        trust = {"trust_remote_code": True, "revision": "main", "code_revision": commit}
        for code, dtype, options, expected in (
            (plugin, torch.float32, {"revision": "main"}, "hf_dirembed"),
            (plugin, torch.float32, {"revision": commit}, "hf_dirembed"),
            (plugin, torch.float16, {"revision": "half"}, "hf_dirembed"),
            (BLOCK_PLUGIN + LOAD, torch.float32, trust, "transformers_modules"),
        ):
            found, *numbers = hub.run(code, auto, inputs, dtype, options, cache=cache).split()
            assert found == expected, f"{found} ran"
            difference, largest = map(float, numbers)
            if found == "hf_dirembed":
                assert difference == 0, f"by revision, max difference {difference:.0e} of {largest:.1f}"
            else:
                said = without_package(difference, largest, subject)
        hub.run(REFUSED, auto, cache=subject.work / "stranger", token="")
    return (
        f"{len(files)} files, card and metadata arrived; exact by branch and commit; with its code pinned: {said}; "
        "not without a token"
    )


@row("Hub", "SentenceTransformer.push_to_hub to a private repo, loaded from there", "encoder")
def push_sentences(subject: Subject) -> str:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise Skip("sentence_transformers is not installed")
    with StandInHub() as hub:
        modules = hub.run(SENTENCES, subject.compressed, cache=subject.work / "sentences-pusher").strip()
        assert hub.repos["me/sentences"].private, "the repo is public"
    return f"exact; modules {modules.splitlines()[-1]}"
