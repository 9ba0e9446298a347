"""Rows unlike the others: they are kept as they are, or what they lose is said, and cost the others nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel

from hf_dirembed.cli.commands import main
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.row_weights import RowWeights
from hf_dirembed.compression.subspace import row_cosines
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform.codec import _REACH, storable_scales


V = 2000
TOLERANCE = 0.02
METRIC = torch.linspace(0.1, 2, 64).diag().double()


def gaussian(dim: int) -> Tensor:
    """Rows of a decaying spectrum, of about one length."""
    return torch.randn(V, dim, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, dim)


def chosen(number: int) -> Tensor:
    picked = torch.zeros(V, dtype=torch.bool)
    picked[torch.randperm(V, generator=torch.Generator().manual_seed(1))[:number]] = True
    return picked


@functools.cache
def usual_cosines(bits: float, dim: int, metric: bool) -> Tensor:
    rows = gaussian(dim)
    return row_cosines(rows, compress_table(rows, bits=bits, hessian=METRIC if metric else None).reconstruct())


def stretched(bits: float, dim: int, number: int, factor: float, metric: bool = False) -> tuple[Tensor, Tensor]:
    """The cosines of the rows that stay as they were, and of those that are `factor` as long and had to be coded."""
    rows, picked = gaussian(dim), chosen(number)
    rows[picked] *= factor
    coded = compress_table(rows, bits=bits, hessian=METRIC if metric else None)
    found = coded.reconstruct()
    cosines = row_cosines(rows, found)
    outliers = torch.zeros(V, dtype=torch.bool)
    if coded.layout.outliers is not None:
        outliers[coded.tensors["outlier_rows_weight"].long()] = True
    assert torch.equal(found[outliers], rows[outliers])
    assert int(outliers.sum()) == (coded.layout.outliers or 0)
    assert sum(tensor.nbytes for tensor in coded.tensors.values()) <= bits * rows.numel() / 8
    lost = usual_cosines(bits, dim, metric)[~picked].median() - cosines[~picked].median()
    assert lost < TOLERANCE
    long = RowWeights.of(Table(rows), None, 1.0, relative=True).long_rows
    if not metric and long.any():
        affordable = int(0.1 * bits * rows.numel() / 8) // (dim * rows.itemsize + 4)
        assert int((long & outliers).sum()) >= min(affordable, int(long.sum()))
        shortened = long & ~outliers
        assert coded.record.quality.get("shortened_rows", 0) == int(shortened.sum())
        if shortened.any():
            assert coded.record.quality["shortened_cosine"] == pytest.approx(
                float(cosines[shortened].mean()), abs=1e-4
            )
    return cosines[~picked & ~outliers], cosines[picked & ~outliers]


@pytest.mark.parametrize("metric", [False, True], ids=["relative", "metric"])
@pytest.mark.parametrize("number", [1, V // 100], ids=["one row", "1 % of the rows"])
@pytest.mark.parametrize("factor", [10.0**power for power in range(1, 7)])
def test_long_rows_keep_their_direction_and_cost_the_others_nothing(factor: float, number: int, metric: bool) -> None:
    _, long = stretched(3, 64, number, factor, metric)
    assert len(long) < number
    assert not len(long) or long.mean() > 0.9


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 6), st.integers(1, V // 100), st.sampled_from([1.5, 2, 4]))
def test_whatever_the_length(power: float, number: int, bits: float) -> None:
    stretched(bits, 64, number, 10**power)


def test_of_a_wide_table() -> None:
    _, long = stretched(3, 384, V // 50, 1e4)
    assert long.mean() > 0.9


@pytest.mark.parametrize("factor", [0.1, 1e-3, 1e-6])
def test_short_rows_cost_the_others_nothing_and_stay_short(factor: float) -> None:
    stretched(3, 64, V // 100, factor)
    rows, picked = gaussian(64), chosen(V // 100)
    rows[picked] *= factor
    found = compress_table(rows, bits=3).reconstruct().norm(dim=1)
    assert found[picked].max() < 0.2 * found[~picked].median()


def test_what_many_rows_have_is_no_outlier() -> None:
    rows = gaussian(64)
    rows[: V // 10] *= 100
    assert not RowWeights.of(Table(rows), None, 1.0, relative=True).long_rows.any()
    assert "shortened_rows" not in compress_table(rows, bits=3).record.quality


def test_a_row_that_the_codes_would_lose_is_kept() -> None:
    """Of usual length, but far out along an axis that hardly any other row uses."""
    rows = gaussian(64)
    rows[:, 40:] *= 0.01
    rows[123, 50] = 2
    assert rows[123].norm() < 2 * rows.norm(dim=1).median()
    coded = compress_table(rows, bits=3, token_weights=1 / torch.arange(1, V + 1))
    assert coded.tensors["outlier_rows_weight"].tolist() == [123]
    assert torch.equal(coded.reconstruct()[123], rows[123])
    assert sum(tensor.nbytes for tensor in coded.tensors.values()) <= 3 * rows.numel() / 8


@pytest.mark.parametrize("number", [3, 90])
def test_people_are_told(number: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=V, **shape))
    with torch.no_grad():
        model.get_input_embeddings().weight[7 : 7 + number] *= 1e4
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["compress", str(tmp_path / "dense"), str(out), "--bits", "4"])
    assert done.exit_code == 0, done.output
    said = {line.split("  ")[0]: line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if "rows  " in line}
    spec, card = json.loads((out / "config.json").read_text())["dirembed"], (out / "README.md").read_text()
    ((path, layout),) = spec["tables"].items()
    quality = spec["record"]["tables"][path]["quality"]
    outliers, shortened = layout["outliers"], quality.get("shortened_rows", 0)
    assert outliers + shortened == number
    assert said["outlier rows"] == f"{outliers} kept as they are"
    assert f"| rows that are kept as they are | {outliers} |" in card
    assert (shortened > 0) == ("long rows" in said) == ("far longer than most" in card) == (number == 90)
    if shortened:
        cosine = quality["shortened_cosine"]
        assert cosine > 0.85
        assert said["long rows"] == (
            f"{shortened}, far longer than most: their length is cut, their mean cosine {cosine:.4f}"
        )
        assert (
            f"{shortened} of the rows, far longer than most, keep their direction (mean cosine {cosine:.4f})" in card
        )


@pytest.mark.parametrize("bits", [2, 4])
def test_rows_that_are_far_out_along_one_axis_cost_no_more_than_others(bits: float) -> None:
    rows = gaussian(64)
    never_trained = chosen(V // 20)
    rows[never_trained] *= 0.03
    rows[never_trained, 5] += 1.5  # several times what others have there, with nothing beside it

    coded = compress_table(rows, bits=bits)
    squares = (coded.reconstruct() - rows).square().sum(dim=1)
    far, others = squares[never_trained].mean(), squares[~never_trained].mean()
    assert far < 1.5 * others
    assert others < 1.3 * (compress_table(gaussian(64), bits=bits).reconstruct() - gaussian(64)).square().sum(1).mean()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1.0))
def test_scales_are_those_that_cost_least(seed: int, left: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(8, 16, generator=generator) * torch.rand(8, 1, generator=generator).square() * 3
    units[::2, seed % 16] = torch.randn(4, generator=generator) * 20
    power = torch.rand(16, generator=generator)
    lost = left * float(power.sum())

    def cost(scales: Tensor) -> Tensor:
        beyond = (units.abs() - _REACH * scales.unsqueeze(1)).clamp_min(0).square() @ power
        return lost * scales.square() + beyond

    # the best of a fine grid, and what is chosen a quarter of an octave from it at most; no scale is below 2^-8
    usual = units.square().mean(dim=1).sqrt()
    every = usual * 2 ** (torch.arange(8 * 64) / 64).unsqueeze(1)
    best = every.gather(0, torch.stack([cost(each) for each in every]).argmin(dim=0, keepdim=True)).clamp_min(2**-8)
    steps = 4 * (storable_scales(units, power, lost) / best).log2().abs()
    assert (steps <= 1 + 4 / 64 + 1e-4).all()
