"""Multiplies the codes of one row with states while they are looked up, in vectors that numba cannot spell by itself.

Codes are looked up in pairs: the bits of two neighbouring codes' states, 8 and the width, are the index to both of
their levels. Each word of 64 bits holds several pairs, at any offset within a byte.
"""

from __future__ import annotations

from typing import Any

import numpy
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..remote.codes_dirembed import BIT_WIDTHS, STATE_BITS
from ..remote.kernels_dirembed import HALF
from .compiling import compiled, unaligned_word
from .plans import BIT, COUNT, PLACE


PAIRS_OF_WORD = {4: 4, 3: 8, 2: 8, 1: 16}
PAIR_STARTS = {4: 0, 3: 4096, 2: 6144, 1: 7168}  # of the pairs of each width in their table
PAIRS = 7680
LANES = 8  # of a vector

_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _PAIR = ir.VectorType(_FLOAT, LANES), ir.VectorType(_FLOAT, 2)


@compiled
def make_pairs(codebook, pairs):  # type: ignore[no-untyped-def]
    """Fills in (PAIRS, 2) float32, the levels of each two neighbouring codes, from the (4, 256) codebook.

    At each call anew: it takes microseconds, and what is not kept cannot be out of date.
    """
    place = 0
    for book in range(len(BIT_WIDTHS)):
        width = len(BIT_WIDTHS) - book
        for window in range(1 << (STATE_BITS + width)):
            pairs[place, 0] = numpy.float32(codebook[book, window & 255]) + numpy.float32(HALF)
            pairs[place, 1] = numpy.float32(codebook[book, window >> width]) + numpy.float32(HALF)
            place += 1


@intrinsic(prefer_literal=True)
def multiply_row(typing_context, num_states, address, parts, pairs, states, stride, totals):  # type: ignore[no-untyped-def]
    """Multiplies a row with each of some states.

    Args:
        typing_context: Numba's.
        num_states: How many states there are; this must be known where it is compiled.
        address: Of the row.
        parts: Address of the sections in the row's class's plan.
        pairs: Address of what `make_pairs` makes.
        states: Address of the first state's number for the first place of an unpacked row, float32. The numbers for
            places that have no code are 0.
        stride: How many numbers lie between two states.
        totals: Address of as many float32 as there are states, for the products.
    """
    if not isinstance(num_states, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, address, parts, pairs, states, stride, totals = arguments
        row = _Row(builder, num_states.literal_value, address, pairs, states, stride)
        for part, width in enumerate(BIT_WIDTHS):
            row.multiply_section(
                width, *(row.load(parts, _number(4 * part + column), _INT64) for column in (BIT, COUNT, PLACE))
            )
        row.store_totals(totals)
        return context.get_dummy_value()

    return types.void(num_states, *[types.int64] * 6), generate


class _Row:
    """Writes the instructions for a row."""

    def __init__(
        self, builder: ir.IRBuilder, num_states: int, address: Any, pairs: Any, states: Any, stride: Any
    ) -> None:
        self.builder, self.address, self.pairs = builder, address, pairs
        self.states = [builder.add(states, builder.mul(stride, _number(4 * number))) for number in range(num_states)]
        zeros = ir.Constant(_VECTOR, [0.0] * LANES)
        # With few states, each addition would wait for the one before: so there are several totals, to be summed up.
        self.totals = [
            [cgutils.alloca_once_value(builder, zeros) for _ in range(max(1, 4 // num_states))] for _ in self.states
        ]

    def multiply_section(self, width: int, bit: Any, count: Any, place: Any) -> None:
        """The loop over the words of a section; there are none where it has no codes."""
        builder, codes = self.builder, 2 * PAIRS_OF_WORD[width]
        first_byte = builder.add(self.address, builder.ashr(bit, _number(3)))
        offset = builder.and_(bit, _number(7))
        pairs = builder.add(self.pairs, _number(8 * PAIR_STARTS[width]))
        num_words = builder.sdiv(builder.add(count, _number(codes - 1)), _number(codes))

        with cgutils.for_range(builder, num_words, intp=_INT64) as loop:
            before = builder.mul(loop.index, _number(codes))
            byte = builder.add(first_byte, builder.mul(loop.index, _number(codes * width // 8)))
            left = builder.mul(builder.sub(count, before), _number(width))
            word = self.first_bits(builder.lshr(unaligned_word(builder, byte), offset), left)
            for vector in range(0, codes, LANES):
                levels = self.look_up(word, width, vector, pairs)
                index = builder.add(builder.add(place, before), _number(vector))
                for states, totals in zip(self.states, self.totals, strict=True):
                    total = totals[vector // LANES % len(totals)]
                    product = builder.fmul(levels, self.load(states, index, _VECTOR), flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

    def store_totals(self, totals: Any) -> None:
        """The sum of each total's lanes, to memory."""
        builder = self.builder
        for number, parts in enumerate(self.totals):
            vector = builder.load(parts[0])
            for part in parts[1:]:
                vector = builder.fadd(vector, builder.load(part))
            for half in (4, 2, 1):
                low, high = (
                    ir.Constant(ir.VectorType(_INT32, half), list(range(first, first + half))) for first in (0, half)
                )
                vector = builder.fadd(*(builder.shuffle_vector(vector, vector, lanes) for lanes in (low, high)))
            place = builder.inttoptr(builder.add(totals, _number(4 * number)), ir.PointerType(_FLOAT))
            builder.store(builder.extract_element(vector, ir.Constant(_INT32, 0)), place)

    def first_bits(self, word: Any, count: Any) -> Any:
        """The word with zeros behind its first bits, as many as there are in the section."""
        builder = self.builder
        mask = builder.sub(builder.shl(_number(1), count), _number(1))
        return builder.and_(word, builder.select(builder.icmp_signed(">=", count, _number(64)), _number(-1), mask))

    def look_up(self, word: Any, width: int, first: int, pairs: Any) -> Any:
        """The levels of as many codes of a word as a vector has lanes, from the first on."""
        builder, mask = self.builder, _number((1 << (STATE_BITS + width)) - 1)
        parts = []
        for code in range(first, first + LANES, 2):
            window = builder.and_(builder.lshr(word, _number(code * width)), mask)
            parts.append(self.load(pairs, window, _PAIR, size=8))

        while len(parts) > 1:
            lanes = ir.Constant(ir.VectorType(_INT32, LANES * 2 // len(parts)), list(range(LANES * 2 // len(parts))))
            parts = [builder.shuffle_vector(*two, lanes) for two in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def load(self, start: Any, index: Any, kind: ir.Type, size: int = 0) -> Any:
        """What is at an address, so many elements further."""
        size = size or (8 if kind == _INT64 else 4)
        address = self.builder.add(start, self.builder.mul(index, _number(size)))
        return self.builder.load(self.builder.inttoptr(address, ir.PointerType(kind)), align=4)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)
