"""A tiny dense model in a folder, to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_dirembed.checkpoints.convert import compress_checkpoint


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A fresh BERT, with its tokenizer."""
    folder = tmp_path_factory.mktemp("evaluation") / "dense"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=160, max_position_embeddings=32, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compressed(dense: Path) -> Path:
    """The same, with a table in packed codes."""
    folder = dense.with_name("compressed")
    compress_checkpoint(dense, folder, method="transform", bits=4)
    return folder
