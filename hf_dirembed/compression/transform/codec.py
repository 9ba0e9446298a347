"""Integer codes of one or two stages, and the decoder that they are fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS, OCTAVE, code_bytes
from ...remote.kernels_dirembed import pack, refinement_steps, sections, unpack_levels
from ..row_weights import Sample
from ..table import Table
from .decoder import DecoderFit, DecoderStorage, StoredDecoder
from .quantisation import Allocation, Quantisers
from .trellis import Codebooks, quantise


@dataclass(frozen=True)
class Stage:
    """Codes that the same rows have: which latents they are of, and what they are worth.

    Attributes:
        allocation: Their bits.
        latents: (its rank,) int64, the latent of each code; or a slice, of as many leading ones.
        exponents: (its rank,) int8, the step of each, in eighths of a power of two, as to the decoder.
    """

    allocation: Allocation
    latents: Tensor | slice
    exponents: Tensor

    @classmethod
    def leading(cls, allocation: Allocation, device: torch.device) -> Stage:
        """Makes a stage of the first latents, whose steps the decoder takes in."""
        exponents = torch.zeros(allocation.rank, dtype=torch.int8, device=device)
        return cls(allocation, slice(allocation.rank), exponents)

    @classmethod
    def of_steps(cls, allocation: Allocation, latents: Tensor, steps: Tensor) -> Stage:
        """Makes a stage whose steps are the storable ones nearest to some, (its rank,)."""
        exponents = (OCTAVE * steps.log2()).round().clamp(-127, 127)
        return cls(allocation, latents, exponents.to(torch.int8))

    @property
    def steps(self) -> Tensor:
        """(its rank,) float32, what a half-integer of each is in its latent's unit."""
        return refinement_steps(self.exponents, torch.float32)

    def sections(self) -> Iterator[tuple[int, slice, Tensor | slice]]:
        """Each width that any codes have, with these codes and their latents."""
        first = 0
        for count, width in zip(self.allocation.counts, BIT_WIDTHS, strict=True):
            section, first = slice(first, first + count), first + count
            if count:
                yield width, section, section if isinstance(self.latents, slice) else self.latents[section]


@dataclass
class Codec:
    """What codes stand for: row ŷ = z D + b. Half-integers are the latents z, and finer ones add to some of them.

    Attributes:
        base: The codes that every row has, of the leading latents.
        refinement: The further codes of refined rows, if there are any.
        codebooks: What codes of fewer than 8 bits stand for.
        decoder: D, (rank, dim), in the metric: once it was fitted, what its stored form stands for.
        bias: b, (dim,), in the metric.
        storage: How the decoder is stored.
    """

    base: Allocation
    refinement: Stage | None
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

    def refined_by(self, stage: Stage, further: Tensor) -> Codec:
        """This codec with a second stage, and with the decoder's rows, (n, dim), of latents that the first has not."""
        return replace(self, refinement=stage, decoder=torch.cat([self.decoder, further]))

    @property
    def stages(self) -> list[Stage]:
        """The codes of every row, then those of refined rows, if there are any."""
        base = Stage.leading(self.base, self.decoder.device)
        return [base] if self.refinement is None else [base, self.refinement]

    @property
    def num_codes(self) -> int:
        """How many codes a refined row has."""
        return self.base.rank + (self.refinement.allocation.rank if self.refinement else 0)

    def latents(self, levels: Tensor) -> Tensor:
        """The latents of rows, (n, rank), from the levels of all their codes, (n, codes)."""
        latents = F.pad(levels[:, : self.base.rank], (0, len(self.decoder) - self.base.rank))
        if self.refinement is not None:
            latents[:, self.refinement.latents] += levels[:, self.base.rank :] * self.refinement.steps
        return latents

    def encode(self, rows: Tensor, refined: Tensor) -> Symbols:
        """Finds the symbols of rows, (n, dim), of which some are `refined`, (n,), for the decoder there is."""
        levels = rows.new_zeros(len(rows), self.num_codes)
        nothing = Symbols(torch.zeros_like(levels, dtype=torch.uint8), levels, refined)
        return self._sweep(rows, nothing, keep_better=False)

    def improve(self, rows: Tensor, coded: Symbols) -> Symbols:
        """Codes rows anew for the decoder there is, from the symbols they have; no row's error rises."""
        return self._sweep(rows, coded, keep_better=True)

    def residual(self, rows: Tensor, coded: Symbols) -> Tensor:
        """What codes leave of rows, y - ŷ, (n, dim)."""
        return rows - self.bias - self.latents(coded.levels) @ self.decoder

    def _sweep(self, rows: Tensor, coded: Symbols, keep_better: bool) -> Symbols:
        """Codes one section after the other, each for what all others leave.

        The error is ‖y - b‖² - 2 z·t + z G zᵀ with t = (y - b) Dᵀ and G = D Dᵀ: no row has to be decoded.
        """
        symbols, levels = coded.symbols.clone(), coded.levels.clone()
        sums, gram = (rows - self.bias) @ self.decoder.T, self.decoder @ self.decoder.T
        latents, first = self.latents(levels), 0

        rows_of_stage: list[slice | Tensor] = [slice(None), coded.refined.nonzero().squeeze(1)]
        for stage, with_stage in zip(self.stages, rows_of_stage, strict=False):
            sums, latents = sums[with_stage], latents[with_stage]
            for width, section, named in stage.sections():
                codes = with_stage, slice(first + section.start, first + section.stop)
                steps = stage.steps[section]
                columns = gram[:, named]
                slopes = (sums[:, named] - latents @ columns) * steps
                curvature = columns[named] * torch.outer(steps, steps)
                gains = curvature.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)

                # The codes that would be best if the section's rows of the decoder were orthogonal.
                before, found_before = levels[codes], symbols[codes]
                found, after = quantise(before + slopes / gains, gains, self.codebooks.levels, width)
                moves = after - before

                # A row whose error would not fall keeps its codes.
                if keep_better:
                    better = (moves * (moves @ curvature - 2 * slopes)).sum(dim=1, keepdim=True) < 0
                    found, moves = torch.where(better, found, found_before), moves * better

                symbols[codes], levels[codes] = found, before + moves
                latents[:, named] += moves * steps
            first += stage.allocation.rank
        return Symbols(symbols, levels, coded.refined)

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
        refined, others = coded.refined, ~coded.refined
        fit.add(rows[refined], self.latents(coded.levels[refined]), omega[refined])
        fit.add(rows[others], coded.levels[others, : self.base.rank], omega[others])

    def train(self, sample: Sample, refined: Tensor) -> None:
        """Fits the decoder to the codes of a sample, of which some rows are `refined`, (n,)."""
        fit = self._fit()
        self._count_in(sample.rows, self.encode(sample.rows, refined), sample.omega, fit)
        self.refit(fit)

    def encode_table(self, table: Table, omega: Tensor, refined: Tensor) -> tuple[PackedTable, Tensor]:
        """Codes all rows, and fits the decoder to them.

        Args:
            table: The rows y.
            omega: (num_rows,) what an error of each counts.
            refined: (num_rows,) which rows have the second stage.

        Returns:
            The codes, and what they leave of each row, ‖y - ŷ‖², (num_rows,).
        """
        packed, errors, fit = PackedTable.empty(self, refined), torch.empty_like(omega), self._fit()
        for part, rows in table.chunks():
            coded = self.encode(rows, refined[part])
            self._count_in(rows, coded, omega[part].float(), fit)
            packed.put(part, coded)
            errors[part] = self.residual(rows, coded).square().sum(dim=1).to(errors)
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
            coded = self.improve(rows, packed.get(part))
            self._count_in(rows, coded, omega[part].float(), fit)
            packed.put(part, coded)
        return self.refit(fit)


@dataclass(frozen=True)
class Symbols:
    """Rows as symbols, and as the levels that these stand for.

    Attributes:
        symbols: (n, codes of both stages) uint8; zero for those that a row does not have.
        levels: (n, codes of both stages) half-integers; zero for those that a row does not have.
        refined: (n,) which rows have the second stage.
    """

    symbols: Tensor
    levels: Tensor
    refined: Tensor


@dataclass(frozen=True)
class PackedTable:
    """The symbols of all rows, packed as they are stored; made once, so that chunk after chunk needs no more memory.

    Attributes:
        codec: What they are symbols of.
        refined: (num_rows,) which rows have the second stage.
        base: (num_rows, bytes) uint8.
        further: (refined rows, bytes) uint8.
    """

    codec: Codec
    refined: Tensor
    base: Tensor
    further: Tensor

    @classmethod
    def empty(cls, codec: Codec, refined: Tensor) -> PackedTable:
        """Makes room for the symbols of all rows; `refined`, (num_rows,), says which have the second stage."""
        base = refined.new_zeros(len(refined), code_bytes(codec.base.counts), dtype=torch.uint8)
        further_bytes = code_bytes(codec.refinement.allocation.counts) if codec.refinement else 0
        return cls(codec, refined, base, base.new_zeros(int(refined.sum()), further_bytes))

    def refining(self, refined: Tensor) -> PackedTable:
        """Keeps the second stage of fewer rows, `refined`, (num_rows,); the first stage stays as it is."""
        return replace(self, refined=refined, further=self.further[refined[self.refined]])

    def _further(self, part: slice) -> Tensor:
        first = int(self.refined[: part.start].sum())
        return self.further[first : first + int(self.refined[part].sum())]

    def _packed(self, part: slice) -> list[tuple[Tensor, Stage, Tensor]]:
        """The packed codes of some rows, stage by stage, with which of the rows have them."""
        refined = self.refined[part]
        packed, with_stage = [self.base[part], self._further(part)], [torch.ones_like(refined), refined]
        return list(zip(packed, self.codec.stages, with_stage, strict=False))

    def put(self, part: slice, coded: Symbols) -> None:
        """Packs the symbols of some rows."""
        first = 0
        for packed, stage, with_stage in self._packed(part):
            of_stage = slice(first, first := first + stage.allocation.rank)
            packed.copy_(pack(coded.symbols[with_stage, of_stage], stage.allocation.counts))

    def get(self, part: slice) -> Symbols:
        """The symbols of some rows, with their levels."""
        refined, codebook = self.refined[part], self.codec.codebooks.stored()
        symbols = torch.zeros(len(refined), self.codec.num_codes, dtype=torch.uint8, device=refined.device)
        levels, first = torch.zeros_like(symbols, dtype=torch.float32), 0
        for packed, stage, with_stage in self._packed(part):
            of_stage, counts = slice(first, first := first + stage.allocation.rank), stage.allocation.counts
            found = torch.cat([each for _, each in sections(packed, counts)], dim=1)
            symbols[with_stage, of_stage] = found.to(torch.uint8)
            levels[with_stage, of_stage] = unpack_levels(packed, counts, codebook, levels.dtype)
        return Symbols(symbols, levels, refined)

    def tensors(self, decoder: StoredDecoder) -> dict[str, Tensor]:
        """What files hold, by name: the codes of both stages, the codebook, and their decoder."""
        tensors = {
            "weight": self.base,
            "codebook_weight": self.codec.codebooks.stored(),
            "decoder_weight": decoder.weight,
            "exponent_weight": decoder.exponents,
        }
        if self.codec.refinement is not None:
            tensors["refinement_weight"] = self.further
            tensors["refined_rows_weight"] = self.refined.nonzero().squeeze(1).to(torch.int32)
            tensors["refined_latents_weight"] = torch.as_tensor(self.codec.refinement.latents).to(torch.int32)
            tensors["refinement_exponent_weight"] = self.codec.refinement.exponents
        return tensors
