"""What came of a compression: cosines, the error in the codec's own measure, and how far from the bound it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .coded import CodedTable
from .distortion import Measure
from .rate_distortion import RateDistortion
from .row_weights import RowWeights
from .subspace import check_weights, eigenbasis, length_scale, row_cosines
from .table import Table


DIGITS = 6
NOTHING = 1e-9  # of the rows' weighted squares: variance that is rounding


def table_quality(table: Table, coded: CodedTable, measure: Measure | None = None) -> dict[str, float]:
    """Measures a compressed table against the dense one, in four passes over it.

    All figures are of the rows over their usual length, as squares of very short or long rows leave float32.

    Args:
        table: The (num_rows, dim) table.
        coded: What was made of it.
        measure: That errors were measured in; by default relative to the rows' lengths.

    Returns:
        `mean_cosine` over the rows; `token_cosine`, with the token weights, where there are any; `shortened_rows` and
        `shortened_cosine`, how many rows `transform` cut in length and their mean cosine, if any; `distortion`, the
        share of the table's weighted variance that is lost, in the measure that `transform` minimises; `bound_bits`,
        the bits per weight in which a Gaussian table of the same weighted spectrum could be coded with that
        distortion: see `RateDistortion` for what that assumes.

    Example:
        >>> from hf_dirembed.compression import compress_table
        >>> rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
        >>> quality = compress_table(rows, bits=3).record.quality
        >>> 0 < quality["bound_bits"] < 3, 0.01 < quality["distortion"] < 0.1
        (True, True)
    """
    scale = length_scale(table)
    table = table.over(scale)
    measure = measure or Measure()
    rows = measure.in_metric(table)
    importance = measure.importance(rows)
    omega = importance.omega
    spectrum = WeightedSpectrum.of(rows, omega)

    # cosines, and errors in the measure, chunk by chunk
    cosines, shares, lost = [], [], omega.new_zeros(())
    for part, chunk in table.chunks():
        approximated = coded.reconstruct(part).to(chunk) / scale
        cosines.append(row_cosines(chunk.to(omega), approximated.to(omega)))
        error = chunk - approximated
        if rows.factor is not None:
            chunk, error = chunk @ rows.factor, error @ rows.factor
        shares.append((chunk - spectrum.mean.to(chunk)).square().sum(dim=1).to(omega) * omega[part])
        lost += error.square().sum(dim=1).to(omega) @ omega[part]

    every = check_weights(None, table)
    figures = {"mean_cosine": _weighted_mean(torch.cat(cosines), every)}
    if measure.weights is not None:
        figures["token_cosine"] = _weighted_mean(torch.cat(cosines), check_weights(measure.weights, table))
    if coded.layout.method == "transform" and (shortened := _shortened(importance, coded)).any():
        figures["shortened_rows"] = int(shortened.sum())
        figures["shortened_cosine"] = _weighted_mean(torch.cat(cosines), every * shortened)

    if (variance := spectrum.values.sum()) > NOTHING:  # else all rows are alike: nothing to lose
        figures["distortion"] = float(lost / variance)
        figures["bound_bits"] = RateDistortion(torch.cat(shares) / variance, spectrum.values).rate(float(lost))

    return {name: round(value, DIGITS) for name, value in figures.items()}


def _shortened(importance: RowWeights, coded: CodedTable) -> Tensor:
    """(num_rows,) the long rows that are not kept as they are."""
    shortened = importance.long_rows.clone()
    if coded.layout.outliers is not None:
        shortened[coded.tensors["outlier_rows_weight"].to(shortened.device).long()] = False
    return shortened


@dataclass(frozen=True)
class WeightedSpectrum:
    """Mean and variances of weighted rows along their principal axes.

    Attributes:
        mean: (dim,) float64.
        values: (dim,) float64, descending: the sum over the rows of weight x squared coordinate.
    """

    mean: Tensor
    values: Tensor

    @classmethod
    def of(cls, rows: Table, omega: Tensor) -> WeightedSpectrum:
        """Reads a table once, its first chunk twice.

        Args:
            rows: The table, in the metric that errors are measured in.
            omega: (num_rows,) float64, non-negative.

        Example:
            >>> rows = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [6.0, 5.0]])
            >>> WeightedSpectrum.of(Table(rows), torch.tensor([1.0, 1.0, 0.0]).double()).values.tolist()
            [2.0, 0.0]
        """
        first, second = omega.new_zeros(rows.dim), omega.new_zeros(rows.dim, rows.dim)
        origin = next(rows.chunks())[1].mean(dim=0)  # near the mean: of nearly equal rows little cancels below
        for part, chunk in rows.chunks():
            chunk = chunk - origin
            weighted = chunk * omega[part, None].to(chunk)
            first += weighted.sum(dim=0).to(omega)
            second += (weighted.T @ chunk).to(omega)  # a chunk in float32, their sum in float64
        mean = first / omega.sum()
        values, _ = eigenbasis((second + second.T) / 2 - omega.sum() * torch.outer(mean, mean))
        return cls(mean + origin.to(omega), values.clamp_min(0))


def _weighted_mean(cosines: Tensor, weights: Tensor) -> float:
    """The weighted mean of the cosines of those rows that have a direction; 1 if none has."""
    directed = weights * cosines.isfinite().to(weights)
    return float((cosines.nan_to_num() @ directed) / directed.sum()) if directed.any() else 1.0
