"""Tables and models that are made up, so that nothing has to be downloaded or fitted: codes are random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_dirembed.conversion import convert
from hf_dirembed.remote.codes_dirembed import CompressionSpec, TableLayout
from hf_dirembed.remote.kernels_dirembed import PackedRows
from hf_dirembed.remote.modules_dirembed import CompressedEmbedding, CompressedLinear

from ..turns import random_rows


ALLOCATIONS = [(20, 80, 200, 340), (200, 300, 100, 40)]  # of 640 codes: a large class, and one of frequent rows


def packed_tensors(
    rows: PackedRows, dim: int, *, outliers: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[TableLayout, dict[str, Tensor]]:
    """The layout and the tensors of a table with these rows and a random decoder.

    Args:
        rows: Random codes, on the CPU.
        dim: d, the columns of the table.
        outliers: How many rows are kept as they are; with any, the last row is one of zeros.
        dtype: Of decoder and outliers.
    """
    num_rows = len(rows.weight)
    layout = TableLayout(
        method="transform", rank=rows.rank, codes="packed", codebook="own", decoder=str(dtype).removeprefix("torch."),
        bias=True, classes=rows.classes, outliers=outliers or None, zero_row=num_rows - 1 if outliers else None,
    )  # fmt: skip
    tensors = {
        "weight": rows.weight, "codebook_weight": rows.codebook, "latents_weight": rows.latents,
        "steps_weight": rows.steps, "row_weight": rows.rows,
        "decoder_weight": (torch.randn(rows.rank, dim) / rows.rank**0.5).to(dtype),
        "exponent_weight": torch.randint(-9, -6, (rows.rank,)).to(torch.int8),
        "decoder_bias_weight": torch.randn(dim).to(dtype),
    }  # fmt: skip
    if rows.class_counts is not None and rows.further is not None:
        tensors |= {"class_counts_weight": rows.class_counts, "further_weight": rows.further}
    if outliers:
        tensors["outlier_weight"] = torch.randn(outliers, dim).to(dtype)
        tensors["outlier_rows_weight"] = torch.randperm(num_rows)[:outliers].sort().values.int()
    return layout, tensors


def modules(
    rows: PackedRows, dim: int, outliers: int, dtype: torch.dtype
) -> tuple[CompressedEmbedding, CompressedLinear]:
    """An embedding and a head with a bias over the same codes, on the CPU."""
    layout, tensors = packed_tensors(rows, dim, outliers=outliers, dtype=dtype)
    num_rows = len(rows.weight)
    embedding = CompressedEmbedding(num_rows, dim, layout, dtype=dtype)
    bias = nn.Parameter(torch.randn(num_rows).to(dtype), requires_grad=False)
    head = CompressedLinear(dim, num_rows, layout, bias=bias, dtype=dtype)
    for module in (embedding, head):
        module.load_state_dict(tensors, strict=False)
        module.requires_grad_(False)
    return embedding, head


def table_rows(num_rows: int, dim: int) -> PackedRows:
    """Random codes of two classes, as many bits a weight as the large tables of the CPU's benchmarks have."""
    torch.manual_seed(0)
    scale = dim / 640
    allocations = [tuple(max(1, round(scale * count)) for count in each) for each in ALLOCATIONS]
    return random_rows(num_rows, dim, allocations, torch.device("cpu"))


def llama(num_rows: int, dim: int, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A dense language model with a tied head, of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=num_rows, hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=layers,
        num_attention_heads=max(1, dim // 64), tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def compressed_llama(num_rows: int, dim: int, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """The same with random codes in the place of its table."""
    model = llama(num_rows, dim, layers, dtype)
    layout, tensors = packed_tensors(table_rows(num_rows, dim), dim, dtype=dtype)
    path = "model.embed_tokens"
    return convert(model, CompressionSpec({path: layout}), {path: tensors}).eval().requires_grad_(False)


def edge_tables() -> dict[str, tuple[int, int, list[tuple[int, ...]]]]:
    """Rows, latents and allocations of every shape that a layout can have, by what is special about each."""
    return {
        "one row, one latent": (1, 1, [(0, 0, 0, 7)]),
        "codes of 4 bits alone": (65, 70, [(70, 0, 0, 0)]),
        "codes of 3 bits alone": (64, 70, [(0, 70, 0, 0)]),
        "codes of 2 bits alone": (63, 70, [(0, 0, 70, 0)]),
        "codes of 1 bit alone": (130, 70, [(0, 0, 0, 70)]),
        "two codes a latent": (130, 40, [(20, 20, 20, 20)]),
        "latents without a code": (130, 200, [(3, 40, 60, 9)]),
        "more latents than a block": (70, 300, [(100, 100, 60, 40)]),
        "two classes": (200, 90, [(3, 3, 9, 1), (50, 20, 30, 40)]),
        "classes of as many bytes": (200, 40, [(10, 0, 0, 0), (0, 0, 20, 0)]),
        "four classes": (1_000, 90, [(3, 3, 9, 1), (50, 20, 30, 40), (20, 30, 4, 70), (90, 0, 0, 0)]),
        "rows that fill no block": (4_099, 64, [(0, 0, 40, 24), (20, 20, 20, 4)]),
    }
