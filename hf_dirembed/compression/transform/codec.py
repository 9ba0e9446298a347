"""Integer codes of rows of several classes, and the decoder that they are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS, OCTAVE, QUARTER
from ...remote.kernels_dirembed import code_steps, pack_rows, row_scales
from ..row_weights import Sample
from .allocation import Allocation
from .decoder import DecoderFit, DecoderStorage, StoredDecoder
from .packing import unpack_symbols
from .quantisation import Quantisers
from .trellis import Codebooks, quantise


_REACH = 3.5  # standard deviations of a latent that its levels reach: what lies further out is cut off
_BLOCK_ELEMENTS = 1 << 18  # of a block of rows, and of each of their products: small enough for a core's own cache
_SCALE_STEPS = 32  # a row may have a scale of up to 256 times the usual length of its latents


@dataclass(frozen=True)
class ClassCodes:
    """What the codes of rows of one class are.

    Attributes:
        counts: How many have 4, 3, 2 and 1 bits.
        latents: (codes,) int64, the latent that each adds to; no two of one width add to the same.
        exponents: (codes,) int8, the step of each, in eighths of a power of two.
        deviations: (rank,) the standard deviation of each latent in rows of the class, over the scales of the rows.
        left: (rank,) the share of each latent's variance that its codes are expected to leave.
    """

    counts: tuple[int, ...]
    latents: Tensor
    exponents: Tensor
    deviations: Tensor
    left: Tensor

    @classmethod
    def of(cls, allocation: Allocation, quantisers: Quantisers, deviations: Tensor) -> ClassCodes:
        """Chooses the steps of an allocation's codes.

        Args:
            allocation: The bits of each latent.
            quantisers: What has the steps, in standard deviations of a latent.
            deviations: (rank,) the standard deviation of each latent in rows of the class, over the scales of these,
                in the latent's unit.
        """
        named, steps, bits = [], [], allocation.bits.to(deviations.device)
        for index, (_, coded) in enumerate(allocation.codes()):
            latents = coded.to(deviations.device)
            steps.append(quantisers.steps[bits[latents], index, latents] * deviations[latents])
            named.append(latents)
        every = torch.cat(steps)
        exponents = (OCTAVE * every.clamp_min(torch.finfo(every.dtype).tiny).log2()).round().clamp(-127, 127)
        left = quantisers.left[:, : len(bits)].gather(0, bits.unsqueeze(0)).squeeze(0)
        return cls(allocation.counts, torch.cat(named), exponents.to(torch.int8), deviations, left)

    @property
    def num_codes(self) -> int:
        """How many codes a row has."""
        return sum(self.counts)

    @cached_property
    def steps(self) -> Tensor:
        """(codes,) float32, what a half-integer of each is in its latent's unit."""
        return code_steps(self.exponents, torch.float32)

    def scales(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """The scales of rows with some latents, (n, rank), whose errors count `lengths` each, (rank,): (n,)."""
        coded = torch.zeros_like(self.left, dtype=torch.bool).index_fill(0, self.latents, True) & (self.deviations > 0)
        deviations, power = self.deviations[coded], lengths[coded] * self.deviations[coded].square()
        return storable_scales(latents[:, coded] / deviations, power, float(self.left[coded] @ power))

    def sections(self) -> Iterator[tuple[int, slice]]:
        """Each width that any codes have, with these codes."""
        first = 0
        for count, width in zip(self.counts, BIT_WIDTHS, strict=True):
            if count:
                yield width, slice(first, first + count)
            first += count


@dataclass(frozen=True)
class Symbols:
    """Rows of one class as symbols, and as the levels that these stand for.

    Attributes:
        symbols: (n, codes) uint8.
        levels: (n, codes) half-integers.
        scales: (n,) what the latents of each row are multiplied by.
        errors: (n,) float64, what they leave of each row, ‖y - ŷ‖², of the decoder that they were found for.
    """

    symbols: Tensor
    levels: Tensor
    scales: Tensor
    errors: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Symbols]) -> Symbols:
        """The rows of several, one after the other."""
        names = ("symbols", "levels", "scales", "errors")
        return parts[0] if len(parts) == 1 else cls(*(torch.cat([getattr(each, n) for each in parts]) for n in names))

    def split(self, size: int) -> list[Symbols]:
        """Views of so many rows each."""
        each = (self.symbols.split(size), self.levels.split(size), self.scales.split(size), self.errors.split(size))
        return [Symbols(*parts) for parts in zip(*each, strict=True)]

    def merged(self, others: Symbols, mine: Tensor) -> Symbols:
        """These rows and others in one order: `mine`, (n,), says which of all rows are these."""
        both = ((getattr(each, name) for each in (self, others)) for name in ("symbols", "levels", "scales", "errors"))
        merged = []
        for own, other in both:
            every = own.new_empty(len(mine), *own.shape[1:])
            every[mine], every[~mine] = own, other.to(own.dtype)
            merged.append(every)
        return Symbols(*merged)


@dataclass
class Codec:
    """What codes stand for: row ŷ = s z D + b, and each code adds its level, times its step, to one of the latents z.

    The scale s of a row leaves latents that are all of one size, whatever the row's length.

    Attributes:
        classes: The codes of rows of each class.
        codebooks: The levels of the trellis's states.
        decoder: D, (rank, dim), in the metric: once it was fitted, what its stored form stands for.
        bias: b, (dim,), in the metric.
        storage: How the decoder is stored.
    """

    classes: Sequence[ClassCodes]
    codebooks: Codebooks
    decoder: Tensor
    bias: Tensor
    storage: DecoderStorage

    @property
    def rank(self) -> int:
        """The number of latents."""
        return len(self.decoder)

    def latents(self, found: Symbols, number: int) -> Tensor:
        """The latents of rows of a class, (n, rank), times their scales."""
        return self._sums(found.levels, self.classes[number]) * found.scales.unsqueeze(1)

    def _sums(self, levels: Tensor, codes: ClassCodes) -> Tensor:
        """The latents, (n, rank), that the levels of the codes of rows, (n, codes), add up to."""
        return levels.new_zeros(len(levels), self.rank).index_add_(1, codes.latents, levels * codes.steps)

    def encode(self, rows: Tensor, number: int) -> Symbols:
        """Finds scales and symbols of rows, (n, dim), of one class, for the decoder there is."""
        codes = self.classes[number]
        lengths = self.decoder.square().sum(dim=1).clamp_min(torch.finfo(self.decoder.dtype).tiny)
        sweep, found = _Sweep.of(self, number), []
        for block in rows.split(self._block_rows(rows, number)):
            products = (block - self.bias) @ self.decoder.T
            scales = codes.scales(products / lengths, lengths)
            nothing = block.new_zeros(len(block), codes.num_codes)
            begun = Symbols(nothing.byte(), nothing, scales, scales)
            found.append(self._sweep(block, products, begun, sweep, keep_better=False))
        return Symbols.joined(found)

    def improve(self, rows: Tensor, begun: Symbols, number: int) -> Symbols:
        """Codes rows anew for the decoder there is, from the codes they have, written over; no row's error rises."""
        size, sweep, found = self._block_rows(rows, number), _Sweep.of(self, number), []
        for block, mine in zip(rows.split(size), begun.split(size), strict=True):
            products = (block - self.bias) @ self.decoder.T
            found.append(self._sweep(block, products, mine, sweep, keep_better=True))
        return Symbols.joined(found)

    def _block_rows(self, rows: Tensor, number: int) -> int:
        """How many rows are coded together; a row's codes do not depend on it."""
        if rows.device.type != "cpu":
            return max(1, len(rows))
        return max(1, _BLOCK_ELEMENTS // max(*self.decoder.shape, self.classes[number].num_codes))

    def unpack(self, packed: Tensor, scales: Tensor, number: int) -> Symbols:
        """Packed rows of a class, (n, bytes), and their scales, as symbols; what they leave of rows is not known."""
        symbols, levels = unpack_symbols(packed, self.classes[number].counts, self.codebooks.levels)
        return Symbols(symbols, levels, scales, torch.full_like(scales, torch.nan))

    def _sweep(self, rows: Tensor, products: Tensor, begun: Symbols, sweep: _Sweep, *, keep_better: bool) -> Symbols:
        """Codes one section after the other, each for what all others leave.

        Over its scale, the error of a row is ‖u‖² - 2 z·t + z G zᵀ with u = (y - b) / s, t = u Dᵀ, the `products` over
        the scale, and G = D Dᵀ: no row has to be decoded.
        """
        codes = sweep.codes
        symbols, levels, scales = begun.symbols, begun.levels, begun.scales.unsqueeze(1)
        sums = products / scales
        latents = self._sums(levels, codes)
        slopes = sums - latents @ sweep.gram if keep_better else sums.clone()

        for width, section, curvature, gains in sweep.sections:
            named, steps = codes.latents[section], codes.steps[section]

            # The codes that would be best if the section's rows of the decoder were orthogonal.
            before, sloping = levels[:, section], slopes.index_select(1, named)
            found, after = quantise(before + sloping * steps / gains, gains, self.codebooks.levels, width)
            moves = (after - before) * steps
            change = moves @ curvature  # of the slopes of all latents

            # A row whose error would not fall keeps its codes; such rows are few.
            if keep_better:
                kept = ~((moves * (change.index_select(1, named) - 2 * sloping)).sum(dim=1) < 0)
                if len(stays := kept.nonzero().squeeze(1)):
                    found[stays], after[stays] = symbols[stays, section], before[stays]
                    moves[stays], change[stays] = 0, 0

            symbols[:, section], levels[:, section] = found, after
            latents[:, named] += moves
            slopes -= change

        explained = (latents * (sums + slopes)).sum(dim=1) * begun.scales.square()
        errors = (rows - self.bias).square().sum(dim=1) - explained
        return Symbols(symbols, levels, begun.scales, errors.double().clamp_min(0))

    def refit(self, fit: DecoderFit) -> StoredDecoder:
        """Takes over the best decoder for the latents that `fit` has seen, as it is stored."""
        stored = self.storage.round(fit.solve())
        self.decoder = self.storage.in_metric(stored)
        self.bias = fit.bias(self.decoder)
        return stored

    def new_fit(self) -> DecoderFit:
        """Where rows and their latents are to be counted in, to fit the decoder to them."""
        rank, dim = self.decoder.shape
        return DecoderFit(rank, dim, self.decoder.device)

    def train(self, sample: Sample, row_class: Tensor) -> None:
        """Fits the decoder to the codes of a sample, whose rows are of some classes, (n,)."""
        fit = self.new_fit()
        for number in range(len(self.classes)):
            of_class = row_class == number
            rows = sample.rows[of_class]
            found = self.encode(rows, number)
            fit.add(rows, self.latents(found, number), sample.omega[of_class])
        self.refit(fit)


@dataclass(frozen=True)
class _Sweep:
    """What all rows of a class are coded with, for one decoder.

    Attributes:
        codes: What their codes are.
        gram: G = D Dᵀ.
        sections: Each width that any codes have, with these codes, their rows of G, and what a level's error costs,
            (codes,).
    """

    codes: ClassCodes
    gram: Tensor
    sections: list[tuple[int, slice, Tensor, Tensor]]

    @classmethod
    def of(cls, codec: Codec, number: int) -> _Sweep:
        """What rows of a class are coded with for the decoder there is."""
        codes, gram, sections = codec.classes[number], codec.decoder @ codec.decoder.T, []
        for width, section in codes.sections():
            named, steps = codes.latents[section], codes.steps[section]
            gains = gram.diagonal()[named] * steps.square()
            gains = gains.clamp_min(torch.finfo(gram.dtype).tiny)
            sections.append((width, section, gram[named], gains))
        return cls(codes, gram, sections)


def storable_scales(units: Tensor, power: Tensor, lost: float) -> Tensor:
    """The scales of rows at which codes lose least, (n,) float32, rounded as they are stored.

    What the levels leave of a row grows with the square of its scale; what lies beyond their reach falls with it. A
    row whose latents are all of the usual size gets the scale that says so. One that is far out along a few axes,
    such as the rows of tokens that were never trained, gets a larger one.

    Args:
        units: (n, k) the latents that are coded, in their standard deviations in rows of scale 1.
        power: (k,) what an error of one standard deviation of each counts.
        lost: The error that the codes leave of a row of scale 1.
    """
    if not units.shape[1]:
        return units.new_ones(len(units))
    scales = units.square().mean(dim=1).sqrt()

    # the cost is convex in the scale: its slope is bisected, over the steps in which scales are stored
    far = (units.abs().amax(dim=1) > _REACH * scales).nonzero().squeeze(1)
    lengths, least = units[far].abs(), scales[far]
    low, high = torch.full_like(least, -1), torch.full_like(least, _SCALE_STEPS - 1)
    for _ in range(_SCALE_STEPS.bit_length() - 1):
        middle = (low + high) / 2
        tried = least * 2 ** (middle / QUARTER)
        beyond = (lengths - _REACH * tried.unsqueeze(1)).clamp_min_(0) @ power
        rising = lost * tried >= _REACH * beyond
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    scales[far] = least * 2 ** (((low + high) / 2).clamp_min(0) / QUARTER)
    return row_scales(pack_rows(torch.zeros_like(scales), scales))
