"""Compiled kernels against plain operations; damaged tables, threads, forks and processes that share a cache."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn_rows import any_rows, assert_product, draw_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import CacheImpl
from torch import Tensor

from hf_dirembed.kernels import read_rows, rows_product, threads
from hf_dirembed.kernels.compiling import compiled
from hf_dirembed.kernels.threads import Course, course_of, share_out
from hf_dirembed.remote.codes_dirembed import TableError
from hf_dirembed.remote.kernels_dirembed import PackedRows


ALLOCATIONS = [(3, 3, 9, 1), (50, 20, 30, 40), (20, 30, 4, 70)]
TOLERANCE = 2e-6


def all_latents(rows: PackedRows) -> Tensor:
    return rows.read(torch.arange(len(rows.weight)), torch.float64)


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.data())
def test_reading_is_bit_by_bit_that_of_plain_operations(rows: PackedRows, data: st.DataObject) -> None:
    last = len(rows.weight) - 1
    ids = torch.tensor([last, 0, *data.draw(st.lists(st.integers(0, last), max_size=20))])
    assert torch.equal(read_rows(rows, ids), rows.read(ids, torch.float32))
    assert torch.equal(read_rows(rows, ids[:2].view(2, 1, 1).int()), rows.read(ids[:2].view(2, 1, 1), torch.float32))
    assert read_rows(rows, ids[:0].view(3, 0)).shape == (3, 0, rows.rank)


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.sampled_from([0, 1, 2, 4, 5, 8, 9, 17, 70]))
def test_products_match_brute_force(rows: PackedRows, num_states: int) -> None:
    states = torch.randn(num_states, rows.rank)
    assert_product(rows_product(rows, states), states, all_latents(rows), TOLERANCE)


@pytest.mark.parametrize("allocations", [ALLOCATIONS[:1], ALLOCATIONS])
@pytest.mark.parametrize("most_threads", [2, 3])
def test_shared_work_is_the_same(
    allocations: list[tuple[int, ...]], most_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, ids = draw_rows(2000, 150, allocations), torch.randint(0, 2000, (5, 333))
    cases = [torch.randn(num_states, 150) for num_states in (1, 3, 20, 100)]
    alone = [read_rows(rows, ids), *(rows_product(rows, states) for states in cases)]
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(threads, "PART_TIME", 1000.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: most_threads)
    shared = [read_rows(rows, ids), *(rows_product(rows, states) for states in cases)]
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


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


def test_strided_tensors_are_read() -> None:
    rows = draw_rows(300, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    strided = {
        name: torch.stack([each, each], dim=-1)[..., 0]
        for name, each in rows._asdict().items()
        if isinstance(each, Tensor)
    }
    states, ids = torch.randn(40, 3).T, torch.arange(300).repeat(2)[::2]
    assert torch.equal(read_rows(rows._replace(**strided), ids), read_rows(rows, ids))
    assert torch.equal(rows_product(rows._replace(**strided), states), rows_product(rows, states.contiguous()))


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
        with pytest.raises(TableError, match="do not fit"):
            read_rows(rows._replace(latents=torch.full_like(rows.latents, latent)), torch.arange(2))


def test_changed_codebooks_and_steps_are_noticed() -> None:
    rows, states = draw_rows(100, 40, [(1, 3, 10, 9)]), torch.randn(2, 40)
    rows_product(rows, states)
    for each in (rows.codebook, rows.steps, rows.latents, rows.rows):
        each.numpy()[:] = each.flip(0).numpy()  # torch does not count it as a change
        assert_product(rows_product(rows, states), states, all_latents(rows), TOLERANCE)
        assert torch.equal(read_rows(rows, torch.arange(100)), rows.read(torch.arange(100), torch.float32))


def test_courses() -> None:
    """Little work is done alone; more by all threads, in parts; products with many states by torch."""
    assert course_of(1000, 0, 4) == course_of(1000, 64, 4)._replace(threads=1) == Course(1, 1)
    assert course_of(0, 100, 4) == Course(1, 1, unpacked=True)
    assert course_of(10**9, 1, 1) == Course(1, 1)
    for states in (1, 8, 64):
        courses = [course_of(codes, states, 4) for codes in (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)]
        assert courses == sorted(courses)
        assert courses[-1].threads == 4
        assert courses[-1].parts > 100
        assert not courses[-1].unpacked
    assert course_of(10**9, 65, 4).unpacked


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("course", [Course(1, 1), Course(2, 2), Course(3, 50), Course(5, 1)])
def test_shared_parts_make_the_whole(length: int, course: Course) -> None:
    parts: list[tuple[int, int]] = []

    def work(first: int, last: int) -> int:
        parts.append((first, last))
        return int(first <= 64 < last)

    assert share_out(work, length, 64, course) == int(length > 64)
    assert sorted(place for part in parts for place in range(*part)) == list(range(length))
    assert all(first % 64 == 0 for first, _ in parts)


def test_errors_of_other_threads_are_raised() -> None:
    def work(first: int, last: int) -> int:
        raise RuntimeError(f"part {first}")

    with pytest.raises(RuntimeError, match="part"):
        share_out(work, 100, 1, Course(2, 4))


def product_of_a_child(rows: PackedRows, states: Tensor, connection: object) -> None:
    connection.send(share_out(lambda first, last: 0, 1000, 1, Course(2, 10)))  # type: ignore[attr-defined]
    connection.send(rows_product(rows, states).tolist())  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_forks_have_threads_of_their_own() -> None:
    rows, states = draw_rows(100, 40, [(1, 3, 10, 9)]), torch.randn(1, 40)
    share_out(lambda first, last: 0, 1000, 1, Course(2, 10))  # the pool of this process
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=product_of_a_child, args=(rows, states, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == 0
    assert ours.poll(60)
    assert ours.recv() == rows_product(rows, states).tolist()
    child.join()
    assert child.exitcode == 0


PROGRAM = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from drawn_rows import draw_rows
from hf_dirembed.kernels import products, read_rows, reading, rows_product

rows = draw_rows(200, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
expected = rows.read(torch.arange(200), torch.float32)
assert torch.equal(read_rows(rows, torch.arange(200)), expected)
for num_states in (1, 4, 8):
    states = torch.randn(num_states, 40)
    assert torch.allclose(rows_product(rows, states), states @ expected.T, rtol=1e-3, atol=1e-2)
kernels = [reading._read, *map(products._kernel_of, (1, 4, 8))]
print([sum(each.stats.cache_hits.values()) for each in kernels])
"""


def run_program(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_compile_into_one_cache_at_once_and_others_load_it(tmp_path: Path) -> None:
    processes = [run_program(tmp_path) for _ in range(4)]
    assert [each.wait() for each in processes] == [0] * 4
    for each in processes:
        each.communicate()
    output, _ = run_program(tmp_path).communicate()
    assert output.strip() == "[1, 1, 1, 1]"


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    kernel = compiled(lambda number: number + 1)
    assert kernel(2) == 3
    assert not kernel.stats.cache_path
