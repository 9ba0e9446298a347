"""The product of a tied head with packed integer codes on CUDA, where a Triton kernel unpacks them in registers.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


try:  # torch brings Triton with its CUDA builds; inside `try`, transformers does not ask users to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the kernel runs on a device, tried once: Triton may be missing, lack a C compiler, not know the GPU."""
    if triton is None:
        return False
    inner = torch.ones(1, 5, device=device)
    packed = torch.full((3, 4), 255, dtype=torch.uint8, device=device)
    codebook = torch.arange(-128, 128, dtype=torch.int8, device=device).repeat(3, 1)
    try:
        # 127 of 8 bits; the states 15, 3, 3 and 1 of the streams that begin.
        works = triton_linear(inner, packed, (1, 1, 1, 2), codebook).tolist() == [[127.0 - 113 - 125 - 125 - 127] * 3]
    except (RuntimeError, OSError, ImportError, triton.TritonError) as error:
        warnings.warn(f"codes are unpacked without Triton, which fails here: {error}", stacklevel=2)
        return False
    return works


def triton_linear(inner: Tensor, packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor) -> Tensor:
    """`packed_linear` of (n, r) float32, float16 or bfloat16 rows by the Triton kernel; no autograd, no checks."""
    num_rows, batch = len(packed), len(inner)
    product = torch.empty(batch, num_rows, dtype=inner.dtype, device=inner.device)
    if product.numel() == 0:
        return product
    inner, packed, codebook = inner.contiguous(), packed.contiguous(), codebook.contiguous()
    block_batch = min(64, max(16, triton.next_power_of_2(batch)))  # 16 is the least that a matrix instruction takes
    block_rows = 64
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(batch, block_batch))
    with torch.cuda.device_of(inner):
        _packed_linear_kernel[grid](
            inner, packed, codebook, product, batch, num_rows, packed.shape[1], inner.shape[1], *bit_allocation,
            block_batch=block_batch, block_rows=block_rows, block=64,
        )  # fmt: skip
    return product


if triton is not None:

    @triton.jit
    def _add_section(  # type: ignore[no-untyped-def]
        total, states, packed, levels, is_row, is_state, first,
        count: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Adds to `total`, (rows, states), what a section of `count` latents of `width` bits contributes."""
        num_bytes: tl.constexpr = (count * width + 7) // 8
        for start in range(0, num_bytes, block):
            byte = start + tl.arange(0, block)
            is_byte = byte < num_bytes
            for plane in range(8 // width):  # unrolled, it would take most of a minute to compile
                latent = plane * num_bytes + byte
                symbols = tl.zeros((total.shape[0], block), tl.int32)
                for behind in range(8 // width):  # the latent's own symbol, then those that it shares its state with
                    other = latent + behind
                    at = packed + (other % num_bytes)[None, :]
                    is_symbol = is_row[:, None] & (is_byte & (other < count))[None, :]
                    loaded = tl.load(at, is_symbol, other=0).to(tl.int32)
                    symbol = (loaded >> (other // num_bytes * width)[None, :]) & ((1 << width) - 1)
                    symbols |= symbol << (behind * width)
                if width == 8:  # noqa: SIM108 (Triton prunes a branch, not an expression, when it compiles)
                    codes = symbols - 128
                else:
                    codes = tl.load(levels + symbols).to(tl.int32)
                # Where there is no latent the state is 0, whatever the padding of the codes holds.
                is_latent = is_byte & (latent < count)
                state = tl.load(states + (first + latent)[:, None], is_latent[:, None] & is_state[None, :], other=0.0)
                # Codes are exact in every float dtype. Three TF32 products keep the accuracy of float32 states.
                total = tl.dot(codes.to(tl.float32).to(state.dtype), state, total, input_precision="tf32x3")
        return total

    @triton.jit
    def _packed_linear_kernel(  # type: ignore[no-untyped-def]
        inner, packed, codebook, product, batch, num_rows, row_bytes, rank,
        n8: tl.constexpr, n4: tl.constexpr, n2: tl.constexpr, n1: tl.constexpr,
        block_batch: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Multiplies `block_batch` states with `block_rows` packed rows, unpacked in registers, section by section."""
        row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
        state = (tl.program_id(1) * block_batch + tl.arange(0, block_batch)).to(tl.int64)
        is_row, is_state = row < num_rows, state < batch
        states, at = inner + state[None, :] * rank, packed + row[:, None] * row_bytes
        total = tl.zeros((block_rows, block_batch), tl.float32)
        total = _add_section(total, states, at, codebook, is_row, is_state, 0, n8, 8, block)
        at += n8
        total = _add_section(total, states, at, codebook, is_row, is_state, n8, n4, 4, block)
        at += (n4 + 1) // 2
        total = _add_section(total, states, at, codebook + 256, is_row, is_state, n8 + n4, n2, 2, block)
        at += (n2 + 3) // 4
        total = _add_section(total, states, at, codebook + 512, is_row, is_state, n8 + n4 + n2, n1, 1, block)
        out = product + state[None, :] * num_rows + row[:, None]
        tl.store(out, total.to(product.dtype.element_ty), is_row[:, None] & is_state[None, :])
