"""Repos as the Hub's cache holds them: by name, by revision, with the code pinned, with the plugin and without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from test_fresh_process import WITHOUT_PLUGIN, run
from tiny import make


FIRST, SECOND = "1" * 40, "2" * 40
LOAD = """
import os, sys
cache, expected, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
os.environ["HF_HUB_CACHE"] = cache
import torch, transformers
from safetensors.torch import load_file
BEFORE
model = transformers.AutoModelForMaskedLM.from_pretrained("me/tiny", **options).eval()
tensors = load_file(expected)
with torch.no_grad():
    logits = model(input_ids=tensors["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["logits"])  # compiled heads, and those that are not, round differently
print(type(model).__module__)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two revisions of a private repo: the first is a model, the second another one, whose code does not run."""
    root = tmp_path_factory.mktemp("cache")
    repo = root / "models--me--tiny"
    inputs = FAMILIES["bert"].inputs()
    for revision, method in ((FIRST, "transform"), (SECOND, "direction")):
        model = make("bert", "AutoModelForMaskedLM", method)
        folder = repo / "snapshots" / revision
        model.save_pretrained(folder)
        with torch.no_grad():
            logits = model(**inputs).logits.contiguous()
        save_file({**inputs, "logits": logits}, root / f"{revision}.safetensors")
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('the code of the second revision ran')")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SECOND)
    return root


def load(cache: Path, expected: str, modules: Path, *, plugin: bool, **options: object) -> str:
    code = LOAD.replace("BEFORE", "import hf_dirembed" if plugin else "")
    if not plugin:
        code = WITHOUT_PLUGIN + code
    return run(code, cache, cache / f"{expected}.safetensors", repr(options), modules=modules).strip()


@pytest.mark.parametrize(("revision", "expected"), [("main", SECOND), (FIRST, FIRST)])
def test_with_the_plugin(cache: Path, revision: str, expected: str, tmp_path: Path) -> None:
    assert load(cache, expected, tmp_path, plugin=True, revision=revision) == "hf_dirembed.remote.modeling_dirembed"


def test_without_it_the_code_is_that_of_its_revision(cache: Path, tmp_path: Path) -> None:
    """Weights of one revision with the code of another, as one pins code that was reviewed."""
    found = load(cache, FIRST, tmp_path, plugin=False, revision=FIRST, trust_remote_code=True)
    assert found.startswith("transformers_modules.")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    options = {"trust_remote_code": True, "revision": SECOND, "code_revision": FIRST}
    assert load(cache, SECOND, tmp_path, plugin=False, **options).startswith("transformers_modules.")
    with pytest.raises(AssertionError, match="the code of the second revision ran"):
        load(cache, SECOND, tmp_path, plugin=False, revision=SECOND, trust_remote_code=True)
