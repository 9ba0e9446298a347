"""Configs that would have code run that nobody asked for, and code beside a checkpoint: neither is obeyed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForMaskedLM

import hf_dirembed
from attacks.spoiling import base, record
from hf_dirembed.cli.commands import main


# What a config may hold and nobody obeys.
SMUGGLED = {
    "quantised by nothing known": base(quantization_config={"quant_method": "magic"}),
    "attention of a repo": base(attn_implementation="evil/kernel", _attn_implementation="evil/kernel"),
    "attention by its inner name": base(_attn_implementation_internal="evil/kernel"),
    "attention of no kind": base(attn_implementation=17),
    "experts of a repo": base(experts_implementation="evil/kernel", _experts_implementation="evil/kernel"),
    "trust": base(trust_remote_code=True),
    "a forged auto_map": base(auto_map={"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}),
    "an auto_map of another repo": base(auto_map={"AutoConfig": "evil/repo--evil.Config"}),
    "an auto_map that is a list": base(auto_map={"AutoConfig": ["evil.Config", None]}),
    "pipelines": base(custom_pipelines={"fill-mask": {"impl": "evil.Pipeline", "pt": ["evil.Model"]}}),
    "a function for an architecture": base(architectures=["pipeline"]),
    "a module for an architecture": base(architectures=["transformers"]),
    "another model's architecture": base(architectures=["DirEmbedGPT2LMHeadModel"]),
    "a number for an architecture": base(architectures=[1]),
    "figures that are none": record(
        lambda r: r.update(quality={"dense_bytes": "many", "mean_cosine": [1], "token_cosine": float("nan")})
    ),
}
EVIL = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(folder).eval()(torch.arange(50).view(1, -1)).logits


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_in_a_config_is_obeyed_that_runs_code(name: str, folder: Path, intact: Path, tmp_path: Path) -> None:
    SMUGGLED[name](folder)
    (folder / "evil.py").write_text(EVIL)
    (folder / "modeling_dirembed.py").write_text(EVIL)
    assert torch.equal(logits(folder), logits(intact))
    done = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    assert done.exit_code == 0, done.exception
    done = CliRunner().invoke(main, ["expand", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    assert not list(tmp_path.rglob("executed"))


def test_the_package_is_preferred_to_the_code_of_a_repo_that_is_trusted(folder: Path) -> None:
    for file in folder.glob("*_dirembed.py"):
        file.write_text(EVIL)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__ == "hf_dirembed.remote.modeling_dirembed"
    assert not list(folder.parent.rglob("executed"))


@pytest.mark.parametrize("auto_map", [None, 7, {"AutoConfig": 7}, {"AutoConfig": "a.b.c--d.e"}])
def test_a_malformed_auto_map_ends_in_one_line_or_is_ignored(auto_map: Any, folder: Path, tmp_path: Path) -> None:
    base(auto_map=auto_map)(folder)
    done = CliRunner().invoke(main, ["expand", str(folder), str(tmp_path / "out")])
    assert done.exit_code in (0, 2), done.exception


def test_nothing_in_the_package_unpickles() -> None:
    unpickling = re.compile(r"torch\.(jit\.)?load\b|from torch import.*\bload\b|import.*pickle|pickle\.load|joblib")
    modules = [*Path(hf_dirembed.__file__).parent.rglob("*.py")]
    assert len(modules) > 50
    assert [module for module in modules if unpickling.search(module.read_text(encoding="utf-8"))] == []
