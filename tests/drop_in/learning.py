"""Models whose packed codes are asked to learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from families import FAMILIES
from packed import DIM, PACKED_LAYOUT, convert_input, draw_tensors
from tiny import Sentences
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dirembed.compression.transform.trellis import Codebooks


AUTO = "AutoModelForCausalLM"
ZERO_ROW = 3
LAYOUT = replace(PACKED_LAYOUT, zero_row=ZERO_ROW)


def codec_tensors() -> dict[str, Tensor]:
    """Of `LAYOUT`, with levels that a quantiser has, and rows of about unit length."""
    sample = torch.randn(4000, 10, generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_weight": torch.randn(LAYOUT.rank, DIM).half() / 8}
    return draw_tensors() | decoder | {"codebook_weight": Codebooks.train(sample).stored()}


def rich_model(name: str = "llama-tied") -> PreTrainedModel:
    """With several classes of rows, outliers and a zero row, in its table and, where it is tied, in its head."""
    return convert_input(FAMILIES[name].make(AUTO), LAYOUT, codec_tensors())


def optimiser(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)


def learn(model: nn.Module, steps: int, lr: float = 1e-2) -> float:
    """Trains on one batch, and returns the loss in evaluation."""
    adam, ids = optimiser(model.train(), lr), Sentences().ids[:8]
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=Sentences().ids[8:12]).logits


def table(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.get_input_embeddings().code_tensors().items()}
