"""Compressed models of tiny families, what they answer, and data to train them on."""

from __future__ import annotations

import torch
from families import FAMILIES, VOCAB
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed


BUDGETS = {"transform": {"bits": 7}, "direction": {"rank": 6, "latent_dtype": "float16"}}


def make(name: str, auto: str, method: str = "transform") -> PreTrainedModel:
    """A compressed model of a family."""
    return hf_dirembed.compress(FAMILIES[name].make(auto), method=method, **BUDGETS[method])


@torch.no_grad()
def outputs(model: PreTrainedModel, name: str) -> list[Tensor]:
    """What a model of a family answers to the family's inputs."""
    return [value for value in model(**FAMILIES[name].inputs()).values() if isinstance(value, Tensor)]


class Sentences(torch.utils.data.Dataset):
    """Random token ids, each example its own labels."""

    def __init__(self, size: int = 48) -> None:
        self.ids = torch.randint(8, VOCAB, (size, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}
