"""Codes drawn at random, packed modules made of them, and what such modules' float64 sums come to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dirembed.conversion import convert
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS, CODEBOOK_SHAPE, CompressionSpec, RowClass, TableLayout
from hf_dirembed.remote.guarded_dirembed import plain
from hf_dirembed.remote.kernels_dirembed import PackedRows, count_classes, pack, pack_rows, row_scales
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix
from hf_dirembed.remote.modules_dirembed import CompressedEmbedding, CompressedLinear
from hf_dirembed.remote.tables_dirembed import input_table, source_of, tied_modules


# Of the sum of the terms' sizes: latents and products are rounded, and so is their sum; in 16 bits only this.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.8e-3}
DTYPES = tuple(TOLERANCE)

NUM_ROWS, DIM, NUM_OUTLIERS = 160, 32, 5
CLASSES = (RowClass((3, 5, 12, 9)), RowClass((6, 10, 12, 5), rows=37), RowClass((14, 10, 9, 1), rows=11))
PACKED_LAYOUT = TableLayout(
    method="transform",
    rank=30,
    codes="packed",
    codebook="own",
    decoder="float8_e4m3fn",
    bias=True,
    classes=CLASSES,
    outliers=NUM_OUTLIERS,
)


def draw_codebook(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, CODEBOOK_SHAPE, generator=generator).to(torch.int8)


def draw_codes(num_rows: int, allocation: tuple[int, ...], codebook: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed random symbols, and the float64 levels that they stand for, found symbol by symbol."""
    generator = torch.Generator().manual_seed(seed)
    columns, levels = [], []
    for book, width, count in zip(codebook.double() + 0.5, BIT_WIDTHS, allocation, strict=True):
        symbols = torch.randint(0, 1 << width, (num_rows, count), generator=generator)
        states = torch.zeros_like(symbols)
        for code in range(count):
            for behind in range(min(-(-8 // width), count - code)):
                states[:, code] += symbols[:, code + behind] << (behind * width)
        columns.append(symbols)
        levels.append(book[states % 256])
    return pack(torch.cat(columns, dim=1).to(torch.uint8), allocation), torch.cat(levels, dim=1)


def draw_rows(num_rows: int, classes: tuple[RowClass, ...], rank: int, seed: int = 0) -> tuple[PackedRows, Tensor]:
    """Packed rows, of whose codes several add to the same latent, and the latents that they stand for in float64."""
    generator = torch.Generator().manual_seed(seed)
    codebook, width = draw_codebook(seed), classes[0].num_bytes
    numbers = torch.arange(1, len(classes)).repeat_interleave(torch.tensor([each.rows for each in classes[1:]]).long())
    class_of = torch.zeros(num_rows, dtype=torch.int64)
    class_of[torch.randperm(num_rows, generator=generator)[: len(numbers)]] = numbers

    weight = torch.empty(num_rows, width, dtype=torch.uint8)
    latents = torch.zeros(num_rows, rank, dtype=torch.float64)
    further, places, steps = [], [], []
    for number, each in enumerate(classes):
        rows = (class_of == number).nonzero().squeeze(1)
        packed, levels = draw_codes(len(rows), each.bit_allocation, codebook, seed + number)
        places.append(torch.randperm(max(rank, each.num_codes), generator=generator)[: each.num_codes] % rank)
        steps.append(torch.randint(-9, 4, (each.num_codes,), generator=generator))
        for code, (latent, step) in enumerate(zip(places[-1].tolist(), steps[-1].tolist(), strict=True)):
            latents[rows, latent] += levels[:, code] * 2.0 ** (step / 8)
        weight[rows] = packed[:, :width]
        further.append(packed[:, width:].flatten())

    several = len(classes) > 1
    row_bytes = pack_rows(class_of, 2.0 ** (torch.randint(-9, 6, (num_rows,), generator=generator) / 4))
    latents *= row_scales(row_bytes).double().unsqueeze(1)
    rows = PackedRows(
        weight=weight,
        codebook=codebook,
        latents=torch.cat(places).int(),
        steps=torch.cat(steps).to(torch.int8),
        rows=row_bytes,
        classes=classes,
        rank=rank,
        class_counts=count_classes(row_bytes, len(classes)) if several else None,
        further=torch.cat(further) if several else None,
    )
    return rows, latents


def draw_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Codes and a decoder of `PACKED_LAYOUT`, of a table whose rows have a mean."""
    torch.manual_seed(seed)
    rows, _ = draw_rows(NUM_ROWS, CLASSES, PACKED_LAYOUT.rank, seed)
    return {
        "weight": rows.weight,
        "codebook_weight": rows.codebook,
        "latents_weight": rows.latents,
        "steps_weight": rows.steps,
        "row_weight": rows.rows,
        "class_counts_weight": rows.class_counts,
        "further_weight": rows.further,
        "decoder_weight": torch.randn(PACKED_LAYOUT.rank, DIM).half(),
        "exponent_weight": torch.randint(-9, -4, (PACKED_LAYOUT.rank,)).to(torch.int8),
        "decoder_bias_weight": torch.randn(DIM),
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
    _, latents = draw_rows(NUM_ROWS, CLASSES, PACKED_LAYOUT.rank)
    latents = latents * 2.0 ** plain(module.exponent_weight).double()
    rows, terms = latents @ decoder + bias, latents.abs() @ decoder.abs() + bias.abs()
    outliers, kept = plain(module.outlier_rows_weight).long(), plain(module.outlier_weight).double()
    rows[outliers], terms[outliers] = kept, kept.abs()
    return rows, terms
