"""Outliers: rows that are kept as they are, because the codes would lose too much of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


ROW_NUMBER_ITEMSIZE = 4  # int32
RESERVED_SHARE = 0.1  # of the budget, at most, that is set aside for rows that are known to be outliers


def outlier_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of a row that is kept."""
    return dim * dtype.itemsize + ROW_NUMBER_ITEMSIZE


def worth_keeping(num_rows: int, dim: int, row_bytes: int) -> float:
    """How large a share of the error of a row and all others must be that it is worth keeping.

    Args:
        num_rows: V.
        dim: d.
        row_bytes: Of a row that is kept.
    """
    return row_bytes * 8 * math.log(4) / (num_rows * dim)


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
    worth = falling > others * worth_keeping(len(errors), dim, row_bytes)
    return int(worth.cumprod(dim=0).sum())


def count_worst(worst: Tensor, total: float, share: float) -> int:
    """The same where only the worst rows are known one by one.

    Args:
        worst: (n,) the largest errors, descending.
        total: Of all rows, these among them.
        share: What `worth_keeping` says.

    Example:
        >>> count_worst(torch.tensor([50.0, 20.0]), total=1070, share=worth_keeping(1002, 64, 132))
        1
    """
    others = total - torch.cat([worst.new_zeros(1), worst.cumsum(dim=0)])[:-1]
    return int((worst > others * share).cumprod(dim=0).sum())
