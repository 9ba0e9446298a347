"""Packed rows and products with them against brute force, what is refused, gradients, compilers, and kernels."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import DTYPES, TOLERANCE, draw_codebook, draw_codes, draw_rows
from torch import Tensor, nn

from hf_dirembed.errors import TableError
from hf_dirembed.remote import products_dirembed
from hf_dirembed.remote.codes_dirembed import BIT_WIDTHS, RowClass
from hf_dirembed.remote.kernels_dirembed import (
    PackedRows,
    count_classes,
    pack,
    pack_rows,
    row_classes,
    row_scales,
    trellis_states,
    unpack,
    unpack_levels,
    windows,
)
from hf_dirembed.remote.products_dirembed import package, read_rows, rows_product


RANK = 40
CLASSES = (RowClass((3, 8, 10, 9)), RowClass((3, 20, 13, 9), rows=41), RowClass((40, 10, 7, 3), rows=7))

allocations = st.tuples(*[st.integers(0, 20)] * 4).filter(any)


@st.composite
def tables(draw: st.DrawFn) -> tuple[PackedRows, Tensor]:
    """Rows of 1 to 4 classes, some of which may have none, and their latents."""
    classes = sorted(draw(st.lists(allocations, min_size=1, max_size=4)), key=lambda each: RowClass(each).num_bytes)
    num_rows = draw(st.integers(1, 150))
    bounds = sorted(draw(st.integers(0, num_rows)) for _ in classes[1:])
    sizes = [after - before for before, after in zip([0, *bounds], bounds, strict=False)]
    further = [RowClass(each, rows=size) for each, size in zip(classes[1:], sizes, strict=True)]
    return draw_rows(num_rows, (RowClass(classes[0]), *further), draw(st.integers(1, 50)), draw(st.integers(0, 9)))


def assert_product(product: Tensor, states: Tensor, latents: Tensor, sizes: Tensor | None = None) -> None:
    """Within the rounding of the products' terms, of which `sizes` says how large the latents' are."""
    expected = states.double() @ latents.double().T
    size = states.double().abs() @ (latents if sizes is None else sizes).double().abs().T
    assert product.dtype == states.dtype
    assert product.shape == expected.shape
    excess = (product.double() - expected).abs() - TOLERANCE[states.dtype] * size
    assert excess.numel() == 0 or excess.max() <= torch.finfo(states.dtype).tiny


@settings(max_examples=100, deadline=None)
@given(allocations, st.integers(0, 5), st.integers(0, 9))
def test_codes_are_one_stream_of_bits(allocation, num_rows, seed):
    """Bit after bit, the first of them lowest; a state is a window of 8 bits that its section ends."""
    packed, levels = draw_codes(num_rows, allocation, draw_codebook(seed), seed)
    states = trellis_states(packed, allocation)
    widths = [width for width, count in zip(BIT_WIDTHS, allocation, strict=True) for _ in range(count)]
    ends = [
        sum(width * count for width, count in zip(BIT_WIDTHS[:number], allocation, strict=False))
        for number in range(1, 5)
    ]
    for row, found in zip(packed.tolist(), states.tolist(), strict=True):
        value = int.from_bytes(bytes(row), "little")
        for width, bit, state in zip(widths, accumulate(widths, initial=0), found, strict=False):
            end = ends[BIT_WIDTHS.index(width)]
            assert state == (value % (1 << end)) >> bit & 255
        assert value >> sum(widths) == 0
    symbols = states & torch.tensor([(1 << width) - 1 for width in widths])
    assert torch.equal(pack(symbols.to(torch.uint8), allocation), packed)
    assert torch.equal(unpack(packed, allocation, draw_codebook(seed)), levels.floor().to(torch.int8))
    for dtype in DTYPES:  # every level is exact in it
        assert torch.equal(unpack_levels(packed, allocation, draw_codebook(seed), dtype), levels.to(dtype))
        assert torch.equal(levels.to(dtype).double(), levels)
    assert len(windows(allocation).byte) == sum(allocation)


def test_a_symbol_that_is_too_large_is_refused():
    with pytest.raises(TableError, match="symbol 8 does not fit into 3 bits"):
        pack(torch.tensor([[9, 8]], dtype=torch.uint8), (1, 1, 0, 0))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(2, 4), st.integers(0, 9))
def test_classes_and_places_match_brute_force(num_rows, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, num_classes, (num_rows,), generator=generator)
    exponents = torch.randint(-32, 32, (num_rows,), generator=generator)
    packed = pack_rows(classes, 2.0 ** (exponents.double() / 4))
    counts = count_classes(packed, num_classes)
    assert torch.equal(row_classes(packed), classes.int())
    torch.testing.assert_close(row_scales(packed).double(), 2.0 ** (exponents.double() / 4), rtol=1e-6, atol=0)
    seen, places = [0] * num_classes, []
    for row, each in enumerate(classes.tolist()):
        if row % 64 == 0:
            assert counts[row // 64].tolist() == seen[1:]
        places.append(seen[each] if each else 0)
        seen[each] += 1
    rows = draw_rows(num_rows, (RowClass((1, 0, 0, 0)), *[RowClass((1, 0, 0, 0), rows=0)] * (num_classes - 1)), 1)[0]
    found = rows._replace(rows=packed, class_counts=counts).place(torch.arange(num_rows))
    assert (found[0].tolist(), found[1].tolist()) == (classes.tolist(), places)


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from([0, 1, 2, 5, 9]), st.sampled_from(DTYPES))
def test_rows_and_products_match_brute_force(table, batch, dtype):
    rows, latents = table
    rows.check()
    torch.manual_seed(1)
    ids = torch.randint(0, len(latents), (batch, 3))
    largest = 128 * 2**0.5 * 4 * rows.latents.bincount().max()
    for wide in (torch.float32, torch.float64):
        assert read_rows(rows, ids, wide).dtype == wide
        assert (read_rows(rows, ids, wide) - latents[ids]).abs().sum() <= TOLERANCE[wide] * largest * ids.numel()
    states = torch.randn(batch, rows.rank).to(dtype)
    assert_product(rows_product(states, rows), states, latents, latents.abs() + largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_many_chunks_match_brute_force(monkeypatch, dtype, batch):
    monkeypatch.setattr(products_dirembed, "BUFFER_BYTES", 1)
    rows, latents = draw_rows(1001, CLASSES, RANK)
    states = torch.randn(batch, RANK).to(dtype)
    assert_product(rows_product(states, rows), states, latents)


@pytest.mark.parametrize("shape", [(RANK,), (2, 3, RANK), (2, 0, RANK)])
def test_leading_dimensions_and_strides_are_kept(shape):
    rows, latents = draw_rows(90, CLASSES, RANK)
    states = torch.randn(*shape[:-1], 2 * RANK)[..., ::2]
    torch.testing.assert_close(rows_product(states, rows), states @ latents.float().T, rtol=1e-5, atol=1e-2)
    ids = torch.randint(0, 90, (3, 8), dtype=torch.int32)[:, ::2]
    torch.testing.assert_close(read_rows(rows, ids), latents[ids.long()].float(), rtol=1e-5, atol=1e-4)


def spoiled() -> dict[str, PackedRows]:
    """Packed rows that a kernel would read beyond, or read wrongly."""
    rows, _ = draw_rows(200, CLASSES, RANK)
    one, _ = draw_rows(200, CLASSES[:1], RANK)

    def changed(name: str, at: int, value: int) -> PackedRows:
        tensor = getattr(rows, name).clone()
        tensor.view(-1)[at] = value
        return rows._replace(**{name: tensor})

    return {
        "bytes dropped": rows._replace(weight=rows.weight[:, 1:]),
        "rows dropped": rows._replace(weight=rows.weight[:120]),
        "signed bytes": rows._replace(weight=rows.weight.to(torch.int8)),
        "half a codebook": rows._replace(codebook=rows.codebook[:2]),
        "a codebook in float": rows._replace(codebook=rows.codebook.float()),
        "a latent below": changed("latents", 3, -1),
        "a latent beyond": changed("latents", -1, RANK),
        "fewer latents": rows._replace(rank=RANK - 9),
        "steps dropped": rows._replace(steps=rows.steps[1:]),
        "other classes": rows._replace(classes=CLASSES[:2]),
        "a class beyond": changed("rows", 0, 0b11),
        "classes of fewer rows": rows._replace(rows=rows.rows[:-1]),
        "classes in 32 bits": rows._replace(rows=rows.rows.int()),
        "a class beyond the one": one._replace(rows=one.rows | 1),
        "no counts": rows._replace(class_counts=None),
        "miscounted rows": changed("class_counts", 2, 10**6),
        "a negative count": changed("class_counts", 0, -1),
        "counts in 64 bits": rows._replace(class_counts=rows.class_counts.long()),
        "rows of another class": changed("rows", 0, int(rows.rows[0]) ^ 1),
        "more rows than stated": rows._replace(classes=(*CLASSES[:2], RowClass(CLASSES[2].bit_allocation, rows=6))),
        "bytes of rows dropped": rows._replace(further=rows.further[:-1]),
        "no bytes of rows": rows._replace(further=None),
        "counts of one class": one._replace(class_counts=rows.class_counts),
    }


@pytest.mark.parametrize("name", spoiled())
def test_hostile_tensors_are_refused(name):
    with pytest.raises(TableError, match=r": (pass|compress)"):
        spoiled()[name].check()


def test_the_last_of_many_blocks_is_checked():
    rows, _ = draw_rows(1_100_001, (RowClass((1, 0, 0, 0)), RowClass((3, 0, 0, 0), rows=500_000)), 3)
    rows.check()
    rows.class_counts[-1, 0] += 1
    with pytest.raises(TableError, match="miscount"):
        rows.check()


def test_states_of_another_length_are_refused():
    with pytest.raises(TableError, match="do not fit 40 latents"):
        rows_product(torch.randn(2, RANK + 1), draw_rows(90, CLASSES, RANK)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_reach_the_states(dtype):
    rows, latents = draw_rows(300, CLASSES, RANK)
    states, upstream = torch.randn(2, RANK).to(dtype), torch.randn(2, 300).to(dtype)
    product = rows_product(states, rows)
    leaf = states.clone().requires_grad_()
    with_grad = rows_product(leaf, rows)
    assert torch.equal(with_grad, product)
    with_grad.backward(upstream)
    assert_product(leaf.grad, upstream, latents.T)


def test_gradients_are_right_numerically_and_twice():
    rows, _ = draw_rows(70, CLASSES, RANK)
    states = torch.randn(2, RANK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rows_product(x, rows), states)
    assert torch.autograd.gradgradcheck(lambda x: rows_product(x, rows).square(), states, atol=1e-2)


def test_training_keeps_no_float_latents():
    rows, _ = draw_rows(300, CLASSES, RANK)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rows_product(torch.randn(2, RANK, requires_grad=True), rows)
    assert {tensor.data_ptr() for tensor in kept} == {each.data_ptr() for each in rows if isinstance(each, Tensor)}


class Product(nn.Module):
    """Reads packed rows, and multiplies with them, as modules do."""

    def __init__(self):
        super().__init__()
        rows, self.expected = draw_rows(150, CLASSES, RANK)
        for name, value in rows._asdict().items():
            setattr(self, name, nn.Parameter(value, requires_grad=False) if isinstance(value, Tensor) else value)

    def forward(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = PackedRows(**{name: getattr(self, name) for name in PackedRows._fields})
        return rows_product(states, rows), read_rows(rows, ids)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_compilers_and_exporters_see_the_plain_path(strict, monkeypatch):
    module, inputs = Product(), (torch.randn(2, 3, RANK), torch.randint(0, 150, (2, 5)))
    expected = module(*inputs)
    for name in ("read_rows", "rows_product"):  # what they call is not to be traced
        monkeypatch.setattr(package, name, None)
        monkeypatch.setattr(package, name, lambda *_: pytest.fail("traced"))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    exported = torch.export.export(module, inputs, strict=strict).module()
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs, check_trace=False)
    leaf = inputs[0].clone().requires_grad_()
    compiled(leaf, inputs[1])[0].sum().backward()
    for path in (compiled, exported, traced):
        for found, each in zip(path(*inputs), expected, strict=True):
            torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(leaf.grad, module.expected.sum(dim=0).float().expand(2, 3, -1), rtol=1e-4, atol=1e-1)


def test_function_transforms_see_the_plain_path():
    module, states, ids = Product(), torch.randn(5, RANK), torch.randint(0, 150, (5, 2))
    expected = module(states, ids)
    torch.testing.assert_close(torch.vmap(module)(states, ids), expected, rtol=1e-5, atol=1e-2)

    def product(each: Tensor) -> Tensor:
        return module(each, ids)[0]

    torch.testing.assert_close(torch.func.jvp(product, (states,), (states,))[1], expected[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(torch.func.jacrev(product)(states[0]), module.expected.float(), rtol=1e-5, atol=1e-2)


def test_meta_tensors_have_a_product():
    module = Product().to("meta")
    found = module(torch.empty(2, RANK, device="meta"), torch.empty(2, 3, device="meta", dtype=torch.long))
    assert [each.shape for each in found] == [(2, 150), (2, 3, RANK)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_the_package_are_taken_on_cpus(monkeypatch, dtype, compiled):
    """Where they run: in float32, whatever 16 bits come in; float64 and other devices take the plain way."""
    rows, latents = draw_rows(150, CLASSES, RANK)
    calls = []

    def product(rows: PackedRows, states: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
        calls.append((states.dtype, states.shape))
        assert offsets is None
        return (states @ latents.float().T).to(dtype)

    def read(rows: PackedRows, ids: Tensor, exponents: Tensor | None) -> Tensor:
        calls.append((ids.dtype, ids.shape))
        assert exponents is None
        return latents[ids].float()

    monkeypatch.setattr(package, "compiled", lambda: compiled)
    monkeypatch.setattr(package, "rows_product", product)
    monkeypatch.setattr(package, "read_rows", read)
    states = torch.randn(2, 3, RANK).to(dtype)
    ids = torch.randint(0, 150, (4, 5), dtype=torch.int32)
    found, read_latents = rows_product(states, rows), read_rows(rows, ids, dtype)
    assert_product(found.view(6, -1), states.view(6, -1), latents)
    assert (read_latents - latents[ids.long()]).abs().max() < 1e-3
    expected = [(torch.float32, (6, RANK)), (torch.int32, (4, 5))]
    assert calls == (expected if compiled and dtype != torch.float64 else [])
