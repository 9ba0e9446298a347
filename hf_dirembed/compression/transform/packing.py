"""Packs the symbols of rows, and unpacks them with their levels: compiled on CPUs, in torch's operations elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.library import library, threads_for
from ...kernels.packed_tables import class_struct
from ...remote.codes_dirembed import BIT_WIDTHS, RowClass
from ...remote.kernels_dirembed import pack, sections, trellis_states
from ...remote.products_dirembed import runs_compiled


_CODE_TIME = 2.0  # nanoseconds, to pack or to unpack a code


def pack_symbols(symbols: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Packs symbols as [`pack`] does, but fast.

    Args:
        symbols: (n, codes) uint8, below 2^width each.
        counts: How many codes have 4, 3, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Example:
        >>> pack_symbols(torch.tensor([[15, 5, 1, 0]], dtype=torch.uint8), (1, 1, 0, 2)).tolist()
        [[223, 0]]
    """
    if not runs_compiled(symbols):
        return pack(symbols, counts)
    of_class, symbols = RowClass(counts), symbols.contiguous()
    packed = symbols.new_empty(len(symbols), of_class.num_bytes)
    struct, threads = class_struct(of_class), threads_for(symbols.numel() * _CODE_TIME)
    library().dirembed_pack(struct.address, symbols.data_ptr(), len(symbols), packed.data_ptr(), threads)
    return packed


def unpack_symbols(packed: Tensor, counts: tuple[int, ...], books: Tensor) -> tuple[Tensor, Tensor]:
    """The symbols of packed rows, and the levels that they stand for.

    Args:
        packed: (n, bytes per row) uint8.
        counts: How many codes have 4, 3, 2 and 1 bits.
        books: (4, 256) float32, the levels of the trellis's states at 4, 3, 2 and 1 bits.

    Returns:
        (n, codes) uint8 and (n, codes) float32.

    Example:
        >>> books = torch.arange(256.0).repeat(4, 1)
        >>> symbols, levels = unpack_symbols(torch.tensor([[0b11_10_01]], dtype=torch.uint8), (0, 0, 3, 0), books)
        >>> symbols.tolist(), levels.tolist()
        ([[1, 2, 3]], [[57.0, 14.0, 3.0]])
    """
    shape = len(packed), sum(counts)
    symbols, levels = packed.new_empty(shape), packed.new_empty(shape, dtype=torch.float32)
    if runs_compiled(packed):
        struct, packed, books = class_struct(RowClass(counts)), packed.contiguous(), books.float().contiguous()
        library().dirembed_unpack(
            struct.address, packed.data_ptr(), len(packed), books.data_ptr(), symbols.data_ptr(), levels.data_ptr(),
            threads_for(symbols.numel() * _CODE_TIME),
        )  # fmt: skip
        return symbols, levels

    states = trellis_states(packed, counts)
    for width, section, _ in sections(counts):
        symbols[:, section] = (states[:, section] & ((1 << width) - 1)).to(torch.uint8)
        levels[:, section] = books[BIT_WIDTHS.index(width)][states[:, section]]
    return symbols, levels
