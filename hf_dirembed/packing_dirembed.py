"""The layout of packed codes: bits to symbols, symbols to latents.

A row's latents of 8 bits are plain integers. Those of 4, 2 and 1 bits are trellis coded: the symbols of a section are
read as one stream, and a latent is looked up by the last 8 bits of it, so that few bits of its own choose among 256
levels (trellis-coded quantisation, Marcellin & Fischer 1990, over the bitshift trellis of Tseng et al. 2024, "QTIP").

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout_dirembed import BIT_WIDTHS, CODEBOOK_SHAPE, NO_STEP, OCTAVE, STATE_BITS, TableError, code_bytes


HALF = 0.5  # what a mid-rise quantiser's integer stands for is half a step above it


def pack(symbols: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Packs symbols into bytes, the widest latents first.

    A section of n latents of w bits takes m = ⌈n·w/8⌉ bytes; latent s·m + k of the section sits in byte k at bit s·w,
    so that unpacking works on whole contiguous sections.

    Args:
        symbols: (n, rank) uint8; that of a latent of w bits is below 2^w.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Raises:
        TableError: If a symbol does not fit into its bits.

    Example:
        >>> packed = pack(torch.tensor([[255, 3, 1, 1, 0]], dtype=torch.uint8), (1, 0, 2, 2))
        >>> packed.tolist(), [section.tolist() for _, section in sections(packed, (1, 0, 2, 2))]
        ([[255, 7, 1]], [[[255]], [[3, 1]], [[1, 0]]])
    """
    packed, first = [], 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        section, first = symbols[:, first : first + count], first + count
        per_byte = 8 // width
        num_bytes = math.ceil(count / per_byte)
        if section.numel() and (largest := int(section.max())) >> width:
            raise TableError(f"symbol {largest} does not fit into {width} bits: quantise the codes again")
        planes = F.pad(section, (0, num_bytes * per_byte - count)).view(len(symbols), per_byte, num_bytes)
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=symbols.device).view(1, per_byte, 1) * width
        packed.append((planes << shifts).sum(dim=1, dtype=torch.uint8))
    return torch.cat(packed, dim=1)


def sections(packed: Tensor, bit_allocation: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The symbols of packed rows, width by width, by plain operations that compilers and exporters know.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Yields:
        The width, and (..., count) int32 symbols, for each width that has any.
    """
    first = 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        num_bytes = math.ceil(count * width / 8)
        section, first = packed[..., first : first + num_bytes], first + num_bytes
        if width < 8 and count:
            # In 32 bits, as exporters to ONNX have no shifts of bytes.
            wide, mask = section.int(), (1 << width) - 1
            planes = [(wide >> shift) & mask for shift in range(0, 8, width)]
            section = torch.cat(planes, dim=-1)[..., :count]
        if count:
            yield width, section.int()


def trellis_states(symbols: Tensor, width: int) -> Tensor:
    """The state of each latent: its own symbol in the low bits, those of the latents behind it above.

    The stream runs from the weakest latent to the strongest, as its first symbols have least to choose from.

    Args:
        symbols: (..., count) integers, each below 2^width.
        width: Bits of a symbol.

    Returns:
        (..., count) int32, below 256.

    Example:
        >>> trellis_states(torch.tensor([1, 2, 3], dtype=torch.uint8), width=2).tolist()
        [57, 14, 3]
    """
    states, known = symbols.int(), 1
    while known * width < STATE_BITS:  # doubles how many symbols each state knows
        behind = F.pad(states[..., known:], (0, min(known, states.shape[-1])))
        states = states | (behind << (known * width))
        known *= 2
    return states


def unpack(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor) -> Tensor:
    """The latents of packed rows, less ½.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, the levels of the trellis's states at 4, 2 and 1 bits, less ½.

    Returns:
        (..., rank) int8.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack(torch.tensor([[200, 0b10]], dtype=torch.uint8), (1, 0, 0, 2), codebook).tolist()
        [[72, -126, -127]]
    """
    latents = []
    for width, symbols in sections(packed, bit_allocation):
        if width == 8:
            latents.append((symbols - 128).to(torch.int8))
        else:
            latents.append(codebook[BIT_WIDTHS.index(width) - 1][trellis_states(symbols, width).long()])
    return torch.cat(latents, dim=-1)


def unpack_levels(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The half-integers that packed rows stand for, (..., rank): [`unpack`] and ½.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack_levels(torch.tensor([[200]], dtype=torch.uint8), (1, 0, 0, 0), codebook, torch.float32).tolist()
        [[72.5]]
    """
    return unpack(packed, bit_allocation, codebook).to(dtype) + HALF


def refinement_steps(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What a second layer's half-integers are multiplied by to be in the first layer's unit.

    Args:
        exponents: (rank,) int8, in eighths of a power of two; -128 for a step of 0.
        dtype: Of the steps.

    Example:
        >>> refinement_steps(torch.tensor([0, -8, 4, -128], dtype=torch.int8), torch.float64)[[0, 1, 3]].tolist()
        [1.0, 0.5, 0.0]
    """
    wide = exponents.to(torch.promote_types(dtype, torch.float32))
    return torch.exp2(wide / OCTAVE).masked_fill(exponents == NO_STEP, 0).to(dtype)


class PackedCodes(NamedTuple):
    """Packed rows with all that it takes to read them.

    Attributes:
        packed: (V, bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, as [`unpack`] takes it.
    """

    packed: Tensor
    bit_allocation: tuple[int, ...]
    codebook: Tensor

    @property
    def rank(self) -> int:
        """Latents of a row."""
        return sum(self.bit_allocation)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The latents of rows, less ½: (n, rank) int8."""
        return unpack(self.packed[rows], self.bit_allocation, self.codebook)

    def check(self, rank: int) -> None:
        """Refuses tensors that are not what the allocation makes them.

        Raises:
            TableError: If shapes or dtypes do not fit each other or the rank.
        """
        packed, codebook = self.packed, self.codebook
        if (
            (packed.dtype, packed.shape[1:]) != (torch.uint8, (code_bytes(self.bit_allocation),))
            or (codebook.dtype, codebook.shape) != (torch.int8, CODEBOOK_SHAPE)
            or self.rank != rank
        ):
            raise TableError(
                f"codes {packed.dtype} {tuple(packed.shape)} of bit allocation {self.bit_allocation} and codebook "
                f"{codebook.dtype} {tuple(codebook.shape)} do not fit rank {rank}: pass those of one module"
            )
