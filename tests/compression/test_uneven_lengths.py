"""Rows of very uneven lengths: a few long or short ones cost the others nothing, and what they lose is said."""

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

from hf_dirembed.cli import main
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.importance import Importance
from hf_dirembed.compression.subspace import row_cosines
from hf_dirembed.compression.table import Table


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
    return row_cosines(rows, compress_table(rows, bits=bits, metric=METRIC if metric else None).reconstruct())


def stretched(bits: float, dim: int, number: int, factor: float, metric: bool = False) -> tuple[Tensor, Tensor]:
    """The cosines of the rows that stay as they were, and of those that are `factor` as long."""
    rows, picked = gaussian(dim), chosen(number)
    rows[picked] *= factor
    coded = compress_table(rows, bits=bits, metric=METRIC if metric else None)
    cosines = row_cosines(rows, coded.reconstruct())
    lost = usual_cosines(bits, dim, metric)[~picked].median() - cosines[~picked].median()
    assert lost < TOLERANCE
    long = Importance.of(Table(rows), None, 1.0, relative=True).long_rows
    if not metric and long.any():
        assert coded.spec.figures["shortened_rows"] == int(long.sum())
        assert coded.spec.figures["shortened_cosine"] == pytest.approx(float(cosines[long].mean()), abs=1e-4)
    return cosines[~picked], cosines[picked]


@pytest.mark.parametrize("metric", [False, True], ids=["relative", "metric"])
@pytest.mark.parametrize("number", [1, V // 100], ids=["one row", "1 % of the rows"])
@pytest.mark.parametrize("factor", [10.0**power for power in range(1, 7)])
def test_long_rows_keep_their_direction_and_cost_the_others_nothing(factor: float, number: int, metric: bool) -> None:
    _, long = stretched(3, 64, number, factor, metric)
    assert long.mean() > 0.9


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 6), st.integers(1, V // 100), st.sampled_from([1.5, 2, 4]))
def test_whatever_the_length(power: float, number: int, bits: float) -> None:
    stretched(bits, 64, number, 10**power)


def test_of_a_wide_table() -> None:
    _, long = stretched(3, 384, V // 100, 1e4)
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
    assert not Importance.of(Table(rows), None, 1.0, relative=True).long_rows.any()
    assert "shortened_rows" not in compress_table(rows, bits=3).spec.figures


def test_people_are_told(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=V, **shape))
    with torch.no_grad():
        model.get_input_embeddings().weight[7:10] *= 1e4
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["compress", str(tmp_path / "dense"), str(out), "--bits", "4"])
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("long rows"))
    cosine = json.loads((out / "config.json").read_text())["dirembed"]["figures"]["shortened_cosine"]
    assert cosine > 0.85
    assert line.split(maxsplit=2)[2] == (
        f"3, far longer than most: their length is cut, their mean cosine {cosine:.4f}"
    )
    assert (
        f"3 of the rows, far longer than most, keep their direction (mean cosine {cosine:.4f})"
        in (out / "README.md").read_text()
    )
