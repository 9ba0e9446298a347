"""The rows of a compressed table that one of several processes holds: its shard, which is a compressed table too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...remote.codes_dirembed import BlocksLayout, Layout, TableLayout
from ...remote.kernels_dirembed import count_classes, row_classes


def rows_between(
    layout: Layout, tensors: Mapping[str, Tensor], first: int, last: int
) -> tuple[Layout, dict[str, Tensor]]:
    """A table's rows from `first` to before `last`, as a table of their own.

    Args:
        layout: The layout of the whole table.
        tensors: The tensors of the whole table, by name, checked.
        first: The first row.
        last: The row behind the last one.

    Returns:
        The layout of these rows, and their tensors.

    Example:
        >>> layout = TableLayout(method="svd", rank=2, codes="float32", decoder="float32")
        >>> tensors = {"weight": torch.arange(10.0).view(5, 2), "decoder_weight": torch.eye(2, 3)}
        >>> rows_between(layout, tensors, 1, 3)[1]["weight"].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """
    if isinstance(layout, TableLayout):
        return _rows_of_matrix(layout, tensors, first, last)

    blocks, cut = [], {"weight": tensors["weight"]}
    for prefix, _, block in layout.named_blocks():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        block, own = _rows_of_matrix(block, own, first, last)
        blocks.append(block)
        cut |= {prefix + name: tensor for name, tensor in own.items()}
    return BlocksLayout(layout.dims, tuple(blocks)), cut


def _rows_of_matrix(
    layout: TableLayout, tensors: Mapping[str, Tensor], first: int, last: int
) -> tuple[TableLayout, dict[str, Tensor]]:
    cut, changes = dict(tensors), dict[str, Any]()
    cut["weight"] = tensors["weight"][first:last]
    if layout.packed:
        cut["row_weight"] = tensors["row_weight"][first:last]

    # the further bytes of a class stand in the order of its rows
    if len(layout.classes) > 1:
        before = _rows_of_classes(tensors["row_weight"][:first], layout)
        own = _rows_of_classes(cut["row_weight"], layout)
        parts, begin = [], 0
        for each, skipped, rows in zip(layout.classes[1:], before, own, strict=True):
            width = each.num_bytes - layout.code_width
            parts.append(tensors["further_weight"][begin:][skipped * width : (skipped + rows) * width])
            begin += (each.rows or 0) * width
        cut["further_weight"] = torch.cat(parts)
        cut["class_counts_weight"] = count_classes(cut["row_weight"], len(layout.classes))
        further = (replace(each, rows=rows) for each, rows in zip(layout.classes[1:], own, strict=True))
        changes["classes"] = (layout.classes[0], *further)

    # what names rows names them from the shard's first on
    if layout.outliers is not None:
        numbers = tensors["outlier_rows_weight"]
        kept = (numbers >= first) & (numbers < last)
        changes["outliers"] = int(kept.sum()) or None
        for name in ("outlier_rows_weight", "outlier_weight"):
            cut[name] = tensors[name][kept]
        cut["outlier_rows_weight"] = cut["outlier_rows_weight"] - first
        if changes["outliers"] is None:
            del cut["outlier_rows_weight"], cut["outlier_weight"]
    if layout.zero_row is not None:
        changes["zero_row"] = layout.zero_row - first if first <= layout.zero_row < last else None

    return replace(layout, **changes), cut


def _rows_of_classes(rows: Tensor, layout: TableLayout) -> list[int]:
    """How many rows are of each class but the first."""
    counts: list[int] = torch.bincount(row_classes(rows).flatten(), minlength=len(layout.classes)).tolist()
    return counts[1:]


def parts_of(num_rows: int, num_parts: int, multiple: int = 64) -> list[tuple[int, int]]:
    """The rows of each part when a table is cut as vLLM does it: padded to a multiple, then in equal parts.

    Example:
        >>> parts_of(500, 2), parts_of(130, 4)
        ([(0, 256), (256, 500)], [(0, 48), (48, 96), (96, 130), (130, 130)])
    """
    padded = -(-num_rows // multiple) * multiple
    ends = [min(num_rows, padded // num_parts * part) for part in range(num_parts + 1)]
    return list(pairwise(ends))
