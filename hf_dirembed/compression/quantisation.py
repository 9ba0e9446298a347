"""Quantisation of latents: steps and codebooks, and how many bits each latent gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from torch import Tensor

from ..layout_dirembed import BIT_WIDTHS
from .trellis import Codebooks, best_states, round_to_levels


# Steps of 8 bits to try, in standard deviations: around the best uniform mid-rise quantiser of a Gaussian (Max 1960),
# on the wide side, as latents have heavier tails.
_STEPS = tuple(0.031 * stretch for stretch in (0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.4, 1.6, 1.85))

QUANTISER_SAMPLE = 1024  # rows that step sizes are searched on
_PRICES = 100  # of a bit, from next to nothing to the strongest latent's variance


@dataclass(frozen=True)
class Quantisers:
    """The quantiser of each latent at each width, fitted to a sample.

    Attributes:
        errors: (1 + widths, rank) mean squared error per latent: without any bits, then for each of `BIT_WIDTHS`.
        steps: (widths, rank) what half-integers are multiplied by.
        codebooks: Of the trellis at 4, 2 and 1 bits.
    """

    errors: Tensor
    steps: Tensor
    codebooks: Codebooks

    @classmethod
    def fit(cls, sample: Tensor, variances: Tensor, codebooks: Codebooks | None = None) -> Quantisers:
        """Finds step and error of every latent at every width.

        Args:
            sample: (n, rank) latents, drawn with the weights that the error is to have.
            variances: (rank,) of all latents, weighed so.
            codebooks: To quantise with; by default some are trained on the sample.
        """
        power = sample.square().mean(dim=0)
        normalised = sample * torch.where(power > 0, power.rsqrt(), 0)
        variances = variances.clamp_min(0)
        codebooks = codebooks or Codebooks.train(normalised)
        importance = torch.ones_like(variances)
        found = [_best_uniform(normalised)]
        for index, width in enumerate(BIT_WIDTHS[1:]):
            levels, unit = codebooks.levels[index], codebooks.units[index]
            states = best_states(normalised, importance, levels * unit, width)
            found.append(_regression(normalised, levels[states.int()]))
        errors, steps = (torch.stack(each) for each in zip(*found, strict=True))
        errors = torch.cat([torch.ones_like(errors[:1]), errors.clamp_min(0)])
        return cls(errors * variances, steps * torch.where(variances > 0, variances.sqrt(), 1), codebooks)


def _best_uniform(normalised: Tensor) -> tuple[Tensor, Tensor]:
    """Error and step of the best uniform quantiser of 8 bits, (rank,) each."""
    best = None
    for step in _STEPS:
        found = _regression(normalised, round_to_levels(normalised / step))
        if best is None:
            best = found
        else:
            better = found[0] < best[0]
            best = torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])
    assert best is not None
    return best


def _regression(latents: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error of levels times their best step, and that step, (rank,) each."""
    shared, power = (latents * levels).mean(dim=0), levels.square().mean(dim=0)
    scale = shared / power
    return latents.square().mean(dim=0) - shared * scale, torch.where(scale > 0, scale, 1)


@dataclass(frozen=True)
class Allocation:
    """How many of the latents, in descending order of variance, get 8, 4, 2 and 1 bits.

    Attributes:
        counts: Latents of each of `BIT_WIDTHS`.
        error: The mean squared error of a row.
    """

    counts: tuple[int, ...]
    error: float

    @property
    def rank(self) -> int:
        """Latents with any bits."""
        return sum(self.counts)

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return sum(count * width for count, width in zip(self.counts, BIT_WIDTHS, strict=True)) // 8

    def steps(self, quantisers: Quantisers) -> Tensor:
        """(rank,) the step of each latent."""
        return self.chosen(quantisers.steps.cpu())

    def chosen(self, of_widths: Tensor) -> Tensor:
        """(rank,) of what each latent has at each width, (widths, rank or more), that at its own."""
        width = torch.arange(len(BIT_WIDTHS)).repeat_interleave(torch.tensor(self.counts))
        return of_widths[width, torch.arange(self.rank)]


class BitAllocator:
    """Gives every latent 8, 4, 2, 1 or 0 bits, to the least error within whole bytes.

    Latents are in descending order of variance, so an allocation is four counts, and each byte is spent on one latent
    of 8 bits, two of 4, four of 2 or eight of 1: the budget is met to the byte. Bytes are moved from one width to
    another while that lowers the error, from what a Lagrangian finds without regard to whole bytes, and from the best
    way to spend all bytes on two widths.

    Args:
        errors: (1 + widths, rank) mean squared error of each latent without any bits, then at each of `BIT_WIDTHS`.
        latents: (rank,) their numbers, where they were sorted; by default in order.
    """

    def __init__(self, errors: Tensor, latents: Tensor | None = None) -> None:
        self.latents = torch.arange(errors.shape[1]) if latents is None else latents
        self._errors = errors.double().cpu()
        zero = self._errors.new_zeros(len(errors), 1)
        self._sums = torch.cat([zero, self._errors.cumsum(dim=1)], dim=1).tolist()
        self.rank = errors.shape[1]
        self._on_hull = self._lagrangian()

    def _lagrangian(self) -> list[tuple[int, ...]]:
        """Bytes of each width where each latent takes what is worth its bits, from cheap bits to dear ones."""
        bits = torch.tensor([0, *BIT_WIDTHS], dtype=torch.float64)
        strongest = self._errors[0].amax().clamp_min(torch.finfo(torch.float64).tiny)
        prices = strongest * torch.logspace(-10, 0, _PRICES, dtype=torch.float64)
        costs = self._errors + (prices.view(-1, 1) * bits).unsqueeze(2)
        counts = torch.nn.functional.one_hot(costs.argmin(dim=1), len(bits)).sum(dim=1)[:, 1:]
        return [tuple(row) for row in (counts * bits[1:].long() // 8).tolist()]

    def after(self, base: Allocation) -> BitAllocator:
        """Allocates further bits to what an allocation leaves, were it like the latents: so successive codes add up.

        What is left of each latent is a latent of that variance, which each width makes smaller by its usual factor.
        """
        left = self._errors[0].clone()
        left[: base.rank] = base.chosen(self._errors[1:])
        factors = self._errors / self._errors[0].clamp_min(torch.finfo(torch.float64).tiny)
        factors = factors[:, : base.rank].mean(dim=1, keepdim=True)
        variances, latents = left.sort(descending=True, stable=True)
        return BitAllocator(factors * variances, latents)

    def error(self, spent: tuple[int, ...]) -> float:
        """The error when so many bytes are spent on each width; infinite if they exceed the latents there are."""
        first, total = 0, 0.0
        for index, (width, num_bytes) in enumerate(zip(BIT_WIDTHS, spent, strict=True), start=1):
            last = first + num_bytes * (8 // width)
            if last > self.rank:
                return torch.inf
            total += self._sums[index][last] - self._sums[index][first]
            first = last
        return total + self._sums[0][self.rank] - self._sums[0][first]

    def allocate(self, num_bytes: int, max_rank: int) -> Allocation | None:
        """The best allocation of exactly `num_bytes` to at most `max_rank` latents; None if there is none."""
        found = [
            self._descend(start, max_rank)
            for starts in (self._two_widths(num_bytes), self._near_hull(num_bytes, max_rank))
            if (start := self._least(starts, max_rank)) is not None and start[0] < torch.inf
        ]
        if not found:
            return None
        error, spent = min(found)
        counts = tuple(number * (8 // width) for number, width in zip(spent, BIT_WIDTHS, strict=True))
        return Allocation(counts, error)

    def _descend(self, start: tuple[float, tuple[int, ...]], max_rank: int) -> tuple[float, tuple[int, ...]]:
        """Moves bytes between widths while that lowers the error."""
        error, spent = start
        while True:
            single = list(_moves(spent))
            found = self._least(single, max_rank)
            if found is None or found[0] >= error:  # two moves at once, of which one alone may be impossible
                found = self._least([twice for once in single for twice in _moves(once)], max_rank)
            if found is None or found[0] >= error:
                return error, spent
            error, spent = found

    def _two_widths(self, num_bytes: int) -> Iterator[tuple[int, ...]]:
        """Sixteenths of the bytes on one width, the others on another."""
        for first, second in combinations(range(len(BIT_WIDTHS)), 2):
            for share in range(17):
                spent = [0] * len(BIT_WIDTHS)
                spent[first] = num_bytes * share // 16
                spent[second] = num_bytes - spent[first]
                yield tuple(spent)

    def _near_hull(self, num_bytes: int, max_rank: int) -> Iterator[tuple[int, ...]]:
        """Between the Lagrangian's two nearest, and on one of the widths the bytes that are missing then."""
        nothing = (0,) * len(BIT_WIDTHS)
        possible = [nothing] + [spent for spent in self._on_hull if _rank_of(spent) <= max_rank]
        below = max((spent for spent in possible if sum(spent) <= num_bytes), key=sum)
        above = min((spent for spent in possible if sum(spent) > num_bytes), key=sum, default=below)
        share = (num_bytes - sum(below)) / max(1, sum(above) - sum(below))
        between = [first + math.floor(share * (last - first)) for first, last in zip(below, above, strict=True)]
        for index in range(len(BIT_WIDTHS)):
            spent = list(between)
            spent[index] += num_bytes - sum(between)
            yield tuple(spent)

    def _least(self, spent: Iterable[tuple[int, ...]], max_rank: int) -> tuple[float, tuple[int, ...]] | None:
        return min(((self.error(each), each) for each in spent if _rank_of(each) <= max_rank), default=None)


def _moves(spent: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Moves one byte, or an eighth of a width's, to another width."""
    for source, target in permutations(range(len(spent)), 2):
        for step in {1, max(1, spent[source] // 8)}:
            if spent[source] >= step:
                moved = list(spent)
                moved[source] -= step
                moved[target] += step
                yield tuple(moved)


def _rank_of(spent: tuple[int, ...]) -> int:
    return sum(number * (8 // width) for number, width in zip(spent, BIT_WIDTHS, strict=True))
