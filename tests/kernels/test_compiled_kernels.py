"""Compiled kernels against plain operations, of every kind that the CPU runs; damaged tables, threads and forks."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drawn_rows import any_rows, assert_product, draw_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dirembed.compression.transform.packing import pack_symbols, unpack_symbols
from hf_dirembed.compression.transform.viterbi import cheapest_paths
from hf_dirembed.kernels import compiled, library, patch_rows, read_rows, rows_product
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS, TableError
from hf_dirembed.remote.kernels_dirembed import PackedRows, pack
from hf_dirembed.remote.matrix_dirembed import find_slots
from hf_dirembed.remote.products_dirembed import package, scaled


pytestmark = pytest.mark.skipif(not compiled(), reason="the library is not built: python setup.py build_ext --inplace")

ALLOCATIONS = [(3, 3, 9, 1), (50, 20, 30, 40), (20, 30, 4, 70)]
TOLERANCE = 2e-6


def all_latents(rows: PackedRows) -> Tensor:
    return rows.read(torch.arange(len(rows.weight)), torch.float64)


def kinds() -> list[str]:
    """The kernels that this CPU runs, the best first."""
    found = library.library()
    names = [found.dirembed_kernels_name(number) for number in range(5)] if found else []
    return [name.decode() for name in names if name]


def choose(kind: str) -> None:
    library.library().dirembed_choose(kinds().index(kind))


@pytest.fixture(params=kinds())
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    choose(request.param)
    yield request.param
    choose(kinds()[0])


@pytest.fixture(autouse=True)
def no_others_choice() -> Iterator[None]:
    yield
    if kinds():
        choose(kinds()[0])


@settings(max_examples=200, deadline=None)
@given(any_rows(), st.sampled_from(kinds() or [""]), st.data())
def test_reading_is_bit_by_bit_that_of_plain_operations(rows: PackedRows, of_kind: str, data: st.DataObject) -> None:
    choose(of_kind)
    last = len(rows.weight) - 1
    ids = torch.tensor([last, 0, *data.draw(st.lists(st.integers(0, last), max_size=20))])
    assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))
    assert torch.equal(read_rows(rows, ids[:2].view(2, 1, 1).int()), rows.read(ids[:2].view(2, 1, 1), torch.float32))
    assert read_rows(rows, ids[:0].view(3, 0)).shape == (3, 0, rows.rank)
    exponents = torch.randint(-40, 41, (rows.rank,)).to(torch.int8)
    assert torch.equal(read_rows(rows, ids, exponents), scaled(rows.read(ids, torch.float32), exponents))


@pytest.mark.usefixtures("kind")
def test_every_step_scale_and_exponent_is_that_of_plain_operations() -> None:
    """Those that no draw may come upon: all bytes of rows, all steps, all powers of two."""
    rows = draw_rows(256, 256, [(0, 0, 0, 256)])
    steps = torch.arange(-128, 128).to(torch.int8)
    rows = rows._replace(rows=torch.arange(256).to(torch.uint8) & 252, steps=steps, latents=torch.arange(256).int())
    ids = torch.arange(256)
    assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))
    exponents = torch.arange(-126, 130).clamp(max=127).to(torch.int8)  # of -128 and -127 floats are not normal
    assert torch.equal(read_rows(rows, ids, exponents), scaled(rows.read(ids, torch.float32), exponents))


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.sampled_from([0, 1, 2, 4, 5, 8, 9, 17, 70]), st.sampled_from(kinds() or [""]))
def test_products_match_brute_force(rows: PackedRows, num_states: int, of_kind: str) -> None:
    choose(of_kind)
    states, offsets = torch.randn(num_states, rows.rank), torch.randn(num_states)
    product = rows_product(rows, states)
    assert_product(product, states, all_latents(rows), TOLERANCE)
    with_offsets = rows_product(rows, states, offsets)
    assert torch.allclose(with_offsets, product + offsets.unsqueeze(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows_product(rows, states, offsets, torch.float16), with_offsets.to(torch.float16))

    # in bfloat16 as close as sums that are rounded once, but for what 16 bits of factors leave
    latents, narrow = all_latents(rows), rows_product(rows, states, offsets, torch.bfloat16)
    exact, size = states.double() @ latents.T + offsets.unsqueeze(1), states.double().abs() @ latents.abs().T
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-4 * size + 1e-12).all()


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("num_states", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_large_small_and_no_numbers(num_states: int, dtype: torch.dtype) -> None:
    """States of any size, one number that dwarfs all others, states of zeros, and those that are no numbers."""
    rows = draw_rows(700, 150, ALLOCATIONS)
    latents = all_latents(rows)
    for size in (1e-42, 1e-20, 1e20):
        states = torch.randn(num_states, 150) * size
        states[-1, 7] *= 3e4
        exact, terms = states.double() @ latents.T, states.double().abs() @ latents.abs().T
        found = rows_product(rows, states, None, dtype).double()
        limit = (2**-8 if dtype == torch.bfloat16 else TOLERANCE) * terms.amax(dim=1, keepdim=True)
        assert ((found - exact).abs() <= limit + 1e-30).all()
    assert not rows_product(rows, torch.zeros(num_states, 150), None, dtype).any()
    for value in (torch.inf, torch.nan):
        states = torch.randn(num_states, 150)
        states[0, 3] = value
        found = rows_product(rows, states, None, dtype)
        assert not found[0, latents[:, 3] != 0].isfinite().any()
        assert found[1:].isfinite().all()


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("num_codes", [8100, 8128, 8129, 20000])
@pytest.mark.parametrize("level", [-128, 127])
def test_the_largest_sums_have_room(num_codes: int, level: int) -> None:
    """Rows as long as whole numbers allow, and longer, of which every product is as large as any."""
    rows = draw_rows(5, num_codes, [(num_codes, 0, 0, 0)])
    rows = rows._replace(codebook=torch.full_like(rows.codebook, level), steps=torch.zeros_like(rows.steps))
    for num_states in (1, 4, 6):
        states = torch.ones(num_states, num_codes)
        exact = states.double() @ all_latents(rows).T
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
            found = rows_product(rows, states, None, dtype).double()
            assert ((found - exact).abs() <= tolerance * exact.abs()).all()


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("allocations", [ALLOCATIONS[:1], ALLOCATIONS])
@pytest.mark.parametrize("most_threads", [2, 3])
@pytest.mark.parametrize("pool", [True, False])
def test_shared_work_is_the_same(
    allocations: list[tuple[int, ...]], most_threads: int, pool: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = library.library()
    found.dirembed_share_by(library.torchs_pool() if pool else None)
    rows, ids = draw_rows(2000, 150, allocations), torch.randint(0, 2000, (5, 333))
    cases = [torch.randn(num_states, 150) for num_states in (1, 3, 20, 100)]
    alone = [read_rows(rows, ids), *(rows_product(rows, states) for states in cases)]
    monkeypatch.setattr(library, "WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: most_threads)
    shared = [read_rows(rows, ids), *(rows_product(rows, states) for states in cases)]
    found.dirembed_share_by(library.torchs_pool())
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.skipif(library.torchs_pool() is None, reason="this torch has other threads")
def test_no_threads_are_made_beside_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would wait for the other's: torch's wait busily."""
    made: list[int] = []
    address = library.torchs_pool()
    assert address is not None
    pool = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(address)

    @type(pool)
    def counted(work: int, context: int, threads: int, flags: int) -> None:
        made.append(threads)
        pool(work, context, threads, flags)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows, states = draw_rows(20000, 150, ALLOCATIONS), torch.randn(3, 150)
    expected = rows_product(rows, states)
    library.library().dirembed_share_by(counted)
    try:
        assert torch.equal(rows_product(rows, states), expected)
    finally:
        library.library().dirembed_share_by(library.torchs_pool())
    assert made == [2]


def test_threads() -> None:
    """Little work is done alone, more by as many threads as it is worth."""
    assert [library.threads_for(work) for work in (0, 1e5)] == [1, 1]
    assert library.threads_for(1e12) == torch.get_num_threads()


@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_searches_of_all_kinds_find_the_same(width: int) -> None:
    """Where costs are rounded alike; without fused products they may find what is as cheap."""
    targets, importance, levels = 3 * torch.randn(77, 40), torch.rand(40), 3 * torch.randn(256)
    found = {}
    for each in kinds():
        choose(each)
        found[each] = cheapest_paths(targets, importance, levels, width)[0]
    errors = {name: (levels[states.int()] - targets).square() @ importance for name, states in found.items()}
    for name, states in found.items():
        assert name == "plain" or torch.equal(states, found[kinds()[0]])
        assert torch.allclose(errors[name], errors[kinds()[0]], rtol=1e-4, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any), st.integers(0, 300), st.integers(0, 99))
def test_symbols_are_packed_as_by_plain_operations(counts: tuple[int, ...], num_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = [width for count, width in zip(counts, BIT_WIDTHS, strict=True) for _ in range(count)]
    draws = [torch.randint(0, 1 << width, (num_rows,), generator=generator) for width in widths]
    symbols, books = torch.stack(draws, dim=1).to(torch.uint8), torch.randn(4, 256, generator=generator)
    packed = pack_symbols(symbols, counts)
    assert torch.equal(packed, pack(symbols, counts))
    found, levels = unpack_symbols(packed, counts, books)
    assert torch.equal(found, symbols)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(package, "compiled", lambda: False)
        plain = unpack_symbols(packed, counts, books)
    assert torch.equal(plain[0], symbols)
    assert torch.equal(plain[1], levels)


@pytest.mark.usefixtures("kind")
def test_infinite_states_reach_the_rows_that_have_them_only() -> None:
    rows = draw_rows(100, 150, [(1, 3, 20, 9), (2, 3, 30, 9)])
    states = torch.randn(2, 150)
    states[0, 5], states[1, 7] = torch.inf, torch.nan
    expected = all_latents(rows)
    product = rows_product(rows, states)
    for state, latent in enumerate((5, 7)):
        touched = expected[:, latent] != 0
        assert not product[state, touched].isfinite().any()
        assert product[state, ~touched].isfinite().all()


def test_strided_and_widened_tensors_are_read() -> None:
    rows = draw_rows(300, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    tensors = {name: each for name, each in rows._asdict().items() if isinstance(each, Tensor)}
    strided = {name: torch.stack([each, each], dim=-1)[..., 0] for name, each in tensors.items()}
    widened = {name: each.float() for name, each in tensors.items() if each.ndim == 1}  # as some scripts cast all
    states, ids = torch.randn(40, 3).T, torch.arange(300).repeat(2)[::2]
    for others in (strided, widened):
        assert torch.equal(read_rows(rows._replace(**others), ids), read_rows(rows, ids))
        assert torch.equal(rows_product(rows._replace(**others), states), rows_product(rows, states.contiguous()))


def test_other_defaults_of_torch_change_nothing() -> None:
    rows, states, ids = draw_rows(100, 40, [(1, 3, 10, 9)]), torch.randn(2, 40), torch.arange(100)
    expected = read_rows(rows, ids), rows_product(rows, states)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            found = read_rows(rows, ids), rows_product(rows, states)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("bad", [-1, 200, 1 << 40])
def test_rows_that_there_are_not_are_refused_as_embeddings_refuse_them(bad: int) -> None:
    rows = draw_rows(200, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    ids = torch.tensor([3, bad])
    with pytest.raises(IndexError) as of_torch:
        torch.nn.functional.embedding(ids, rows.weight)
    with pytest.raises(IndexError) as ours:
        read_rows(rows, ids)
    assert str(ours.value) == str(of_torch.value)


def test_damaged_tables_are_refused() -> None:
    rows = draw_rows(200, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    assert rows.class_counts is not None
    assert rows.further is not None
    too_many = rows.class_counts.clone()
    too_many[-1] += 100
    damages = [
        rows._replace(rows=torch.full_like(rows.rows, 255)),
        rows._replace(class_counts=too_many),
        rows._replace(class_counts=torch.full_like(rows.class_counts, -(1 << 30))),
        rows._replace(class_counts=rows.class_counts[:-1]),
        rows._replace(rows=rows.rows[:-1]),
        rows._replace(further=rows.further[:-1]),
        rows._replace(further=None),
        rows._replace(weight=rows.weight[:, :-1]),
        rows._replace(codebook=rows.codebook[:3]),
        rows._replace(latents=rows.latents[:-1]),
        rows._replace(steps=rows.steps[:-1]),
    ]
    for damaged in damages:
        with pytest.raises(TableError, match="do not fit"):
            read_rows(damaged, torch.arange(200))
        with pytest.raises(TableError, match="do not fit"):
            rows_product(damaged, torch.randn(1, 40))
    for latent in (-1, 40):
        damaged = rows._replace(latents=torch.full_like(rows.latents, latent))
        with pytest.raises(TableError, match="do not fit"):
            read_rows(damaged, torch.arange(2))
        with pytest.raises(TableError, match="do not fit"):
            rows_product(damaged, torch.randn(1, 40))


def test_changes_are_noticed_wherever_they_are_written() -> None:
    """Also those that torch does not count: nothing that tensors hold is kept from call to call."""
    rows, states, ids = draw_rows(100, 40, [(1, 3, 10, 9)]), torch.randn(2, 40), torch.arange(100)
    rows_product(rows, states)
    for each in (rows.codebook, rows.steps, rows.latents, rows.rows, rows.weight):
        each.numpy()[:] = each.flip(0).numpy()
        assert_product(rows_product(rows, states), states, all_latents(rows), TOLERANCE)
        assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))


def test_tensors_that_move_or_shrink_are_noticed() -> None:
    """The same objects, with other memory behind them, or less of it."""
    rows, ids = draw_rows(100, 40, [(1, 3, 10, 9)]), torch.arange(50)
    read_rows(rows, ids)
    for each in (rows.weight, rows.rows, rows.steps, rows.codebook):
        each.data = each.flip(0)
        assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))
    rows.weight.resize_(50, rows.weight.shape[1])
    with pytest.raises(TableError, match="do not fit"):
        read_rows(rows, ids)
    rows.rows.resize_(50)
    assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))
    with pytest.raises(IndexError):
        read_rows(rows, ids + 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=8, unique=True), st.sampled_from([None, 0, 7]), st.data())
def test_rows_that_are_kept_are_put_in_place(numbers: list[int], zero_row: int | None, data: st.DataObject) -> None:
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 30), max_size=20)), dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        kept, rows = torch.randn(len(numbers), 5).to(dtype), torch.randn(len(ids), 5).to(dtype)
        sorted_numbers = torch.tensor(sorted(numbers), dtype=torch.int32)
        expected = rows
        if numbers:
            slots, found = find_slots(sorted_numbers, ids, 31)
            expected = torch.where(found.unsqueeze(-1), kept[slots], rows)
        if zero_row is not None:
            expected = expected.masked_fill((ids == zero_row).unsqueeze(-1), 0)
        patch_rows(rows, ids, sorted_numbers if numbers else None, kept if numbers else None, zero_row)
        assert torch.equal(rows, expected)


def test_many_threads_read_and_multiply_at_once() -> None:
    tables = [draw_rows(500, 150, ALLOCATIONS, seed) for seed in range(4)]
    states, ids = torch.randn(3, 150), torch.arange(500)
    expected = [(rows.read(ids, torch.float32), rows_product(rows, states)) for rows in tables]

    def work(number: int) -> bool:
        rows, (latents, product) = tables[number % 4], expected[number % 4]
        return torch.equal(read_rows(rows, ids), latents) and torch.equal(rows_product(rows, states), product)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def product_of_a_child(rows: PackedRows, states: Tensor, connection: object) -> None:
    library.WORTH_A_THREAD = 1.0
    torch.get_num_threads = lambda: 3
    connection.send(rows_product(rows, states).tolist())  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_forks_have_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, states = draw_rows(1000, 40, [(1, 3, 10, 9)]), torch.randn(1, 40)
    monkeypatch.setattr(library, "WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = rows_product(rows, states).tolist()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=product_of_a_child, args=(rows, states, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("name", ["weight", "codebook", "latents", "steps", "rows", "class_counts", "further"])
def test_memory_that_was_freed_is_not_read(name: str) -> None:
    rows = draw_rows(50, 150, ALLOCATIONS)
    rows_product(rows, torch.randn(1, 150))  # after which the table is known
    getattr(rows, name).untyped_storage().resize_(0)
    for read in (lambda: rows_product(rows, torch.randn(1, 150)), lambda: read_rows(rows, torch.arange(3))):
        with pytest.raises(TableError, match="freed the memory of packed codes"):
            read()
