"""A compressed checkpoint with every kind of tensor, to be spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_dirembed import CompressionSpec
from hf_dirembed.layout_dirembed import Refinement
from hf_dirembed.matrix_dirembed import CompressedMatrix
from hf_dirembed.modeling_dirembed import convert


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed BERT with every kind of tensor, its body large enough to measure against: 9 MB."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 1 << 15}
    model = BertForMaskedLM(BertConfig(vocab_size=3000, **shape))
    spec = CompressionSpec(
        method="transform",
        rank=16,
        codes="packed",
        decoder="float16",
        bias=True,
        bit_allocation=(4, 4, 4, 4),
        refinement=Refinement(rows=100, rank=8, bit_allocation=(0, 4, 4, 0)),
        outliers=3,
    )
    convert(model, spec, CompressedMatrix(3000, 32, spec).code_tensors())
    folder = tmp_path_factory.mktemp("intact")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy of the intact checkpoint, to be spoiled."""
    return Path(shutil.copytree(intact, tmp_path / "above" / "model"))
