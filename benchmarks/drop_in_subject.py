"""What the rows of drop_in.py are about: a compressed model beside the expanded one, and how answers are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from hf_dirembed import CompressedEmbedding, ModelError


SENTENCES = ["The cat sat on the mat.", "Snow fell on the old harbour all night long.", "Why do birds sing?"]
PROMPT = "The three most important things to know about the sea are"
NEW_TOKENS = 20
CLOSE = 1e-4  # of the largest value: float32 sums in another order

# How a process starts that shall not have the plugin.
BLOCK_PLUGIN = """
import sys

class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "hf_dirembed":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
"""


class Skip(Exception):  # noqa: N818 (no error)
    """Why a row does not apply here."""


@dataclass(frozen=True)
class Subject:
    """A compressed model in `work`/compressed, and the same expanded in `work`/stock."""

    work: Path

    @cached_property
    def compressed(self) -> Path:
        """Its folder."""
        return self.work / "compressed"

    @cached_property
    def kind(self) -> str:
        """`causal` or `encoder`."""
        config = AutoConfig.from_pretrained(self.compressed)
        if config.is_encoder_decoder:
            raise ModelError(f"{config.model_type} is an encoder-decoder model: give a causal one or an encoder")
        stock = AutoConfig.from_pretrained(self.work / "stock")
        causal = getattr(AutoModelForCausalLM._model_mapping.get(type(stock), None), "__name__", None)
        return "causal" if causal in (config.architectures or []) or causal == self.stock_name else "encoder"

    @cached_property
    def stock_name(self) -> str:
        """Of the class that the expanded model was saved in."""
        return AutoConfig.from_pretrained(self.work / "stock").architectures[0]

    @property
    def auto(self) -> Any:
        """The AutoModel class to load it with."""
        return AutoModelForCausalLM if self.kind == "causal" else AutoModel

    def load(self, folder: Path | None = None, auto: Any = None, **options: Any) -> PreTrainedModel:
        """The model in a folder, by default the compressed one, ready to answer."""
        return (auto or self.auto).from_pretrained(folder or self.compressed, **options).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """Compressed; for rows that leave it as it is."""
        return self.load()

    @cached_property
    def stock(self) -> PreTrainedModel:
        """Expanded; for comparison."""
        return self.load(self.work / "stock")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own, with a token to pad with."""
        tokenizer = AutoTokenizer.from_pretrained(self.compressed)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Three sentences, padded."""
        return dict(self.tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    @torch.no_grad()
    def answer(self, model: nn.Module) -> Tensor:
        """Logits, or the last hidden state, where tokens are."""
        return model(**self.inputs)[0][self.inputs["attention_mask"].bool()]

    @cached_property
    def expected(self) -> Tensor:
        """What the compressed model answers."""
        return self.answer(self.model)

    def trainee(self, folder: Path | None = None) -> PreTrainedModel:
        """A causal model as it is; an encoder with a fresh head of two classes, the same each time."""
        torch.manual_seed(0)
        return self.load(folder, AutoModelForCausalLM if self.kind == "causal" else AutoModelForSequenceClassification)

    def examples(self) -> list[dict[str, Tensor]]:
        """The sentences with labels to train on."""
        labels = self.inputs["input_ids"] if self.kind == "causal" else torch.tensor([0, 1, 0])
        return [{**{key: value[i] for key, value in self.inputs.items()}, "labels": labels[i]} for i in range(3)]


@dataclass(frozen=True)
class Row:
    """One thing to do, and the function that does it and says what came of it."""

    name: str
    what: str
    check: Callable[[Subject], str]
    kind: str | None


ROWS: list[Row] = []


def row(name: str, what: str, kind: str | None = None) -> Callable[[Callable[[Subject], str]], Any]:
    """Puts a check among the rows; for models of one kind, or of both."""

    def add(check: Callable[[Subject], str]) -> Callable[[Subject], str]:
        ROWS.append(Row(name, what, check, kind))
        return check

    return add


def exact(found: Tensor, expected: Tensor) -> str:
    assert torch.equal(found, expected), f"not exact, max difference {(found - expected).abs().max():.1e}"
    return "exact"


def close(found: Tensor, expected: Tensor, within: float = CLOSE) -> str:
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= within * largest, f"max difference {difference:.1e} of values up to {largest:.1f}"
    return f"max difference {difference:.0e} of {largest:.1f}"


def without_package(difference: float, largest: float, subject: Subject) -> str:
    """What the code in the repo answers: rows to the bit, heads in sums of another order than the compiled kernels."""
    if subject.auto.__name__ == "AutoModel":
        assert difference == 0, f"not exact, max difference {difference:.1e}"
        return "exact"
    assert difference <= CLOSE * largest, f"max difference {difference:.1e} of values up to {largest:.1f}"
    return f"max difference {difference:.0e} of {largest:.1f}"


def same_codes(model: nn.Module, subject: Subject) -> None:
    tables = [next(m for m in each.modules() if isinstance(m, CompressedEmbedding)) for each in (model, subject.model)]
    for key, tensor in tables[0].code_tensors().items():
        if not key.startswith("decoder"):  # which learns
            exact(tensor, tables[1].code_tensors()[key])
