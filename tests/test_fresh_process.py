"""What others do with a saved repo: load it in a new process, with the plugin, with trust, with neither."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file

import hf_dirembed


LOADS = {"bert": "AutoModelForMaskedLM", "llama-tied": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}

WITHOUT_PLUGIN = """
import sys

class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "hf_dirembed":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
"""

COMPARE = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file

root, source, target = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for name, auto in LOADS.items():
    model = getattr(transformers, auto).from_pretrained(root / name / source, trust_remote_code=TRUST).eval()
    expected = load_file(root / name / "expected.safetensors")
    inputs = {key: value for key, value in expected.items() if key != "logits"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"]), name
    model.save_pretrained(root / name / target)
    print(name, type(model).__module__)
"""


def run(code: str, *arguments: object, modules: Path) -> str:
    """Runs code in a fresh interpreter that sees this package only if it is installed, and its own module cache."""
    # As many threads as here, or the last bits of sums differ.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=modules,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed models of three families, each beside its inputs and its logits."""
    root = tmp_path_factory.mktemp("repos")
    for name, auto in LOADS.items():
        model = hf_dirembed.compress(FAMILIES[name].make(auto), method="direction", rank=7, latent_dtype="float16")
        inputs = FAMILIES[name].inputs()
        with torch.no_grad():
            logits = model(**inputs).logits
        (root / name).mkdir()
        save_file({**inputs, "logits": logits.contiguous()}, root / name / "expected.safetensors")
        model.save_pretrained(root / name / "one")
    return root


def test_trust_remote_code_without_plugin(repos: Path, tmp_path: Path) -> None:
    """A repo is self-contained, and so is what is saved from it, twice over, when the first is gone."""
    code = WITHOUT_PLUGIN + COMPARE.replace("LOADS", repr(LOADS)).replace("TRUST", "True")
    for source, target in (("one", "two"), ("two", "three"), ("three", "four")):
        modules = tmp_path / source
        modules.mkdir()
        printed = run(code, repos, source, target, modules=modules)
        assert all(line.split()[1].startswith("transformers_modules.") for line in printed.splitlines())
        for name in LOADS:
            folder = repos / name / target
            assert {file.name for file in folder.glob("*.py")} == {
                "adapters_dirembed.py",
                "checks_dirembed.py",
                "codes_dirembed.py",
                "configuration_dirembed.py",
                "guarded_dirembed.py",
                "kernels_dirembed.py",
                "kinds_dirembed.py",
                "matrix_dirembed.py",
                "modeling_dirembed.py",
                "modules_dirembed.py",
                "placement_dirembed.py",
                "products_dirembed.py",
                "resizing_dirembed.py",
                "stock_dirembed.py",
                "tables_dirembed.py",
                "triton_dirembed.py",
            }
            if source != "one":
                shutil.rmtree(repos / name / source)


@pytest.mark.parametrize("trust", [None, True])
def test_plugin_runs_nothing_of_the_repo(repos: Path, tmp_path: Path, trust: bool | None) -> None:
    """With the plugin imported the repo's own files are not run, trusted or not."""
    for name in LOADS:
        shutil.copytree(repos / name, tmp_path / name)
        for file in (tmp_path / name / "one").glob("*.py"):
            file.write_text("raise SystemExit('the code of the repo ran')")
    code = "import hf_dirembed\n" + COMPARE.replace("LOADS", repr(LOADS)).replace("TRUST", repr(trust))
    printed = run(code, tmp_path, "one", "two", modules=tmp_path)
    assert all(line.split()[1] == "hf_dirembed.remote.modeling_dirembed" for line in printed.splitlines())


def test_without_plugin_and_trust_it_fails(repos: Path, tmp_path: Path) -> None:
    """transformers' own errors, and never a model with a random table."""
    code = (
        WITHOUT_PLUGIN
        + """
import transformers
folder = sys.argv[1]
for load in (transformers.AutoModel, transformers.AutoConfig, transformers.AutoModelForMaskedLM):
    try:
        load.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit("loaded without trust")
for load in (transformers.BertModel, transformers.BertForMaskedLM):
    try:
        load.from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error).lower(), error
    else:
        raise SystemExit("a stock class loaded a code matrix for a table")
"""
    )
    run(code, repos / "bert" / "one", modules=tmp_path)


def test_pickle(tmp_path: Path) -> None:
    """A compressed model unpickles in a fresh process, which has not derived its classes yet."""
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), method="svd", rank=4)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = """
import pickle, sys
model = pickle.load(open(sys.argv[1], "rb"))
print(type(model).__name__, type(model.config).__name__, model.get_input_embeddings().layout.rank)
"""
    assert run(code, tmp_path / "model.pickle", modules=tmp_path).split() == [
        "DirEmbedBertForMaskedLM",
        "DirEmbedBertConfig",
        "4",
    ]
