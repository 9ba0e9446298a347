"""Reads the latents of rows from their packed codes, on a CPU, and puts rows that are kept as they are in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..remote.codes_dirembed import TableError
from ..remote.kernels_dirembed import PackedRows
from .library import DAMAGED, NO_MEMORY, NO_SUCH_ID, library, threads_for
from .packed_tables import DAMAGED_TABLE, table_of


_CODE_TIME = 1.0  # nanoseconds, to look a code up and to add it to its latent


def read_rows(rows: PackedRows, ids: Tensor, exponents: Tensor | None = None) -> Tensor:
    """What [`PackedRows.read`] gives in float32, bit by bit, but fast.

    Args:
        rows: The codes of a table, on a CPU.
        ids: (...,) integers, the numbers of rows.
        exponents: (rank,) int8, of powers of two that the latents are multiplied by; None for none.

    Returns:
        (..., rank) float32.

    Raises:
        IndexError: If there is no such row.
        TableError: If the tensors do not fit the classes.

    Example:
        >>> from hf_dirembed.remote.codes_dirembed import RowClass
        >>> from hf_dirembed.remote.kernels_dirembed import pack_rows
        >>> rows = PackedRows(
        ...     torch.tensor([[0b11_10_01], [0]], dtype=torch.uint8),
        ...     torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1),
        ...     torch.tensor([2, 0, 2], dtype=torch.int32),
        ...     torch.tensor([0, 0, -8], dtype=torch.int8),
        ...     pack_rows(torch.tensor([0, 0]), torch.tensor([1.0, 0.5])),
        ...     classes=(RowClass((0, 0, 3, 0)),),
        ...     rank=3,
        ... )
        >>> read_rows(rows, torch.tensor([0, 1])).tolist()
        [[-113.5, 0.0, -132.75], [-63.75, 0.0, -95.625]]
    """
    table = table_of(rows)
    shape, count = ids.shape, ids.numel()
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        ids = ids.long().contiguous()
    if exponents is not None and not exponents.is_contiguous():
        exponents = exponents.contiguous()
    latents = torch.empty((*shape, rows.rank), dtype=torch.float32, device="cpu")
    state = library().dirembed_read(
        table.address,
        None if exponents is None else exponents.data_ptr(),
        ids.data_ptr(),
        count,
        latents.data_ptr(),
        threads_for(count * table.most_codes * _CODE_TIME),
    )
    if state:
        raise_for(state)
    return latents


def patch_rows(out: Tensor, ids: Tensor, numbers: Tensor | None, kept: Tensor | None, zero_row: int | None) -> None:
    """Puts rows that are kept as they are, and the row of zeros, in the place of what codes stand for.

    Args:
        out: (..., dim) contiguous rows of any dtype, on a CPU, that no gradient is asked for: written to.
        ids: (...,) integers, which rows they are.
        numbers: (n,) int32, ascending, the rows that are kept; None for none.
        kept: (n, dim) these, in the dtype of `out`.
        zero_row: The row that is all zeros; None for none.

    Example:
        >>> rows = torch.ones(3, 2)
        >>> numbers, kept = torch.tensor([5], dtype=torch.int32), torch.tensor([[7.0, 8.0]])
        >>> patch_rows(rows, torch.tensor([5, 1, 0]), numbers, kept, zero_row=0)
        >>> rows.tolist()
        [[7.0, 8.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        ids = ids.long().contiguous()
    if numbers is not None and kept is not None:
        numbers, kept = numbers.to(torch.int32).contiguous(), kept.to(out.dtype).contiguous()
    library().dirembed_patch(
        out.data_ptr(),
        ids.data_ptr(),
        ids.numel(),
        out.shape[-1] * out.itemsize,
        None if numbers is None else numbers.data_ptr(),
        None if kept is None else kept.data_ptr(),
        0 if numbers is None else len(numbers),
        -1 if zero_row is None else zero_row,
    )


def raise_for(state: int) -> None:
    """Raises what the library gave back as an error, in the words of torch where torch has the same."""
    if state == NO_SUCH_ID:
        raise IndexError("index out of range in self")
    if state == DAMAGED:
        raise TableError(DAMAGED_TABLE)
    if state == NO_MEMORY:
        raise MemoryError("there is no memory for the buffers of a kernel")
