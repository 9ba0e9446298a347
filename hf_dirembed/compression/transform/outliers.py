"""Outliers: rows that are kept as they are, because the codes would lose too much of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plan import ROW_NUMBER_ITEMSIZE


RESERVED_SHARE = 0.1  # of the budget, at most, that is set aside for rows that are known to be outliers


def outlier_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of a row that is kept."""
    return dim * dtype.itemsize + ROW_NUMBER_ITEMSIZE


def count_outliers(errors: Tensor, dim: int, row_bytes: int) -> int:
    """How many of the worst rows are worth keeping: an outlier's bytes take away more error than codes could.

    A table's error falls by a factor of 4 with each bit per weight, so a byte more for its codes takes 8 ln 4 / (V d)
    of the error away. A row is an outlier if its own error is more than its bytes would take away from all others.

    Args:
        errors: (V,) each row's share of the error.
        dim: d.
        row_bytes: Of a row that is kept.

    Example:
        >>> errors = torch.cat([torch.ones(1000), torch.tensor([50.0, 20.0])])
        >>> count_outliers(errors, dim=64, row_bytes=132)  # worth 23 times the mean error
        1
    """
    falling = errors.sort(descending=True).values
    others = falling.flip(0).cumsum(dim=0).flip(0)  # and the row itself
    worth = falling > others * (row_bytes * 8 * math.log(4) / (len(errors) * dim))
    return int(worth.cumprod(dim=0).sum())
