"""Quantisation of latents: steps and codebooks, and how many bits each latent gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS
from .trellis import Codebooks, best_states, round_to_levels


# Steps of 8 bits to try, in standard deviations: around the best uniform mid-rise quantiser of a Gaussian (Max 1960),
# on the wide side, as latents have heavier tails.
_STEPS = tuple(0.031 * stretch for stretch in (0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.4, 1.6, 1.85))

QUANTISER_SAMPLE = 1024  # rows that step sizes are searched on
_PRICES = 100  # of a bit, from the strongest latent's variance to next to nothing
_WINDOW = 32  # bytes for latents of 4 bits to try, more and fewer than the Lagrangian's
_PATIENCE = 2  # numbers of latents with 8 bits that may be worse, one after the other, before the search ends


@dataclass(frozen=True)
class Quantisers:
    """The quantiser of each latent at each width, fitted to a sample.

    Attributes:
        errors: (1 + widths, rank) mean squared error per latent: without any bits, then for each of `BIT_WIDTHS`.
        steps: (widths, rank) what half-integers are multiplied by.
        codebooks: The levels of the trellis's states at 4, 2 and 1 bits.
    """

    errors: Tensor
    steps: Tensor
    codebooks: Codebooks

    @classmethod
    def fit(cls, sample: Tensor, variances: Tensor, codebooks: Codebooks | None = None) -> Quantisers:
        """Finds step and error of every latent at every width.

        Args:
            sample: (n, rank) latents, drawn with the weights that the error is to have.
            variances: (rank,) the variance of each latent, with the same weights.
            codebooks: What to quantise with; by default some are trained on the sample.
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
        """How many bytes the codes of a row take."""
        return sum(count * width for count, width in zip(self.counts, BIT_WIDTHS, strict=True)) // 8

    def steps(self, quantisers: Quantisers) -> Tensor:
        """(rank,) the step of each latent."""
        return self.chosen(quantisers.steps.cpu())

    def chosen(self, of_widths: Tensor) -> Tensor:
        """Picks what each latent has at its own width, (rank,), out of what it has at each, (widths, rank or more)."""
        width = torch.arange(len(BIT_WIDTHS)).repeat_interleave(torch.tensor(self.counts))
        return of_widths[width, torch.arange(self.rank)]


class BitAllocator:
    """Gives every latent 8, 4, 2, 1 or 0 bits, to the least error within whole bytes.

    Latents are in descending order of variance, so an allocation is the four ranks where latents stop having 8, 4, 2
    and 1 bits, and each byte is spent on one latent of 8 bits, two of 4, four of 2 or eight of 1: the budget is met to
    the byte. The error is a sum of four terms, one of each of these ranks. Compared are all allocations around what a
    Lagrangian finds without regard to whole bytes: with about as many latents of 4 bits, and with as many of 8 bits or
    more or fewer, as long as the error falls.

    Args:
        errors: (1 + widths, rank) mean squared error of each latent without any bits, then at each of `BIT_WIDTHS`.
        latents: (rank,) their numbers, where they were sorted; by default in order.
    """

    def __init__(self, errors: Tensor, latents: Tensor | None = None) -> None:
        self.latents = torch.arange(errors.shape[1]) if latents is None else latents
        self.rank = errors.shape[1]
        self._errors = errors.double().cpu()
        sums = F.pad(self._errors.cumsum(dim=1), (1, 0))
        self._of_nothing = float(sums[0, -1])
        self._terms = sums[1:] - sums.roll(-1, dims=0)[1:]  # of a width less those of the next, at last without bits
        self._hulls: dict[int, Tensor] = {}

    def _hull(self, max_rank: int) -> Tensor:
        """(prices, widths) bytes of each width where so many latents take what is worth its bits, dear ones first."""
        if max_rank not in self._hulls:
            errors, bits = self._errors[:, :max_rank], torch.tensor([0, *BIT_WIDTHS], dtype=torch.float64)
            strongest = errors[0].amax().clamp_min(torch.finfo(torch.float64).tiny)
            prices = strongest * torch.logspace(0, -10, _PRICES, dtype=torch.float64)
            width = (errors + (prices.view(-1, 1) * bits).unsqueeze(2)).argmin(dim=1)
            counts = torch.stack([(width == index).sum(dim=1) for index in range(1, len(bits))], dim=1)
            self._hulls[max_rank] = counts * bits[1:] / 8
        return self._hulls[max_rank]

    def _lagrangian(self, num_bytes: int, max_rank: int) -> Tensor:
        """(widths,) float64, about the bytes of each width: between the two points of the hull that are next to it."""
        hull = self._hull(max_rank)
        totals = hull.sum(dim=1)
        above = int(torch.searchsorted(totals, float(num_bytes)).clamp(1, len(totals) - 1))
        below, wanted = totals[above - 1], totals[above] - totals[above - 1]
        share = ((num_bytes - below) / wanted.clamp_min(1)).clamp(0, 1)
        return torch.lerp(hull[above - 1], hull[above], share)

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

    def allocate(self, num_bytes: int, max_rank: int) -> Allocation | None:
        """The best allocation of exactly `num_bytes` to at most `max_rank` latents; None if there is none."""
        max_rank = min(max_rank, self.rank)
        least = max(0, 2 * num_bytes - max_rank)  # of latents with 8 bits, if all others had 4
        if num_bytes > max_rank:
            return None

        about = self._lagrangian(num_bytes, max_rank).round().long().tolist()
        start = min(max(about[0], least), num_bytes)
        best = self._with_eights(start, about[1], num_bytes, max_rank)

        # More latents of 8 bits, then fewer, as long as the error falls.
        for further in (range(start + 1, num_bytes + 1), range(start - 1, least - 1, -1)):
            worse = 0
            for eights in further:
                found = self._with_eights(eights, about[1], num_bytes, max_rank)
                best, worse = (found, 0) if found.error < best.error else (best, worse + 1)
                if worse == _PATIENCE:
                    break
        return best

    def _with_eights(self, eights: int, about: int, num_bytes: int, max_rank: int) -> Allocation:
        """The best allocation with so many latents of 8 bits, and about so many bytes of latents with 4."""
        left, most = num_bytes - eights, max_rank - eights
        least = max(0, 4 * left - most) // 2  # of bytes for 4 bits, if all others had 2
        nearest = min(max(about, least), min(left, most // 2))

        # Ways to split the bytes left: a row for each number spent on 4 bits, a column for each spent on 2.
        of_fours = torch.arange(max(0, nearest - _WINDOW), min(left, most // 2, nearest + _WINDOW) + 1).view(-1, 1)
        of_twos = torch.arange(min(left, most // 4) + 1)
        of_ones = left - of_fours - of_twos

        # The ranks where latents stop having 4, 2 and 1 bits.
        fours = eights + 2 * of_fours
        twos = fours + 4 * of_twos
        ones = twos + 8 * of_ones

        errors = self._terms[0, eights] + self._terms[1, fours] + self._terms[2, twos.clamp(max=max_rank)]
        errors = errors + self._terms[3, ones.clamp(0, max_rank)]
        errors = errors.masked_fill((of_ones < 0) | (ones > max_rank), torch.inf)

        best = int(errors.argmin())
        row, column = divmod(best, len(of_twos))
        spent_on_fours = int(of_fours[row])
        counts = (eights, 2 * spent_on_fours, 4 * column, 8 * (left - spent_on_fours - column))
        return Allocation(counts, self._of_nothing + float(errors.view(-1)[best]))
