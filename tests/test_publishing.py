"""Uploads to a stand-in of the Hub: what arrives there, and what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import hf_dirembed
from benchmarks.stand_in_hub import StandInHub
from hf_dirembed.errors import CheckpointError
from hf_dirembed.hub.publishing import write_checkpoint_card


PUSH = """
import sys, hf_dirembed, torch
from transformers import AutoModelForMaskedLM

source, repo, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
model = AutoModelForMaskedLM.from_pretrained(source)
if not isinstance(model.get_input_embeddings(), hf_dirembed.CompressedEmbedding):
    hf_dirembed.compress(model, method="direction", rank=5)
model.push_to_hub(repo, **options)
again = AutoModelForMaskedLM.from_pretrained(repo, revision=options.get("revision", "main"))
ids = torch.tensor([[2, 9, 3]])
assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
"""

BASE_CARD = "---\nlicense: mit\nlanguage: en\nmodel-index: nonsense\n---\n# The base\n"


@pytest.fixture
def dense(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "dense"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def card_of(hub: StandInHub, repo: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo].files(revision)["README.md"].decode())


def test_push_to_hub_takes_the_base_models_licence(hub: StandInHub, dense: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in dense.iterdir()}
    hub.add("org/base", {**files, "README.md": BASE_CARD.encode()})
    hub.run(PUSH, "org/base", "me/small", {"private": True, "tags": ["mine"], "revision": "v1"}, cache=tmp_path / "hf")
    repo = hub.repos["me/small"]
    assert repo.private
    assert not repo.files("main")
    assert {"config.json", "model.safetensors", "README.md", "modeling_dirembed.py"} <= repo.files("v1").keys()
    card = card_of(hub, "me/small", "v1")
    assert card.data.base_model == "org/base"
    assert card.data.get("base_model_relation") == "quantized"
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("mit", "en", "fill-mask")
    assert set(card.data.tags) == {"dirembed", "mine"}
    assert 'from_pretrained("me/small")' in card.text
    (record,) = json.loads(repo.files("v1")["config.json"])["dirembed"]["record"]["tables"].values()
    assert record["settings"]["base_model"] == "org/base"
    code = "import hf_dirembed, transformers; transformers.AutoConfig.from_pretrained('me/small', revision='v1')"
    hub.run(code, cache=tmp_path / "friend")
    with pytest.raises(AssertionError, match="private"):
        hub.run(code, cache=tmp_path / "stranger", token="")


def test_a_card_written_by_hand_stays(hub: StandInHub, dense: Path, tmp_path: Path) -> None:
    hub.add("me/small", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    hub.run(PUSH, dense, "me/small", {}, cache=tmp_path / "hf")
    assert card_of(hub, "me/small").text.strip() == "# Mine"


def test_a_reloaded_model_is_pushed_with_the_card_of_its_folder(hub: StandInHub, dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text(BASE_CARD.replace("model-index: nonsense\n", ""))
    out = tmp_path / "out"
    hf_dirembed.checkpoints.convert.compress_checkpoint(dense, out, method="direction", rank=4, base_model="org/base")
    hub.run(PUSH, out, "me/small", {}, cache=tmp_path / "hf")
    card = card_of(hub, "me/small")
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")


def test_the_command_line_uploads_folder_card_and_results(hub: StandInHub, dense: Path, tmp_path: Path) -> None:
    code = "import sys; from hf_dirembed.cli.commands import main; main(sys.argv[1:])"
    options = ("--method", "direction", "--rank", 4, "--push-to-hub", "me/small", "--private")
    hub.run(code, "compress", dense, tmp_path / "out", *options, cache=tmp_path / "hf")
    assert hub.repos["me/small"].private
    assert 'from_pretrained("me/small")' in card_of(hub, "me/small").text
    assert "tokenizer.json" in hub.repos["me/small"].files()


@pytest.mark.parametrize("name", ["", "no id!", "a/b/c"])
def test_a_card_names_no_repo_that_cannot_be(name: str, tmp_path: Path) -> None:
    """What the card would tell people to load could not be loaded by anybody."""
    hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="svd", rank=3).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="is no id of the Hub: give one like org/name"):
        write_checkpoint_card(tmp_path / "small", model_id=name)
    assert not (tmp_path / "small" / "README.md").exists()
