"""Triton's kernels under its interpreter, ahead of time for GPUs that are not here, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from drawn_rows import assert_product, draw_rows
from torch import Tensor

from hf_dirembed.remote import triton_dirembed
from hf_dirembed.remote.kernels_dirembed import PackedRows
from hf_dirembed.remote.triton_dirembed import triton_product, triton_read, triton_works


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [
    ([(1, 1, 1, 2)], 3, 3, 1),
    ([(0, 0, 0, 7)], 1, 9, 3),
    ([(3, 40, 60, 9)], 130, 70, 5),
    ([(3, 3, 9, 1), (50, 20, 30, 40), (20, 30, 4, 70)], 200, 90, 70),
]


def to(rows: PackedRows, device: str) -> PackedRows:
    tensors = {name: each.to(device) for name, each in rows._asdict().items() if isinstance(each, Tensor)}
    return rows._replace(**tensors)


def check_triton(device: str) -> None:
    """Also run by a process that interprets Triton, which must be told before it is imported."""
    assert triton_works(torch.device(device))
    for allocations, num_rows, rank, num_states in CASES:
        rows, ids = draw_rows(num_rows, rank, allocations), torch.randint(0, num_rows, (2, 7))
        latents = rows.read(torch.arange(num_rows), torch.float32)
        there = to(rows, device)
        torch.testing.assert_close(triton_read(there, ids.to(device)).cpu(), latents[ids], rtol=1e-6, atol=1e-5)
        assert triton_read(there, ids[:0].to(device)).shape == (0, 7, rank)
        for dtype in TOLERANCE:
            if device == "cpu" and dtype == torch.bfloat16:
                continue  # the interpreter's dot product takes its bits for integers
            states = torch.randn(num_states, rank).to(dtype)
            assert_product(triton_product(there, states.to(device)).cpu(), states, latents, TOLERANCE[dtype])


def test_triton_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    program += "from test_triton_kernels import check_triton\ncheck_triton('cpu')\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=600)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_on_a_gpu() -> None:
    check_triton("cuda")
    rows = to(draw_rows(5000, 90, CASES[-1][0]), "cuda")
    states, ids = torch.randn(4, 90, device="cuda"), torch.arange(100, device="cuda")
    expected = triton_product(rows, states), triton_read(rows, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product, latents = triton_product(rows, states), triton_read(rows, ids)
    product.zero_()
    graph.replay()
    assert torch.equal(product, expected[0])
    assert torch.equal(latents, expected[1])


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bytes_, whole = ("weight", "further", "row_bytes"), ("ids", "class_numbers", "blocks")
    kinds = dict.fromkeys(bytes_, "*u8") | dict.fromkeys(whole, "*i64") | {"codebook": "*i8"}
    kinds |= dict.fromkeys(("out", "steps", "scales"), "*fp32")
    kinds |= dict.fromkeys(("class_counts", "numbers", "latent_codes", "order"), "*i32")

    def compile_kernel(kernel: Any, constants: dict[str, Any], **own_kinds: str) -> Any:
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in constants else (kinds | own_kinds).get(name, "i32") for name in names
        }
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        return triton.compile(source, target=GPUTarget("cuda", capability, 32))

    blocks = {"block_states": 16, "block_rows": triton_dirembed.BLOCK_ROWS, "block": triton_dirembed.BLOCK_CODES}
    for kind, own, precision in (("fp32", "fp32", "tf32x3"), ("fp32", "fp16", "tf32"), ("bf16", "bf16", "tf32")):
        constants = {**blocks, "precision": precision}
        pointers = {"factors": f"*{kind}", "product": f"*{own}"}
        assert compile_kernel(triton_dirembed._product_kernel, constants, **pointers).asm["cubin"]
    for num_classes in (1, 3):
        constants = {"num_classes": num_classes, "most": 2, "block": 128}
        assert compile_kernel(triton_dirembed._read_kernel, constants).asm["cubin"]


def test_derived_tensors_follow_the_tensors_that_they_are_made_of() -> None:
    rows = draw_rows(200, 40, [(1, 3, 10, 9), (2, 3, 20, 9)])
    with torch.inference_mode():
        first = triton_dirembed._derived(rows)
    assert triton_dirembed._derived(rows) is first
    assert triton_dirembed._derived(rows._replace(weight=rows.weight.clone())) is first
    assert not first.steps.is_inference()
    rows.steps.zero_()
    second = triton_dirembed._derived(rows)
    assert second is not first
    assert second.steps.tolist() == [1.0] * len(rows.steps)
    assert triton_dirembed._derived(rows._replace(latents=rows.latents.clone())) is not second


def test_every_row_is_in_a_block_of_its_class() -> None:
    rows = draw_rows(1000, 40, [(1, 3, 10, 9), (2, 3, 20, 9), (9, 9, 9, 9)])
    derived = triton_dirembed._derived(rows)
    numbers, slots = rows.place(torch.arange(1000))
    order = derived.order.view(len(derived.blocks), -1)
    assert sorted(order[order >= 0].tolist()) == list(range(1000))
    firsts = [0, rows.classes[0].num_codes, rows.classes[0].num_codes + rows.classes[1].num_codes]
    for mine, (first, count, own, _, before) in zip(order, derived.blocks.tolist(), strict=True):
        of_class, mine = firsts.index(first), mine[mine >= 0]
        assert set(numbers[mine].tolist()) == {of_class}
        assert (count, own) == (
            rows.classes[of_class].num_codes,
            rows.classes[of_class].num_bytes - rows.weight.shape[1],
        )
        if of_class:
            assert slots[mine].tolist() == list(range(before, before + len(mine)))


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dirembed, "triton", None)
    triton_works.cache_clear()
    assert not triton_works(torch.device("cpu"))
    triton_works.cache_clear()
