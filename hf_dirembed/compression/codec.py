"""Integer codes of one or two layers, and the decoder that they are fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout_dirembed import BIT_WIDTHS, code_bytes
from ..matrix_dirembed import HALF
from ..packing_dirembed import pack, sections, unpack
from .decoder import DecoderFit, DecoderStorage, StoredDecoder
from .importance import Sample
from .quantisation import Allocation, Quantisers
from .table import Table
from .trellis import Codebooks, quantise


_WORTHWHILE = 0.005  # the fall of the error that makes another round of training worth it


@dataclass
class Codec:
    """What codes stand for: row ŷ = z D + b, z half-integers, of which refined rows have more.

    Attributes:
        base: The latents of every row.
        refinement: The further latents of refined rows, if there are any.
        codebooks: Of the latents of fewer than 8 bits.
        decoder: D, (rank of both, dim), in the metric: once it was fitted, what its stored form stands for.
        bias: b, (dim,), in the metric.
        storage: How the decoder is stored.
    """

    base: Allocation
    refinement: Allocation | None
    codebooks: Codebooks
    decoder: Tensor
    bias: Tensor
    storage: DecoderStorage

    @classmethod
    def from_quantisers(
        cls, base: Allocation, quantisers: Quantisers, basis: Tensor, bias: Tensor, storage: DecoderStorage
    ) -> Codec:
        """Starts from the quantisers of the leading latents of a basis, whose steps the decoder takes in."""
        decoder = base.steps(quantisers).to(basis).unsqueeze(1) * basis[:, : base.rank].T
        return cls(base, None, quantisers.codebooks, decoder, bias, storage)

    def refined_by(self, other: Codec) -> Codec:
        """This codec with that of its residual as a second layer."""
        decoder = torch.cat([self.decoder, other.decoder])
        return replace(self, refinement=other.base, decoder=decoder, bias=self.bias + other.bias)

    def encode(self, rows: Tensor, refined: Tensor) -> tuple[Symbols, Tensor]:
        """Finds the symbols of rows, for the decoder there is.

        Args:
            rows: y, (n, dim).
            refined: (n,) which rows have the second layer.

        Returns:
            The symbols, and what they leave of each row, ‖y - ŷ‖², (n,).
        """
        latents = rows.new_zeros(len(rows), len(self.decoder))
        nothing = Symbols(torch.zeros_like(latents, dtype=torch.uint8), latents, refined)
        coded, residual = self._sweep(rows - self.bias, nothing, keep_better=False)
        return coded, residual.square().sum(dim=1)

    def improve(self, rows: Tensor, coded: Symbols) -> tuple[Symbols, Tensor]:
        """Codes rows anew for the decoder there is, from the symbols they have; no row's error rises."""
        rank = self.base.rank
        residual = rows - self.bias - coded.latents[:, :rank] @ self.decoder[:rank]
        residual[coded.refined] -= coded.latents[coded.refined, rank:] @ self.decoder[rank:]
        coded, residual = self._sweep(residual, coded, keep_better=True)
        return coded, residual.square().sum(dim=1)

    def _sweep(self, residual: Tensor, coded: Symbols, keep_better: bool) -> tuple[Symbols, Tensor]:
        """Codes one section of latents after the other, each for what all others leave; with what all then leave."""
        residual, symbols, latents = residual.clone(), coded.symbols.clone(), coded.latents.clone()
        for section, width, of_refined in self._sections():
            has_section = coded.refined.nonzero().squeeze(1) if of_refined else slice(None)
            decoder, left, before = self.decoder[section], residual[has_section], latents[has_section, section]
            gains = decoder.square().sum(dim=1).clamp_min(torch.finfo(decoder.dtype).tiny)
            targets = before + left @ decoder.T / gains
            # The best ones, were the section's rows of the decoder orthogonal.
            found, levels = quantise(targets, gains, self.codebooks.levels, width)
            after = left - (levels - before) @ decoder
            if keep_better:
                better = (after.square().sum(dim=1) < left.square().sum(dim=1)).unsqueeze(1)
                found = torch.where(better, found, symbols[has_section, section])
                levels, after = torch.where(better, levels, before), torch.where(better, after, left)
            symbols[has_section, section], latents[has_section, section] = found, levels
            residual[has_section] = after
        return Symbols(symbols, latents, coded.refined), residual

    def _sections(self) -> Iterator[tuple[slice, int, bool]]:
        first = 0
        for layer, of_refined in ((self.base, False), (self.refinement, True)):
            for count, width in zip(layer.counts if layer else (), BIT_WIDTHS, strict=layer is not None):
                if count:
                    yield slice(first, first + count), width, of_refined
                first += count

    def refit(self, fit: DecoderFit) -> StoredDecoder:
        """Takes over the best decoder for the latents that `fit` has seen, as it is stored."""
        stored = self.storage.round(fit.solve())
        self.decoder = self.storage.in_metric(stored)
        self.bias = fit.bias(self.decoder)
        return stored

    def _fit(self) -> DecoderFit:
        rank, dim = self.decoder.shape
        return DecoderFit(rank, dim, self.decoder.device)

    def _count_in(self, rows: Tensor, coded: Symbols, omega: Tensor, fit: DecoderFit) -> None:
        for chosen, rank in ((coded.refined, len(self.decoder)), (~coded.refined, self.base.rank)):
            fit.add(rows[chosen], coded.latents[chosen, :rank], omega[chosen])

    def train(self, sample: Sample, refined: Tensor, rounds: int) -> None:
        """Fits decoder and codes to each other on a sample, in turn, while it helps.

        Args:
            sample: The rows.
            refined: (n,) which of them have the second layer.
            rounds: The most rounds.
        """
        coded, errors = self.encode(sample.rows, refined)
        before = errors.double() @ sample.omega.double()
        for left in reversed(range(rounds)):
            fit = self._fit()
            self._count_in(sample.rows, coded, sample.omega, fit)
            self.refit(fit)
            if not left:  # what the sample's codes would be now, nobody asks
                break
            coded, errors = self.improve(sample.rows, coded)
            after = errors.double() @ sample.omega.double()
            if after > (1 - _WORTHWHILE) * before:
                break
            before = after

    def encode_table(self, table: Table, omega: Tensor, refined: Tensor) -> tuple[PackedTable, Tensor]:
        """Codes all rows, and fits the decoder to them.

        Args:
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            refined: (num_rows,) which rows have the second layer.

        Returns:
            The codes, and what they leave of each row, ‖y - ŷ‖², (num_rows,).
        """
        packed, errors, fit = PackedTable.empty(self, refined), torch.empty_like(omega), self._fit()
        for part, rows in table.chunks():
            coded, left = self.encode(rows, refined[part])
            self._count_in(rows, coded, omega[part].float(), fit)
            packed.put(part, coded)
            errors[part] = left.to(errors)
        self.refit(fit)
        return packed, errors

    def improve_table(self, table: Table, omega: Tensor, packed: PackedTable) -> StoredDecoder:
        """Codes all rows anew for the decoder there is, and fits that to them once more.

        Args:
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            packed: The codes that the rows have; they change.

        Returns:
            The decoder as it is stored.
        """
        fit = self._fit()
        for part, rows in table.chunks():
            coded, _ = self.improve(rows, packed.get(part))
            self._count_in(rows, coded, omega[part].float(), fit)
            packed.put(part, coded)
        return self.refit(fit)


@dataclass(frozen=True)
class Symbols:
    """Rows as symbols, and as the latents that these stand for.

    Attributes:
        symbols: (n, rank of both layers) uint8; zero for those that a row does not have.
        latents: (n, rank of both layers) half-integers; zero for those that a row does not have.
        refined: (n,) which rows have the second layer.
    """

    symbols: Tensor
    latents: Tensor
    refined: Tensor


@dataclass(frozen=True)
class PackedTable:
    """The symbols of all rows, packed as they are stored; made once, so that chunk after chunk needs no more memory.

    Attributes:
        codec: What they are symbols of.
        refined: (num_rows,) which rows have the second layer.
        base: (num_rows, bytes) uint8.
        further: (refined rows, bytes) uint8.
    """

    codec: Codec
    refined: Tensor
    base: Tensor
    further: Tensor

    @classmethod
    def empty(cls, codec: Codec, refined: Tensor) -> PackedTable:
        """Room for the symbols of rows, (num_rows,) of which are `refined`."""
        base = refined.new_zeros(len(refined), code_bytes(codec.base.counts), dtype=torch.uint8)
        further_bytes = code_bytes(codec.refinement.counts) if codec.refinement else 0
        return cls(codec, refined, base, base.new_zeros(int(refined.sum()), further_bytes))

    def refining(self, refined: Tensor) -> PackedTable:
        """The same with the second layer of fewer rows."""
        return replace(self, refined=refined, further=self.further[refined[self.refined]])

    def _further(self, part: slice) -> Tensor:
        first = int(self.refined[: part.start].sum())
        return self.further[first : first + int(self.refined[part].sum())]

    def put(self, part: slice, coded: Symbols) -> None:
        """Packs the symbols of some rows."""
        symbols, rank = coded.symbols, self.codec.base.rank
        self.base[part] = pack(symbols[:, :rank], self.codec.base.counts)
        if self.codec.refinement is not None:
            self._further(part).copy_(pack(symbols[coded.refined, rank:], self.codec.refinement.counts))

    def get(self, part: slice) -> Symbols:
        """The symbols of some rows, with their latents."""
        codec, refined = self.codec, self.refined[part]
        symbols = torch.zeros(len(refined), len(codec.decoder), dtype=torch.uint8, device=refined.device)
        latents = torch.zeros_like(symbols, dtype=torch.float32)
        layers = [(self.base[part], codec.base, torch.ones_like(refined))]
        if codec.refinement is not None:
            layers.append((self._further(part), codec.refinement, refined))
        first = 0
        for packed, allocation, rows in layers:
            of_layer = slice(first, first := first + allocation.rank)
            found = torch.cat([each for _, each in sections(packed, allocation.counts)], dim=1)
            symbols[rows, of_layer] = found.to(torch.uint8)
            latents[rows, of_layer] = unpack(packed, allocation.counts, codec.codebooks.stored()).float() + HALF
        return Symbols(symbols, latents, refined)

    def tensors(self, decoder: StoredDecoder) -> dict[str, Tensor]:
        """What files hold, by name: the codes of both layers, the codebook, and their decoder."""
        tensors = {
            "weight": self.base,
            "codebook_weight": self.codec.codebooks.stored(),
            "decoder_weight": decoder.weight,
            "exponent_weight": decoder.exponents,
        }
        if self.codec.refinement is not None:
            tensors["refinement_weight"] = self.further
            tensors["refined_rows_weight"] = self.refined.nonzero().squeeze(1).to(torch.int32)
        return tensors
