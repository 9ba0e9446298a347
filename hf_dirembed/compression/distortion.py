"""What an error of a table's rows costs: along which directions, and in which rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BudgetError
from .row_weights import Importance
from .table import Table


# The exponent of the token weights: below 1 rare tokens matter more than a word list says. They are less rare in text
# that the list was not made from; a head has to tell each from all others; and the rarer a token, the more an error
# of it moves what a model computes (E‖g‖², g the gradient at its embedding, falls as a power of its frequency).
TEMPERING = 0.5


@dataclass(frozen=True)
class Measure:
    """Σ ωᵢ (xᵢ - x̂ᵢ) M (xᵢ - x̂ᵢ)ᵀ over the rows xᵢ of a table.

    Without a metric M is the identity and ωᵢ = wᵢ^τ / ‖xᵢ‖²: the error relative to the row's length, which to first
    order is twice its cosine distance. With a metric ωᵢ = wᵢ^τ: what a metric measures, how far sentences move or
    the rise of a language model's loss, is absolute already.

    Attributes:
        weights: w, (num_rows,) non-negative; uniform by default.
        metric: M, (dim, dim) symmetric positive definite; the identity by default.
        tempering: τ.

    Raises:
        BudgetError: On use, if weights or metric are malformed.

    Example:
        >>> rows = Table(torch.tensor([[3.0, 4.0], [0.6, 0.8]]))
        >>> Measure().importance(rows).share.tolist()  # relative to each row's length
        [0.5, 0.5]
        >>> measure = Measure(metric=torch.eye(2))
        >>> [round(share, 4) for share in measure.importance(measure.in_metric(rows)).share.tolist()]
        [0.9615, 0.0385]
    """

    weights: Tensor | None = None
    metric: Tensor | None = None
    tempering: float = TEMPERING

    def factor(self, table: Table) -> Tensor | None:
        """L of M = L Lᵀ, (dim, dim) float64, on the table's device; None for the identity."""
        if self.metric is None:
            return None
        if tuple(self.metric.shape) != (table.dim, table.dim):
            raise BudgetError(f"metric of shape {tuple(self.metric.shape)}: give one of ({table.dim}, {table.dim})")
        factor, info = torch.linalg.cholesky_ex(self.metric.to(table.device).double())
        if int(info) or not factor.isfinite().all():
            raise BudgetError("metric: give a symmetric positive definite matrix, damped if need be")
        return factor

    def in_metric(self, table: Table) -> Table:
        """The rows xᵢ L, whose plain squared errors are those in the metric."""
        factor = self.factor(table)
        return table if factor is None else table.in_metric(factor)

    def importance(self, rows: Table) -> Importance:
        """What an error of each row counts; of rows in the metric."""
        return Importance.of(rows, self.weights, self.tempering, relative=self.metric is None)
