"""Transform coding: each part against brute force, the whole against its budget and against plain integer tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dirembed.compression.coded import CodedTable
from hf_dirembed.compression.importance import Importance, Sample
from hf_dirembed.compression.lattice import DecoderFit, coordinate_descent
from hf_dirembed.compression.quantisation import BitAllocator, ScalarQuantisers, largest_level, quantise
from hf_dirembed.compression.subspace import mean_cosine
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform import TransformSettings, transform
from hf_dirembed.configuration_dirembed import BIT_WIDTHS, BudgetError, TableError


def table_of(num_rows: int, dim: int, seed: int = 0, decay: float = 1.0) -> Tensor:
    """Rows with a decaying spectrum, heavy tails, varying lengths and a common mean, as embeddings have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator) * torch.linspace(0, 4 * decay, dim).neg().exp()
    rows = rows * torch.rand(num_rows, 1, generator=generator).mul(0.8).sub(0.4).exp()
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    return rows @ turn + 0.1


def num_bytes(coded: CodedTable) -> int:
    return sum(tensor.nbytes for tensor in coded.tensors.values())


def relative_error(rows: Tensor, coded: CodedTable, weights: Tensor | None = None) -> float:
    errors = (rows - coded.reconstruct()).square().sum(dim=1) / rows.square().sum(dim=1)
    return float(errors.mean() if weights is None else errors @ weights.float())


def code(rows: Tensor, bits: float, **options: object) -> CodedTable:
    return transform(Table(rows), int(bits * rows.numel() / 8), dtype=rows.dtype, **options)  # type: ignore[arg-type]


def test_quantise_against_all_levels() -> None:
    values = torch.linspace(-12, 12, 4001)
    for width in BIT_WIDTHS:
        levels = torch.arange(2**width) - largest_level(width)
        nearest = (values.unsqueeze(1) - levels).abs().min(dim=1).values
        assert torch.allclose((values - quantise(values, largest_level(width))).abs(), nearest, atol=1e-5)


def test_steps_against_a_fine_search() -> None:
    sample = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)) * 3
    fitted = ScalarQuantisers.fit(sample)
    for index, width in enumerate(BIT_WIDTHS):
        errors = []
        for step in torch.linspace(0.01, 8, 1500):
            levels = quantise(sample / step, largest_level(width))
            best_scale = (sample * levels).sum() / levels.square().sum()
            errors.append(float((sample - best_scale * levels).square().mean()))
        assert float(fitted.errors[1 + index, 0]) <= 1.15 * min(errors)
    assert float(fitted.errors[0, 0]) == pytest.approx(float(sample.square().mean()), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 40), st.floats(0.0, 0.4), st.integers(0, 2**31))
def test_allocation_against_all_allocations(budget: int, rank: int, decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(200, rank, generator=generator) * (-decay * torch.arange(rank)).exp()
    allocator = BitAllocator(ScalarQuantisers.fit(sample))
    all_spent = [s for s in itertools.product(range(budget + 1), repeat=4) if sum(s) == budget]
    best = min(allocator.error(spent) for spent in all_spent)
    found = allocator.allocate(budget, max_rank=rank)
    if best == torch.inf:
        assert found is None
    else:
        assert found is not None
        assert found.num_bytes == budget
        assert found.error <= best * 1.02 + 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_coordinate_descent_against_all_codes(rank: int, seed: int) -> None:
    """No single latent can be bettered; with orthogonal decoder rows the codes are the best of all."""
    generator = torch.Generator().manual_seed(seed)
    rows, start = torch.randn(20, 5, generator=generator), torch.full((20, rank), -0.5)
    largest = torch.tensor([0.5, 1.5, 1.5, 0.5])[:rank]
    lattice = torch.tensor(list(itertools.product(*(torch.arange(-m, m + 1) for m in largest.tolist()))))
    general = torch.randn(rank, 5, generator=generator)
    orthogonal = torch.linalg.qr(general.T).Q.T
    for decoder in (general, orthogonal):
        found = coordinate_descent(rows, start, decoder, largest, sweeps=20)
        error = (rows - found @ decoder).square().sum(dim=1)
        for j in range(rank):
            for level in torch.arange(-largest[j], largest[j] + 1):
                changed = found.clone()
                changed[:, j] = level
                assert (error <= (rows - changed @ decoder).square().sum(dim=1) + 1e-4).all()
        if decoder is orthogonal:
            every = (rows.unsqueeze(1) - lattice @ decoder).square().sum(dim=2)
            assert torch.allclose(error, every.min(dim=1).values, atol=1e-4)


def test_coordinate_descent_never_raises_the_error() -> None:
    rows, decoder = table_of(300, 24), table_of(70, 24, seed=1)
    largest = torch.tensor([1.5] * 40 + [0.5] * 30)
    latents = quantise(torch.randn(300, 70, generator=torch.Generator().manual_seed(2)), largest)
    errors = [(rows - latents @ decoder).square().sum(dim=1)]
    for _ in range(4):
        latents = coordinate_descent(rows, latents, decoder, largest)
        errors.append((rows - latents @ decoder).square().sum(dim=1))
        assert (errors[-1] <= errors[-2] * (1 + 1e-4) + 1e-4).all()
    assert errors[-1].sum() < 0.5 * errors[0].sum()


def test_decoder_fit_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, latents = torch.randn(60, 7, generator=generator), torch.randn(60, 4, generator=generator)
    omega = torch.rand(60, generator=generator)
    fit = DecoderFit(4, 7, rows.device)
    for part in (slice(0, 25), slice(25, 60)):
        fit.add(rows[part], latents[part], omega[part])
    decoder, bias = fit.solve()
    root = omega.sqrt().unsqueeze(1).numpy()
    affine = np.concatenate([latents.numpy(), np.ones((60, 1))], axis=1)
    expected = np.linalg.lstsq(affine * root, rows.numpy() * root, rcond=None)[0]
    assert np.allclose(torch.cat([decoder, bias.unsqueeze(0)]).numpy(), expected, atol=1e-3)


def test_a_sample_stands_for_the_table() -> None:
    """Inverse-probability weights: sums over the sample estimate sums over the table."""
    rows = table_of(20_000, 6)
    weights = torch.arange(1, 20_001).double().reciprocal()
    importance = Importance.of(Table(rows), weights, 1.0, relative=True)
    assert float(importance.share.sum()) == pytest.approx(1)
    sample = Sample.draw(Table(rows), importance, 3000, seed=0)
    assert 2700 < len(sample.numbers) < 3300
    assert torch.equal(sample.rows, rows[sample.numbers])
    estimate = float((sample.omega * sample.rows.square().sum(dim=1)).sum())
    assert estimate == pytest.approx(1, abs=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(400, 1500), st.integers(16, 80), st.floats(0.8, 7.0), st.integers(0, 2**31))
def test_the_budget_is_met(num_rows: int, dim: int, bits: float, seed: int) -> None:
    """Never above it, and within one refined row, or one per cent, below."""
    rows = table_of(num_rows, dim, seed)
    quick = TransformSettings(sample_rows=200, rounds=1)
    asked = int(bits * rows.numel() / 8)
    try:
        coded = transform(Table(rows), asked, dtype=rows.dtype, settings=quick)
    except BudgetError as error:
        assert "at least bits=" in str(error)  # noqa: PT017
        return
    refinement = coded.spec.refinement
    assert num_bytes(coded) <= asked
    if refinement is not None and refinement.rows < num_rows:
        assert num_bytes(coded) > asked - max(refinement.code_width + 4, 0.01 * asked)
    assert coded.spec.code_width != dim
    assert coded.reconstruct().isfinite().all()


@pytest.mark.parametrize("bits", [3.5, 2.5])
def test_better_than_integers_in_groups(bits: float) -> None:
    """int3 and int2 with a float16 scale and zero per group of 32 weights take 4 and 3 bits: more than ours here."""
    rows = table_of(4000, 96)
    width = int(bits)
    groups = rows.view(-1, 32)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = ((high - low) / (2**width - 1)).half().float()
    integers = (((groups - low) / step).round().clamp(0, 2**width - 1) * step + low).view_as(rows)
    theirs = float(((rows - integers).square().sum(dim=1) / rows.square().sum(dim=1)).mean())
    assert relative_error(rows, code(rows, bits)) < 0.8 * theirs


def test_more_bits_are_better() -> None:
    rows = table_of(3000, 64)
    errors = [relative_error(rows, code(rows, bits)) for bits in (1, 1.5, 2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_weights_help_the_rows_they_weigh() -> None:
    rows = table_of(16_000, 64)
    weights = torch.arange(1, 16_001).double().reciprocal()
    weights = weights / weights.sum()
    plain, weighed = code(rows, 1.5), code(rows, 1.5, weights=weights)
    assert relative_error(rows, weighed, weights) < 0.75 * relative_error(rows, plain, weights)
    assert weighed.spec.refinement is not None
    refined = weighed.tensors["refined_rows_weight"]
    assert refined.tolist() == list(range(len(refined)))  # the heaviest rows, in ascending order


def test_a_metric_lowers_the_error_that_it_measures() -> None:
    rows = table_of(3000, 48)
    factor = torch.randn(48, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metric = factor @ torch.diag(torch.linspace(0, 8, 48).neg().exp().double()) @ factor.T + 1e-3 * torch.eye(48)

    def error(coded: CodedTable) -> float:
        difference = (rows - coded.reconstruct()).double()
        return float(((difference @ metric) * difference).sum())

    assert error(code(rows, 1.5, metric=metric)) < 0.5 * error(code(rows, 1.5))


def test_same_input_same_bytes_and_chunks_do_not_matter() -> None:
    rows = table_of(3000, 40)
    first, again = code(rows, 2), code(rows, 2)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    chunked = transform(Table(rows, chunk_rows=700), 2 * rows.numel() // 8, dtype=rows.dtype)
    assert relative_error(rows, chunked) == pytest.approx(relative_error(rows, first), rel=0.02)


def test_tables_at_the_edge() -> None:
    """Zero, equal and constant rows, one heavy token, lengths that span 10⁶, half precision: defined results."""
    rows = table_of(800, 32)
    rows[5] = 0
    rows[7:20] = rows[6]
    for name, edge in {
        "zero and equal rows": rows,
        "all zero": torch.zeros(800, 32),
        "constant": torch.ones(800, 32),
        "lengths": rows * torch.logspace(-3, 3, 800).unsqueeze(1),
        "float16": rows.half(),
        "bfloat16": rows.bfloat16(),
        "tiny": rows * 1e-6,
        "huge": rows * 1e4,
    }.items():
        coded = code(edge, 4)
        approximated = coded.reconstruct()
        assert approximated.isfinite().all(), name
        if name not in ("all zero", "lengths"):
            assert mean_cosine(Table(edge), coded) > 0.98, name
        if name == "all zero":
            assert approximated.abs().max() == 0
    one_token = torch.zeros(800, dtype=torch.float64)
    one_token[3] = 1
    assert code(rows, 4, weights=one_token).reconstruct().isfinite().all()
    rows[9, 2] = torch.nan
    with pytest.raises(TableError, match="row 9 "):
        code(rows, 4)


def test_mistakes() -> None:
    rows = table_of(100, 16)
    with pytest.raises(BudgetError, match="at least bits="):
        code(rows, 0.1)
    with pytest.raises(BudgetError, match="positive definite"):
        code(rows, 6, metric=-torch.eye(16))
    with pytest.raises(BudgetError, match=r"\(16, 16\)"):
        code(rows, 6, metric=torch.eye(4))
    for wrong in ({"tempering": -1}, {"rounds": 0}, {"sample_rows": 1.5}, {"seed": -1}):
        with pytest.raises(BudgetError, match=next(iter(wrong))):
            TransformSettings(**wrong)  # type: ignore[arg-type]
