"""The rate-distortion bound against a brute force over all components, and the figures of compressed tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dirembed import TableError
from hf_dirembed.compression.rate_distortion import RateDistortion


positive = st.floats(1e-6, 1e6)
vectors = st.lists(st.one_of(positive, st.just(0.0)), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def by_brute_force(bound: RateDistortion, level: float) -> tuple[float, float]:
    """Distortion and bits per weight at a water level, over an array of all components."""
    variances = (bound.weights.double()[:, None] * bound.spectrum.double()).flatten()
    wet = variances[variances > level]
    return float(variances.clamp(max=level).sum()), float((wet / level).log2().sum() / 2) / len(variances)


@settings(max_examples=200, deadline=None)
@given(weights=vectors, spectrum=vectors, depth=st.floats(1e-4, 0.999))
def test_both_ways_agree_with_brute_force(weights: torch.Tensor, spectrum: torch.Tensor, depth: float) -> None:
    bound = RateDistortion(weights, spectrum)
    if not bound.variance:
        assert bound.distortion(1.0) == bound.rate(0.5) == 0
        return
    distortion, bits = by_brute_force(bound, depth * float(weights.max() * spectrum.max()))
    assert bound.distortion(bits) == pytest.approx(distortion, rel=1e-9)
    assert bound.rate(distortion) == pytest.approx(bits, rel=1e-6, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(weights=vectors, spectrum=vectors, bits=st.lists(st.floats(0, 20), min_size=3, max_size=3))
def test_distortion_falls_and_is_convex(weights: torch.Tensor, spectrum: torch.Tensor, bits: list[float]) -> None:
    bound = RateDistortion(weights, spectrum)
    low, middle, high = sorted(bits)
    at = [bound.distortion(each) for each in (low, middle, high)]
    assert at[0] * (1 + 1e-9) >= at[1]
    assert at[1] * (1 + 1e-9) >= at[2]
    assert bound.distortion(0) == pytest.approx(bound.variance)
    if high > low:
        share = (middle - low) / (high - low)
        assert at[1] <= ((1 - share) * at[0] + share * at[2]) * (1 + 1e-9) + 1e-300


def test_one_variance_is_the_textbook_formula() -> None:
    bound = RateDistortion(torch.full((7,), 3.0), torch.full((5,), 2.0))
    for bits in (0.0, 0.3, 1.0, 8.0):
        assert bound.distortion(bits) == pytest.approx(7 * 5 * 6 * 2 ** (-2 * bits))


def test_a_large_table_needs_no_array_of_all_components() -> None:
    weights = 1 / (torch.arange(1_000_000) + 50)
    bound = RateDistortion(weights, 0.99 ** torch.arange(1024))  # 8 GiB as an array
    assert bound.rate(bound.distortion(1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.tensor([-1.0]), torch.tensor([math.nan]), torch.ones(0)])
def test_malformed_vectors_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(TableError, match="finite, non-negative"):
        RateDistortion(torch.ones(3), bad)
    with pytest.raises(TableError, match="at least 0"):
        RateDistortion(torch.ones(3), torch.ones(3)).distortion(-1.0)
