"""How few bits could do: the rate-distortion bound of a table's weighted spectrum, by reverse water-filling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import TableError


_BISECTIONS = 100  # of the logarithm of the water level: to the precision of float64


@dataclass(frozen=True)
class RateDistortion:
    """The rate-distortion function of independent Gaussians whose variances are a product of two vectors.

    Component j of row i has the variance pᵢ sⱼ. At the water level θ every component is left with the error
    min(θ, pᵢ sⱼ), for ½ log₂⁺(pᵢ sⱼ / θ) bits. Rows and dimensions that lie below the water get nothing, so the bound
    spends its bits where the weights are, as the codec does. Memory is linear in rows plus dimensions.

    What it says of a table, and what not: of all sources with these second moments the Gaussian is the hardest to
    code, so some code of very long blocks does as well for any such table, and a table that is not Gaussian may be
    coded in fewer bits still: the bound is where the *spectrum* alone leads, no limit of nature. The basis, the mean
    and the weights are taken for known; a real code has to spend bytes on them.

    Attributes:
        weights: p, (num_rows,) non-negative: what an error of each row counts, its variance included.
        spectrum: s, (dim,) non-negative: the variance along each axis.

    Raises:
        TableError: If one is not a vector of finite, non-negative numbers.

    Source: Cover & Thomas, Elements of Information Theory, theorem 10.3.3.

    Example:
        >>> bound = RateDistortion(torch.ones(10), torch.tensor([4.0, 1.0]))
        >>> bound.distortion(bits=1.5), bound.rate(distortion=5.0)  # 5 = ten rows x 2 components x 1/4
        (5.0, 1.5)
        >>> bound.rate(distortion=20)  # the second axis lies below the water: 1 bit for one component in two
        0.5
    """

    weights: Tensor
    spectrum: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "spectrum"):
            values = getattr(self, name)
            if values.ndim != 1 or not len(values) or not values.isfinite().all() or values.min() < 0:
                raise TableError(f"{name} of a rate-distortion bound: give a vector of finite, non-negative numbers")

    @property
    def variance(self) -> float:
        """The distortion at rate 0."""
        return float(self.weights.double().sum() * self.spectrum.double().sum())

    def distortion(self, bits: float) -> float:
        """The least distortion Σ min(θ, pᵢ sⱼ) at a rate.

        Args:
            bits: Per weight: the rate over num_rows x dim, the components without variance counted.

        Raises:
            TableError: If it is negative or not finite.
        """
        level = self.water_level(bits)
        return self._error(math.log2(level)) if level else 0.0

    def water_level(self, bits: float) -> float:
        """The water level θ at a rate: components with a variance below it get no bits.

        Args:
            bits: Per weight, as for `distortion`.

        Returns:
            The level; 0 where there is no variance.

        Raises:
            TableError: If the rate is negative or not finite.

        Example:
            >>> round(RateDistortion(torch.ones(10), torch.tensor([4.0, 1.0])).water_level(bits=1.5), 9)
            0.25
        """
        if not 0 <= bits < float("inf"):
            raise TableError(f"bits={bits}: give a rate that is at least 0")
        if not self.variance:
            return 0.0
        total = bits * len(self.weights) * len(self.spectrum)
        # With all components above the water, the mean of ½ log₂(pᵢ sⱼ / θ) is the rate; θ is never below that.
        mean_log = self._logs.mean() + self._spectrum.log2().mean()
        low = float(mean_log) - 2 * total / (len(self._rows) * len(self._spectrum))
        return float(2 ** self._bisect(low, lambda level: self._bits(level) > total))

    def rate(self, distortion: float) -> float:
        """The fewest bits per weight that reach a distortion.

        Args:
            distortion: Σ over rows and dimensions, as `distortion` gives it.

        Returns:
            Bits per weight; 0 from the variance on, infinite for a distortion of 0 or less.
        """
        if distortion >= self.variance:
            return 0.0
        if distortion <= 0:
            return float("inf")
        low = torch.tensor(distortion / (len(self._rows) * len(self._spectrum)), dtype=torch.float64).log2()
        level = self._bisect(float(low) - 1, lambda level: self._error(level) < distortion)
        return self._bits(level) / (len(self.weights) * len(self.spectrum))

    def rate_at_slope(self, slope: float) -> float:
        """The bits per weight from which on one more lowers the distortion by less than a share of the variance.

        At the water level θ the last bit of all components together lowers their distortion by 2 θ ln 2, whichever
        of them gets it: every component above the water has the same slope there.

        Args:
            slope: The share of the variance.

        Returns:
            Bits per weight; infinite for a slope of 0 or less.

        Example:
            >>> RateDistortion(torch.ones(10), torch.ones(4)).rate_at_slope(2 * math.log(2) / 16)  # error 1/16
            2.0
        """
        if not self.variance:
            return 0.0
        total = len(self.weights) * len(self.spectrum)
        level = slope * self.variance / (2 * math.log(2) * total)
        return self._bits(math.log2(level)) / total if level > 0 else float("inf")

    @cached_property
    def _rows(self) -> Tensor:
        """The positive weights, ascending."""
        weights = self.weights.double().cpu()
        return weights[weights > 0].sort().values

    @cached_property
    def _spectrum(self) -> Tensor:
        spectrum = self.spectrum.double().cpu()
        return spectrum[spectrum > 0]

    @cached_property
    def _logs(self) -> Tensor:
        return self._rows.log2()

    @cached_property
    def _cumulated(self) -> tuple[Tensor, Tensor]:
        """Sums of the smallest weights, and of the logarithms of the largest."""
        zero = self._rows.new_zeros(1)
        sums = torch.cat([zero, self._rows.cumsum(0)])
        logs = torch.cat([zero, self._logs.flip(0).cumsum(0)]).flip(0)
        return sums, logs

    def _below(self, level: float) -> tuple[Tensor, Tensor]:
        """How many rows lie below the water at the level 2^`level` along each axis, and how many above, (dim,)."""
        below = torch.searchsorted(self._rows, 2**level / self._spectrum, right=True)
        return below, (len(self._rows) - below).double()

    def _error(self, level: float) -> float:
        below, above = self._below(level)
        sums, _ = self._cumulated
        return float((self._spectrum * sums[below] + 2**level * above).sum())

    def _bits(self, level: float) -> float:
        below, above = self._below(level)
        _, logs = self._cumulated
        return float((logs[below] + above * (self._spectrum.log2() - level)).sum() / 2)

    def _bisect(self, low: float, too_low: Callable[[float], bool]) -> float:
        high = float(self._logs[-1] + self._spectrum.max().log2())
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return (low + high) / 2
