"""Whether two methods differ by more than the choice of what they were evaluated on: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dirembed.evaluation import similarity_error


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
        measure: What the figure is, one of `FIGURES`.
        file: What both were evaluated on.
        items: How many pairs or windows that has.
        difference: Of the method's figure to that of `transform`, in the figure's unit.
        interval: Where the difference lies, at `LEVEL`; None where there are too few items to say.
    """

    method: str
    bits: float
    against: float
    measure: str
    file: str
    items: int
    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within the noise` if the interval holds zero."""
        if self.interval is None:
            return "too few to say"
        low, high = self.interval
        if low <= 0 <= high:
            return "within the noise"
        return "better" if (high < 0) == FIGURES[self.measure].lower_is_better else "worse"


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


@dataclass(frozen=True)
class Figure:
    """A figure that methods are compared by.

    Attributes:
        of: Items of a method and of the dense model, and what is the same for both, to the figure.
        lower_is_better: Of it.
        form: How it is shown.
    """

    of: Arrays
    lower_is_better: bool
    form: str


SPEARMAN, SIMILARITY_ERROR, PERPLEXITY = "Spearman x 100", "similarity error x 100", "perplexity"
FIGURES: Mapping[str, Figure] = {
    SPEARMAN: Figure(spearman_lost, False, "{:+.3f}"),
    SIMILARITY_ERROR: Figure(lambda items, dense, gold, axis: similarity_error(items, dense, axis), True, "{:+.3f}"),
    PERPLEXITY: Figure(perplexity_ratio, True, "{:+.4f}"),
}
COMPARED: Mapping[str, Sequence[str]] = {SPEARMAN: (SPEARMAN, SIMILARITY_ERROR), PERPLEXITY: (PERPLEXITY,)}


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

    figure = FIGURES[measure].of

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
