"""More or fewer rows of a compressed matrix.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .guarded_dirembed import plain
from .kernels_dirembed import count_classes
from .matrix_dirembed import DENSE_CHUNK, CompressedMatrix


@torch.no_grad()
def resize_rows(matrix: CompressedMatrix, num_rows: int) -> None:
    """Drops rows from the end, or adds rows: the mean latents or, packed, the codes of the row nearest to it.

    Args:
        matrix: Changed in place.
        num_rows: How many it shall have.
    """
    matrix.write_codes()
    matrix.verify_codes()
    _resize_outliers(matrix, num_rows)
    if matrix.layout.packed:
        _resize_packed(matrix, num_rows)
    else:
        latents = plain(matrix.weight)
        mean = latents.float().mean(dim=0, keepdim=True).to(latents.dtype)
        _put(matrix, "weight", _resized(latents, num_rows, mean))
    if matrix.layout.zero_row is not None and matrix.layout.zero_row >= num_rows:
        matrix.layout = replace(matrix.layout, zero_row=None)
    if matrix.shadow is not None:
        matrix.shadow.follow(matrix)
    matrix.follow_shadow()
    matrix.seal_codes()


def _resize_outliers(matrix: CompressedMatrix, num_rows: int) -> None:
    if matrix.outlier_rows_weight is None or matrix.outlier_weight is None:
        return
    held = plain(matrix.outlier_rows_weight)
    inside = held < num_rows
    rows, kept = held[inside], plain(matrix.outlier_weight)[inside]
    if not len(rows):  # none at all would be another layout: the first row becomes one
        rows = held.new_zeros(1)
        kept = matrix.decode(rows)
    _put(matrix, "outlier_rows_weight", rows)
    _put(matrix, "outlier_weight", kept)


def _resize_packed(matrix: CompressedMatrix, num_rows: int) -> None:
    """Added rows have the codes of the row nearest to the mean, and are of its class."""
    assert matrix.row_weight is not None
    classes = matrix.row_classes()
    like = _row_like_the_mean(matrix, classes) if num_rows > len(classes) else 0
    for name in ("weight", "row_weight"):
        rows = plain(getattr(matrix, name))
        _put(matrix, name, _resized(rows, num_rows, rows[like : like + 1]))
    if matrix.class_counts_weight is None:
        return

    # the bytes of each class's rows beyond the code matrix's, and how many rows it has now
    pieces, of_class, resized = [], list(matrix.layout.classes), matrix.row_classes()
    for number in range(1, len(of_class)):
        held, size = matrix.further_bytes(number), int((resized == number).sum())
        slot = int((classes[:like] == number).sum())  # only rows of the one class are added
        pieces.append(_resized(held, size, held[slot : slot + 1]).flatten())
        of_class[number] = replace(of_class[number], rows=size)

    _put(matrix, "further_weight", torch.cat(pieces))
    _put(matrix, "class_counts_weight", count_classes(plain(matrix.row_weight), len(of_class)))
    matrix.layout = replace(matrix.layout, classes=tuple(of_class))


def _resized(rows: Tensor, num_rows: int, new: Tensor) -> Tensor:
    """The first of some rows, and as often as it takes a new one, of which there is a batch of one."""
    kept = rows[:num_rows]
    return torch.cat([kept, new.expand(num_rows - len(kept), *new.shape[1:])])


def _row_like_the_mean(matrix: CompressedMatrix, classes: Tensor) -> int:
    """The row that is nearest to the mean row, of the first class if there is any such."""
    chunks = torch.arange(matrix.num_rows, device=matrix.weight.device).split(DENSE_CHUNK)
    mean = torch.stack([matrix.decode(ids).double().sum(dim=0) for ids in chunks]).sum(dim=0) / matrix.num_rows
    distances = torch.cat([(matrix.decode(ids) - mean).square().sum(dim=1) for ids in chunks])
    distances[classes > 0] += distances.max()

    # not those whose codes alone stand for another row: zero or an outlier, which no added row is
    if matrix.outlier_rows_weight is not None:
        distances[plain(matrix.outlier_rows_weight).long()] = torch.inf
    if matrix.layout.zero_row is not None:
        distances[matrix.layout.zero_row] = torch.inf
    return int(distances.argmin())


def _put(matrix: CompressedMatrix, name: str, value: Tensor) -> None:
    """Sets a parameter, which learns if the one before did; in memory of its own."""
    old = getattr(matrix, name)
    new = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    if "_table" in vars(old):
        vars(new)["_table"] = vars(old)["_table"]
    setattr(matrix, name, new)
