"""Reads the latents of rows from their packed codes, on a CPU."""

from __future__ import annotations

import functools

import numba
import numpy
import torch
from torch import Tensor

from ..remote.codes_dirembed import BIT_WIDTHS, TableError
from ..remote.kernels_dirembed import HALF, PackedRows, code_steps
from .compiling import compiled, load_word, pointer
from .plans import BIT, CODE, COUNT, FIRST_CODE, PLAN_COLUMNS, SECTIONS, plan_of
from .rows import (
    CLASS_MASK,
    DAMAGED,
    DAMAGED_TABLE,
    FINE,
    NO_SUCH_ID,
    NO_SUCH_ROW,
    address_of,
    all_scales,
    check_shapes,
    make_scratch,
    slot_of,
)
from .threads import course_of, share_out


_LOWEST_STEP = -128
_READ_COST = 6  # looking a code up and adding it to its latent takes so many times as long as the lookup of a product
_WORD_CODES = 8  # codes of w bits take w bytes


def read_rows(rows: PackedRows, ids: Tensor) -> Tensor:
    """What [`PackedRows.read`] gives in float32, bit by bit, but fast: a row takes a few microseconds.

    Args:
        rows: The codes of a table, on a CPU.
        ids: (...,) integers, the numbers of rows.

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
    plan = plan_of(rows.classes)
    check_shapes(rows, plan)
    num_ids = ids.numel()
    latents = torch.empty((*ids.shape, rows.rank), dtype=torch.float32, device="cpu")
    weight, ids = rows.weight, ids.long().contiguous()
    held = [
        each if each is None or each.is_contiguous() else each.contiguous()
        for each in (weight, rows.codebook, rows.latents, rows.steps, rows.rows, rows.class_counts, rows.further)
    ]
    arguments = (
        *[0 if each is None else each.data_ptr() for each in held],
        *(
            _steps().data_ptr(),
            all_scales().data_ptr(),
            plan.address,
            plan.number,
            len(weight),
            plan.shared,
            plan.num_codes,
        ),
        *(rows.rank, ids.data_ptr(), latents.data_ptr()),
    )

    course = course_of(num_ids * plan.most_codes * _READ_COST, 0, torch.get_num_threads())
    if course.threads == 1:
        state = _read(*arguments, 0, num_ids)
    else:
        state = share_out(functools.partial(_read, *arguments), num_ids, 1, course)
    if state == NO_SUCH_ID:
        raise IndexError("index out of range in self")  # in the words of torch.nn.functional.embedding
    if state == DAMAGED:
        raise TableError(DAMAGED_TABLE)
    return latents


@functools.cache
def _steps() -> Tensor:
    """The steps of all exponents, from the lowest on."""
    exponents = torch.arange(_LOWEST_STEP, -_LOWEST_STEP, dtype=torch.int8, device="cpu")
    return code_steps(exponents, torch.float32)


@compiled
def _read(  # type: ignore[no-untyped-def]
    weight, codebook, latents, steps, row_bytes, class_counts, further, all_steps, scales, plan, num_classes,
    num_rows, shared, num_codes, rank, ids, out, first, last,
):  # fmt: skip
    """Reads a part of the ids: all arrays come as addresses, and say no more than whether there was anything wrong."""
    plan = numba.carray(pointer(plan), (num_classes, PLAN_COLUMNS), numpy.int64)  # type: ignore[call-arg]
    row_bytes = numba.carray(pointer(row_bytes), num_rows, numpy.uint8)
    scales = numba.carray(pointer(scales), 256, numpy.float32)
    class_counts = numba.carray(pointer(class_counts), (num_rows, num_classes - 1), numpy.int32)
    codebook = numba.carray(pointer(codebook), 4 * 256, numpy.int8)
    latents = numba.carray(pointer(latents), num_codes, numpy.int32)
    ids = numba.carray(pointer(ids), last, numpy.int64)
    out = numba.carray(pointer(out), last * rank, numpy.float32)

    exponents = numba.carray(pointer(steps), num_codes, numpy.int8)
    all_steps = numba.carray(pointer(all_steps), 256, numpy.float32)
    factors = numpy.empty(num_codes, dtype=numpy.float32)
    for code in range(num_codes):
        factors[code] = all_steps[numpy.int64(exponents[code]) - _LOWEST_STEP]
        if not 0 <= latents[code] < rank:
            return DAMAGED

    scratch = make_scratch(plan)
    at_scratch = scratch.ctypes.data
    for place in range(first, last):
        row = ids[place]
        if not 0 <= row < num_rows:
            return NO_SUCH_ID
        number = numpy.int64(row_bytes[row] & CLASS_MASK)
        slot = slot_of(row, number, row_bytes, class_counts) if 0 < number < num_classes else 0
        address = address_of(row, number, slot, plan, weight, num_rows, shared, further, at_scratch)
        if address == NO_SUCH_ROW:
            return DAMAGED
        of_row = out[place * rank : (place + 1) * rank]
        _read_row(address, plan, number, codebook, latents, factors, of_row)
        of_row *= scales[row_bytes[row]]
    scratch[0] = 0  # what is not used any more, numba frees
    return FINE


@compiled
def _read_row(address, plan, number, codebook, latents, factors, out):  # type: ignore[no-untyped-def]
    """Adds what each code of a row stands for to its latent."""
    out[:] = 0
    for part in range(len(BIT_WIDTHS)):
        width = len(BIT_WIDTHS) - part
        column = SECTIONS + 4 * part
        bit = plan[number, column + BIT]
        # Unsigned, as numba counts negative indices from the end.
        code = numpy.uint64(plan[number, FIRST_CODE] + plan[number, column + CODE])
        left = plan[number, column + COUNT]
        while left > 0:
            word = load_word(address + (bit >> 3)) >> numpy.uint64(bit & 7)  # type: ignore[call-arg]
            if left * width < 64:  # behind the section's end the windows of its last codes have zeros
                word &= (numpy.uint64(1) << numpy.uint64(left * width)) - numpy.uint64(1)
            for _ in range(min(_WORD_CODES, left)):
                state = (word & numpy.uint64(255)) | numpy.uint64(part << 8)
                level = numpy.float32(codebook[state]) + numpy.float32(HALF)
                out[numpy.uint64(latents[code])] += level * factors[code]
                word >>= numpy.uint64(width)
                code += numpy.uint64(1)
            bit += _WORD_CODES * width
            left -= _WORD_CODES
