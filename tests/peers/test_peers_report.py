"""What a report says of figures: which differ by more than noise, and which are missing."""

from __future__ import annotations

import math
import re

import pytest
import torch

from benchmarks.peers.noise import difference
from benchmarks.peers.report import ModelReport, compare, comparison_parts, failures
from benchmarks.peers.running import Point


pytest.importorskip("scipy")

GOLD = torch.arange(200.0)


def cosines(error: float, seed: int = 0) -> list[float]:
    """Cosines that follow the gold scores but for an error."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    return ((GOLD + 200 * error * noise) / 200).tolist()


def encoder_report(points: dict[tuple[str, float], list[float]]) -> ModelReport:
    """Of methods with these cosines at these bits."""
    found = [
        Point(method, bits, 100, {"bits": bits, "fit_s": bits}, {"file": -1.0}, items={"file": items})
        for (method, bits), items in {("dense", 32): cosines(0), **points}.items()
    ]
    base = {"file": GOLD.tolist()}
    return ModelReport("m", "Spearman x 100", "difference", False, (100, 8), False, {"file": 90}, found, base=base)


def test_a_difference_within_the_noise_is_said_to_be_that() -> None:
    model = encoder_report(
        {
            ("transform", 4): cosines(0.3),
            ("transform", 2): cosines(0.6),
            ("svd", 4): cosines(0),  # ours
            ("torchao-int8", 8): cosines(0.3),  # a tie
            ("torchao-int4", 4.5): cosines(0.31, seed=1),
            ("torchao-int3", 3.5): cosines(0.1),  # against 2 bits, as 4 are more than its own
            ("torchao-int2", 2.5): cosines(1.5),
            ("sklearn-svd", 1): cosines(0),  # in fewer bits than any of ours
        }
    )
    model.comparisons = compare(model)
    found = {(each.method, each.measure): (each.against, each.verdict) for each in model.comparisons}
    by_rank, by_error = "Spearman x 100", "similarity error x 100"
    assert found == {
        ("torchao-int8", by_rank): (4, "within the noise"),
        ("torchao-int4", by_rank): (4, "within the noise"),
        ("torchao-int3", by_rank): (2, "better"),
        ("torchao-int2", by_rank): (2, "worse"),
        ("torchao-int8", by_error): (4, "within the noise"),
        ("torchao-int4", by_error): (4, "within the noise"),
        ("torchao-int3", by_error): (2, "better"),
        ("torchao-int2", by_error): (2, "worse"),
    }
    intro, shown, faster = comparison_parts(model)
    assert "the 95% interval of a paired bootstrap over the 200 pairs (2,000 draws)" in intro
    assert re.search(r"^\| torchao-int4 .* \| [+-][\d.]+ \| -[\d.]+ to \+[\d.]+ \| within the noise \|$", shown, re.M)
    assert re.search(
        r"^\| torchao-int3 .* Spearman .* \| \+[\d.]+ \| \+[\d.]+ to \+[\d.]+ \| \*\*better\*\* \|$", shown, re.M
    )
    assert faster == "- Faster than transform in fitting: sklearn-svd"


def test_similarities_that_move_show_where_their_ranks_do_not() -> None:
    """Doubled, the cosines keep their order."""
    moved = [2 * each for each in cosines(0)]
    model = encoder_report({("transform", 4): cosines(0), ("torchao-int4", 4.5): moved})
    model.comparisons = compare(model)
    by_rank, by_error = model.comparisons
    assert (by_rank.difference, by_rank.verdict) == (0, "within the noise")
    assert by_error.difference == pytest.approx(100 * float((GOLD / 200).square().mean().sqrt()))
    assert by_error.verdict == "worse"


def test_nothing_to_compare_with() -> None:
    assert comparison_parts(encoder_report({("torchao-int4", 4): cosines(0)})) == []
    model = encoder_report({("transform", 4): cosines(0.3), ("torchao-int2", 2.5): cosines(0.3)})
    model.comparisons = compare(model)
    said, faster = comparison_parts(model)
    assert said == "No method of another package has as many bits as transform or more."
    assert faster == "- Faster than transform in fitting: torchao-int2"


def test_the_interval_of_perplexities_is_that_of_the_windows_losses() -> None:
    """Against the normal distribution, which the mean of so many losses has."""
    seeded = torch.Generator().manual_seed(0)
    dense = 100 + 10 * torch.randn(400, generator=seeded)
    ours, theirs = dense + 5, dense + 5 + 4 * torch.randn(400, generator=seeded)
    counts = torch.full((400,), 50.0)
    found, interval = difference("perplexity", *(each.tolist() for each in (theirs, ours, dense, counts)))
    ratio = math.exp(5 / 50)
    by = (theirs - ours).double()
    assert found == pytest.approx(ratio * (math.exp(by.mean() / 50) - 1))
    spread = 1.96 * ratio * float(by.std()) / 50 / 400**0.5
    assert interval == pytest.approx((found - spread, found + spread), abs=0.15 * spread)
    assert difference("perplexity", [3.0], [2.0], [1.0], [1.0])[1] is None


def test_a_failure_is_told_once() -> None:
    points = [Point("tltorch-tt", bits, 100, {"head": None}, {}, {"lookup": "killed by signal 9"}) for bits in (4, 2)]
    assert failures(points) == [
        "tltorch-tt, lookup: killed by signal 9",
        "tltorch-tt, head: its package has none over this table",
    ]
