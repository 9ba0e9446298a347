"""Codes drawn at random, packed modules made of them, and what such modules' float64 sums come to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_dirembed.configuration_dirembed import BIT_WIDTHS, CompressionSpec, Refinement
from hf_dirembed.embedding_dirembed import CompressedEmbedding, CompressedMatrix
from hf_dirembed.head_dirembed import CompressedLMHead
from hf_dirembed.packing_dirembed import pack, unpack


# Of Σ |inner| |code|: the products are exact, their sum is rounded.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)

NUM_ROWS, DIM, NUM_REFINED = 160, 32, 37
SPEC = CompressionSpec(
    method="transform",
    rank=25,
    codes="packed",
    decoder="float16",
    bias=True,
    bit_allocation=(1, 3, 10, 11),
    refinement=Refinement(rows=NUM_REFINED, rank=13, bit_allocation=(0, 0, 3, 10)),
)


def draw_codes(num_rows: int, allocation: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(-(1 << (width - 1)), 1 << (width - 1), (num_rows, count), generator=generator)
        for count, width in zip(allocation, BIT_WIDTHS, strict=True)
    ]
    return torch.cat(columns, dim=1).to(torch.int8)


def draw_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Codes and a decoder of `SPEC`, of a table whose rows have a mean."""
    torch.manual_seed(seed)
    return {
        "weight": pack(draw_codes(NUM_ROWS, SPEC.bit_allocation, seed), SPEC.bit_allocation),
        "decoder_weight": torch.randn(SPEC.decoder_rows, DIM).half(),
        "decoder_bias_weight": torch.randn(DIM),
        "refinement_weight": pack(
            draw_codes(NUM_REFINED, SPEC.refinement.bit_allocation, seed + 1), SPEC.refinement.bit_allocation
        ),
        "refined_rows_weight": torch.randperm(NUM_ROWS)[:NUM_REFINED].sort().values.int(),
    }


def fill(module: CompressedMatrix) -> CompressedMatrix:
    module.load_state_dict(draw_tensors(), strict=False)
    return module


def make_head(dtype: torch.dtype = torch.float32) -> CompressedLMHead:
    bias = nn.Parameter(torch.randn(NUM_ROWS).to(dtype))
    return fill(CompressedLMHead(DIM, NUM_ROWS, SPEC, bias=bias, dtype=dtype))


def make_embedding(dtype: torch.dtype = torch.float32) -> CompressedEmbedding:
    return fill(CompressedEmbedding(NUM_ROWS, DIM, SPEC, dtype=dtype))


def brute_force_rows(module: CompressedMatrix) -> tuple[Tensor, Tensor]:
    """The dense rows of a module in float64, one latent vector after the other, and how large their terms are."""
    decoder, bias = module.decoder_weight.double(), module.decoder_bias_weight.double()
    latents = torch.zeros(NUM_ROWS, SPEC.decoder_rows, dtype=torch.float64)
    latents[:, : SPEC.rank] = unpack(module.weight, SPEC.bit_allocation).double() + 0.5
    further = unpack(module.refinement_weight, SPEC.refinement.bit_allocation).double() + 0.5
    for slot, row in enumerate(module.refined_rows_weight.tolist()):
        latents[row, SPEC.rank :] = further[slot]
    return latents @ decoder + bias, latents.abs() @ decoder.abs() + bias.abs()
