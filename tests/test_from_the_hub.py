"""Compressing a model of the Hub: what is needed of it comes once, and only the table's shard is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES

from benchmarks.stand_in_hub import StandInHub


COMPRESS = """
import sys
from pathlib import Path
from hf_dirembed.cli.commands import main
copied = []
sys.addaudithook(lambda event, args: event == "shutil.copyfile" and copied.append(Path(args[0]).name))
try:
    main(["compress", "me/dense", sys.argv[1], "--method", "svd", "--rank", "5", "--json"])
finally:
    print(*(name for name in copied if name.endswith(".safetensors")))
"""
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def dense(hub: StandInHub, tmp_path: Path) -> Path:
    """A sharded model, with a copy of its weights in other layouts beside it."""
    folder = tmp_path / "dense"
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(folder, max_shard_size="16KB")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    shards = b"".join(content for name, content in files.items() if name.endswith(".safetensors"))
    hub.add("me/dense", {**files, "consolidated.safetensors": shards, "pytorch_model.bin": shards})
    return folder


def test_every_shard_comes_once_and_nothing_else(hub: StandInHub, dense: Path, tmp_path: Path) -> None:
    said = hub.run(COMPRESS, tmp_path / "out", cache=tmp_path / "cache")
    sizes = {file.name: file.stat().st_size for file in dense.iterdir()}
    assert sorted(hub.downloads) == sorted(sizes.items())  # each once, and not the copies
    weight_map = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
    others = sorted({*weight_map.values()} - {weight_map[TABLE]})
    assert len(others) > 3
    assert sorted(said.splitlines()[-1].split()) == others  # read once, to be copied; the table's is read row by row
    for name in others:
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()
    hub.downloads.clear()
    hub.run(COMPRESS, tmp_path / "again", cache=tmp_path / "cache")
    assert not hub.downloads


def test_a_model_in_one_file(hub: StandInHub, tmp_path: Path) -> None:
    FAMILIES["bert"].make("AutoModel").save_pretrained(tmp_path / "dense")
    hub.add("me/dense", {file.name: file.read_bytes() for file in (tmp_path / "dense").iterdir()})
    hub.run(COMPRESS, tmp_path / "out", cache=tmp_path / "cache")
    assert sorted(name for name, _ in hub.downloads) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
