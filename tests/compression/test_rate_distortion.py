"""The rate-distortion bound against a brute force over all components, and the figures of compressed tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dirembed import TableError, TransformSettings
from hf_dirembed.compression import compress_table
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


def gaussian_rows(num_rows: int = 3000, dim: int = 24) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(num_rows, dim) * torch.linspace(2, 0.1, dim) + 0.5


@pytest.mark.parametrize("with_hessian", [False, True])
def test_figures_are_what_a_dense_computation_gives(with_hessian: bool) -> None:
    rows, weights = gaussian_rows(), 1 / (torch.arange(3000.0) + 50)
    hessian = torch.diag(torch.linspace(0.2, 3, 24)).double() if with_hessian else None
    settings = TransformSettings(tempering=0.5)
    coded = compress_table(rows, bits=3, token_weights=weights, hessian=hessian, settings=settings)
    lost, exact = rows.double() - coded.reconstruct().double(), rows.double()
    if hessian is not None:
        lost, exact = lost * hessian.diagonal().sqrt(), exact * hessian.diagonal().sqrt()
    omega = weights.double() ** 0.5
    if hessian is None:
        omega = omega / exact.square().sum(dim=1)
    centred = exact - omega @ exact / omega.sum()
    spectrum = torch.linalg.eigvalsh((centred * omega[:, None]).T @ centred)
    distortion = float(omega @ lost.square().sum(dim=1))
    bound = RateDistortion(omega * centred.square().sum(dim=1) / spectrum.sum(), spectrum)
    assert coded.record.quality["distortion"] == pytest.approx(distortion / float(spectrum.sum()), abs=2e-6)
    assert coded.record.quality["bound_bits"] == pytest.approx(bound.rate(distortion), abs=1e-4)


@pytest.mark.parametrize("deviation", [0.0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0])
def test_rows_that_are_nearly_alike(scale: float, deviation: float) -> None:
    """What is lost of them is measured; where all they differ by is rounding, nothing is."""
    seeded = torch.Generator().manual_seed(0)
    rows = scale * torch.randn(1, 16, generator=seeded) * (1 + deviation * torch.randn(2000, 16, generator=seeded))
    coded = compress_table(rows, method="svd", rank=1)
    if deviation < 1e-5:
        assert coded.record.quality.keys().isdisjoint({"distortion", "bound_bits"})
        return
    exact = rows.double() / scale
    omega = 1 / exact.square().sum(dim=1)
    centred = exact - omega @ exact / omega.sum()
    variance = float(omega @ centred.square().sum(dim=1))
    lost = float(omega @ (exact - coded.reconstruct().double() / scale).square().sum(dim=1))
    assert coded.record.quality["distortion"] == pytest.approx(lost / variance, rel=1e-3)


@pytest.mark.parametrize(("bits", "scalar"), [(1, 0.27), (2, 0.46), (4, 0.78)])
def test_a_gaussian_table_is_nearer_to_its_bound_than_scalar_quantisers_are(bits: float, scalar: float) -> None:
    """Max (1960): the best uniform quantisers of 1, 2 and 4 bits leave .3634, .1188 and .0115 of the variance."""
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    overhead = 8 * (64 * 65 + 64 * 4 + 1024 + 5000) / rows.numel()  # decoder, bias, codebook and scales
    coded = compress_table(rows, bits=bits + overhead + 0.06)
    of_codes = sum(coded.tensors[name].nbytes for name in ("weight", "further_weight") if name in coded.tensors)
    distance = 8 * of_codes / rows.numel() - coded.record.quality["bound_bits"]
    assert 0 < distance < 0.55 * scalar


def test_a_constant_table_has_no_bound() -> None:
    figures = compress_table(torch.ones(300, 16), method="svd", rank=2).record.quality
    assert figures["mean_cosine"] == pytest.approx(1)
    assert "bound_bits" not in figures
