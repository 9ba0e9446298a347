"""What one table asks of bytes that several share: its curve, and the fewest and most bytes that it can use."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TableError
from .budget import TableSize
from .compress import MethodOptions
from .distortion import Measure
from .quality import WeightedSpectrum
from .rate_distortion import RateDistortion
from .sharing import Curve, Demand, LatentCurve
from .table import RowSource, Table
from .transform.quantisation import MAX_BITS
from .transform.sampled import draw_rows, is_large
from .transform.transform import code_bytes, fixed_bytes


_GROUPS = 4096  # of rows of like weight: as many numbers stand for the weights of all rows


def demand_of(
    rows: RowSource,
    measure: Measure | None = None,
    *,
    name: str,
    cost: float,
    options: MethodOptions,
) -> Demand:
    """What a table asks of bytes that it shares with others; `share_bytes` says what it gets.

    It reads the table three times at most, chunk by chunk, and takes a small part of the time of fitting. Of a table
    that is fitted to some of its rows, it reads these.

    Args:
        rows: (V, d) table of a floating dtype.
        measure: What errors of its rows cost, relative to one another.
        name: For messages.
        cost: What leaving it uncoded costs.
        options: How it is to be compressed.

    Raises:
        OptionError: If weights or Hessian are malformed.
        TableError: If the table holds a NaN or an infinity.

    Example:
        >>> rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> demand = demand_of(rows, name="lm_head", cost=1, options=MethodOptions())
        >>> demand.least, round(demand.curve.rate_at_slope(0.1), 1)
        (2096, 1.9)
    """
    table, dtype = Table(rows, device=options.fitting_device()), rows.dtype
    if dtype is None or not dtype.is_floating_point:
        raise TableError(f"{name} is of dtype {dtype}: load the model unquantised")
    size = TableSize(table.num_rows, table.dim, dtype.itemsize)
    measure = measure or Measure(tempering=options.tempering)

    in_metric = measure.in_metric(_rows_that_tell(table, measure, options))
    importance = measure.importance(in_metric)
    if importance.long_rows.any():
        in_metric = in_metric.no_longer_than(importance.longest)
        importance = measure.importance(in_metric)

    spectrum = WeightedSpectrum.of(in_metric, importance.omega).values

    curve: Curve
    if options.method == "transform":
        fixed = fixed_bytes(table.num_rows, table.dim, dtype)
        least, most = (
            fixed + code_bytes(table.num_rows, table.dim, latents=latents, bits=bits)
            for latents, bits in ((1, 8), (table.dim, MAX_BITS))
        )
        curve = RateDistortion(grouped(importance.share), spectrum)
    else:
        storage = options.latent_storage(dtype)
        least, most = (size.latent_bytes(rank, storage) for rank in (1, max(1, table.dim - 1)))
        of_latent = least - size.latent_bytes(0, storage)
        curve = LatentCurve(spectrum, 8 * of_latent / size.num_weights)
    return Demand(name, size.num_weights, curve, cost, least, most)


def _rows_that_tell(table: Table, measure: Measure, options: MethodOptions) -> Table:
    """The table, or the rows of it that a table is fitted to which is too large for the memory."""
    settings = options.transform_settings
    if options.method != "transform" or not is_large(table, measure, settings):
        return table
    return Table(draw_rows(table, settings.fitted_rows, settings.seed), device=table.device)


def grouped(weights: Tensor) -> Tensor:
    """The means of groups of weights of like size, as many in each but for one: a short vector in place of a long one.

    Example:
        >>> len(grouped(torch.rand(100_000)))
        4096
    """
    if len(weights) <= _GROUPS:
        return weights
    return torch.stack([group.mean() for group in weights.sort().values.tensor_split(_GROUPS)])
