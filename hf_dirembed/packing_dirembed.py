"""The bit layout of packed codes.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dirembed import BIT_WIDTHS, TableError


def pack(codes: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Packs signed integer codes into bytes, the widest latents first.

    A section of n latents of w bits takes m = ⌈n·w/8⌉ bytes; latent s·m + k of the section sits in byte k at bit s·w,
    so that unpacking works on whole contiguous sections.

    Args:
        codes: (n, rank) integers; a latent of w bits lies in [-2^(w-1), 2^(w-1)).
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Raises:
        TableError: If a code does not fit into its bits.

    Example:
        >>> packed = pack(torch.tensor([[-128, 1, -1, 0, -1]]), (1, 0, 2, 2))
        >>> packed.tolist(), unpack(packed, (1, 0, 2, 2)).tolist()
        ([[0, 7, 1]], [[-128, 1, -1, 0, -1]])
    """
    sections, first = [], 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        section, first = codes[:, first : first + count], first + count
        if count == 0 or len(codes) == 0:
            sections.append(torch.zeros(len(codes), math.ceil(count * width / 8), dtype=torch.uint8))
            continue
        half, per_byte = 1 << (width - 1), 8 // width
        low, high = int(section.min()), int(section.max())
        if low < -half or high >= half:
            raise TableError(f"codes from {low} to {high} do not fit into {width} bits: quantise them again")
        num_bytes = math.ceil(count / per_byte)
        levels = F.pad(section.to(torch.int16) + half, (0, num_bytes * per_byte - count))
        planes = levels.view(len(codes), per_byte, num_bytes)
        shifts = torch.arange(per_byte, dtype=torch.int16, device=codes.device).view(1, per_byte, 1) * width
        sections.append((planes << shifts).sum(dim=1).to(torch.uint8))
    return torch.cat([section.to(codes.device) for section in sections], dim=1)


def planes(packed: Tensor, bit_allocation: tuple[int, ...]) -> Iterator[Tensor]:
    """The codes of packed rows as blocks of adjacent latents, in order: views and shifts of whole sections.

    They are plain operations, which compilers and exporters know; a `view` of another dtype they do not.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Yields:
        (..., some latents) int8.
    """
    first = 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        num_bytes = math.ceil(count * width / 8)
        section, first = packed[..., first : first + num_bytes], first + num_bytes
        half, mask = 1 << (width - 1), (1 << width) - 1
        for start in range(0, count, max(num_bytes, 1)):
            plane = section[..., : min(num_bytes, count - start)]
            if width == 8:
                yield (plane.to(torch.int16) - half).to(torch.int8)
            else:
                yield ((plane >> (start // num_bytes * width)) & mask).to(torch.int8) - half


def unpack(packed: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Unpacks what [`pack`] packed: (..., bytes per row) uint8 to (..., rank) int8."""
    return torch.cat(list(planes(packed, bit_allocation)), dim=-1)
