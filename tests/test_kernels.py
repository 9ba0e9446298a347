"""Products with packed codes against brute force, the cache of expanded codes, gradients, compilers, and Triton."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import DTYPES, TOLERANCE, draw_codes
from torch import Tensor, nn

from hf_dirembed.errors import TableError
from hf_dirembed.remote import kernels_dirembed
from hf_dirembed.remote import kernels_dirembed as triton_dirembed
from hf_dirembed.remote.kernels_dirembed import (
    ExpandedCodes,
    PackedCodes,
    int8_linear,
    packed_linear,
    padded_rank,
    triton_linear,
    triton_works,
)


ALLOCATION = (3, 20, 30, 9)
TRITON_CASES = [((1, 1, 1, 2), 1, 3), ((0, 0, 0, 7), 3, 1), ((3, 70, 130, 9), 5, 130), ((0, 0, 300, 0), 70, 65)]


def assert_product(product: Tensor, inner: Tensor, codes: Tensor) -> None:
    expected = inner.double() @ codes.double().T
    size = inner.double().abs() @ codes.double().abs().T
    assert product.dtype == inner.dtype
    assert product.shape == expected.shape
    excess = (product.double() - expected).abs() - TOLERANCE[inner.dtype] * size
    assert excess.numel() == 0 or excess.max() <= torch.finfo(inner.dtype).tiny


allocations = st.tuples(*[st.integers(0, 40)] * 4).filter(any)


@settings(max_examples=150, deadline=None)
@given(allocations, st.integers(0, 70), st.sampled_from([0, 1, 2, 4, 5, 9]), st.sampled_from(DTYPES))
def test_products_match_brute_force(allocation, num_rows, batch, dtype):
    codes, latents = draw_codes(num_rows, allocation)
    torch.manual_seed(1)
    rank = latents.shape[1]
    inner = torch.randn(batch, rank).to(dtype)
    expanded = ExpandedCodes()
    assert torch.equal(codes.unpack(), latents)
    assert_product(int8_linear(inner, latents), inner, latents)
    assert_product(packed_linear(inner, codes), inner, latents)
    assert_product(packed_linear(inner, codes, expanded=expanded), inner, latents)
    assert expanded.num_bytes == num_rows * padded_rank(rank)
    assert torch.equal(expanded.get(codes)[:, :rank], latents)
    assert not expanded.get(codes)[:, rank:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_many_chunks_match_brute_force(monkeypatch, dtype, batch):
    monkeypatch.setattr(kernels_dirembed, "BUFFER_BYTES", 1)
    codes, latents = draw_codes(1001, ALLOCATION)
    inner = torch.randn(batch, latents.shape[1]).to(dtype)
    assert_product(packed_linear(inner, codes), inner, latents)
    assert_product(packed_linear(inner, codes, expanded=ExpandedCodes()), inner, latents)


@pytest.mark.parametrize("shape", [(62,), (2, 3, 62), (2, 0, 62)])
def test_leading_dimensions_and_strides_are_kept(shape):
    _, codes = draw_codes(50, ALLOCATION)
    inner = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    wide = torch.cat([codes, codes], dim=1)[:, :62]
    torch.testing.assert_close(int8_linear(inner, wide), inner @ codes.float().T)
    product = int8_linear(inner.bfloat16(), wide)
    torch.testing.assert_close(product.float(), inner.bfloat16().float() @ codes.float().T, rtol=1e-2, atol=1.0)


def test_the_int8_kernel_is_taken_with_padded_rows_only(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels_dirembed, "_has_int8_kernel", lambda: True)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, k, s: calls.append(k.shape) or x.float() @ k.float().T)
    (codes, latents), inner = draw_codes(50, ALLOCATION), torch.randn(1, 62)
    expanded = ExpandedCodes().get(codes)
    int8_linear(inner.bfloat16(), latents)
    int8_linear(inner, expanded)
    int8_linear(inner.bfloat16().expand(128, -1), expanded)
    assert calls == []
    int8_linear(inner.bfloat16(), expanded)
    assert calls == [(50, 64)]


def test_bad_shapes_are_refused():
    codes, latents = draw_codes(5, ALLOCATION)
    inner = torch.randn(1, 62)
    for call in (
        lambda: int8_linear(torch.randn(1, 63), latents),
        lambda: int8_linear(inner, latents.int()),
        lambda: packed_linear(torch.randn(1, 61), codes),
        lambda: packed_linear(inner, codes._replace(packed=codes.packed[:, 1:])),
        lambda: packed_linear(inner, codes._replace(packed=codes.packed.to(torch.int8))),
        lambda: packed_linear(inner, codes._replace(codebook=codes.codebook[:2])),
        lambda: packed_linear(inner, codes._replace(codebook=codes.codebook.float())),
        lambda: ExpandedCodes().get(codes._replace(bit_allocation=(1, 1, 1, 1))),
    ):
        with pytest.raises(TableError, match="do not fit"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed_only", [True, False])
def test_gradients_reach_inner(dtype, packed_only):
    codes, latents = draw_codes(300, ALLOCATION)
    expanded = None if packed_only else ExpandedCodes()
    inner, upstream = torch.randn(2, 62).to(dtype), torch.randn(2, 300).to(dtype)
    product = packed_linear(inner, codes, expanded=expanded)
    leaf = inner.clone().requires_grad_()
    with_grad = packed_linear(leaf, codes, expanded=expanded)
    assert torch.equal(with_grad, product)
    with_grad.backward(upstream)
    assert_product(leaf.grad, upstream, latents.T)


def test_gradients_are_right_numerically_and_twice():
    _, codes = draw_codes(30, (1, 2, 3, 4))
    inner = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: int8_linear(x, codes), inner)
    assert torch.autograd.gradgradcheck(lambda x: int8_linear(x, codes).square(), inner)


class Product(nn.Module):
    """Holds packed codes as a head does."""

    def __init__(self, num_rows: int = 40, seed: int = 0):
        super().__init__()
        self.put(draw_codes(num_rows, ALLOCATION, seed)[0])
        self.expanded = ExpandedCodes()

    def put(self, codes: PackedCodes) -> None:
        self.weight = nn.Parameter(codes.packed, requires_grad=False)
        self.codebook_weight = nn.Parameter(codes.codebook, requires_grad=False)

    @property
    def codes(self) -> PackedCodes:
        return PackedCodes(self.weight, ALLOCATION, self.codebook_weight)

    def forward(self, inner: Tensor) -> Tensor:
        return packed_linear(inner, self.codes, expanded=self.expanded)


def test_expanded_codes_follow_the_packed_ones():
    module, other = Product(seed=1), Product(seed=2)
    expanded, first, second = module.expanded, module.weight.data, other.weight.data
    codes = expanded.get(module.codes)
    assert expanded.get(module.codes) is codes
    assert expanded.get(module.codes._replace(packed=module.weight.detach())) is codes

    def is_current() -> bool:
        return torch.equal(expanded.get(module.codes)[:, :62], module.codes.unpack())

    module.load_state_dict(other.state_dict())
    assert is_current()
    with torch.no_grad():
        module.weight[3] ^= 1
    assert is_current()
    with torch.no_grad():
        module.codebook_weight[2, 7] ^= 1
    assert is_current()
    module.weight.data = first.clone()
    assert is_current()
    for packed in (second.clone(), second[:7], second[7:14]):
        module.weight = nn.Parameter(packed, requires_grad=False)
        assert is_current()
    for seed in range(20):  # freed and made again, a tensor may come back at the same address
        del module.weight, module.codebook_weight
        module.put(draw_codes(40, ALLOCATION, seed)[0])
        assert is_current()
    module.weight.data.zero_()  # leaves the version counter as it is
    expanded.clear()
    assert expanded.num_bytes == 0
    assert is_current()
    with torch.inference_mode():
        module.weight = nn.Parameter(first.clone(), requires_grad=False)
        assert is_current()


def test_copies_and_files_are_without_the_expansion():
    module = Product()
    empty = len(pickle.dumps(module))
    module.expanded.get(module.codes)
    assert len(pickle.dumps(module)) == empty
    assert list(module.state_dict()) == ["weight", "codebook_weight"]
    for other in (copy.deepcopy(module), copy.copy(module.expanded), pickle.loads(pickle.dumps(module))):
        assert getattr(other, "expanded", other).num_bytes == 0
    assert module.expanded.num_bytes == 40 * 64


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_compilers_and_exporters_see_the_plain_path(strict):
    module, inner = Product(), torch.randn(2, 3, 62)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    exported = torch.export.export(module, (inner,), strict=strict)
    assert "int8pack" not in str(exported.graph)
    with torch.no_grad():
        traced = torch.jit.trace(module, (inner,), check_trace=False)
    assert module.expanded.num_bytes == 0
    expected = module(inner)
    for path in (compiled, exported.module(), traced):
        torch.testing.assert_close(path(inner), expected)
    leaf = inner.clone().requires_grad_()
    compiled(leaf).sum().backward()
    other = inner.clone().requires_grad_()
    module(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_function_transforms_see_the_plain_path():
    module, inner = Product(), torch.randn(5, 62)
    expected = module(inner)
    torch.testing.assert_close(torch.vmap(module)(inner), expected)
    torch.testing.assert_close(torch.func.jvp(module, (inner,), (inner,))[1], expected)
    jacobian = torch.func.jacrev(module)(inner[0])
    torch.testing.assert_close(jacobian, module.codes.unpack().float())


def test_an_expansion_made_for_inference_serves_training():
    module, inner = Product(), torch.randn(2, 62, requires_grad=True)
    with torch.inference_mode():
        expected = module(inner)
    product = module(inner)
    assert torch.equal(product, expected)
    product.sum().backward()


def test_meta_tensors_have_a_product():
    module, inner = Product().to("meta"), torch.empty(2, 62, device="meta")
    assert module(inner).shape == (2, 40)


def check_triton(device: str) -> None:
    """Also run by a process that interprets Triton, which must be told before it is imported."""
    for allocation, batch, num_rows in TRITON_CASES:
        codes, latents = draw_codes(num_rows, allocation)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if device == "cpu" and dtype == torch.bfloat16:
                continue  # the interpreter's dot product takes its bits for integers
            inner = torch.randn(batch, codes.rank).to(dtype)
            product = triton_linear(inner.to(device), codes.packed.to(device), allocation, codes.codebook.to(device))
            assert_product(product.cpu(), inner, latents)


def test_triton_kernel_under_its_interpreter():
    pytest.importorskip("triton")
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_kernels import check_triton\n"
    run = [sys.executable, "-c", program + "check_triton('cpu')"]
    subprocess.run(run, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=600)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernel_on_a_gpu():
    pytest.importorskip("triton")
    check_triton("cuda")
    codes, latents = draw_codes(5000, ALLOCATION)
    codes = codes._replace(packed=codes.packed.cuda(), codebook=codes.codebook.cuda())
    assert triton_works(codes.packed.device)
    for batch in (1, 128, 200):
        inner = torch.randn(batch, 62)
        leaf = inner.cuda().requires_grad_()
        product = packed_linear(leaf, codes)
        assert_product(product.detach().cpu(), inner, latents)
        product.sum().backward()
        assert_product(leaf.grad.cpu(), torch.ones(batch, 5000), latents.T)


def test_without_triton_codes_are_unpacked(monkeypatch):
    monkeypatch.setattr(triton_dirembed, "triton", None)
    triton_works.cache_clear()
    assert not triton_works(torch.device("cpu"))
