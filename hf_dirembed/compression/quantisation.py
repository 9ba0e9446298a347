"""Scalar quantisation of latents: step sizes, and how many bits each latent gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ..configuration_dirembed import BIT_WIDTHS


# Steps to try, in standard deviations: around the best uniform mid-rise quantiser of a Gaussian (Max 1960), on the
# wide side, as latents have heavier tails.
_STEPS = {8: 0.031, 4: 0.335, 2: 0.996}
_STRETCHES = (0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.4, 1.6, 1.85)


def largest_level(width: int) -> float:
    """The largest half-integer that a mid-rise quantiser of `width` bits has."""
    return 2 ** (width - 1) - 0.5


def quantise(latents: Tensor, largest: Tensor | float) -> Tensor:
    """The nearest half-integers, clamped to ± `largest`.

    Example:
        >>> quantise(torch.tensor([0.2, -0.2, 1.2, 9.0]), 1.5).tolist()
        [0.5, -0.5, 1.5, 1.5]
    """
    levels = latents.floor().add_(0.5)
    return torch.clamp(levels, -largest, largest) if isinstance(largest, float) else levels.clamp_(-largest, largest)


@dataclass(frozen=True)
class ScalarQuantisers:
    """The best quantiser of each latent at each width, fitted to a sample.

    Attributes:
        errors: (1 + widths, rank) mean squared error per latent: without any bits, then for each of `BIT_WIDTHS`.
        steps: (widths, rank) the step of each quantiser.
    """

    errors: Tensor
    steps: Tensor

    @classmethod
    def fit(cls, sample: Tensor) -> ScalarQuantisers:
        """Searches the step of every latent at every width.

        Args:
            sample: (n, rank) latents, drawn with the weights that the error is to have.
        """
        variances = sample.square().mean(dim=0)
        deviations = torch.where(variances > 0, variances.sqrt(), 1)
        normalised = sample / deviations
        errors, steps = [torch.ones_like(variances)], []
        for width in BIT_WIDTHS:
            if width == 1:  # the sign; its level is the mean magnitude
                candidates = [torch.where(variances > 0, 2 * normalised.abs().mean(dim=0), 1)]
            else:
                candidates = [torch.full_like(variances, _STEPS[width] * stretch) for stretch in _STRETCHES]
            error = torch.full_like(variances, torch.inf)
            step = torch.ones_like(variances)
            for candidate in candidates:
                levels = quantise(normalised / candidate, largest_level(width))
                # The error that is left once the decoder is refitted to these levels.
                shared = (normalised * levels).mean(dim=0)
                found = 1 - shared.square() / levels.square().mean(dim=0)
                step = torch.where(found < error, candidate, step)
                error = torch.minimum(error, found)
            errors.append(error.clamp_min(0))
            steps.append(step)
        return cls(torch.stack(errors) * variances, torch.stack(steps) * deviations)


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

    def largest_levels(self) -> Tensor:
        """(rank,) the largest level of each latent."""
        levels = torch.tensor([largest_level(width) for width in BIT_WIDTHS])
        return levels.repeat_interleave(torch.tensor(self.counts))

    def steps(self, quantisers: ScalarQuantisers) -> Tensor:
        """(rank,) the step of each latent."""
        chosen = torch.arange(len(BIT_WIDTHS)).repeat_interleave(torch.tensor(self.counts))
        return quantisers.steps.cpu()[chosen, torch.arange(self.rank)]


class BitAllocator:
    """Gives every latent 8, 4, 2, 1 or 0 bits, to the least error within whole bytes.

    Latents are in descending order of variance, so an allocation is four counts, and each byte is spent on one latent
    of 8 bits, two of 4, four of 2 or eight of 1: the budget is met to the byte. Bytes are moved from one width to
    another while that lowers the error, from starts that spend all bytes on two neighbouring widths.

    Args:
        quantisers: Of the latents.
    """

    def __init__(self, quantisers: ScalarQuantisers) -> None:
        errors = quantisers.errors.double().cpu()
        zero = errors.new_zeros(len(errors), 1)
        self._sums = torch.cat([zero, errors.cumsum(dim=1)], dim=1).tolist()
        self.rank = errors.shape[1]

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
        best = min(self._starts(num_bytes, max_rank), default=None)
        if best is None:
            return None
        error, spent = best
        while True:
            single = list(_moves(spent))
            found = self._least(single, max_rank)
            if found is None or found[0] >= error:  # two moves at once, of which one alone may be impossible
                found = self._least([twice for once in single for twice in _moves(once)], max_rank)
            if found is None or found[0] >= error:
                break
            error, spent = found
        counts = tuple(number * (8 // width) for number, width in zip(spent, BIT_WIDTHS, strict=True))
        return Allocation(counts, error)

    def _starts(self, num_bytes: int, max_rank: int) -> list[tuple[float, tuple[int, ...]]]:
        starts = []
        for wide in range(len(BIT_WIDTHS) - 1):
            for share in range(17):
                spent = [0] * len(BIT_WIDTHS)
                spent[wide] = num_bytes * share // 16
                spent[wide + 1] = num_bytes - spent[wide]
                starts.append(tuple(spent))
        return [(self.error(s), s) for s in starts if _rank_of(s) <= max_rank and self.error(s) < torch.inf]

    def _least(self, spent: list[tuple[int, ...]], max_rank: int) -> tuple[float, tuple[int, ...]] | None:
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
