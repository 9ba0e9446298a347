"""The packed codes of a table as a lookup in ONNX reads them: one stream of bytes, and small tables of numbers.

A code is read by the 8 bits of its row's stream that begin with its own, so what a lookup must know of each code is
where in a row these bits are and which levels they stand for. Both depend on the class of the row. Codes of all
classes that add to the same latent are given the same slot, so that one matrix product decodes rows of every class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from ..remote.codes_dirembed import STATE_BITS, RowClass
from ..remote.guarded_dirembed import plain
from ..remote.kernels_dirembed import HALF, code_steps, gaussian_codebook, row_scales, windows
from ..remote.matrix_dirembed import CompressedMatrix


STATES = 1 << STATE_BITS
_CHUNK = 1 << 14  # rows whose bytes are moved at a time


def bytes_of(row_class: RowClass) -> int:
    """Bytes of a row in the stream: two at least, as they are read in pairs.

    Example:
        >>> bytes_of(RowClass((0, 0, 4, 0))), bytes_of(RowClass((2, 2, 8, 6)))
        (2, 5)
    """
    return max(2, row_class.num_bytes)


@dataclass(frozen=True)
class RowStream:
    """The bytes of all rows, one row after the other.

    Attributes:
        stream: (bytes,) uint8, and zeros behind them, so that as many can be read from any row as the longest has; or
            (num_rows, bytes) where all rows are of one class.
        begins: (num_rows,) int32, where each row begins; None where all rows are of one class.
        most: How many bytes the longest row has.
    """

    stream: NDArray[numpy.uint8]
    begins: NDArray[numpy.int32] | None
    most: int

    @classmethod
    def of(cls, matrix: CompressedMatrix) -> RowStream:
        """Puts the bytes of each row of a matrix of packed codes together."""
        of_class = [bytes_of(each) for each in matrix.layout.classes]
        classes, most = matrix.row_classes().numpy(), max(of_class)
        ends = numpy.array(of_class)[classes].cumsum()
        begins = ends - numpy.array(of_class)[classes]

        stream = numpy.zeros(int(ends[-1]) + most, dtype=numpy.uint8)
        first_bytes = plain(matrix.weight).numpy()
        for number, row_class in enumerate(matrix.layout.classes):
            mine = (classes == number).nonzero()[0]
            further = matrix.further_bytes(number).numpy() if number else None
            for first in range(0, len(mine), _CHUNK):
                rows = mine[first : first + _CHUNK]
                packed = first_bytes[rows]
                if further is not None:
                    packed = numpy.concatenate([packed, further[first : first + _CHUNK]], axis=1)
                stream[begins[rows, None] + numpy.arange(row_class.num_bytes)] = packed

        if len(of_class) == 1:
            return cls(stream[:-most].reshape(-1, most), None, most)
        return cls(stream, begins.astype(numpy.int32), most)


@dataclass(frozen=True)
class Slots:
    """Where the code of each slot is in rows of each class, and what it stands for; the last slot is that of the bias.

    Attributes:
        latents: (slots - 1,) the latent that each slot adds to, ascending.
        pair: (classes, slots) int32, the pair of bytes that the code is in: bytes n and n + 1 are pair n.
        shift: (classes, slots) uint32, the bit of the pair that it begins at.
        book: (classes, slots) uint32, where what its states stand for begins in `levels`.
        levels: (some codebooks x 256,) float32, what states stand for, in steps; the last codebook has ones.
        steps: (256, slots) float32 as the product and sum of (classes, slots) and (256, 1): see `scales` and `offset`.
        scales: (256, 1) float32, what the latents of a row are multiplied by, by what is stored of it.
        offset: (1, slots) float32, what is added to that: one for the bias.
    """

    latents: NDArray[numpy.int64]
    pair: NDArray[numpy.int32]
    shift: NDArray[numpy.uint32]
    book: NDArray[numpy.uint32]
    levels: NDArray[numpy.float32]
    steps: NDArray[numpy.float32]
    scales: NDArray[numpy.float32]
    offset: NDArray[numpy.float32]

    @classmethod
    def of(cls, matrix: CompressedMatrix) -> Slots:
        """Gives the codes of all classes their slots."""
        rows = matrix.packed_rows()
        of_class = [rows.of_class(number) for number in range(len(rows.classes))]
        latents, places = _places([coded.tolist() for _, coded, _ in of_class])
        shape = len(of_class), len(latents) + 1
        pair, steps = numpy.zeros(shape, numpy.int32), numpy.zeros(shape, numpy.float32)
        shift, book = numpy.zeros(shape, numpy.uint32), numpy.zeros(shape, numpy.uint32)

        # a codebook for each width, and for each number of bits that are left of a state at the end of a width
        books: dict[tuple[int, int], int] = {}
        for number, ((row_class, _, exponents), place) in enumerate(zip(of_class, places, strict=True)):
            window = windows(row_class.bit_allocation)
            pair[number, place] = numpy.minimum(window.byte.numpy(), bytes_of(row_class) - 2)
            shift[number, place] = window.shift.numpy() + 8 * (window.byte.numpy() - pair[number, place])
            keys = zip(window.book.tolist(), window.mask.tolist(), strict=True)
            book[number, place] = [STATES * books.setdefault(key, len(books)) for key in keys]
            steps[number, place] = code_steps(exponents, torch.float32).numpy()

        book[:, -1] = STATES * len(books)
        stored = matrix.codebook_weight
        flat = (gaussian_codebook(torch.device("cpu")) if stored is None else plain(stored)).flatten().numpy() + HALF
        levels = [flat[begin + (numpy.arange(STATES) & mask)] for begin, mask in books]
        return cls(
            latents, pair, shift, book,
            numpy.concatenate([*levels, numpy.ones(STATES)]).astype(numpy.float32),
            steps,
            row_scales(torch.arange(STATES, dtype=torch.int32).to(torch.uint8)).unsqueeze(1).numpy(),
            numpy.eye(1, shape[1], shape[1] - 1, dtype=numpy.float32),
        )  # fmt: skip


def _places(coded: list[list[int]]) -> tuple[NDArray[numpy.int64], list[list[int]]]:
    """Slots for the codes of all classes: the latent of each slot, and the slot of each code.

    Args:
        coded: For each class, the latent that each of its codes adds to.

    Example:
        >>> latents, places = _places([[0, 1], [2, 0, 0]])
        >>> latents.tolist(), places
        ([0, 0, 1, 2], [[0, 2], [3, 0, 1]])
    """
    counts = [Counter(latents) for latents in coded]
    needed = {latent: max(count[latent] for count in counts) for latent in sorted(set().union(*counts))}
    first: dict[int, int] = {}
    slots: list[int] = []
    for latent, number in needed.items():
        first[latent] = len(slots)
        slots += [latent] * number

    # the second code of a latent has the second of its slots
    places = []
    for latents in coded:
        seen: Counter[int] = Counter()
        own = []
        for latent in latents:
            own.append(first[latent] + seen[latent])
            seen[latent] += 1
        places.append(own)
    return numpy.array(slots, dtype=numpy.int64), places
