"""Compiled kernels for CPUs: they read rows of packed codes, and multiply states with all of them.

Numba is imported at their first call: not everybody who imports the package runs packed codes.
"""

from __future__ import annotations

from torch import Tensor

from ..remote.kernels_dirembed import PackedRows


def read_rows(rows: PackedRows, ids: Tensor) -> Tensor:
    """The latents of rows, as [`hf_dirembed.kernels.reading.read_rows`] gives them."""
    from .reading import read_rows as compiled

    return compiled(rows, ids)


def rows_product(rows: PackedRows, states: Tensor) -> Tensor:
    """Products with the latents of all rows, as [`hf_dirembed.kernels.products.rows_product`] gives them."""
    from .products import rows_product as compiled

    return compiled(rows, states)
