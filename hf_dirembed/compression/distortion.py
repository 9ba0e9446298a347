"""What an error of a table's rows costs: along which directions, and in which rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .row_weights import RowWeights
from .table import Table


# The exponent of the token weights: below 1 rare tokens matter more than a word list says. They are less rare in text
# that the list was not made from; a head has to tell each from all others; and the rarer a token, the more an error
# of it moves what a model computes (E‖g‖², g the gradient at its embedding, falls as a power of its frequency).
TEMPERING = 0.5


@dataclass(frozen=True)
class Measure:
    """Σ ωᵢ (xᵢ - x̂ᵢ) M (xᵢ - x̂ᵢ)ᵀ over the rows xᵢ of a table.

    Without a Hessian M is the identity and ωᵢ = wᵢ^τ / ‖xᵢ‖²: the error relative to the row's length, which to first
    order is twice its cosine distance. With a Hessian ωᵢ = wᵢ^τ: what it measures, how far sentences move or
    the rise of a language model's loss, is absolute already; but where it says along which directions errors matter,
    and nothing of which rows, errors are relative there, too: ωᵢ = wᵢ^τ / (xᵢ M xᵢᵀ).

    Attributes:
        weights: w, (num_rows,) non-negative; uniform by default.
        hessian: M, (dim, dim) symmetric positive definite; the identity by default.
        tempering: τ.
        relative: Whether errors count relative to the row's length; by default where there is no Hessian.

    Raises:
        OptionError: On use, if weights or Hessian are malformed.

    Example:
        >>> rows = Table(torch.tensor([[3.0, 4.0], [0.6, 0.8]]))
        >>> Measure().importance(rows).share.tolist()  # relative to each row's length
        [0.5, 0.5]
        >>> measure = Measure(hessian=torch.eye(2))
        >>> [round(share, 4) for share in measure.importance(measure.in_metric(rows)).share.tolist()]
        [0.9615, 0.0385]
    """

    weights: Tensor | None = None
    hessian: Tensor | None = None
    tempering: float = TEMPERING
    relative: bool | None = None

    def __post_init__(self) -> None:
        if self.relative is None:
            object.__setattr__(self, "relative", self.hessian is None)

    def factor(self, table: Table) -> Tensor | None:
        """L of M = L Lᵀ, (dim, dim) float64, on the table's device; None for the identity."""
        if self.hessian is None:
            return None
        if tuple(self.hessian.shape) != (table.dim, table.dim):
            raise OptionError(f"hessian of shape {tuple(self.hessian.shape)}: give one of ({table.dim}, {table.dim})")
        factor, info = torch.linalg.cholesky_ex(self.hessian.to(table.device).double())
        if int(info) or not factor.isfinite().all():
            raise OptionError("hessian: give a symmetric positive definite matrix, damped if need be")
        return factor

    def in_metric(self, table: Table) -> Table:
        """The rows xᵢ L, whose plain squared errors are those in the metric."""
        factor = self.factor(table)
        return table if factor is None else table.in_metric(factor)

    def importance(self, rows: Table) -> RowWeights:
        """What an error of each row counts; of rows in the metric."""
        return RowWeights.of(rows, self.weights, self.tempering, relative=bool(self.relative))


def weighted_variance(table: Table, weights: Tensor, hessian: Tensor) -> float:
    """Σ wᵢ (xᵢ - m) M (xᵢ - m)ᵀ over the rows of a table, m their weighted mean, which an affine decoder takes in.

    Args:
        table: The (num_rows, dim) table.
        weights: w, (num_rows,) non-negative.
        hessian: M, (dim, dim) symmetric.

    Example:
        >>> rows = Table(torch.tensor([[1.0, 2.0], [-1.0, 2.0], [6.0, 5.0]]))
        >>> weighted_variance(rows, torch.tensor([1.0, 1.0, 0.0]), torch.eye(2))
        2.0
    """
    weights, hessian = (each.to(device=table.device, dtype=torch.float32) for each in (weights, hessian))
    origin = next(table.chunks())[1].mean(dim=0)  # near the mean: of nearly equal rows little cancels below
    first, squares = torch.zeros(table.dim, dtype=torch.float64), 0.0
    for part, chunk in table.chunks():
        chunk = chunk - origin
        first += (weights[part] @ chunk).cpu().double()
        squares += float((weights[part] @ ((chunk @ hessian) * chunk).sum(dim=1)).double())
    return max(0.0, squares - float(first @ hessian.cpu().double() @ first) / (float(weights.sum()) or 1.0))
