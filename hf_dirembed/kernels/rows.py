"""Where the bytes of a row are."""

from __future__ import annotations

import functools
import math

import numba
import numpy
import torch
from torch import Tensor

from ..remote.codes_dirembed import CLASS_BLOCK, CODEBOOK_SHAPE, MAX_CLASSES, TableError
from ..remote.kernels_dirembed import PackedRows, row_scales
from .compiling import WORD_BYTES, compiled, copy
from .plans import BYTES, FURTHER, ROWS, Plan


_CODEBOOK_SIZE = math.prod(CODEBOOK_SHAPE)
CLASS_MASK = MAX_CLASSES - 1  # of a row's byte
NO_SUCH_ROW = -1  # for an address
FINE, DAMAGED, NO_SUCH_ID = range(3)  # what kernels give back: errors are raised by who calls them
DAMAGED_TABLE = "packed codes do not fit their classes: compress the model again"


@functools.cache
def all_scales() -> Tensor:
    """The scales that every byte of a row stands for, (256,) float32."""
    return row_scales(torch.arange(256, device="cpu").to(torch.uint8))


def check_shapes(rows: PackedRows, plan: Plan) -> None:
    """Refuses tensors of other sizes than the classes give them; what is in them, kernels check as they read it.

    Raises:
        TableError: If they do not fit.
    """
    num_rows, shared = rows.weight.shape
    fits = (
        shared == plan.shared
        and rows.rows.numel() == num_rows
        and rows.latents.numel() == rows.steps.numel() == plan.num_codes
        and rows.codebook.numel() == _CODEBOOK_SIZE
    )
    if plan.number > 1:
        expected = (-(-num_rows // CLASS_BLOCK) * (plan.number - 1), plan.further_bytes)
        further = (rows.class_counts, rows.further)
        fits = fits and all(
            each is not None and each.numel() == size for each, size in zip(further, expected, strict=True)
        )
    if not fits:
        raise TableError(DAMAGED_TABLE)


@compiled
def slot_of(row, number, row_bytes, class_counts):  # type: ignore[no-untyped-def]
    """How many rows of its class, which is not the first, come before a row."""
    block = row // CLASS_BLOCK
    slot = numpy.int64(class_counts[block, number - 1])
    for other in range(block * CLASS_BLOCK, row):
        slot += (row_bytes[other] & CLASS_MASK) == number
    return slot


@numba.njit(inline="always")
def address_of(row, number, slot, plan, weight, num_rows, shared, further, scratch):  # type: ignore[no-untyped-def]
    """Where all bytes of a row are together, with `WORD_BYTES` of readable memory behind.

    That is in the table, or, where the row has two parts or is at the table's end, a copy in `scratch`. It is
    `NO_SUCH_ROW` where the class has no such slot: a damaged table must not make us read what is not its own.

    Args:
        row: Its number.
        number: That of its class.
        slot: How many rows of this class come before it.
        plan: The array of a `Plan`.
        weight: Address of the first bytes of all rows.
        num_rows: How many rows there are.
        shared: How many bytes of each are there.
        further: Address of the further bytes.
        scratch: Address of `make_scratch`.
    """
    fits = number < len(plan) and (number == 0 or 0 <= slot < plan[number, ROWS])
    if not fits:
        return numpy.int64(NO_SUCH_ROW)
    own = plan[number, BYTES] - shared
    address = weight + row * shared
    if own > 0 or (num_rows - row) * shared < shared + WORD_BYTES:
        copy(address, scratch, shared)  # type: ignore[call-arg]
        copy(further + plan[number, FURTHER] + slot * own, scratch + shared, own)
        address = scratch
    return address


@compiled
def make_scratch(plan):  # type: ignore[no-untyped-def]
    """Memory for the bytes of one row of any class, and a word behind them."""
    most = 0
    for number in range(len(plan)):
        most = max(most, plan[number, BYTES])
    return numpy.zeros(most + WORD_BYTES, dtype=numpy.uint8)
