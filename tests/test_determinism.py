"""The same input, seed and number of threads give the same bytes; the file says how it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import PreTrainedTokenizerFast

from hf_dirembed.compression import compress_table


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
    settings = json.loads(one["config.json"])["dirembed"]["settings"]
    assert settings["versions"].keys() == {"hf_dirembed", "torch", "transformers", "wordfreq"}
    assert settings["threads"] == 1
    assert settings["languages"] == ["en"]
    method = "autoencoder" if "autoencoder" in options else "transform"
    assert settings[method]["seed"] == 3
    if method == "autoencoder":
        other = compress(source, tmp_path / "other", *options, "--seed", "4", hash_seed=1)
        assert other["model.safetensors"] != one["model.safetensors"]


@pytest.mark.parametrize("options", [{"bits": 5}, {"method": "autoencoder", "rank": 6}, {"method": "svd", "rank": 6}])
def test_where_a_table_lies_in_memory_changes_nothing(options: dict[str, Any]) -> None:
    rows = torch.randn(160, 32, generator=torch.Generator().manual_seed(0))
    shifted = torch.empty(160 * 32 + 1)[1:].view(160, 32).copy_(rows)  # as in a mapped file
    assert rows.data_ptr() % 64 == 0 != shifted.data_ptr() % 64
    one, two = (compress_table(each, **options) for each in (rows, shifted))
    assert one.spec == two.spec
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
