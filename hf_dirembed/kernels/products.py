"""The product of states with all rows of a table, straight from its packed codes, on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import numpy.typing
import torch
from torch import Tensor

from ..remote.codes_dirembed import CLASS_BLOCK, MAX_CLASSES, TableError
from ..remote.kernels_dirembed import PackedRows, code_steps
from .compiling import array_of, compiled
from .multiplying import PAIRS, make_pairs, multiply_row
from .plans import PLAN_COLUMNS, SECTIONS, places_of, plan_of
from .reading import read_rows
from .rows import (
    CLASS_MASK,
    DAMAGED,
    DAMAGED_TABLE,
    FINE,
    NO_SUCH_ROW,
    address_of,
    all_scales,
    check_shapes,
    make_scratch,
)
from .threads import course_of, share_out


Array = numpy.typing.NDArray[Any]

STATES_AT_ONCE = (
    1,
    4,
    8,
)  # that kernels are compiled for: more states go in groups, for which codes are unpacked anew
BUFFER_FLOATS = 1 << 20  # of rows that are unpacked for torch to multiply


def rows_product(rows: PackedRows, states: Tensor) -> Tensor:
    """The product `states @ rows.read(torch.arange(num_rows), torch.float32).T`.

    Sums are taken in float32. No more memory is needed than the result and a few megabytes.

    Args:
        rows: The codes of a table, on a CPU.
        states: (n, rank) float32.

    Returns:
        (n, num_rows) float32.

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
        >>> rows_product(rows, torch.tensor([[1.0, 5.0, 0.0], [1.0, 0.0, 1.0]])).tolist()
        [[-113.5, -63.75], [-246.25, -159.375]]
    """
    plan = plan_of(rows.classes)
    check_shapes(rows, plan)
    rows = rows.contiguous()
    num_states, num_rows = len(states), len(rows.weight)
    product = torch.empty(num_states, num_rows, dtype=torch.float32, device="cpu")
    if product.numel() == 0:
        return product

    course = course_of(num_rows * plan.most_codes, num_states, torch.get_num_threads())
    if course.unpacked:
        _multiply_unpacked(rows, states, product)
        return product
    group = next((size for size in STATES_AT_ONCE if num_states <= size), STATES_AT_ONCE[-1])
    arguments = _arguments(rows, _factors(rows, states, group))
    kernel = functools.partial(_kernel_of(group), *arguments, array_of(product, numpy.float32))
    if share_out(kernel, num_rows, CLASS_BLOCK, course) == DAMAGED:
        raise TableError(DAMAGED_TABLE)
    return product


def _multiply_unpacked(rows: PackedRows, states: Tensor, product: Tensor) -> None:
    """The product for many states: to read the rows is little beside it, and torch multiplies best."""
    num_rows, step = len(rows.weight), max(1, BUFFER_FLOATS // rows.rank)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        torch.mm(states, read_rows(rows, torch.arange(first, last, device="cpu")).T, out=product[:, first:last])


def _factors(rows: PackedRows, states: Tensor, group: int) -> Tensor:
    """What the code in each place of a row is multiplied by, for each state: (classes, states, places) float32.

    It is 0 where a place has no code. There are as many states as fill groups up.
    """
    plan, num_states = plan_of(rows.classes), len(states)
    shape = plan.number, -(-num_states // group) * group, plan.most_places
    factors = states.new_zeros(shape)
    for number in range(plan.number):
        _, latents, exponents = rows.of_class(number)
        steps = code_steps(exponents, torch.float32)
        factors[number, :num_states, places_of(plan, number)] = states[:, latents] * steps
    return factors


def _arguments(rows: PackedRows, factors: Tensor) -> tuple[Array, ...]:
    """What a kernel takes before the product, as arrays."""
    pairs = numpy.empty((PAIRS, 2), dtype=numpy.float32)
    make_pairs(array_of(rows.codebook.contiguous(), numpy.int8), pairs)
    optional = (
        numpy.empty(shape, kind) if each is None else array_of(each, kind)
        for each, shape, kind in (
            (rows.class_counts, (0, 0), numpy.int32),
            (rows.further, 0, numpy.uint8),
        )
    )
    of_all = all_scales().numpy(), plan_of(rows.classes).array, pairs, factors.numpy()
    return array_of(rows.weight, numpy.uint8), array_of(rows.rows, numpy.uint8), *optional, *of_all


@functools.cache
def _kernel_of(group: int) -> Callable[..., int]:
    """Compiled for groups of so many states."""

    def multiply(  # type: ignore[no-untyped-def]
        weight, row_bytes, class_counts, further, scales, plan, pairs, factors, product, first, last
    ):  # fmt: skip
        """Multiplies rows, from the first of a block on, with all states."""
        num_classes, num_states = len(plan), len(product)
        num_rows, shared = weight.shape
        _, padded_states, places = factors.shape
        scratch = make_scratch(plan)
        slots = numpy.zeros(MAX_CLASSES, dtype=numpy.int64)
        totals = numpy.zeros(group, dtype=numpy.float32)
        # In the loops there are addresses only, as numba counts references to arrays, which takes longer than a row.
        at_weight, at_further, at_scratch = weight.ctypes.data, further.ctypes.data, scratch.ctypes.data
        at_plan, at_pairs, at_factors = plan.ctypes.data, pairs.ctypes.data, factors.ctypes.data
        at_totals = totals.ctypes.data

        for block in range(first, last, CLASS_BLOCK):
            for state in range(0, num_states, group):
                for number in range(1, num_classes):
                    slots[number] = class_counts[block // CLASS_BLOCK, number - 1]
                for row in range(block, min(block + CLASS_BLOCK, last)):
                    of_class = numpy.int64(row_bytes[row] & CLASS_MASK)
                    address = address_of(
                        row, of_class, slots[of_class], plan, at_weight, num_rows, shared, at_further, at_scratch
                    )
                    if address == NO_SUCH_ROW:
                        return DAMAGED
                    slots[of_class] += 1

                    parts = at_plan + 8 * (of_class * PLAN_COLUMNS + SECTIONS)
                    of_states = at_factors + 4 * places * (of_class * padded_states + state)
                    multiply_row(group, address, parts, at_pairs, of_states, places, at_totals)  # type: ignore[call-arg]
                    for other in range(min(group, num_states - state)):
                        product[state + other, row] = totals[other] * scales[row_bytes[row]]

        scratch[0] = 0  # what is not used any more, numba frees
        return FINE

    return compiled(multiply)
