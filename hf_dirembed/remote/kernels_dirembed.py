"""Packed codes: their bits, and the latents that they stand for, in plain operations that run everywhere.

Codes are trellis coded: those of one width are a stream of bits, and each is looked up by the last 8 bits of the
stream, so that few bits of its own choose among 256 levels (trellis-coded quantisation, Marcellin & Fischer 1990, over
the bitshift trellis of Tseng et al. 2024, "QTIP").

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes_dirembed import (
    BIT_WIDTHS,
    CLASS_BITS,
    CLASS_BLOCK,
    CODEBOOK_SHAPE,
    MAX_CLASSES,
    OCTAVE,
    QUARTER,
    SCALE_BIAS,
    STATE_BITS,
    RowClass,
    TableError,
    code_bytes,
    further_offsets,
)


# The codebook of tables that are too small to have one of their own, trained on Gaussian latents: (4, 256) int8.
_GAUSSIAN_CODEBOOK = """
gecGKMbvDTbU9xVP3v8esusKL9H2Ej/d/Rud5AMlw/ANN9n6GVHjASG97Acrz/QTRd//H6foBinJ8Q421fgWV+MDJb7vCjHT9hNE3PwbrOkGK8z0
EjfZ+hhi5QEhwe0LMNX4F0jg/x+26QcoyvEPO9n9G3/oBCXE7wwy0vYTS+H/IbjsCivO9BA93PoYkuUEJcfxDzfV+RZO4QAdueoILc/2E0Df/Ryh
5wQmxe4MM9f5GFbkBCK77Aouz/QRQNz+HKnqByvI8g431/oWXuEBIsHuDDHV9hRE3v4drucFJ8vyETvc/Rlt5QMjvuwKLtH3FEniASGz6wcrzPMO
PNn6GoEBQvEl4BLGDr4ASfIt4hzaFcIGY/k06ybiFdEHrPk79C3mHNQOvQFU+zLsHtsNxAii+z7tJ90V1A+2AUj1KeUg3xLJA3/1Nu8q4hnOCrX8
SPgt6RrZC8IFWfg56iPbEs8Prf878iXiHdgNwf9M8C7sI9sUxwWV+DvyJuQW0wWzAUj2MOcd1g7ICmz8Nu0f3RjSCrb8QO4p5x3WEMADV/U18CLg
Es0Cpf5B8CrhGdALvgZO9yvpGdkUxwWW+DbpI+Qc0wyz/0TzMu0e3A7HAGH7N+wm3RXNCK8CQ/Qr5hXTD8QDVvU05h/eGMsIo/o17SnnGdIJt/pK
9i/oINkRxQOa3QUxzfQTRuEBJLXxED7P+hts3Qkpv+sXR9v8KLfqCDrO9hZb3QIiyvAQOuAAIavsCTLF+hpb3QcrwuwVQNf3Ip7kBzLU9RFS3QIl
yO8RO9n5HqntCjDJ+hhM2gYqvesTOdT3IKfmAjLK8g9R3wAewOwOM9j7HYzpByvK+RhZ1gIitekPN9L0Hn/jAzLL8RBP2vwevOsJLtf6G17pBii+
9RI91AIjqeUPNM3yHVfhASy+7w1D2/4dtOgJL9X2GlTiASS88hI91QAgp+UMNM7xGkncACvB7Ao61foasOUFKdD1FUbkAia68A82zf8gieAMKsbu
Fk3Y/Se07gw91vkU1SQu3CPcHtILrPFX4z7jIdcbxxNS7irlLeAa0xCw9FDqU9kgzha2FUbuNOQf0RTGCZfzVeY/wxnVHcANQu0z4BvNDK4FeOxO
7UXJF7sWvg4z7CvpHsoTrAVs5z7oMMsSyg7HDDzqKuMWzg6u+1vtMuYsxR+uFMEIPOsu3xHUDaAEeugu3yHJFK8RSvAx7BzVFbwNnvdR5z3qKNQf
qhNE70bpHdMXyQmZ7kzuRs4c1BW3CUvxMeYXzRjHBoDmTOk4rhrUGLIINug35BrTDqoGXe5F7lDPHsocqAgw6TTtE8UWnwdw8EffHtMlzReT/zjp
MtkQxwimAGHsT+Ug1RXKIA==
"""
HALF = 0.5  # a level is half a step above the integer that the codebook has
_GROUP = 8  # codes of w bits take w bytes
_CHECKED_BLOCKS = 1 << 14  # of rows, at a time


class Window(NamedTuple):
    """Where in a packed row the state of each code is, (num_codes,) int64 each.

    Attributes:
        byte: The byte that it begins in.
        shift: The bit of this byte.
        mask: Its bits: fewer for the last codes of a width, which have none behind them.
        book: Where the levels of its width begin in the flattened codebook.
    """

    byte: Tensor
    shift: Tensor
    mask: Tensor
    book: Tensor


def sections(bit_allocation: tuple[int, ...]) -> Iterator[tuple[int, slice, int]]:
    """The codes of each width that has any: the width, which codes they are, and the bit that the first begins at.

    Example:
        >>> list(sections((2, 0, 3, 0)))
        [(4, slice(0, 2, None), 0), (2, slice(2, 5, None), 8)]
    """
    first = bit = 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        if count:
            yield width, slice(first, first + count), bit
        first, bit = first + count, bit + count * width


def windows(bit_allocation: tuple[int, ...], device: torch.device | None = None) -> Window:
    """Where in a packed row the state of each code is.

    The bits of a code are the lowest of its state, those of the codes behind it are above: so the stream runs from the
    weakest code to the strongest, as its first ones have least to choose from.

    Args:
        bit_allocation: How many codes have 4, 3, 2 and 1 bits.
        device: Where to put it.

    Example:
        >>> window = windows((1, 0, 2, 0))
        >>> window.byte.tolist(), window.shift.tolist(), window.mask.tolist(), window.book.tolist()
        ([0, 0, 0], [0, 4, 6], [15, 15, 3], [0, 512, 512])
    """
    bits, masks, books = [], [], []
    for width, codes, first in sections(bit_allocation):
        begins = torch.arange(codes.stop - codes.start) * width
        left = (begins[-1] + width - begins).clamp(max=STATE_BITS)
        bits.append(first + begins)
        masks.append((1 << left) - 1)
        books.append(torch.full_like(begins, BIT_WIDTHS.index(width) << STATE_BITS))
    bit = torch.cat(bits)
    return Window(*(each.to(device) for each in (bit >> 3, bit & 7, torch.cat(masks), torch.cat(books))))


def pack(symbols: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Packs symbols into bytes, the widest first, bit after bit.

    Args:
        symbols: (n, num_codes) uint8; that of a code of w bits is below 2^w.
        bit_allocation: How many codes have 4, 3, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Raises:
        TableError: If a symbol does not fit into its bits.

    Example:
        >>> packed = pack(torch.tensor([[15, 5, 1, 0]], dtype=torch.uint8), (1, 1, 0, 2))
        >>> packed.tolist(), trellis_states(packed, (1, 1, 0, 2)).tolist()
        ([[223, 0]], [[15, 5, 1, 0]])
    """
    num_bytes = code_bytes(bit_allocation)
    packed = torch.zeros(len(symbols), num_bytes + _GROUP, dtype=torch.uint8, device=symbols.device)
    for width, codes, first in sections(bit_allocation):
        section = symbols[:, codes]
        if section.numel() and (largest := int(section.max())) >> width:
            raise TableError(f"symbol {largest} does not fit into {width} bits: quantise the codes again")

        # Eight codes make a word of as many bytes as one has bits, and one more where they begin within a byte.
        count = codes.stop - codes.start
        groups = F.pad(section, (0, -count % _GROUP)).view(len(symbols), -(-count // _GROUP), _GROUP).long()
        words = (groups << (torch.arange(_GROUP, device=symbols.device) * width)).sum(dim=2) << (first % 8)
        for byte in range(width + (first % 8 > 0)):
            begin = first // 8 + byte
            number = min(words.shape[1], -(-(num_bytes + _GROUP - begin) // width))
            target = packed[:, begin : begin + (number - 1) * width + 1 : width]
            target |= ((words[:, :number] >> (8 * byte)) & 255).to(torch.uint8)
    return packed[:, :num_bytes].contiguous()


def trellis_states(packed: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """The state of each code: its own symbol in the lowest bits, those of the codes behind it above.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many codes have 4, 3, 2 and 1 bits.

    Returns:
        (..., num_codes) int32, below 256.

    Example:
        >>> trellis_states(torch.tensor([[0b11_10_01]], dtype=torch.uint8), (0, 0, 3, 0)).tolist()
        [[57, 14, 3]]
    """
    return _states(packed, windows(bit_allocation, packed.device))


def _states(packed: Tensor, window: Window) -> Tensor:
    # In 32 bits, as exporters to ONNX have no shifts of bytes. A row's last byte has no next, whose bits none needs.
    wide = packed.int()
    after = (window.byte + 1).clamp(max=packed.shape[-1] - 1)
    words = wide[..., window.byte] | (wide[..., after] << 8)
    return torch.bitwise_right_shift(words, window.shift.int()) & window.mask.int()


def unpack(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor) -> Tensor:
    """The levels of packed rows, less ½.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many codes have 4, 3, 2 and 1 bits.
        codebook: (4, 256) int8, the levels of the trellis's states at 4, 3, 2 and 1 bits, less ½.

    Returns:
        (..., num_codes) int8.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
        >>> unpack(torch.tensor([[0b11_10_01]], dtype=torch.uint8), (0, 0, 3, 0), codebook).tolist()
        [[-71, -114, -125]]
    """
    window = windows(bit_allocation, packed.device)
    return codebook.flatten()[_states(packed, window) + window.book]


def unpack_levels(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The half-integers that packed rows stand for, (..., num_codes): [`unpack`] and ½.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
        >>> unpack_levels(torch.tensor([[7]], dtype=torch.uint8), (1, 0, 0, 0), codebook, torch.float32).tolist()
        [[-120.5]]
    """
    return unpack(packed, bit_allocation, codebook).to(dtype) + HALF


def gaussian_codebook(device: torch.device) -> Tensor:
    """The codebook of tables that have none of their own, (4, 256) int8.

    Example:
        >>> codebook = gaussian_codebook(torch.device("cpu"))
        >>> tuple(codebook.shape), codebook.amin(dim=1).tolist()
        ((4, 256), [-127, -127, -119, -128])
    """
    return _GAUSSIAN.to(device)


_GAUSSIAN = torch.tensor(list(base64.b64decode(_GAUSSIAN_CODEBOOK)), dtype=torch.uint8, device="cpu")
_GAUSSIAN = _GAUSSIAN.view(torch.int8).view(CODEBOOK_SHAPE)


def code_steps(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What half-integers are multiplied by to be in the unit of their latents.

    Args:
        exponents: (num_codes,) int8, in eighths of a power of two.
        dtype: The dtype of the steps.

    Example:
        >>> code_steps(torch.tensor([0, -8, 4], dtype=torch.int8), torch.float64).tolist()
        [1.0, 0.5, 1.4142135623730951]
    """
    wide = exponents.to(torch.promote_types(dtype, torch.float32))
    return _root_power(wide, OCTAVE).to(dtype)


def _root_power(exponents: Tensor, root: int) -> Tensor:
    """2^(exponents / root) of whole numbers in a float dtype, rounded once.

    Of fractions, `torch.exp2` rounds otherwise at a tensor's end, and on each device; of whole numbers it is exact.
    """
    octaves = (exponents / root).floor()
    parts, whole = exponents - root * octaves, torch.exp2(octaves)
    power = whole
    for part in range(1, root):
        power = torch.where(parts == part, whole * 2 ** (part / root), power)
    return power


def pack_rows(classes: Tensor, scales: Tensor) -> Tensor:
    """What is stored of each row beside its codes: (num_rows,) uint8, its class and the exponent of its scale.

    Args:
        classes: (num_rows,) integers below 4.
        scales: (num_rows,) non-negative floats: they are rounded to the nearest that can be stored.

    Example:
        >>> rows = pack_rows(torch.tensor([0, 3]), torch.tensor([1.0, 2.1]))
        >>> rows.tolist(), row_scales(rows).tolist(), row_classes(rows).tolist()
        ([128, 147], [1.0, 2.0], [0, 3])
    """
    exponents = (QUARTER * scales.double().clamp_min(2.0**-SCALE_BIAS).log2()).round() + SCALE_BIAS
    largest = (256 >> CLASS_BITS) - 1
    return (exponents.clamp(0, largest).to(torch.uint8) << CLASS_BITS) | classes.to(torch.uint8)


def row_classes(rows: Tensor) -> Tensor:
    """The class of each row, of what [`pack_rows`] made, in its shape; int32."""
    return rows.int() & (MAX_CLASSES - 1)


def row_scales(rows: Tensor) -> Tensor:
    """The scale of each row, of what [`pack_rows`] made, in its shape; float32."""
    return _root_power(((rows.int() >> CLASS_BITS) - SCALE_BIAS).float(), QUARTER)


def count_classes(rows: Tensor, num_classes: int) -> Tensor:
    """(blocks, num_classes - 1) int32, how many rows of each class but the first come before each block of 64 rows.

    Args:
        rows: (num_rows,) uint8, as [`pack_rows`] makes it.
        num_classes: How many classes there are.

    Example:
        >>> count_classes(pack_rows(torch.tensor([0, 1, 2, 1] * 20), torch.ones(80)), 3).tolist()
        [[0, 0], [32, 16]]
    """
    classes = F.pad(row_classes(rows), (0, -len(rows) % CLASS_BLOCK)).view(-1, CLASS_BLOCK, 1)
    sums = (classes == torch.arange(1, num_classes, device=rows.device)).sum(dim=1).cumsum(dim=0)
    return F.pad(sums, (0, 0, 1, 0))[:-1].int()


class PackedRows(NamedTuple):
    """The codes of all rows of a table, with all that it takes to read their latents.

    Attributes:
        weight: (num_rows, bytes) uint8, the first bytes of every row.
        codebook: (4, 256) int8, as [`unpack`] takes it.
        latents: (codes of all classes,) int32, the latent that each code adds to.
        steps: (codes of all classes,) int8, the exponents of their steps, as [`code_steps`] takes them.
        rows: (num_rows,) uint8, class and scale of each, as [`pack_rows`] makes it.
        classes: The classes of the rows.
        rank: The number of latents.
        class_counts: (blocks, classes - 1) int32, as [`count_classes`] makes it; None where there is one class.
        further: (bytes,) uint8, the bytes of a class's rows behind those in `weight`, class after class.
    """

    weight: Tensor
    codebook: Tensor
    latents: Tensor
    steps: Tensor
    rows: Tensor
    classes: tuple[RowClass, ...]
    rank: int
    class_counts: Tensor | None = None
    further: Tensor | None = None

    def contiguous(self) -> PackedRows:
        """The same with every tensor contiguous in memory."""
        tensors = {name: each.contiguous() for name, each in self._asdict().items() if isinstance(each, Tensor)}
        return self._replace(**cast(Any, tensors))

    def check(self) -> None:
        """Refuses tensors that are not what the classes make them.

        Raises:
            TableError: If shapes or dtypes do not fit, a latent's number is none, or the classes are miscounted.
        """
        num_codes = sum(each.num_codes for each in self.classes)
        fits = (
            (self.weight.dtype, self.weight.shape[1:]) == (torch.uint8, (self.classes[0].num_bytes,))
            and (self.codebook.dtype, self.codebook.shape) == (torch.int8, CODEBOOK_SHAPE)
            and (self.latents.dtype, self.latents.shape) == (torch.int32, (num_codes,))
            and (self.steps.dtype, self.steps.shape) == (torch.int8, (num_codes,))
            and (self.rows.dtype, self.rows.shape) == (torch.uint8, self.weight.shape[:1])
        )
        if not fits or not 0 <= int(self.latents.min()) <= int(self.latents.max()) < self.rank:
            raise TableError("packed codes do not fit their classes: pass the tensors of one module")

        several = len(self.classes) > 1
        if (self.class_counts is not None) != several or (self.further is not None) != several:
            raise TableError("packed codes do not fit their classes: pass the tensors of one module")
        if self.class_counts is not None and self.further is not None:
            blocks = -(-len(self.weight) // CLASS_BLOCK)
            room = further_offsets(self.classes)[-1]
            fits = (self.class_counts.dtype, self.class_counts.shape) == (
                torch.int32,
                (blocks, len(self.classes) - 1),
            ) and (self.further.dtype, self.further.shape) == (torch.uint8, (room,))
            if not fits:
                raise TableError("packed codes do not fit their classes: pass the tensors of one module")
        self._check_rows()

    def _check_rows(self) -> None:
        """Kernels find the bytes of rows by their classes and the counts of these, and by nothing else."""
        before = torch.zeros(len(self.classes) - 1, dtype=torch.int32, device=self.rows.device)
        numbers = torch.arange(1, len(self.classes), device=self.rows.device)
        for first, rows in enumerate(self.rows.split(CLASS_BLOCK * _CHECKED_BLOCKS)):
            classes = row_classes(rows)
            if len(classes) and int(classes.max()) >= len(self.classes):
                raise TableError("packed codes name a class of rows that there is not: compress the model again")
            if self.class_counts is not None:
                stated = self.class_counts[first * _CHECKED_BLOCKS :][:_CHECKED_BLOCKS]
                if not torch.equal(count_classes(rows, len(self.classes)) + before, stated):
                    raise TableError("packed codes miscount the rows of a class: compress the model again")
                before = before + (classes.unsqueeze(-1) == numbers).sum(dim=0).int()
        if before.tolist() != [each.rows for each in self.classes[1:]]:
            raise TableError("packed codes miscount the rows of a class: compress the model again")

    def of_class(self, number: int) -> tuple[RowClass, Tensor, Tensor]:
        """A class, the latents that its codes add to, (its codes,) int64, and the exponents of their steps."""
        first = sum(each.num_codes for each in self.classes[:number])
        codes = slice(first, first + self.classes[number].num_codes)
        return self.classes[number], self.latents[codes].long(), self.steps[codes]

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The class of rows, (...,), and how many rows of this class come before each; 0 for the first class."""
        assert self.class_counts is not None
        block, own = ids // CLASS_BLOCK, row_classes(self.rows[ids])
        near = block.unsqueeze(-1) * CLASS_BLOCK + torch.arange(CLASS_BLOCK, device=ids.device)
        alike = row_classes(self.rows[near.clamp(max=len(self.rows) - 1)]) == own.unsqueeze(-1)
        before = (alike & (near < ids.unsqueeze(-1))).sum(dim=-1)
        counts = F.pad(self.class_counts, (1, 0))[block].gather(-1, own.long().unsqueeze(-1)).squeeze(-1)
        return own, torch.where(own > 0, counts + before, 0)

    def bytes_of(self, ids: Tensor, number: int, slots: Tensor) -> Tensor:
        """All bytes of rows of one class, (..., its bytes): ids and slots are (...,)."""
        of_every = F.embedding(ids, self.weight)
        own = self.classes[number].num_bytes - self.weight.shape[1]
        if not own:
            return of_every
        assert self.further is not None
        begin = further_offsets(self.classes)[number]
        numbers = begin + slots.unsqueeze(-1).long() * own + torch.arange(own, device=ids.device)
        return torch.cat([of_every, self.further[numbers]], dim=-1)

    def read(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The latents of rows, (...,) row numbers to (..., rank), in the unit of their steps.

        Every class is read for every row, so that no shape depends on the data.
        """
        latents = self._of_bytes(F.embedding(ids, self.weight), 0, dtype)
        if self.class_counts is not None:
            classes, slots = self.place(ids)
            for number in range(1, len(self.classes)):
                if self.classes[number].rows:
                    mine = classes == number
                    found = self._of_bytes(self.bytes_of(ids, number, torch.where(mine, slots, 0)), number, dtype)
                    latents = torch.where(mine.unsqueeze(-1), found, latents)
        return latents * row_scales(self.rows[ids]).to(dtype).unsqueeze(-1)

    def _of_bytes(self, packed: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """What the bytes of rows of one class stand for."""
        each, latents, exponents = self.of_class(number)
        levels = unpack_levels(packed, each.bit_allocation, self.codebook, dtype) * code_steps(exponents, dtype)
        return levels.new_zeros(*levels.shape[:-1], self.rank).index_add(-1, latents, levels)
