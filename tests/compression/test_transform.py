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
from hf_dirembed.compression.distortion import Measure
from hf_dirembed.compression.row_weights import RowWeights, Sample
from hf_dirembed.compression.subspace import mean_cosine
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform import trellis
from hf_dirembed.compression.transform.allocation import (
    CODE_ENTRY_BYTES,
    Allocation,
    Gains,
    RowsByShare,
    class_count_bytes,
)
from hf_dirembed.compression.transform.codec import ClassCodes, Codec, Symbols, _Sweep
from hf_dirembed.compression.transform.decoder import DecoderFit, DecoderStorage
from hf_dirembed.compression.transform.quantisation import CODES_OF_BITS, MAX_BITS, Quantisers
from hf_dirembed.compression.transform.row_codes import RowCodes
from hf_dirembed.compression.transform.transform import TransformSettings, transform
from hf_dirembed.compression.transform.trellis import best_states
from hf_dirembed.compression.transform.viterbi import cheapest_paths
from hf_dirembed.errors import BudgetError, OptionError, TableError
from hf_dirembed.kernels import library
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS
from hf_dirembed.remote.kernels_dirembed import pack, row_classes, trellis_states


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


def counts_of(width: int, count: int) -> tuple[int, ...]:
    """So many codes of one width."""
    return tuple(count * (width == each) for each in BIT_WIDTHS)


def code(rows: Tensor, bits: float, **measured: object) -> CodedTable:
    measure = Measure(**measured)  # type: ignore[arg-type]
    return transform(Table(rows), int(bits * rows.numel() / 8), dtype=rows.dtype, measure=measure)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BIT_WIDTHS), st.integers(1, 8), st.integers(0, 2**31))
def test_the_trellis_against_all_sequences(width: int, count: int, seed: int) -> None:
    count = min(count, 10 // width)
    generator = torch.Generator().manual_seed(seed)
    targets, importance = torch.randn(30, count, generator=generator), torch.rand(count, generator=generator)
    levels = torch.randn(256, generator=generator)
    every = torch.tensor(list(itertools.product(range(1 << width), repeat=count)), dtype=torch.uint8)

    def states_of(symbols: Tensor) -> Tensor:
        return trellis_states(pack(symbols, counts_of(width, count)), counts_of(width, count))

    def errors(symbols: Tensor) -> Tensor:
        return (targets - levels[states_of(symbols)]).square() @ importance

    least = torch.stack([errors(symbols.expand(30, -1)) for symbols in every]).min(dim=0).values
    states = best_states(targets, importance, levels, width)
    symbols = states & ((1 << width) - 1)
    assert torch.equal(states_of(symbols), states.int())
    assert torch.allclose(errors(symbols), least, atol=2e-5)


@pytest.mark.parametrize("width", BIT_WIDTHS)
@pytest.mark.parametrize(("count", "num_rows"), [(1, 1), (2, 63), (20, 64), (100, 65), (20, 700)])
def test_one_trellis_search_on_all_devices(
    width: int, count: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled search on any number of threads, and the one of torch's operations by parts of any size."""
    generator = torch.Generator().manual_seed(0)
    targets, importance = torch.randn(num_rows, count, generator=generator), torch.rand(count, generator=generator)
    levels = torch.randn(256, generator=generator)
    compiled, stepwise = [], []
    for threads, num_bytes in ((1, 1 << 28), (2, 1 << 12), (3, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(library, "WORTH_A_THREAD", 1.0)
        monkeypatch.setattr(trellis, "_SURVIVOR_BYTES", num_bytes)
        states, found = cheapest_paths(targets, importance, levels, width)
        assert torch.equal(found, levels[states.int()])
        compiled.append(states)
        stepwise.append(trellis._cheapest_paths(targets, importance, levels, width))
    for each in (compiled, stepwise):
        assert all(torch.equal(other, each[0]) for other in each[1:])

    def errors(states: Tensor) -> Tensor:
        return (levels[states.int()] - targets).square() @ importance

    assert torch.allclose(errors(compiled[0]), errors(stepwise[0]), rtol=1e-4, atol=1e-5)  # rounding may choose


def test_quantisers_of_a_gaussian() -> None:
    """Trellis-coded, latents come as close to the bound 4^-bits as 16, 32, 64 and 128 pasts allow at 4 to 1 bits."""
    sample = 3 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    fitted = Quantisers.fit(sample)
    left = fitted.left.mean(dim=1).tolist()
    for bits, most in enumerate((1.0, 1.19, 1.28, 1.37, 1.45, 2.0, 2.4, 3.2, 4.5)):  # from 5 bits on of two codes
        assert 4**-bits <= left[bits] <= most * 4**-bits  # scalar quantisers (Max 1960): 1.45, 1.88, 2.21, 2.44
    assert fitted.codebooks.levels.abs().amax(dim=1).tolist() == [127.5] * 4


def test_what_codes_leave_is_told_before_anything_is_coded() -> None:
    """Also of latents with several codes."""
    rows = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 5, 256).neg().exp()
    quantisers = Quantisers.fit(rows)
    bits = torch.linspace(7, 0, 256).round().long()
    codes = ClassCodes.of(Allocation(bits), quantisers, rows.square().mean(dim=0).sqrt())
    codec = Codec([codes], quantisers.codebooks, torch.eye(256), torch.zeros(256), DecoderStorage(torch.float16, None))
    scales = torch.ones(len(rows))
    nothing = torch.zeros(len(rows), codes.num_codes)
    begun = Symbols(nothing.byte(), nothing, scales, scales)
    found = codec._sweep(rows, rows, begun, _Sweep.of(codec, 0), keep_better=False)
    left = (rows - codec.latents(found, 0)).square().mean(dim=0)
    promised = rows.square().mean(dim=0) * quantisers.left[bits, torch.arange(256)]
    for number in range(8):
        assert float(left[bits == number].sum()) == pytest.approx(float(promised[bits == number].sum()), rel=0.25)
    assert float(found.errors.mean()) == pytest.approx(float(left.sum()), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.0, 1.5), st.integers(0, 2**31))
def test_allocation_against_all_allocations(num_bytes: int, rank: int, decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    variances = torch.rand(1, rank, generator=generator).double() * (-decay * torch.arange(rank)).exp()
    factors = torch.tensor([1.0, 0.29, 0.078, 0.021, 0.0055, 0.0017, 5e-4, 1.3e-4, 3e-5, 1e-5, 2e-6])
    left = factors.unsqueeze(1).repeat(1, rank)
    gains, num_bits = Gains(variances, left), 8 * num_bytes
    if num_bits > MAX_BITS * rank:
        return

    # the fewest of all ways to give the latents so many bits
    best = torch.zeros(1, dtype=torch.float64)
    for latent in range(rank):
        errors = variances[0, latent] * left[:, latent].double()
        totals = torch.full((len(best) + MAX_BITS,), torch.inf, dtype=torch.float64)
        for bits, error in enumerate(errors):
            part = slice(bits, bits + len(best))
            totals[part] = torch.minimum(totals[part], best + error)
        best = totals
    found = gains.allocation(0, num_bits)
    assert (found.num_bytes, int(found.bits.sum())) == (num_bytes, num_bits)
    error = float((variances[0] * left[found.bits, torch.arange(rank)].double()).sum())
    assert error == pytest.approx(float(best[num_bits]), rel=1e-6)
    assert error == pytest.approx(float(gains.errors[0, num_bits]), rel=1e-6)

    # its codes are those of the bits, no two of one width of the same latent
    of_latent: list[list[int]] = [[] for _ in range(rank)]
    for width, latents in found.codes():
        for latent in latents.tolist():
            of_latent[latent].append(width)
    assert [tuple(each) for each in of_latent] == [CODES_OF_BITS[each] for each in found.bits.tolist()]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_classes_against_all_cuts(most: int) -> None:
    """Where rows are cut and what each class gets is as good as the best of all ways, but for rounding to bytes."""
    generator = torch.Generator().manual_seed(most)
    variances = torch.rand(5, 48, generator=generator).double() * torch.tensor([50.0, 9, 4, 2, 1]).unsqueeze(1)
    left = torch.stack([torch.full((48,), 0.28**bits) for bits in range(MAX_BITS + 1)])
    rows = RowsByShare(torch.tensor([0, 100, 300, 1000, 3000, 8000]), variances)
    segments, room, sizes = rows.segments(48, left, 8000), 8000 * 12, range(1, 33)
    found = segments.best_classes(room, most, forbidden=99)
    assert found is not None
    error, classes = found
    assert segments._num_bytes(classes) <= room
    assert (int(segments.begins[classes[0][0]]), int(segments.ends[classes[-1][0]])) == (0, 5)

    # what each segment would take, and leave, with each number of bytes a row
    number_of = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(segments.begins, segments.ends, strict=True))}
    shared = class_count_bytes(8000, most)
    taken = torch.tensor(
        [[segments._num_bytes([(each, 8 * size)]) for size in sizes] for each in range(len(segments.num_rows))]
    )
    best = torch.inf
    for cuts in itertools.combinations(range(1, 5), most - 1):
        each = [number_of[pair] for pair in itertools.pairwise((0, *cuts, 5))]
        total, errors = torch.full((), shared), torch.zeros(())
        for segment in each:
            total = total.unsqueeze(-1) + taken[segment]
            errors = errors.unsqueeze(-1) + segments.gains.errors[segment, 8:257:8]
        best = min(best, float(errors[total <= room].min()))
    assert error <= 1.1 * best


def codec_of_two_classes(rows: Tensor) -> tuple[Codec, Tensor]:
    """Codes of 24 latents, some of which have several, for a decoder that is not orthogonal."""
    quantisers, deviations = Quantisers.fit(rows), rows.square().mean(dim=0).sqrt()
    few, many = torch.linspace(4, 0, 24).round().long(), torch.linspace(9, 1, 24).round().long()
    classes = [ClassCodes.of(Allocation(each), quantisers, deviations) for each in (few, many)]
    turn = torch.eye(24) + 0.2 * torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    codec = Codec(classes, quantisers.codebooks, turn, rows.mean(dim=0), DecoderStorage(torch.float16, None))
    return codec, (torch.arange(len(rows)) % 3 == 0).to(torch.uint8)


def test_improving_never_raises_a_row_s_error() -> None:
    """Whatever the decoder: its rows need not be orthogonal."""
    rows = table_of(300, 24)
    codec, row_class = codec_of_two_classes(rows)
    for number in (0, 1):
        mine, codes = rows[row_class == number], codec.classes[number]
        levels = [(width, code) for width, section in codes.sections() for code in range(section.start, section.stop)]

        def left(found: Symbols, codes: ClassCodes = codes, mine: Tensor = mine, levels: list = levels) -> Tensor:
            decoded = torch.zeros_like(mine)
            states = trellis_states(pack(found.symbols, codes.counts), codes.counts)
            for width, code in levels:
                level = codec.codebooks.levels[BIT_WIDTHS.index(width)][states[:, code]]
                step = 2.0 ** (float(codes.exponents[code]) / 8)
                decoded += torch.outer(found.scales * level * step, codec.decoder[codes.latents[code]])
            return (mine - codec.bias - decoded).square().sum(dim=1)

        found = codec.encode(mine, number)
        errors = [left(found)]
        for _ in range(4):
            assert torch.allclose(found.errors.float(), errors[-1], rtol=1e-3, atol=1e-4)
            packed = pack(found.symbols, codec.classes[number].counts)
            begun = codec.unpack(packed, found.scales, number)
            assert torch.equal(begun.symbols, found.symbols)
            assert torch.equal(begun.levels, found.levels)
            found = codec.improve(mine, begun, number)
            errors.append(left(found))
            assert (errors[-1] <= errors[-2] * (1 + 1e-5) + 1e-6).all()
        assert errors[-1].sum() < 0.95 * errors[0].sum()


def test_rows_may_change_their_class() -> None:
    rows = table_of(300, 24)
    codec, row_class = codec_of_two_classes(rows)
    coded, _, _ = RowCodes.encode(codec, Table(rows, chunk_rows=70), torch.ones(300).double(), row_class)
    fewer = row_class * (torch.arange(300) % 2 == 0)
    after, _ = coded.improve(Table(rows, chunk_rows=110), torch.ones(300).double(), fewer)
    assert [len(each) for each in after.packed] == [int((fewer == number).sum()) for number in (0, 1)]
    assert after.packed[0].shape[1] < after.packed[1].shape[1]


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
    """Never above it, and within a byte a row and its codes' entries, the bytes of a row, or one per cent."""
    rows = table_of(num_rows, dim, seed)
    quick = TransformSettings(sample_rows=200)
    asked = int(bits * rows.numel() / 8)
    try:
        coded = transform(Table(rows), asked, dtype=rows.dtype, settings=quick)
    except BudgetError as error:
        assert "at least bits=" in str(error)  # noqa: PT017
        return
    assert num_bytes(coded) <= asked
    sizes = [each.num_bytes for each in coded.layout.classes]
    assert num_bytes(coded) > asked - max(max(sizes), num_rows + 8 * CODE_ENTRY_BYTES, 0.01 * asked)
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
    classes = row_classes(weighed.tensors["row_weight"])
    bytes_of = torch.tensor([each.num_bytes for each in weighed.layout.classes])[classes]
    bytes_of[weighed.tensors.get("outlier_rows_weight", torch.tensor([])).long()] = 10**6  # heavier rows still
    assert len(weighed.layout.classes) > 1
    assert bytes_of.tolist() == sorted(bytes_of.tolist(), reverse=True)  # the heaviest rows have the most


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
    for wrong in ({"tempering": -1}, {"tempering": None}, {"passes": -1}, {"sample_rows": 1.5}, {"seed": -1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            TransformSettings(**wrong)  # type: ignore[arg-type]
