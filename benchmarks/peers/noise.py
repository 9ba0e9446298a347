"""Whether two methods differ by more than the choice of what they were evaluated on: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


LEVEL = 0.95
RESAMPLES = 2000
Arrays = Callable[..., Any]  # (resamples, items) arrays to (resamples,) figures


@dataclass(frozen=True)
class Comparison:
    """A method of another package against that budget of `transform` which comes closest to its bits from below.

    Attributes:
        method: Its name.
        bits: Its bits per weight.
        against: Those of `transform`.
        file: What both were evaluated on.
        items: How many pairs or windows that has.
        difference: Of the method's figure to that of `transform`, in the figure's unit.
        interval: Where the difference lies, at `LEVEL`; None where there are too few items to say.
        lower_is_better: Of the figure.
    """

    method: str
    bits: float
    against: float
    file: str
    items: int
    difference: float
    interval: tuple[float, float] | None
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within the noise` if the interval holds zero."""
        if self.interval is None:
            return "too few to say"
        low, high = self.interval
        if low <= 0 <= high:
            return "within the noise"
        return "better" if (high < 0) == self.lower_is_better else "worse"


def spearman_lost(items: Any, dense: Any, gold: Any, axis: int = -1) -> Any:
    """Spearman x 100 over that of the dense model; of cosines and gold scores."""
    return 100 * (_spearman(items, gold, axis) - _spearman(dense, gold, axis))


def perplexity_ratio(items: Any, dense: Any, counts: Any, axis: int = -1) -> Any:
    """Perplexity over that of the dense model; of the windows' losses and how many tokens each has.

    Example:
        >>> round(float(perplexity_ratio(np.array([3.0, 5.0]), np.array([3.0, 3.0]), np.array([2, 2]))), 4)
        1.6487
    """
    return np.exp((items.sum(axis) - dense.sum(axis)) / counts.sum(axis))


def _spearman(first: Any, second: Any, axis: int) -> Any:
    from scipy.stats import rankdata

    ranks = [rankdata(each, axis=axis) for each in (first, second)]
    centred = [each - each.mean(axis, keepdims=True) for each in ranks]
    product = (centred[0] * centred[1]).sum(axis)
    norms = np.sqrt((centred[0] ** 2).sum(axis) * (centred[1] ** 2).sum(axis))
    return np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)  # 0 if all that was drawn is alike


FIGURES: Mapping[str, Arrays] = {"Spearman x 100": spearman_lost, "perplexity": perplexity_ratio}


def difference(
    measure: str, method: Sequence[float], ours: Sequence[float], dense: Sequence[float], base: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
    """By how much a figure differs between two methods, and where that lies over other items of the same kind.

    Args:
        measure: One of `FIGURES`.
        method: An item's number of the one: the cosine of each pair, the loss of each window.
        ours: Of the other.
        dense: Of the dense model.
        base: Gold scores, or numbers of tokens.

    Returns:
        The first figure less the second, and the percentile interval of `RESAMPLES` draws of items with replacement,
        the same for both; None with fewer than two items.

    Example:
        >>> gold = list(range(20))
        >>> difference("Spearman x 100", gold, gold[::-1], gold, gold)
        (200.0, (200.0, 200.0))
    """
    from scipy.stats import bootstrap

    figure = FIGURES[measure]

    def statistic(one: Any, other: Any, stock: Any, given: Any, axis: int) -> Any:
        return figure(one, stock, given, axis=axis) - figure(other, stock, given, axis=axis)

    data = [np.asarray(each, dtype=np.float64) for each in (method, ours, dense, base)]
    found = float(statistic(*data, axis=-1))
    if len(data[0]) < 2:
        return found, None
    interval = bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=200, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found, (float(interval.low), float(interval.high))
