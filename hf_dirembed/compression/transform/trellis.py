"""Trellis-coded quantisation: the best symbols for a codebook, and a codebook for the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS, STATE_BITS
from ...remote.kernels_dirembed import HALF, gaussian_codebook
from ...remote.products_dirembed import runs_compiled
from .viterbi import cheapest_paths


NUM_STATES = 1 << STATE_BITS
POSITIVE = 1e-3  # added to each squared error: path costs must stay positive, as their bits are compared
LARGEST_LEVEL = 127.5  # of 8 bits, which the codebook has
_SURVIVOR_BYTES = 1 << 28  # of the survivors' symbols that a device holds until the best path is known
# Where training starts: of the 256 quantiles of a Gaussian, state s has the one whose number is a multiple of s,
# modulo 256; so states that a symbol chooses between, and those that meet, are far apart. Of all odd multiples these,
# at 4, 3, 2 and 1 bits, leave a Gaussian the least error after training. Levels start too wide, as those of tails are
# slow.
_MULTIPLES, _STRETCH = (69, 115, 71, 115), 1.15
_GAUSSIAN_UNITS = (0.02748, 0.02586, 0.02369, 0.01772)  # of the shared codebook, as `Codebooks` has them
_TRAINING_SYMBOLS, _LLOYD_ROUNDS, _OVER_RELAXATION = 100_000, 10, 1.5


def best_states(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> Tensor:
    """The states whose levels have the least weighted squared error, over all sequences: Viterbi's algorithm.

    Args:
        targets: (n, count) float32, what the levels shall approximate.
        importance: (count,) what the squared error of each latent counts.
        levels: (256,) float32, of the trellis's states.
        width: Bits of a symbol: 4, 3, 2 or 1.

    Returns:
        (n, count) uint8. Symbols are in their lowest `width` bits; of these [`trellis_states`] makes the states again.

    Source: Viterbi 1967; Tseng et al. 2024 (QTIP), section 3.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> targets, levels = torch.randn(64, 100, generator=generator), torch.randn(256, generator=generator)
        >>> states = best_states(targets, torch.ones(100), levels, width=2)
        >>> error = (levels[states.int()] - targets).square().mean()
        >>> bool(error < 0.1175)  # the least of a scalar quantiser of 2 bits (Max 1960); the bound is 1/16
        True
    """
    return _best(targets, importance, levels, width)[0]


def _best(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What `best_states` gives, and the levels of these states, (n, count)."""
    importance = importance / importance.max().clamp_min(torch.finfo(importance.dtype).tiny)
    if runs_compiled(targets):
        return cheapest_paths(targets, importance, levels, width)
    states = _cheapest_paths(targets, importance, levels, width)
    return states, levels[states.int()]


def _cheapest_paths(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> Tensor:
    """What `viterbi.cheapest_paths` finds, in torch's operations: for other devices, and without the library."""
    stream, importance = targets.T.flip(0), importance.flip(0)  # it runs from the last latent to the first
    most = max(1, _SURVIVOR_BYTES // max(1, len(stream) * (NUM_STATES >> width)))
    parts = stream.split(most, dim=1)
    found = [_trace_back(*_search(part, importance, levels, width), width) for part in parts]
    return torch.cat(found, dim=1).flip(0).T


def _trace_back(costs: Tensor, survivors: Tensor, width: int) -> Tensor:
    """States, (steps, n) uint8, from what `_search` found."""
    steps, pasts, num_rows = survivors.shape
    states = torch.empty(steps, num_rows, dtype=torch.uint8, device=costs.device)
    columns = torch.arange(num_rows, device=costs.device)
    past = costs.argmin(dim=0)
    for step in range(steps - 1, -1, -1):
        # The state is the past below the symbol that fell out of its memory.
        state = survivors[step].view(-1)[past * num_rows + columns].long() * pasts + past
        states[step] = state
        past = state >> width
    return states


def _search(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The costs of all pasts at the end, (pasts, n), and which oldest symbol each survived with at each step.

    Of all states with the same past the cheapest survives. Costs are positive floats, whose order is that of their
    bits; so each carries its oldest symbol in its lowest bits, and one minimum finds cost and symbol.
    """
    fan, pasts = 1 << width, NUM_STATES >> width  # a past: what of a state the next one still knows
    steps, num_rows = targets.shape

    # The squared error of each state is a product of these factors and the powers of the target.
    factors = torch.stack([levels.square(), -2 * levels, torch.ones_like(levels)], dim=1)
    weights = importance.unsqueeze(1)
    powers = torch.stack([weights.expand_as(targets), weights * targets, weights * targets.square() + POSITIVE], dim=1)

    # One buffer of costs, viewed by each state's oldest symbol and by its newest.
    cost = torch.empty(NUM_STATES, num_rows, device=targets.device)
    by_oldest = cost.view(torch.int32).view(fan, pasts, num_rows)
    by_newest = cost.view(pasts, fan, num_rows)
    oldest = torch.arange(fan, dtype=torch.int32, device=targets.device).view(fan, 1, 1)

    best = torch.full((pasts, num_rows), torch.finfo(torch.float32).max / 4, device=targets.device)
    best[0] = 0  # the stream starts on zeros
    survivors = torch.empty(steps, pasts, num_rows, dtype=torch.uint8, device=targets.device)

    for step, power in enumerate(powers):
        torch.mm(factors, power, out=cost)
        by_newest += best.unsqueeze(1)
        by_oldest.bitwise_and_(-fan).bitwise_or_(oldest)
        torch.amin(by_oldest, dim=0, out=best.view(torch.int32))
        survivors[step] = best.view(torch.int32) & (fan - 1)
    return best, survivors


def quantise(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best symbols of latents of one width, and the levels that these stand for.

    Args:
        targets: (n, count) float32.
        importance: (count,) what the squared error of each latent counts.
        levels: (4, 256) float32, of the trellis's states at 4, 3, 2 and 1 bits.
        width: 4, 3, 2 or 1.

    Returns:
        (n, count) uint8 symbols, and (n, count) levels.

    Example:
        >>> levels = torch.arange(256.0).repeat(4, 1)
        >>> symbols, found = quantise(torch.tensor([[33.2, 1.9]]), torch.ones(2), levels, width=4)
        >>> symbols.tolist(), found.tolist()
        ([[1, 2]], [[33.0, 2.0]])
    """
    book = levels[BIT_WIDTHS.index(width)]
    states, found = _best(targets, importance, book, width)
    return states & ((1 << width) - 1), found


def round_to_levels(latents: Tensor) -> Tensor:
    """The nearest half-integers that 8 bits have.

    Example:
        >>> round_to_levels(torch.tensor([0.2, -0.2, 1.2, 999.0])).tolist()
        [0.5, -0.5, 1.5, 127.5]
    """
    return latents.floor().add_(0.5).clamp_(-LARGEST_LEVEL, LARGEST_LEVEL)


@dataclass(frozen=True)
class Codebooks:
    """The levels of the trellis's states at 4, 3, 2 and 1 bits.

    Attributes:
        levels: (4, 256) half-integers up to ±127.5.
        units: (4,) what a level's 1 is in standard deviations of the latents.
        own: Whether they were trained for a table, which then has them in its files.
    """

    levels: Tensor
    units: Tensor
    own: bool = True

    @classmethod
    def gaussian(cls, device: torch.device) -> Codebooks:
        """Those that tables share which are too small to have their own."""
        levels = gaussian_codebook(device).float() + HALF
        return cls(levels, torch.tensor(_GAUSSIAN_UNITS, device=device), own=False)

    @classmethod
    def train(cls, latents: Tensor) -> Codebooks:
        """Levels for latents of unit variance, by Lloyd's algorithm from quantiles of a Gaussian.

        Args:
            latents: (n, rank) float32; about 100,000 of them are used.

        Example:
            >>> latents = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
            >>> codebooks = Codebooks.train(latents)
            >>> levels = codebooks.levels[2] * codebooks.units[2]  # of 2 bits
            >>> found = levels[best_states(latents, torch.ones(100), levels, width=2).int()]
            >>> bool((found - latents).square().mean() < 1.28 / 16)  # the bound is 1/16
            True
        """
        rows = max(1, _TRAINING_SYMBOLS // latents.shape[1])
        latents = latents[:: max(1, len(latents) // rows)]
        states = torch.arange(NUM_STATES)
        quantiles = _STRETCH * torch.special.ndtri((states.double() + 0.5) / NUM_STATES).to(latents)
        starts = [quantiles[multiple * states % NUM_STATES] for multiple in _MULTIPLES]
        levels = torch.stack([_lloyd(latents, *each) for each in zip(starts, BIT_WIDTHS, strict=True)])
        units = levels.abs().amax(dim=1) / LARGEST_LEVEL
        return cls(round_to_levels(levels / units.unsqueeze(1)), units)

    def stored(self) -> Tensor:
        """The levels as files have them: (4, 256) int8, less ½."""
        return self.levels.floor().to(torch.int8)


def _lloyd(latents: Tensor, levels: Tensor, width: int) -> Tensor:
    """Moves levels to the means of the latents that they are chosen for, and beyond, in turn with the choice."""
    importance = latents.new_ones(latents.shape[1])
    for _ in range(_LLOYD_ROUNDS):
        states = best_states(latents, importance, levels, width).reshape(-1).long()
        visits = torch.bincount(states, minlength=NUM_STATES)
        sums = torch.zeros_like(levels).index_add_(0, states, latents.reshape(-1))
        means = torch.where(visits > 0, sums / visits, levels)
        levels = torch.lerp(levels, means, _OVER_RELAXATION)
    return levels
