"""The reading of packed rows as an operator: compilers take it as it is, and do not look into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS, RowClass
from ...remote.kernels_dirembed import PackedRows
from ...remote.products_dirembed import read_rows


@torch.library.custom_op("hf_dirembed::read_rows", mutates_args=())
def _read_rows(
    ids: Tensor,
    weight: Tensor,
    codebook: Tensor,
    latents: Tensor,
    steps: Tensor,
    rows: Tensor,
    class_counts: Tensor | None,
    further: Tensor | None,
    classes: list[int],
    rank: int,
) -> Tensor:
    packed = _packed(weight, codebook, latents, steps, rows, class_counts, further, classes, rank)
    return read_rows(packed, ids)


@_read_rows.register_fake
def _(ids: Tensor, *packed: Any) -> Tensor:
    rank = packed[-1]
    return ids.new_empty(*ids.shape, rank, dtype=torch.float32)


def read_rows_unseen(rows: PackedRows, ids: Tensor) -> Tensor:
    """[`hf_dirembed.remote.products_dirembed.read_rows`] in float32, which compilers do not trace.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
        >>> rows = PackedRows(
        ...     weight=torch.tensor([[0x27]], dtype=torch.uint8), codebook=codebook,
        ...     latents=torch.tensor([0, 0], dtype=torch.int32), steps=torch.tensor([0, -8], dtype=torch.int8),
        ...     rows=torch.tensor([0x80], dtype=torch.uint8), classes=(RowClass((2, 0, 0, 0)),), rank=2,
        ... )  # fmt: skip
        >>> torch.compile(read_rows_unseen, fullgraph=True, backend="eager")(rows, torch.tensor([0]))
        tensor([[-151.2500,    0.0000]])
    """
    read: Tensor = _read_rows(ids, *_tensors(rows), _numbers(rows.classes), rows.rank)
    return read


def _tensors(rows: PackedRows) -> tuple[Tensor | None, ...]:
    return rows.weight, rows.codebook, rows.latents, rows.steps, rows.rows, rows.class_counts, rows.further


def _numbers(classes: tuple[RowClass, ...]) -> list[int]:
    """The classes as a list of whole numbers, which operators take; -1 stands for None."""
    return [number for each in classes for number in (-1 if each.rows is None else each.rows, *each.bit_allocation)]


def _packed(
    weight: Tensor,
    codebook: Tensor,
    latents: Tensor,
    steps: Tensor,
    rows: Tensor,
    class_counts: Tensor | None,
    further: Tensor | None,
    numbers: list[int],
    rank: int,
) -> PackedRows:
    """What [`_tensors`] and [`_numbers`] were made of."""
    width = 1 + len(BIT_WIDTHS)
    parts = [numbers[first : first + width] for first in range(0, len(numbers), width)]
    classes = tuple(RowClass(tuple(part[1:]), None if part[0] < 0 else part[0]) for part in parts)
    return PackedRows(weight, codebook, latents, steps, rows, classes, rank, class_counts, further)
