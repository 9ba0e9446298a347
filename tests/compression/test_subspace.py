"""The closed-form subspaces against brute force, numpy, and the symmetries of the objective."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dirembed.compression.subspace import direction, direction_weights, eigenbasis, mean_cosine, second_moment, svd
from hf_dirembed.compression.table import Table
from hf_dirembed.errors import BudgetError, OptionError, TableError


def random_rows(num_rows: int, dim: int, seed: int = 0, decay: float = 0.3, mean: float = 0.0) -> torch.Tensor:
    """Rows with a decaying spectrum, norms spread over two decades and, if asked, a common mean direction."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator) * torch.exp(-decay * torch.arange(dim))
    rows = rows + mean * torch.randn(dim, generator=generator)
    return rows * torch.logspace(-1, 1, num_rows)[torch.randperm(num_rows, generator=generator), None]


def projector(decoder: torch.Tensor) -> torch.Tensor:
    return decoder.T @ decoder


def best_of_restarts(rows: torch.Tensor, rank: int, restarts: int = 60, steps: int = 300) -> float:
    """Gradient ascent of Σ ‖Qᵀy‖ on the Stiefel manifold, by the polar factor of the gradient, from random starts."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(restarts, rows.shape[1], rank, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(start)[0]
    for _ in range(steps):
        latents = unit @ basis
        gradient = unit.T @ (latents / latents.norm(dim=2, keepdim=True).clamp_min(1e-12))
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        basis = left @ right
    return float((unit @ basis).norm(dim=2).mean(dim=1).max())


@pytest.mark.parametrize(("num_rows", "dim", "rank"), [(200, 16, 5), (6, 16, 16), (50, 8, 8), (50, 8, 1)])
def test_svd_is_the_truncated_svd(num_rows, dim, rank):
    rows = random_rows(num_rows, dim)
    left, singular, right = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    expected = torch.from_numpy((left[:, :rank] * singular[:rank]) @ right[:rank]).float()
    found = svd(Table(rows), rank)
    assert found.bias is None
    assert found.latents.dtype == found.decoder.dtype == torch.float32
    torch.testing.assert_close(found.reconstruct(), expected, rtol=0, atol=1e-5 * float(rows.abs().max()))


def test_eigenbasis_descends_with_fixed_signs():
    moment = second_moment(Table(random_rows(100, 12)))
    values, vectors = eigenbasis(moment)
    assert (values.diff() <= 0).all()
    assert (vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(vectors * values @ vectors.T, moment)


@pytest.mark.parametrize("seed", range(12))
def test_direction_matches_the_best_of_many_restarts(seed):
    dim, rank = 4 + seed % 3, 1 + seed % 3
    rows = random_rows(40, dim, seed=seed, decay=0.7)
    found = mean_cosine(Table(rows), direction(Table(rows), rank, affine=False))
    assert found >= best_of_restarts(rows, rank) - 1e-3


def test_direction_reaches_its_certified_bound():
    """No projector of the same rank can do better than the concave objective's linearisation at the solution."""
    rows, rank = random_rows(2000, 32, decay=0.1), 8
    table = Table(rows)
    found = direction(table, rank, affine=False)
    norms, kept = rows.double().norm(dim=1), (rows.double() @ found.decoder.T.double()).norm(dim=1)
    moment = second_moment(table, direction_weights(norms, kept, torch.ones(2000, dtype=torch.float64)))
    attained = (projector(found.decoder).double() * moment).sum()
    gap = float(eigenbasis(moment)[0][:rank].sum() - attained) / 2 / 2000
    assert 0 <= gap < 1e-3
    assert mean_cosine(table, found) > mean_cosine(table, svd(table, rank)) + 1e-3


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    dim=st.integers(2, 8),
    rank=st.integers(1, 8),
    mean=st.sampled_from([0.0, 1.0]),
    affine=st.booleans(),
)
def test_objective_never_falls_from_one_iteration_to_the_next(seed, dim, rank, mean, affine):
    table = Table(random_rows(30, dim, seed=seed, decay=0.1, mean=mean))
    values = [mean_cosine(table, direction(table, min(rank, dim), affine=affine, iterations=n)) for n in range(1, 10)]
    assert all(after >= before - 1e-6 for before, after in pairwise(values))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), dim=st.integers(2, 10), rank=st.integers(1, 9), mean=st.sampled_from([0.0, 1.0, 5.0]))
def test_affine_is_no_worse_than_linear_and_keeps_norms_sane(seed, dim, rank, mean):
    rows = random_rows(60, dim, seed=seed, decay=0.1, mean=mean)
    table, rank = Table(rows), min(rank, dim)
    linear, affine = direction(table, rank, affine=False), direction(table, rank, affine=True)
    assert mean_cosine(table, affine) >= mean_cosine(table, linear) - 1e-6
    torch.testing.assert_close(affine.decoder @ affine.decoder.T, torch.eye(rank))
    assert float((affine.decoder @ affine.bias).abs().max()) <= 1e-5 * (1 + float(affine.bias.norm()))
    assert (affine.reconstruct().norm(dim=1) <= rows.norm(dim=1) + affine.bias.norm() + 1e-4).all()


def test_affine_gains_a_dimension_where_rows_share_a_mean():
    rows = random_rows(500, 16, decay=0.0, mean=3.0)
    rows = torch.nn.functional.normalize(rows, dim=1)
    table = Table(rows)
    linear, affine = direction(table, 2, affine=False), direction(table, 2)
    assert mean_cosine(table, affine) > mean_cosine(table, linear) + 0.5 * (
        mean_cosine(table, direction(table, 3, affine=False)) - mean_cosine(table, linear)
    )
    assert (affine.reconstruct() - rows).norm() < (linear.reconstruct() - rows).norm()


def test_linear_subspace_ignores_row_order_and_row_lengths():
    rows = random_rows(120, 10)
    expected = projector(direction(Table(rows), 4, affine=False).decoder)
    generator = torch.Generator().manual_seed(2)
    permuted = rows[torch.randperm(120, generator=generator)]
    scaled = rows * 2.0 ** torch.randint(-8, 8, (120, 1), generator=generator)  # exact in float32
    for changed in (permuted, scaled):
        torch.testing.assert_close(projector(direction(Table(changed), 4, affine=False).decoder), expected)


@pytest.mark.parametrize("affine", [False, True])
def test_weights_act_like_repeated_rows(affine):
    rows = random_rows(60, 8, mean=0.5)
    counts = torch.arange(60) % 4
    weighted = direction(Table(rows), 3, counts.float(), affine=affine)
    repeated = direction(Table(rows.repeat_interleave(counts, dim=0)), 3, affine=affine)
    torch.testing.assert_close(projector(weighted.decoder), projector(repeated.decoder), rtol=1e-4, atol=1e-4)
    if affine:
        torch.testing.assert_close(weighted.bias, repeated.bias, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        second_moment(Table(rows), counts), second_moment(Table(rows.repeat_interleave(counts, dim=0)))
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
def test_chunk_size_changes_nothing_but_rounding(chunk_rows):
    rows = random_rows(100, 8, mean=0.5)
    for method in (svd, direction):
        whole, chunked = method(Table(rows), 3), method(Table(rows, chunk_rows=chunk_rows), 3)
        torch.testing.assert_close(chunked.reconstruct(), whole.reconstruct(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chunked.decoder, whole.decoder, rtol=1e-4, atol=1e-5)


DEGENERATE = {
    "zero rows": torch.cat([random_rows(20, 5), torch.zeros(20, 5)]),
    "all zero": torch.zeros(4, 5),
    "one row": random_rows(1, 5),
    "duplicate rows": random_rows(1, 5).expand(30, 5),
    "orthogonal rows": torch.eye(5),
    "opposite rows": torch.cat([torch.eye(5), -torch.eye(5)]),
    "tiny and huge rows": random_rows(20, 5) * torch.tensor([1e-30, 1e30]).repeat(10)[:, None],
    "float16": random_rows(20, 5).half(),
}


@pytest.mark.parametrize("rows", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("affine", [False, True])
def test_degenerate_tables(rows, rank, affine):
    table = Table(rows)
    found = direction(table, rank, affine=affine)
    for tensor in (found.latents, found.decoder, found.bias if affine else found.decoder):
        assert tensor.isfinite().all()
    assert (found.latents[(rows == 0).all(dim=1)] == 0).all()
    if rank == 5:
        assert mean_cosine(table, found) > 1 - 1e-6


def test_orthogonal_rows_do_not_make_the_iteration_jump_between_axes():
    """The optimum here, halfway between all axes, is no fixed point of the full eigenproblem."""
    rows = torch.eye(2) + 1e-3 * torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert mean_cosine(Table(rows), direction(Table(rows), 1, affine=False)) > 0.707


@pytest.mark.parametrize("rank", [0, 6, 2.0, True, None])
def test_bad_rank(rank):
    for method in (svd, direction):
        with pytest.raises(BudgetError, match=r"rank=.* from 1 to .* 5"):
            method(Table(torch.ones(3, 5)), rank)


@pytest.mark.parametrize(
    "weights",
    [torch.ones(2), torch.ones(3, 1), torch.tensor([1.0, -1, 1]), torch.zeros(3), torch.full((3,), torch.nan)],
)
def test_bad_weights(weights):
    with pytest.raises(OptionError, match="weights"):
        direction(Table(torch.ones(3, 5)), 1, weights)


def test_bad_iterations_and_bad_table():
    with pytest.raises(OptionError, match="iterations=0"):
        direction(Table(torch.ones(3, 5)), 1, iterations=0)
    with pytest.raises(TableError, match="row 1 "):
        direction(Table(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])), 1)
