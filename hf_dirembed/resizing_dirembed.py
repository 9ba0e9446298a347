"""A compressed matrix of more or fewer rows: what `resize_token_embeddings` does.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .layout_dirembed import NO_STEP
from .matrix_dirembed import DENSE_CHUNK, CompressedMatrix


@torch.no_grad()
def resize_rows(matrix: CompressedMatrix, num_rows: int) -> None:
    """Drops rows from the end, or adds rows: the mean latents or, packed, the codes of the row nearest to it.

    Args:
        matrix: Changed in place.
        num_rows: How many it shall have.
    """
    matrix.write_codes()
    _resize_outliers(matrix, num_rows)
    _resize_refinement(matrix, num_rows)
    kept = matrix.weight[:num_rows]
    if (added := num_rows - len(kept)) > 0:
        kept = torch.cat([kept, _mean_codes(matrix).expand(added, -1)])
    matrix.weight = nn.Parameter(kept.clone(), requires_grad=matrix.weight.requires_grad)
    if matrix.spec.zero_row is not None and matrix.spec.zero_row >= num_rows:
        matrix.spec = replace(matrix.spec, zero_row=None)
    if matrix.shadow is not None:
        matrix.shadow.follow(matrix)


def _resize_refinement(matrix: CompressedMatrix, num_rows: int) -> None:
    if matrix.refined_rows_weight is None or matrix.refinement_weight is None:
        return
    inside = matrix.refined_rows_weight < num_rows
    rows, codes = matrix.refined_rows_weight[inside], matrix.refinement_weight[inside]
    if not len(rows):  # none at all would be another layout: the first row becomes one, to which codes add nothing
        rows, codes = matrix.refined_rows_weight.new_zeros(1), matrix.refinement_weight[:1].clone()
        assert matrix.refinement_exponent_weight is not None
        matrix.refinement_exponent_weight.fill_(NO_STEP)
    matrix.refined_rows_weight = nn.Parameter(rows, requires_grad=False)
    matrix.refinement_weight = nn.Parameter(codes, requires_grad=False)


def _resize_outliers(matrix: CompressedMatrix, num_rows: int) -> None:
    if matrix.outlier_rows_weight is None or matrix.outlier_weight is None:
        return
    inside = matrix.outlier_rows_weight < num_rows
    rows, kept = matrix.outlier_rows_weight[inside], matrix.outlier_weight[inside]
    if not len(rows):  # none at all would be another layout: the first row becomes one
        rows = matrix.outlier_rows_weight.new_zeros(1)
        kept = matrix.decode(rows)
    matrix.outlier_rows_weight = nn.Parameter(rows, requires_grad=False)
    matrix.outlier_weight = nn.Parameter(kept, requires_grad=matrix.outlier_weight.requires_grad)


def _mean_codes(matrix: CompressedMatrix) -> Tensor:
    """The code row that stands for the mean row, or for the row nearest to it, (1, code width)."""
    if matrix.weight.is_floating_point():
        return matrix.weight.float().mean(dim=0, keepdim=True).to(matrix.weight.dtype)
    chunks = torch.arange(len(matrix.weight), device=matrix.weight.device).split(DENSE_CHUNK)
    mean = torch.stack([matrix.decode(ids).double().sum(dim=0) for ids in chunks]).sum(dim=0) / len(matrix.weight)
    distances = torch.cat([(matrix.decode(ids) - mean).square().sum(dim=1) for ids in chunks])
    # Not those whose codes alone stand for another row: zero, refined or an outlier, which no added row is.
    if matrix.refined_rows_weight is not None:
        distances[matrix.refined_rows_weight.long()] += distances.max()
    if matrix.outlier_rows_weight is not None:
        distances[matrix.outlier_rows_weight.long()] = torch.inf
    if matrix.spec.zero_row is not None:
        distances[matrix.spec.zero_row] = torch.inf
    return matrix.weight[distances.argmin()].unsqueeze(0)
