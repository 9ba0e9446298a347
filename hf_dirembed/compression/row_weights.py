"""What an error of each row counts, and a sample of rows that stands for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import TableError
from .subspace import check_weights
from .table import Table


_LEAST_NORM = 0.1  # of the median: an error of a shorter row counts as if the row were that long
# All rows share the quantisers, whose levels reach a few times the usual length. Rows longer than this many times the
# length of 95 % of the rows would take the levels from all others, and still be cut off, each latent by itself.
_LONG, _USUAL = 3.0, 0.95


@dataclass(frozen=True)
class RowWeights:
    """What an error of each row counts: ωᵢ = wᵢ^τ, over ‖yᵢ‖² where errors are relative to the row's length.

    Attributes:
        omega: ω, (num_rows,) float64.
        share: ω ‖y‖², (num_rows,) float64: the row's share of the error of coding nothing. Sums to 1.
        norms: ‖y‖, (num_rows,) float64.
    """

    omega: Tensor
    share: Tensor
    norms: Tensor

    @classmethod
    def of(cls, rows: Table, weights: Tensor | None, tempering: float, *, relative: bool) -> RowWeights:
        """Reads the norms of a table.

        Args:
            rows: The table, in the metric that errors are measured in.
            weights: w, (num_rows,) non-negative; uniform by default.
            tempering: τ.
            relative: Whether errors count relative to the row's length.

        Raises:
            OptionError: If the weights are of the wrong shape, negative, not finite or all zero.
            TableError: If the square of a row's length exceeds float32.
        """
        tempered = check_weights(weights, rows)
        tempered = torch.where(tempered > 0, tempered.pow(tempering), 0)
        norms = torch.cat([chunk.norm(dim=1) for _, chunk in rows.chunks()]).to(tempered)
        if not norms.isfinite().all():
            row = int((~norms.isfinite()).nonzero()[0])
            raise TableError(f"row {row} of the embedding table is too long to measure: scale the table down")
        typical = norms[norms > 0].median() if norms.any() else norms.new_ones(())
        omega = torch.where(norms > 0, tempered, 0)
        if relative:
            omega = omega / norms.clamp_min(_LEAST_NORM * typical).square()
        share = omega * norms.square()
        if not share.any():  # a table of zeros, or weights on its zero rows alone: all rows alike
            return cls(torch.ones_like(omega), torch.full_like(share, 1 / len(share)), norms)
        return cls(omega / share.sum(), share / share.sum(), norms)

    @cached_property
    def order(self) -> Tensor:
        """(num_rows,) the rows' numbers, the one with the largest share first."""
        return self.share.argsort(descending=True, stable=True)

    @property
    def shortest(self) -> float:
        """The length that errors of shorter rows count as if the rows had it."""
        lengths = self.norms[self.norms > 0]
        return _LEAST_NORM * float(lengths.median()) if len(lengths) else _LEAST_NORM

    @property
    def longest(self) -> float:
        """The length above which rows are outliers: three times that of 95 % of the rows."""
        lengths = self.norms[self.norms > 0].sort().values
        return _LONG * float(lengths[int(_USUAL * (len(lengths) - 1))]) if len(lengths) else torch.inf

    @property
    def long_rows(self) -> Tensor:
        """(num_rows,) which rows are longer than that."""
        return self.norms > self.longest


@dataclass(frozen=True)
class Sample:
    """Rows that stand for a table: important ones themselves, a few of the others for the many.

    Attributes:
        numbers: (n,) their row numbers.
        rows: (n, dim) float32.
        omega: (n,) float32, what an error of each counts, over the probability that it was drawn.
    """

    numbers: Tensor
    rows: Tensor
    omega: Tensor

    @classmethod
    def draw(cls, table: Table, importance: RowWeights, size: int, seed: int) -> Sample:
        """Draws about `size` rows, each with a probability in proportion to the root of its share, at most 1."""
        probabilities = _inclusion(importance.share.sqrt().cpu(), size)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(probabilities), dtype=torch.float64, generator=generator) < probabilities
        numbers = drawn.nonzero().squeeze(1)
        omega = importance.omega.cpu()[numbers] / probabilities[numbers]
        drawn = drawn.to(table.device)
        rows = torch.cat([chunk[drawn[part]] for part, chunk in table.chunks()])
        return cls(numbers.to(table.device), rows, omega.float().to(table.device))

    def resample(self, rows: Tensor, size: int) -> Tensor:
        """Positions of `size` rows, as often as their share of the error of leaving `rows`, (n, dim), uncoded.

        Systematic sampling of the cumulated shares: no chance in it.
        """
        shares = (self.omega.double() * rows.double().square().sum(dim=1)).cumsum(dim=0)
        ticks = (torch.arange(size, dtype=torch.float64, device=shares.device) + 0.5) / size
        return torch.searchsorted(shares, ticks * shares[-1]).clamp(max=len(rows) - 1)


def _inclusion(roots: Tensor, size: int) -> Tensor:
    """Probabilities min(1, c · roots) with the c that makes them sum to `size`; ones for a small table."""
    if len(roots) <= size:
        return torch.ones_like(roots)
    low, high = 0.0, float(len(roots) / roots[roots > 0].min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if (roots * middle).clamp(max=1).sum() > size else (middle, high)
    return (roots * high).clamp(max=1)
