"""What compiled kernels must know of the classes of rows, as one array of whole numbers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from ..remote.codes_dirembed import BIT_WIDTHS, RowClass
from ..remote.kernels_dirembed import sections


ALIGNED = 32  # codes: sections begin at multiples of it once unpacked, and each load unpacks a part of that many

# The columns of a plan, whose rows are the classes. Behind them are four numbers for each width.
ROWS, BYTES, CODES, FIRST_CODE, FURTHER, PLACES, SECTIONS = range(7)
COUNT, BIT, CODE, PLACE = range(4)  # of a section: its codes, where it begins in the row, and its first code's numbers
PLAN_COLUMNS = SECTIONS + 4 * len(BIT_WIDTHS)


class Plan(NamedTuple):
    """What kernels must know of the classes of rows.

    Attributes:
        array: (classes, columns) int64, read only. Each class has how many rows it has (0 stands for any number, in
            the first), the bytes and the codes of a row, which of the codes of all classes is its first, where its
            rows begin in the further bytes, and how many places an unpacked row has: sections begin at multiples of
            `ALIGNED`, so a few places have no code.
        address: Of the array.
        number: How many classes there are.
        shared: Bytes that every row has.
        num_codes: Codes of a row, summed over the classes.
        most_codes: Codes of a row of the class that has most of them.
        most_places: Places of an unpacked row, likewise.
        further_bytes: How many bytes all rows have beyond those that every row has.
    """

    array: numpy.typing.NDArray[numpy.int64]
    address: int
    number: int
    shared: int
    num_codes: int
    most_codes: int
    most_places: int
    further_bytes: int


@functools.lru_cache(maxsize=256)
def plan_of(classes: tuple[RowClass, ...]) -> Plan:
    """What kernels must know of the classes.

    Example:
        >>> plan = plan_of((RowClass((0, 0, 4, 8)), RowClass((2, 2, 4, 4), rows=100)))
        >>> plan.array[:, [ROWS, BYTES, CODES, FIRST_CODE, FURTHER, PLACES]].tolist()
        [[0, 2, 12, 0, 0, 64], [100, 4, 12, 12, 0, 128]]
    """
    array = numpy.zeros((len(classes), PLAN_COLUMNS), dtype=numpy.int64)
    first_code = further = 0
    for each, row in zip(classes, array, strict=True):
        place = 0
        for width, codes, bit in sections(each.bit_allocation):
            count = codes.stop - codes.start
            begin = SECTIONS + 4 * BIT_WIDTHS.index(width)
            row[begin : begin + 4] = count, bit, codes.start, place
            place += -(-count // ALIGNED) * ALIGNED
        row[:SECTIONS] = each.rows or 0, each.num_bytes, each.num_codes, first_code, further, place
        first_code += each.num_codes
        further += (each.rows or 0) * (each.num_bytes - classes[0].num_bytes)

    array.flags.writeable = False
    most_codes, most_places = (int(array[:, column].max()) for column in (CODES, PLACES))
    shared = classes[0].num_bytes
    return Plan(array, array.ctypes.data, len(classes), shared, first_code, most_codes, most_places, further)


def places_of(plan: Plan, number: int) -> Tensor:
    """The place of each code of one class, (codes,) int64, in an unpacked row."""
    parts = plan.array[number, SECTIONS:].reshape(-1, 4)
    return torch.from_numpy(numpy.concatenate([numpy.arange(part[COUNT]) + part[PLACE] for part in parts]))
