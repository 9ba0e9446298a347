"""The codes of all rows while codes and decoder are fitted to each other, and as files hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...progress import Progress
from ...remote.codes_dirembed import code_bytes
from ...remote.kernels_dirembed import count_classes, pack_rows
from ..table import Table
from .codec import Codec, Symbols
from .decoder import StoredDecoder
from .packing import pack_symbols


@dataclass
class RowCodes:
    """The packed codes of all rows of a table, class by class.

    Attributes:
        codec: What they are codes of.
        row_class: (num_rows,) uint8, the class of each row.
        scales: (num_rows,) float32, what the latents of each row are multiplied by.
        packed: For each class, (its rows, bytes) uint8.
    """

    codec: Codec
    row_class: Tensor
    scales: Tensor
    packed: list[Tensor]

    @classmethod
    def encode(
        cls, codec: Codec, table: Table, omega: Tensor, row_class: Tensor, progress: Progress | None = None
    ) -> tuple[RowCodes, Tensor, StoredDecoder]:
        """Codes all rows, and fits the decoder to them.

        Args:
            codec: What codes them; its decoder changes.
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            row_class: (num_rows,) uint8, the class of each.
            progress: Is told of the share of the rows that is coded.

        Returns:
            The codes, what they leave of each row, ‖y - ŷ‖², (num_rows,) float64, for the decoder that there was, and
            the decoder that was fitted to them, as it is stored.
        """
        progress = progress or Progress()
        coded, errors, fit = cls.empty(codec, row_class), torch.empty_like(omega), codec.new_fit()
        for part, rows in table.chunks():
            for number, mine, slots in coded._by_class(part):
                found = codec.encode(rows[mine], number)
                coded._put(number, part, mine, slots, found)
                fit.add(rows[mine], codec.latents(found, number), omega[part][mine].float())
                errors[part][mine] = found.errors.to(errors)
            progress.advance(len(rows) / table.num_rows)
        return coded, errors, codec.refit(fit)

    @classmethod
    def empty(cls, codec: Codec, row_class: Tensor) -> RowCodes:
        """Makes room for the codes of all rows, whose classes are `row_class`, (num_rows,) uint8."""
        rows_of = torch.bincount(row_class.long(), minlength=len(codec.classes)).tolist()
        sizes = [code_bytes(each.counts) for each in codec.classes]
        packed = [row_class.new_empty(shape) for shape in zip(rows_of, sizes, strict=True)]
        return cls(codec, row_class, torch.ones(len(row_class), device=row_class.device), packed)

    def improve(
        self, table: Table, omega: Tensor, row_class: Tensor, progress: Progress | None = None
    ) -> tuple[RowCodes, StoredDecoder]:
        """Codes all rows anew for the decoder there is, and fits that to them once more.

        Args:
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            row_class: (num_rows,) uint8, the class of each from now on; these codes have to be forgotten.
            progress: Is told of the share of the rows that is coded.

        Returns:
            The codes, and the decoder as it is stored.
        """
        codec, fit, progress = self.codec, self.codec.new_fit(), progress or Progress()
        coded = RowCodes.empty(codec, row_class)
        for part, rows in table.chunks():
            for number, mine, slots in coded._by_class(part):
                stayed, old = self._of_before(part, number, mine, row_class)
                begun = codec.unpack(old, self.scales[part][mine[stayed]], number)
                if len(old) < len(mine):  # rows that were of another class begin anew
                    begun = begun.merged(codec.encode(rows[mine[~stayed]], number), stayed)

                found = codec.improve(rows[mine], begun, number)
                coded._put(number, part, mine, slots, found)
                fit.add(rows[mine], codec.latents(found, number), omega[part][mine].float())
            progress.advance(len(rows) / table.num_rows)
        return coded, codec.refit(fit)

    def moved(self, table: Table, row_class: Tensor) -> RowCodes:
        """Codes anew, for the decoder there is, the rows alone whose class has changed.

        Args:
            table: The rows y.
            row_class: (num_rows,) uint8, the class of each from now on; these codes have to be forgotten.
        """
        if torch.equal(row_class, self.row_class):
            return self
        coded = RowCodes.empty(self.codec, row_class)
        for part, rows in table.chunks():
            for number, mine, slots in coded._by_class(part):
                stayed, old = self._of_before(part, number, mine, row_class)
                packed, scales = coded.packed[number][slots], self.scales[part][mine]
                packed[stayed] = old
                if len(old) < len(mine):
                    found = self.codec.encode(rows[mine[~stayed]], number)
                    packed[~stayed] = pack_symbols(found.symbols, self.codec.classes[number].counts)
                    scales[~stayed] = found.scales
                coded.scales[part][mine] = scales
        return coded

    def _of_before(self, part: slice, number: int, mine: Tensor, row_class: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows of a class, which were of it before, (n,), and the packed codes of these."""
        was = self.row_class[part]
        first = int((self.row_class[: part.start] == number).sum())
        old = self.packed[number][first : first + int((was == number).sum())]
        return was[mine] == number, old[row_class[part][was == number] == number]

    def _put(self, number: int, part: slice, mine: Tensor, slots: slice, found: Symbols) -> None:
        """Packs what was found of rows of one class."""
        self.packed[number][slots] = pack_symbols(found.symbols, self.codec.classes[number].counts)
        self.scales[part][mine] = found.scales

    def _by_class(self, part: slice) -> Iterator[tuple[int, Tensor, slice]]:
        """Of some rows, those of each class: its number, which rows they are, and where their codes are."""
        for number in range(len(self.codec.classes)):
            mine = (self.row_class[part] == number).nonzero().squeeze(1)
            if len(mine):
                first = int((self.row_class[: part.start] == number).sum())
                yield number, mine, slice(first, first + len(mine))

    def tensors(self, decoder: StoredDecoder) -> dict[str, Tensor]:
        """What files hold, by name: the codes, what they stand for, and their decoder."""
        first, *further = self.packed
        weight = first.new_empty(len(self.row_class), first.shape[1])
        for number, packed in enumerate(self.packed):
            weight[self.row_class == number] = packed[:, : first.shape[1]]
        rows = pack_rows(self.row_class, self.scales)
        tensors = {"weight": weight, "row_weight": rows, **code_tensors(self.codec, decoder)}
        if further:
            tensors["class_counts_weight"] = count_classes(rows, len(self.packed))
            tensors["further_weight"] = torch.cat([packed[:, first.shape[1] :].flatten() for packed in further])
        return tensors


def code_tensors(codec: Codec, decoder: StoredDecoder) -> dict[str, Tensor]:
    """What files hold of codes beside the codes themselves, by name."""
    classes = codec.classes
    codebook = {"codebook_weight": codec.codebooks.stored()} if codec.codebooks.own else {}
    return codebook | {
        "latents_weight": torch.cat([each.latents for each in classes]).to(torch.int32),
        "steps_weight": torch.cat([each.exponents for each in classes]),
        "decoder_weight": decoder.weight,
        "exponent_weight": decoder.exponents,
    }
