"""One budget over several matrices: shares against brute force, limits, and messages."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dirembed.compression.compress import MethodOptions, compress_table
from hf_dirembed.compression.demand import demand_of, grouped
from hf_dirembed.compression.distortion import weighted_variance
from hf_dirembed.compression.rate_distortion import RateDistortion
from hf_dirembed.compression.sharing import Demand, LatentCurve, share_bytes
from hf_dirembed.compression.table import Table
from hf_dirembed.errors import BudgetError


def error(demand: Demand, num_bytes: float) -> float:
    """The relative error that a curve of water-filling promises at so many bytes."""
    assert isinstance(demand.curve, RateDistortion)
    return demand.curve.distortion(8 * num_bytes / demand.num_weights) / demand.curve.variance


def total_cost(demands: list[Demand], shares: tuple[int, ...] | list[int]) -> float:
    return sum(demand.cost * error(demand, share) for demand, share in zip(demands, shares, strict=True))


@st.composite
def demanded(draw: st.DrawFn) -> tuple[list[Demand], int]:
    """Up to three small matrices with random curves, and a total that they can share."""
    positive = st.floats(0.01, 100)
    demands = []
    for number in range(draw(st.integers(2, 3))):
        weights = torch.tensor(draw(st.lists(positive, min_size=2, max_size=5)), dtype=torch.float64)
        spectrum = torch.tensor(draw(st.lists(positive, min_size=2, max_size=4)), dtype=torch.float64)
        size = len(weights) * len(spectrum)
        least = draw(st.integers(1, 3))
        most = least + draw(st.integers(1, 2 * size))
        curve = RateDistortion(weights, spectrum)
        demands.append(Demand(f"table{number}", size, curve, draw(positive), least, most))
    least, most = sum(each.least for each in demands), sum(each.most for each in demands)
    return demands, draw(st.integers(least, min(most, least + 30)))


@settings(max_examples=60, deadline=None)
@given(demanded())
def test_no_other_whole_shares_cost_clearly_less(case: tuple[list[Demand], int]) -> None:
    demands, total = case
    shares = share_bytes(demands, total)
    assert sum(shares) <= total
    assert all(each.least <= share <= each.most for each, share in zip(demands, shares, strict=True))

    ranges = [range(each.least, min(each.most, total) + 1) for each in demands]
    tables = [
        {num_bytes: each.cost * error(each, num_bytes) for num_bytes in of}
        for each, of in zip(demands, ranges, strict=True)
    ]
    best = min(
        sum(table[share] for table, share in zip(tables, found, strict=True))
        for found in itertools.product(*ranges)
        if sum(found) <= total
    )
    # What the best has by less than a byte of each matrix is rounding: one byte more of each is no worse than it.
    rounded_up = [min(share + 1, each.most) for each, share in zip(demands, shares, strict=True)]
    assert total_cost(demands, rounded_up) <= best + 1e-9


def test_equal_matrices_share_equally_and_all_of_it() -> None:
    curve = RateDistortion(torch.rand(50).double(), torch.rand(8).double())
    demands = [Demand(name, 400, curve, 1.0, 10, 400) for name in "abcd"]
    assert share_bytes(demands, 400) == [100] * 4


def test_a_matrix_of_no_cost_gets_its_least_and_the_most_is_a_limit() -> None:
    curve = RateDistortion(torch.ones(50), torch.ones(8))
    free, dear = Demand("free", 400, curve, 0.0, 10, 400), Demand("dear", 400, curve, 1.0, 10, 150)
    assert share_bytes([free, dear], 100) == [10, 90]
    assert share_bytes([free, dear], 10_000) == [400, 150]


def test_float_latents_go_to_the_largest_gain() -> None:
    first = LatentCurve(torch.tensor([8.0, 4.0, 2.0]), bits=16)
    second = LatentCurve(torch.tensor([1.0, 1.0, 1.0]), bits=16)
    demands = [Demand("a", 100, first, 14.0, 200, 600), Demand("b", 100, second, 9.0, 200, 600)]  # 200 bytes a latent
    assert share_bytes(demands, 800) == [400, 400]  # gains of a latent: 8, 4, 2 and 3, 3, 3


def test_too_few_bytes_name_the_table_and_the_bits_that_do() -> None:
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    demands = [demand_of(rows, name=name, cost=1.0, options=MethodOptions()) for name in ("embed", "lm_head")]
    with pytest.raises(BudgetError, match="embed 69") as raised:
        share_bytes(demands, 500)
    bits = float(re.search(r"bits=([\d.]+)", str(raised.value))[1])  # type: ignore[index]
    for share in share_bytes(demands, int(bits * 2 * rows.numel() / 8)):
        coded = compress_table(rows, num_bytes=share)
        assert sum(tensor.nbytes for tensor in coded.tensors.values()) <= share


@pytest.mark.parametrize("method", ["transform", "svd", "direction"])
def test_the_least_holds_a_code(method: str) -> None:
    rows = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    demand = demand_of(rows, name="embed", cost=1.0, options=MethodOptions(method))
    coded = compress_table(rows, num_bytes=demand.least, method=method)
    assert sum(tensor.nbytes for tensor in coded.tensors.values()) <= demand.least
    with pytest.raises(BudgetError):
        compress_table(rows, num_bytes=demand.least - 1, method=method)


def test_rate_at_slope_is_where_the_distortion_falls_so() -> None:
    generator = torch.Generator().manual_seed(0)
    bound = RateDistortion(torch.rand(30, generator=generator), torch.rand(8, generator=generator))
    for bits in (0.3, 1.0, 3.0):
        step = 1e-4
        slope = (bound.distortion(bits - step) - bound.distortion(bits + step)) / (2 * step) / bound.variance
        assert bound.rate_at_slope(slope) == pytest.approx(bits, abs=1e-3)


def test_grouped_weights_have_the_curve_of_all() -> None:
    weights = 1 / (torch.arange(40_000).double() + 50)
    spectrum = torch.linspace(1, 0.01, 32)
    all_of_them, few = RateDistortion(weights, spectrum), RateDistortion(grouped(weights), spectrum)
    for slope in (0.5, 0.1, 0.01):
        assert few.rate_at_slope(slope) == pytest.approx(all_of_them.rate_at_slope(slope), rel=2e-2, abs=1e-3)


def test_weighted_variance_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(70, 5, generator=generator) + 3, torch.rand(70, generator=generator)
    factor = torch.randn(5, 5, generator=generator)
    hessian = factor @ factor.T
    centred = (rows - (weights @ rows) / weights.sum()).double()
    expected = sum(float(w * (x @ hessian.double() @ x)) for w, x in zip(weights.double(), centred, strict=True))
    assert weighted_variance(Table(rows, chunk_rows=16), weights, hessian) == pytest.approx(expected, rel=1e-5)
