"""Tiny models for the benchmark, what they are measured on, and measuring without processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.peers import running
from hf_dirembed import BudgetError


PAIRS = """the cat sat on a mat,a cat on the mat,4.5
the house,a green tree,0.5
a dog ran to the house,the dog ran,4.0
green,blue,2.0
the cat,a b c d e,0.0
"""


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return tmp_path / "pairs.csv"


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**{**FAMILIES["bert"].arguments, "vocab_size": 400, "initializer_range": 0.3})
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def causal(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures without processes: starting one takes seconds."""

    def run(measurement: Any, job: str, work: Path, timeout: float) -> tuple[dict[str, Any], str | None]:
        try:
            return json.loads(json.dumps(measurement(job))), None
        except BudgetError as error:
            return {}, str(error)

    monkeypatch.setattr(running, "run_process", run)
