"""The same input, seed and number of threads give the same bytes; the file says how it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

from hf_dirembed import AutoencoderSettings, TransformSettings
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.compress import SETTINGS
from hf_dirembed.remote.configuration_dirembed import read_spec


ROOT = Path(__file__).parents[1]


def compress(source: Path, out: Path, *options: str, hash_seed: int) -> dict[str, bytes]:
    """Compresses in a process of its own; the files' contents."""
    code = "from hf_dirembed_command import main; main()"
    command = [sys.executable, "-c", code, "compress", str(source), str(out), *options]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("options", [("--bits", "5"), ("--method", "autoencoder", "--rank", "6")])
def test_the_same_seed_gives_the_same_bytes(
    options: tuple[str, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tmp_path / "dense"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(source)
    tokenizer.save_pretrained(source)
    options = (*options, "--languages", "en")
    one, two = (  # in folders of one name, which the card bears
        compress(source, tmp_path / str(number) / "out", *options, "--seed", "3", hash_seed=number)
        for number in (1, 2)
    )
    assert one == two
    (record,) = json.loads(one["config.json"])["dirembed"]["record"]["tables"].values()
    settings = record["settings"]
    assert settings["versions"].keys() == {"hf_dirembed", "torch", "transformers", "numpy", "wordfreq"}
    assert all(version(name) == made_with for name, made_with in settings["versions"].items())
    assert settings["threads"] == 1
    assert settings["languages"] == ["en"]
    method = "autoencoder" if "autoencoder" in options else "transform"
    assert settings[method]["seed"] == 3
    if method == "autoencoder":
        other = compress(source, tmp_path / "other", *options, "--seed", "4", hash_seed=1)
        assert other["model.safetensors"] != one["model.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5, "settings": TransformSettings(seed=3)},
        {
            "ratio": 4,
            "method": "autoencoder",
            "latent_dtype": "float16",
            "settings": AutoencoderSettings(epochs=3, seed=7),
        },
        {"rank": 4, "method": "direction"},
    ],
    ids=lambda options: options.get("method", "transform"),
)
def test_what_is_recorded_is_enough_to_make_it_again(
    options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source, first, second = tmp_path / "dense", tmp_path / "1" / "out", tmp_path / "2" / "out"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(source)
    tokenizer.save_pretrained(source)
    compress_checkpoint(source, first, languages=("en", "de"), **options)
    _, spec = read_spec(json.loads((first / "config.json").read_text()))
    ((path, layout),) = spec.tables.items()
    made_with, method = spec.record(path).settings, layout.method
    budget, _, size = made_with["budget"].partition("=")
    again: dict[str, Any] = {budget: int(size) if budget == "rank" else float(size), "method": method}
    again |= {"languages": made_with["languages"], "device": made_with["device"]}
    if method in SETTINGS:
        again["settings"] = SETTINGS[method](**made_with[method])
    if method != "transform":
        again["latent_dtype"] = layout.codes
    compress_checkpoint(source, second, **again)
    names = sorted(file.name for file in first.iterdir() if file.is_file())
    assert names == sorted(file.name for file in second.iterdir() if file.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("options", [{"bits": 5}, {"method": "autoencoder", "rank": 6}, {"method": "svd", "rank": 6}])
def test_where_a_table_lies_in_memory_changes_nothing(options: dict[str, Any]) -> None:
    rows = torch.randn(160, 32, generator=torch.Generator().manual_seed(0))
    shifted = torch.empty(160 * 32 + 1)[1:].view(160, 32).copy_(rows)  # as in a mapped file
    assert rows.data_ptr() % 64 == 0 != shifted.data_ptr() % 64
    one, two = (compress_table(each, **options) for each in (rows, shifted))
    assert one.layout == two.layout
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
