"""Transform coding: each part against brute force, the whole against its budget and against plain integer tables."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dirembed.compression.coded import CodedTable
from hf_dirembed.compression.distortion import Measure
from hf_dirembed.compression.row_weights import RowWeights, Sample
from hf_dirembed.compression.subspace import mean_cosine
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform import trellis
from hf_dirembed.compression.transform.codec import Codec, PackedTable, Stage, Symbols
from hf_dirembed.compression.transform.decoder import DecoderFit, DecoderStorage
from hf_dirembed.compression.transform.quantisation import Allocation, BitAllocator, Quantisers
from hf_dirembed.compression.transform.transform import TransformSettings, transform
from hf_dirembed.compression.transform.trellis import Codebooks, best_states
from hf_dirembed.compression.transform.viterbi import cheapest_paths
from hf_dirembed.errors import BudgetError, OptionError, TableError
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS
from hf_dirembed.remote.kernels_dirembed import trellis_states


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


def quantisers_of(sample: Tensor) -> Quantisers:
    """What a sample's latents would have for errors, were they Gaussian: quick."""
    errors = torch.tensor([1, 1e-4, 6e-3, 8e-2, 0.29]).unsqueeze(1) * sample.square().mean(dim=0)
    return Quantisers(errors, errors[1:], Codebooks(torch.zeros(3, 256), torch.ones(3)))


def code(rows: Tensor, bits: float, **measured: object) -> CodedTable:
    measure = Measure(**measured)  # type: ignore[arg-type]
    return transform(Table(rows), int(bits * rows.numel() / 8), dtype=rows.dtype, measure=measure)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(0, 2**31))
def test_the_trellis_against_all_sequences(width: int, count: int, seed: int) -> None:
    count = min(count, 10 // width)
    generator = torch.Generator().manual_seed(seed)
    targets, importance = torch.randn(30, count, generator=generator), torch.rand(count, generator=generator)
    levels = torch.randn(256, generator=generator)
    every = torch.tensor(list(itertools.product(range(1 << width), repeat=count)), dtype=torch.uint8)

    def errors(symbols: Tensor) -> Tensor:
        return (targets - levels[trellis_states(symbols, width)]).square() @ importance

    least = torch.stack([errors(symbols.expand(30, -1)) for symbols in every]).min(dim=0).values
    states = best_states(targets, importance, levels, width)
    symbols = states & ((1 << width) - 1)
    assert torch.equal(trellis_states(symbols, width), states.int())
    assert torch.allclose(errors(symbols), least, atol=2e-5)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(("count", "num_rows"), [(1, 1), (2, 63), (20, 64), (100, 65), (20, 700)])
def test_one_trellis_search_on_all_devices(
    width: int, count: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled search on any number of threads, and the one of torch's operations by parts of any size."""
    generator = torch.Generator().manual_seed(0)
    targets, importance = torch.randn(count, num_rows, generator=generator), torch.rand(count, generator=generator)
    levels = torch.randn(256, generator=generator)
    compiled, stepwise = [], []
    for threads, num_bytes in ((1, 1 << 28), (2, 1 << 12), (3, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(trellis, "_SURVIVOR_BYTES", num_bytes)
        compiled.append(cheapest_paths(targets, importance, levels, width))
        stepwise.append(trellis._cheapest_paths(targets, importance, levels, width))
    for each in (compiled, stepwise):
        assert all(torch.equal(other, each[0]) for other in each[1:])

    def errors(states: Tensor) -> Tensor:
        return importance @ (levels[states.int()] - targets).square()

    assert torch.allclose(errors(compiled[0]), errors(stepwise[0]), rtol=1e-4, atol=1e-5)  # rounding may choose


def test_the_search_is_compiled_once_for_all_processes(tmp_path: Path) -> None:
    code = """
import torch
from hf_dirembed.compression.transform.viterbi import _search_of, cheapest_paths

for width in (1, 2, 4):
    cheapest_paths(torch.zeros(2, 3), torch.ones(2), torch.zeros(256), width)
    print(width, sum(_search_of(width).stats.cache_hits.values()))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    outputs = [subprocess.run(run, env=environment, check=True, capture_output=True, text=True) for _ in range(2)]
    assert [output.stdout.split() for output in outputs] == [
        ["1", "0", "2", "0", "4", "0"],
        ["1", "1", "2", "1", "4", "1"],
    ]


def test_quantisers_of_a_gaussian() -> None:
    """Trellis-coded, latents come as close to the bound 4^-bits as 16, 64 and 128 pasts allow at 4, 2 and 1 bits."""
    sample = 3 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    fitted = Quantisers.fit(sample, torch.full((64,), 9.0))
    errors = fitted.errors.mean(dim=1) / 9
    assert errors[0] == pytest.approx(1, rel=0.02)
    for error, width, most in zip(errors[1:].tolist(), BIT_WIDTHS, (4.8, 1.45, 1.28, 1.19), strict=True):
        assert 4**-width < error < most * 4**-width  # scalar quantisers (Max 1960): 2.44, 1.88, 1.45 at 4, 2, 1 bits
    assert fitted.codebooks.levels.abs().amax(dim=1).tolist() == [127.5] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 40), st.floats(0.0, 0.4), st.integers(0, 2**31))
def test_allocation_against_all_allocations(budget: int, rank: int, decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(200, rank, generator=generator) * (-decay * torch.arange(rank)).exp()
    errors = quantisers_of(sample).errors.double()

    def error(spent: tuple[int, ...]) -> float:
        rows = [
            row
            for row, num_bytes, width in zip((1, 2, 3, 4), spent, BIT_WIDTHS, strict=True)
            for _ in range(num_bytes * 8 // width)
        ]
        return torch.inf if len(rows) > rank else float(errors[rows + [0] * (rank - len(rows)), range(rank)].sum())

    best = min(error(spent) for spent in itertools.product(range(budget + 1), repeat=4) if sum(spent) == budget)
    found = BitAllocator(errors).allocate(budget, max_rank=rank)
    if best == torch.inf:
        assert found is None
    else:
        assert found is not None
        assert found.num_bytes == budget
        assert found.error == pytest.approx(best, rel=1e-9)
        assert found.error == pytest.approx(
            error(tuple(count * width // 8 for count, width in zip(found.counts, BIT_WIDTHS, strict=True)))
        )


@pytest.mark.parametrize(("base_bytes", "further_bytes"), [(20, 20), (64, 16), (64, 64)])
def test_successive_refinement_is_estimated(base_bytes: int, further_bytes: int) -> None:
    """What a second stage leaves is told from the first one's errors, before anything is coded."""
    rows = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 3, 256).neg().exp()
    quantisers = Quantisers.fit(rows, rows.square().mean(dim=0))
    allocator = BitAllocator(quantisers.errors)
    base = allocator.allocate(base_bytes, 256)
    assert base is not None
    axes = (torch.eye(256), torch.zeros(256), DecoderStorage(torch.float16, None))
    codec = Codec.from_quantisers(base, quantisers, *axes)
    residual = codec.residual(rows, codec.encode(rows, torch.zeros(1000, dtype=torch.bool)))
    assert float(residual.square().sum(dim=1).mean()) == pytest.approx(base.error, rel=0.1)
    variances, order = residual.square().mean(dim=0).sort(descending=True)
    measured = BitAllocator(Quantisers.fit(residual[:, order], variances).errors).allocate(further_bytes, 256)
    estimated = allocator.after(base).allocate(further_bytes, 256)
    assert measured is not None
    assert estimated is not None
    assert estimated.error == pytest.approx(measured.error, rel=0.1)


def test_improving_never_raises_a_row_s_error() -> None:
    """Whatever the decoder: its rows need not be orthogonal."""
    rows, refined = table_of(300, 24), torch.arange(300) % 3 == 0
    quantisers = Quantisers.fit(rows, rows.square().mean(dim=0))
    base, further = Allocation((1, 4, 10, 8), 0.0), Allocation((0, 1, 4, 16), 0.0)
    axes = (torch.eye(24), torch.zeros(24), DecoderStorage(torch.float16, None))
    codec = Codec.from_quantisers(base, quantisers, *axes)
    named = torch.randperm(28, generator=torch.Generator().manual_seed(2))[: further.rank]
    layer = Stage.of_steps(further, named, further.steps(quantisers))
    codec = codec.refined_by(layer, 0.1 * torch.eye(24)[:5])
    turn = torch.eye(28) + 0.2 * torch.randn(28, 28, generator=torch.Generator().manual_seed(1))
    codec.decoder = turn @ codec.decoder

    def left(coded: Symbols) -> torch.Tensor:
        decoded = coded.levels[:, : base.rank] @ codec.decoder[: base.rank]
        for code, latent in enumerate(named.tolist()):
            step = 2.0 ** (float(layer.exponents[code]) / 8)
            decoded += torch.outer(coded.levels[:, base.rank + code] * step, codec.decoder[latent])
        return (rows - codec.bias - decoded).square().sum(dim=1)

    coded = codec.encode(rows, refined)
    errors = [left(coded)]
    for _ in range(4):
        coded = codec.improve(rows, coded)
        errors.append(left(coded))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5) + 1e-6).all()
    assert errors[-1].sum() < 0.95 * errors[0].sum()
    assert not coded.levels[~refined, base.rank :].any()
    assert torch.allclose(codec.residual(rows, coded).square().sum(dim=1), errors[-1], rtol=1e-3, atol=1e-4)
    packed = PackedTable.empty(codec, refined)
    for part in (slice(0, 130), slice(130, 300)):
        packed.put(part, Symbols(coded.symbols[part], coded.levels[part], refined[part]))
    found = packed.get(slice(0, 300))
    assert torch.equal(found.symbols, coded.symbols)
    assert torch.equal(found.levels, coded.levels)
    fewer = refined & (torch.arange(300) % 2 == 0)
    found, part = packed.refining(fewer).get(slice(100, 250)), slice(100, 250)
    assert torch.equal(found.levels[fewer[part]], coded.levels[part][fewer[part]])
    assert not found.levels[~fewer[part], base.rank :].any()
    assert torch.equal(found.symbols[:, : base.rank], coded.symbols[part, : base.rank])


def test_decoder_fit_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, latents = torch.randn(60, 7, generator=generator), torch.randn(60, 4, generator=generator)
    omega = torch.rand(60, generator=generator)
    latents[25:40, 2:] = 0
    fit = DecoderFit(4, 7, rows.device)
    for part, rank in ((slice(0, 25), 4), (slice(25, 40), 2), (slice(40, 60), 4)):
        fit.add(rows[part], latents[part, :rank], omega[part])
    decoder = fit.solve()
    bias = fit.bias(decoder)
    root = omega.sqrt().unsqueeze(1).numpy()
    affine = np.concatenate([latents.numpy(), np.ones((60, 1))], axis=1)
    expected = np.linalg.lstsq(affine * root, rows.numpy() * root, rcond=None)[0]
    assert np.allclose(torch.cat([decoder, bias.unsqueeze(0)]).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_storing_a_decoder(dtype: torch.dtype) -> None:
    """Whatever the size of its rows, what is stored is near what was given, and of the size that optimisers expect."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    factor = torch.linalg.cholesky(turn @ torch.diag(torch.logspace(0, -3, 24).double()) @ turn.T)
    decoder = torch.randn(40, 24, generator=generator) * torch.logspace(-12, 4, 40).unsqueeze(1)
    decoder[7] = 0
    for metric in (None, factor):
        storage = DecoderStorage(dtype, metric)
        stored = storage.round(decoder)
        held = storage.in_metric(stored)
        assert stored.weight.dtype == dtype
        assert stored.weight.nbytes + stored.exponents.nbytes == storage.num_bytes(40, 24)
        assert float(stored.weight.float().abs().max()) <= 4
        errors = (held - decoder).norm(dim=1) / decoder.norm(dim=1).clamp_min(1e-30)
        fine = dtype == torch.float16
        assert float(errors.max()) < (0.002 if fine else 0.06 if metric is None else 0.12)


def test_the_decoder_s_storage_follows_its_share_of_the_budget() -> None:
    """Narrow where the decoder takes much of the bytes, wide where the codes are so fine that its rounding shows."""
    assert code(table_of(2000, 64), 2).layout.decoder == "float8_e4m3fn"
    assert code(table_of(20_000, 16), 7).layout.decoder == "float16"


def test_a_sample_stands_for_the_table() -> None:
    """Inverse-probability weights: sums over the sample estimate sums over the table."""
    rows = table_of(20_000, 6)
    weights = torch.arange(1, 20_001).double().reciprocal()
    importance = RowWeights.of(Table(rows), weights, 1.0, relative=True)
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
    quick = TransformSettings(sample_rows=200)
    asked = int(bits * rows.numel() / 8)
    try:
        coded = transform(Table(rows), asked, dtype=rows.dtype, settings=quick)
    except BudgetError as error:
        assert "at least bits=" in str(error)  # noqa: PT017
        return
    refinement = coded.layout.refinement
    assert num_bytes(coded) <= asked
    if refinement is not None and refinement.rows < num_rows:
        assert num_bytes(coded) > asked - max(refinement.code_width + 4, 0.01 * asked)
    assert coded.layout.code_width != dim
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
    assert weighed.layout.refinement is not None
    refined = weighed.tensors["refined_rows_weight"].tolist()
    kept = weighed.tensors.get("outlier_rows_weight", torch.tensor([])).tolist()  # heavier rows still
    assert sorted(refined) == refined
    assert sorted(kept + refined) == list(range(len(kept + refined)))  # the heaviest rows


def test_a_hessian_lowers_the_error_that_it_measures() -> None:
    rows = table_of(3000, 48)
    factor = torch.randn(48, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hessian = factor @ torch.diag(torch.linspace(0, 8, 48).neg().exp().double()) @ factor.T + 1e-3 * torch.eye(48)

    def error(coded: CodedTable) -> float:
        difference = (rows - coded.reconstruct()).double()
        return float(((difference @ hessian) * difference).sum())

    assert error(code(rows, 1.5, hessian=hessian)) < 0.5 * error(code(rows, 1.5))


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
    with pytest.raises(BudgetError, match="at least bits=") as refused:
        code(rows, 0.1)
    least = float(str(refused.value).rsplit("=", 1)[1])
    assert num_bytes(code(rows, least)) <= least * rows.numel() / 8
    with pytest.raises(OptionError, match="positive definite"):
        code(rows, 6, hessian=-torch.eye(16))
    with pytest.raises(OptionError, match=r"\(16, 16\)"):
        code(rows, 6, hessian=torch.eye(4))
    for wrong in ({"tempering": -1}, {"tempering": None}, {"passes": 0}, {"sample_rows": 1.5}, {"seed": -1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            TransformSettings(**wrong)  # type: ignore[arg-type]
