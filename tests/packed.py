"""Codes drawn at random, packed modules made of them, and what such modules' float64 sums come to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dirembed.conversion import convert
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS, CODEBOOK_SHAPE, CompressionSpec, Refinement, TableLayout
from hf_dirembed.remote.kernels_dirembed import PackedCodes, pack
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix
from hf_dirembed.remote.modules_dirembed import CompressedEmbedding, CompressedLinear
from hf_dirembed.remote.tables_dirembed import input_table, source_of, tied_modules


# Of Σ |inner| |code|: the products are exact, their sum is rounded.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)

NUM_ROWS, DIM, NUM_REFINED, NUM_OUTLIERS = 160, 32, 37, 5
PACKED_LAYOUT = TableLayout(
    method="transform",
    rank=30,
    codes="packed",
    decoder="float8_e4m3fn",
    bias=True,
    bit_allocation=(1, 3, 10, 11),
    refinement=Refinement(rows=NUM_REFINED, bit_allocation=(0, 0, 3, 10)),
    outliers=NUM_OUTLIERS,
)


def draw_codebook(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, CODEBOOK_SHAPE, generator=generator).to(torch.int8)


def draw_codes(num_rows: int, allocation: tuple[int, ...], seed: int = 0) -> tuple[PackedCodes, Tensor]:
    """Packed random symbols, and the int8 latents that they stand for, found symbol by symbol."""
    generator = torch.Generator().manual_seed(seed)
    codebook = draw_codebook(seed)
    columns = [
        torch.randint(0, 1 << width, (num_rows, count), generator=generator)
        for count, width in zip(allocation, BIT_WIDTHS, strict=True)
    ]
    latents = [columns[0] - 128]
    for levels, width, symbols in zip(codebook, BIT_WIDTHS[1:], columns[1:], strict=True):
        states = torch.zeros_like(symbols)
        for position in range(symbols.shape[1]):
            for behind in range(8 // width):
                if position + behind < symbols.shape[1]:
                    states[:, position] += symbols[:, position + behind] << (behind * width)
        latents.append(levels[states])
    packed = pack(torch.cat(columns, dim=1).to(torch.uint8), allocation)
    return PackedCodes(packed, allocation, codebook), torch.cat(latents, dim=1).to(torch.int8)


def draw_refined_latents(seed: int = 0) -> Tensor:
    """Those that the first stage of `PACKED_LAYOUT` has not, and some that it has, in any order."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(PACKED_LAYOUT.base_rank, PACKED_LAYOUT.rank)
    others = torch.randperm(PACKED_LAYOUT.base_rank, generator=generator)[: PACKED_LAYOUT.refinement.rank - len(own)]
    mixed = torch.randperm(PACKED_LAYOUT.refinement.rank, generator=generator)
    return torch.cat([own, others])[mixed].int()


def draw_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Codes and a decoder of `PACKED_LAYOUT`, of a table whose rows have a mean."""
    torch.manual_seed(seed)
    return {
        "weight": draw_codes(NUM_ROWS, PACKED_LAYOUT.bit_allocation, seed)[0].packed,
        "codebook_weight": draw_codebook(seed),
        "decoder_weight": torch.randn(PACKED_LAYOUT.rank, DIM).half(),
        "exponent_weight": torch.randint(-9, -4, (PACKED_LAYOUT.rank,)).to(torch.int8),
        "decoder_bias_weight": torch.randn(DIM),
        "refinement_weight": draw_codes(NUM_REFINED, PACKED_LAYOUT.refinement.bit_allocation, seed)[0].packed,
        "refined_rows_weight": torch.randperm(NUM_ROWS)[:NUM_REFINED].sort().values.int(),
        "refined_latents_weight": draw_refined_latents(seed),
        "refinement_exponent_weight": torch.randint(-9, 3, (PACKED_LAYOUT.refinement.rank,)).to(torch.int8),
        "outlier_weight": torch.randn(NUM_OUTLIERS, DIM),
        "outlier_rows_weight": torch.randperm(NUM_ROWS)[:NUM_OUTLIERS].sort().values.int(),
    }


def convert_input(model: PreTrainedModel, layout: TableLayout, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Puts codes in the place of a model's input table and of what is tied to it; other tables stay dense."""
    path = source_of(model, tied_modules(model, input_table(model)))
    return convert(model, CompressionSpec({path: layout}), {path: tensors})


def fill(module: CompressedMatrix) -> CompressedMatrix:
    module.load_state_dict(draw_tensors(), strict=False)
    return module


def make_head(dtype: torch.dtype = torch.float32) -> CompressedLinear:
    bias = nn.Parameter(torch.randn(NUM_ROWS).to(dtype))
    return fill(CompressedLinear(DIM, NUM_ROWS, PACKED_LAYOUT, bias=bias, dtype=dtype))


def make_embedding(dtype: torch.dtype = torch.float32) -> CompressedEmbedding:
    return fill(CompressedEmbedding(NUM_ROWS, DIM, PACKED_LAYOUT, dtype=dtype))


def brute_force_rows(module: CompressedMatrix) -> tuple[Tensor, Tensor]:
    """The dense rows of a module with the tensors of seed 0 in float64, and how large their terms are."""
    decoder, bias = module.decoder_weight.double(), module.decoder_bias_weight.double()
    latents = torch.zeros(NUM_ROWS, PACKED_LAYOUT.rank, dtype=torch.float64)
    latents[:, : PACKED_LAYOUT.base_rank] = draw_codes(NUM_ROWS, PACKED_LAYOUT.bit_allocation)[1].double() + 0.5
    further = draw_codes(NUM_REFINED, PACKED_LAYOUT.refinement.bit_allocation)[1].double() + 0.5
    for slot, row in enumerate(module.refined_rows_weight.tolist()):
        for code, latent in enumerate(module.refined_latents_weight.tolist()):
            exponent = int(module.refinement_exponent_weight[code])
            latents[row, latent] += further[slot, code] * 2.0 ** (exponent / 8)
    latents = latents * 2.0 ** module.exponent_weight.double()
    rows, terms = latents @ decoder + bias, latents.abs() @ decoder.abs() + bias.abs()
    outliers = module.outlier_rows_weight.long()
    rows[outliers] = module.outlier_weight.double()
    terms[outliers] = module.outlier_weight.double().abs()
    return rows, terms
