"""Packed rows drawn at random, of one class or several; nothing of the package but its layout is needed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_dirembed.remote.codes_dirembed import CODEBOOK_SHAPE, RowClass
from hf_dirembed.remote.kernels_dirembed import PackedRows, count_classes, pack_rows


def draw_rows(num_rows: int, rank: int, allocations: list[tuple[int, ...]], seed: int = 0) -> PackedRows:
    """Rows whose class is drawn too; no latent has more than two codes of one row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, len(allocations), (num_rows,), generator=generator)
    by_bytes = sorted(allocations, key=lambda each: RowClass(each).num_bytes)
    classes = tuple(
        RowClass(each, int((numbers == number).sum()) if number else None) for number, each in enumerate(by_bytes)
    )

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_codes, shared = sum(each.num_codes for each in classes), classes[0].num_bytes
    twice = [torch.randperm(rank, generator=generator).repeat(2)[: each.num_codes] for each in classes]
    rows = PackedRows(
        integers(0, 256, num_rows, shared).to(torch.uint8),
        integers(-128, 128, *CODEBOOK_SHAPE).to(torch.int8),
        torch.cat(twice).int(),
        integers(-40, 9, num_codes).to(torch.int8),
        pack_rows(numbers, 4 * torch.rand(num_rows, generator=generator) + 0.1),
        classes,
        rank,
    )
    if len(classes) > 1:
        counts = count_classes(rows.rows, len(classes))
        further = sum((each.rows or 0) * (each.num_bytes - shared) for each in classes)
        rows = rows._replace(class_counts=counts, further=integers(0, 256, further).to(torch.uint8))
    if num_rows:
        rows.check()
    return rows


@st.composite
def any_rows(draw: st.DrawFn) -> PackedRows:
    """Rows of every shape: sections of any length or none, latents with two codes and with none, every class."""
    rank = draw(st.integers(1, 60))
    allocation = st.tuples(*[st.integers(0, 40)] * 4).filter(lambda counts: 1 <= sum(counts) <= 2 * rank)
    allocations = draw(st.lists(allocation, min_size=1, max_size=4))
    return draw_rows(draw(st.integers(1, 200)), rank, allocations, draw(st.integers(0, 1000)))


def assert_product(product: Tensor, states: Tensor, latents: Tensor, tolerance: float) -> None:
    """That sums are as exact as their dtype allows: of Σ |state| |latent|."""
    expected = states.double() @ latents.double().T
    size = states.double().abs() @ latents.double().abs().T
    assert product.dtype == states.dtype
    assert product.shape == expected.shape
    excess = (product.double() - expected).abs() - tolerance * size
    assert excess.numel() == 0 or excess.max() <= torch.finfo(states.dtype).tiny
