"""The product of states with all rows of a table, straight from its packed codes, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..remote.kernels_dirembed import PackedRows
from .library import library, threads_for
from .packed_tables import table_of
from .reading import raise_for, read_rows


MATMUL_STATES = 64  # with more of them, torch's product is faster, even though all rows are unpacked to floats before
BUFFER_FLOATS = 1 << 20  # of rows that are unpacked for torch to multiply
_CODE_TIME, _PRODUCT_TIME = 0.1, 0.03  # nanoseconds, to look a code up and to multiply it with a state


def rows_product(
    rows: PackedRows, states: Tensor, offsets: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The product `states @ rows.read(torch.arange(num_rows), torch.float32).T`, plus a number for each state.

    Sums are taken in float32. No more memory is needed than the result and a few megabytes.

    Args:
        rows: The codes of a table, on a CPU.
        states: (n, rank) float32.
        offsets: (n,) float32, is added to all products of each state; None for nothing.
        dtype: Of the result: the sums are rounded once.

    Returns:
        (n, num_rows).

    Raises:
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
        >>> states = torch.tensor([[1.0, 5.0, 0.0], [1.0, 0.0, 1.0]])
        >>> rows_product(rows, states).tolist()
        [[-113.5, -63.75], [-246.25, -159.375]]
    """
    table, num_states, num_rows = table_of(rows), len(states), len(rows.weight)
    narrow = dtype == torch.bfloat16
    product = torch.empty(num_states, num_rows, dtype=dtype if narrow else torch.float32, device="cpu")
    if product.numel() == 0:
        return product.to(dtype)
    if num_states > MATMUL_STATES:
        _multiply_unpacked(rows, states, offsets, product)
        return product.to(dtype)

    states = states.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    work = num_rows * table.most_codes * (_CODE_TIME + _PRODUCT_TIME * num_states)
    state = library().dirembed_multiply(
        table.address,
        states.data_ptr(),
        num_states,
        None if offsets is None else offsets.data_ptr(),
        product.data_ptr(),
        narrow,
        threads_for(work),
    )
    if state:
        raise_for(state)
    return product.to(dtype)


def _multiply_unpacked(rows: PackedRows, states: Tensor, offsets: Tensor | None, product: Tensor) -> None:
    """The product for many states: to read the rows is little beside it, and torch multiplies best."""
    num_rows, step = len(rows.weight), max(1, BUFFER_FLOATS // rows.rank)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        part = states @ read_rows(rows, torch.arange(first, last, device="cpu")).T
        product[:, first:last] = part if offsets is None else part + offsets.unsqueeze(1)
