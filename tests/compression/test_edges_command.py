"""Tables at the edges through the command line: the numbers that are to be expected, or one line with the mend."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, BertConfig, BertModel

from hf_dirembed.checkpoints.convert import inspect_checkpoint
from hf_dirembed.cli.commands import main


V, D, PADDING = 400, 32, 3
METHODS = {
    "transform, 4 bits": "--method transform --bits 4",
    "transform, 1.5 bits": "--method transform --bits 1.5",
    "svd, rank 1": "--method svd --rank 1",
    "svd, rank d - 1": f"--method svd --rank {D - 1}",
    "direction, rank 1": "--method direction --rank 1",
    "direction, rank d - 1": f"--method direction --rank {D - 1}",
    "autoencoder, rank 1": "--method autoencoder --rank 1",
    "autoencoder, rank d - 1": f"--method autoencoder --rank {D - 1}",
}
Check = Callable[[Tensor, Tensor, str], None]


def gaussian(rows: int = V) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(0))


def with_row(number: int, value: float | Tensor, rows: Tensor | None = None) -> Tensor:
    rows = gaussian() if rows is None else rows
    rows[number] = value
    return rows


def with_zero_rows() -> Tensor:
    rows = gaussian()
    rows[::7] = 0
    return rows


def compress(rows: Tensor, options: str, tmp_path: Path) -> Result:
    """`hf-dirembed compress` on a small model with that table."""
    shape = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    padding = PADDING if len(rows) > PADDING else 0
    model = BertModel(BertConfig(vocab_size=len(rows), pad_token_id=padding, max_position_embeddings=16, **shape))
    model = model.to(rows.dtype)
    model.get_input_embeddings().weight.data = rows.clone()
    model.save_pretrained(tmp_path / "dense")
    return CliRunner().invoke(main, ["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *options.split()])


def largest_error(rows: Tensor, found: Tensor) -> float:
    """Of all numbers, relative to the root of the mean square of the table's."""
    return float((found - rows).abs().max() / rows.square().mean().sqrt())


def truncated(rows: Tensor, rank: int) -> Tensor:
    """By torch's own SVD."""
    left, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


def is_as_good_as_svd(rows: Tensor, found: Tensor, method: str) -> None:
    """`svd` is torch's; `direction` has the better cosines, the autoencoder nearly those of SVD."""
    expected = truncated(rows, 1 if method.endswith("rank 1") else D - 1)
    if method.startswith("svd"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))
    elif not method.startswith("transform"):
        margin = 0.02 if method.startswith("autoencoder") else -1e-4
        assert cosine_similarity(rows, found).mean() > cosine_similarity(rows, expected).mean() - margin


def stay_near_zero(rows: Tensor, found: Tensor, method: str) -> None:
    zero, lengths = ~rows.any(dim=1), found.norm(dim=1)
    assert zero[PADDING] == (lengths[PADDING] == 0)
    if method.startswith("svd"):
        assert not found[zero].any()
    assert lengths[zero].max() < (0.4 if "1.5 bits" in method else 0.2) * rows.norm(dim=1).median()
    is_as_good_as_svd(rows, found, method)


def are_zero(rows: Tensor, found: Tensor, method: str) -> None:
    assert not found.any()


def stay_equal(rows: Tensor, found: Tensor, method: str) -> None:
    if method.startswith("transform"):  # which may refine some of them
        assert largest_error(rows, found) < 0.1
        return
    assert torch.equal(found, found[:5].repeat(V // 5, 1))
    if not method.endswith("rank 1"):
        assert largest_error(rows, found) < (0.05 if method.startswith("autoencoder") else 1e-3)


def come_out_again(rows: Tensor, found: Tensor, method: str) -> None:
    assert largest_error(rows, found) < (0.05 if method.startswith("autoencoder") else 1e-4)


def has_a_zero_padding_row(rows: Tensor, found: Tensor, method: str) -> None:
    assert not found[PADDING].any()
    assert (found.any(dim=1) == (torch.arange(V) != PADDING)).all()
    is_as_good_as_svd(rows, found, method)


def keep_directions(rows: Tensor, found: Tensor, method: str) -> None:
    least = {"transform, 4 bits": 0.6, "transform, 1.5 bits": 0.3}.get(method, 0)
    assert cosine_similarity(rows.double(), found.double()).mean() > least
    is_as_good_as_svd(rows, found, method)


def keep_all_but_the_long_ones_length(rows: Tensor, found: Tensor, method: str) -> None:
    if method.endswith("rank d - 1"):
        assert found[9].norm() > 0.95 * rows[9].norm()
    if method.startswith("transform"):
        assert cosine_similarity(rows[9], found[9], dim=0) > (0.6 if "1.5 bits" in method else 0.9)
    is_as_good_as_svd(rows, found, method)


EDGES: dict[str, tuple[Tensor, Check]] = {
    "zero rows": (with_zero_rows(), stay_near_zero),
    "nothing but zeros": (torch.zeros(V, D), are_zero),
    "five rows again and again": (gaussian(5).repeat(V // 5, 1), stay_equal),
    "a constant table": (torch.full((V, D), 0.3), come_out_again),
    "a zero padding row": (with_row(PADDING, 0), has_a_zero_padding_row),
    "norms from 1e-3 to 1e3": (gaussian() * torch.logspace(-3, 3, V)[:, None], keep_directions),
    "one row 1e4 as long": (with_row(9, gaussian()[9] * 1e4), keep_all_but_the_long_ones_length),
    "half precision": ((gaussian() * 1000).half(), keep_directions),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EDGES)
def test_the_result_is_what_is_to_be_expected(name: str, method: str, tmp_path: Path) -> None:
    rows, check = EDGES[name]
    done = compress(rows, METHODS[method], tmp_path)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    embedding = AutoModel.from_pretrained(tmp_path / "out").get_input_embeddings()
    found = embedding(torch.arange(len(rows))).detach()
    assert found.dtype == rows.dtype
    assert found.isfinite().all()
    rows, found = rows.float(), found.float()
    directed = rows.any(dim=1)
    if directed.any():
        cosine = cosine_similarity(rows[directed].double(), found[directed].double()).mean()
        (summary,) = inspect_checkpoint(tmp_path / "out").tables
        assert summary.mean_cosine == pytest.approx(float(cosine), abs=2e-3)
    if name == "half precision" and method.startswith("svd"):
        assert largest_error(truncated(rows, embedding.layout.rank), found) < 0.02
    else:
        check(rows, found, method)


FLOAT_METHODS = [method for method in METHODS if not method.startswith("transform")]


@pytest.mark.parametrize("method", FLOAT_METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float_latents_are_as_good_at_any_scale(scale: float, method: str, tmp_path: Path) -> None:
    rows = gaussian() * scale
    done = compress(rows, METHODS[method], tmp_path)
    assert done.exit_code == 0, done.output
    found = AutoModel.from_pretrained(tmp_path / "out").get_input_embeddings()(torch.arange(V)).detach()
    is_as_good_as_svd(rows / scale, found / scale, method)


@pytest.mark.parametrize("method", FLOAT_METHODS)
def test_one_token_is_its_own_subspace(method: str, tmp_path: Path) -> None:
    rows = gaussian(1)
    assert compress(rows, METHODS[method], tmp_path).exit_code == 0
    found = AutoModel.from_pretrained(tmp_path / "out").get_input_embeddings()(torch.tensor([0])).detach()
    come_out_again(rows, found, method)


LONG_LATENTS = [*METHODS][2:-2] + [*METHODS][-1:]  # in rank 1 the autoencoder leaves the length to its decoder
NUMBERS = "holds a NaN or an infinity: mend the checkpoint"
RANGE = "exceeds the range of float16: give the model, and float latents, in bfloat16 or float32"
REFUSALS: dict[str, tuple[Tensor, list[str], str]] = {
    "infinity": (with_row(17, float("inf"), gaussian().half()), list(METHODS), f"row 17 .* {NUMBERS}"),
    "NaN": (with_row(17, float("nan"), gaussian().half()), list(METHODS), f"row 17 .* {NUMBERS}"),
    "squares beyond float32": (
        gaussian() * 1e30,
        ["transform, 4 bits"],
        "row 0 .* too long to measure: scale the table",
    ),
    "half precision, latents beyond it": (torch.full((V, D), 6e4).half(), LONG_LATENTS, RANGE),
    "squares that are lost in float32": (
        gaussian() * 1e-30,
        ["transform, 4 bits"],
        "up to .e-30 long.*scale the table",
    ),
    "importance that is lost in float32": (gaussian() * 1e18, ["transform, 4 bits"], "scale the table to lengths nea"),
    "double precision": (gaussian().double(), ["svd, rank 1"], "of dtype float64: give the model in float32"),
    "one token": (gaussian(1), ["transform, 4 bits"], "ask for at least bits="),
}


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, (_, methods, _) in REFUSALS.items() for method in methods]
)
def test_what_cannot_be_coded_is_refused_in_one_line(name: str, method: str, tmp_path: Path) -> None:
    rows, _, message = REFUSALS[name]
    refused(compress(rows, METHODS[method], tmp_path), message, tmp_path)


@pytest.mark.parametrize("method", ["svd", "direction", "autoencoder"])
@pytest.mark.parametrize("rank", [-1, 0, D, D + 1])
def test_a_rank_that_is_none_is_refused(rank: int, method: str, tmp_path: Path) -> None:
    refused(
        compress(gaussian(), f"--method {method} --rank {rank}", tmp_path), "rank.* ask for less|give one", tmp_path
    )


def refused(done: Result, message: str, tmp_path: Path) -> None:
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hf-dirembed: ")
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
