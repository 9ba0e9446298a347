"""The product of a tied head with packed or expanded integer codes, fast on CPU and CUDA, plain everywhere else.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .configuration_dirembed import TableError, code_bytes
from .packing_dirembed import planes, unpack
from .triton_dirembed import triton_linear, triton_works


Allocation = tuple[int, ...]

# torch 2.13's int8 kernel for bfloat16 steps through a row in vectors and ends on none: with a width that is no
# multiple of 16 it reads beyond its tensors (wrong sums, or a segmentation fault). So expanded rows are padded.
WIDTH_MULTIPLE = 16
INT8_KERNEL_ROWS = 4  # of `inner`; with more of them, a cast of the codes that many products share is faster
BUFFER_BYTES = 4 << 20  # of float codes per thread: less is more barriers between threads, more leaves the cache
DEVICE_BUFFER_BYTES = 64 << 20  # the same on an accelerator, where launches cost more than memory
TRITON_ROWS = 128  # of `inner`; with more of them, unpacking is small beside the product, which cuBLAS does best


def padded_rank(rank: int) -> int:
    """Columns of expanded codes: the rank rounded up to what the fast CPU kernel takes.

    Example:
        >>> padded_rank(300), padded_rank(320)
        (304, 320)
    """
    return math.ceil(rank / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _decode(codes: Tensor, bit_allocation: Allocation | None, out: Tensor) -> Tensor:
    """Writes packed codes, or int8 codes where there is no allocation, into the (n, rank) tensor `out`."""
    if bit_allocation is None:
        return out.copy_(codes[:, : out.shape[1]])
    first = 0
    for plane in planes(codes, bit_allocation):
        out[:, first : first + plane.shape[1]] = plane
        first += plane.shape[1]
    return out


class ExpandedCodes:
    """Packed codes expanded to int8 once, at their first use, and again whenever the packed tensor has changed.

    A cache: copies, pickles and state dicts of what holds it leave the expansion out. Changes are told by the
    tensor's memory, shape, device and version counter; the counter misses writes through `.data` and to tensors made
    under `torch.inference_mode()`: call `clear` after those.

    Example:
        >>> expanded = ExpandedCodes()
        >>> expanded.num_bytes
        0
        >>> expanded.get(torch.tensor([[7, 1]], dtype=torch.uint8), (0, 0, 2, 2))[:, :4].tolist()
        [[1, -1, 0, -1]]
        >>> expanded.num_bytes
        16
    """

    def __init__(self) -> None:
        self._entry: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def get(self, packed: Tensor, bit_allocation: Allocation) -> Tensor:
        """The codes as (V, `padded_rank(rank)`) int8; the columns beyond the rank are zero.

        Args:
            packed: (V, bytes per row) uint8.
            bit_allocation: How many latents have 8, 4, 2 and 1 bits.

        Raises:
            TableError: If the rows of `packed` are not what the allocation makes them.
        """
        version = -1 if packed.is_inference() else packed._version
        key = (packed.data_ptr(), version, packed.shape, packed.stride(), packed.device, bit_allocation)
        if (entry := self._entry) is None or entry[1] != key:
            self._entry = None  # the old codes go before the new ones come
            # Held, the packed memory cannot be freed and come back as another tensor's at the same address.
            entry = self._entry = packed.detach(), key, _expand(packed.detach(), bit_allocation)
        return entry[2]

    @property
    def num_bytes(self) -> int:
        """Memory that the expansion holds now."""
        return 0 if self._entry is None else self._entry[2].numel()

    def clear(self) -> None:
        """Frees the expansion."""
        self._entry = None

    def __reduce__(self) -> tuple[type[ExpandedCodes], tuple[()]]:
        return ExpandedCodes, ()


def _expand(packed: Tensor, bit_allocation: Allocation) -> Tensor:
    rank = sum(bit_allocation)
    _check_packed(packed, bit_allocation, rank)
    # What is made under `inference_mode` could not serve a training step later.
    with torch.inference_mode(False), torch.no_grad():
        codes = torch.zeros(len(packed), padded_rank(rank), dtype=torch.int8, device=packed.device)
        step = max(1, BUFFER_BYTES // max(rank, 1))  # rows whose intermediates stay small
        for rows, out in zip(packed.split(step), codes.split(step), strict=True):
            _decode(rows, bit_allocation, out[:, :rank])
    return codes


def int8_linear(inner: Tensor, codes: Tensor) -> Tensor:
    """The product `inner @ codes.T` with int8 codes.

    Sums are taken in float32 (float64 for float64) and rounded once to the dtype of `inner`. Memory beyond the result
    is a buffer of a few megabytes. Gradients reach `inner`.

    Args:
        inner: (..., r) floats of any dtype.
        codes: (V, r) int8, on the same device, or wider with zeros beyond r: [`ExpandedCodes`] pads its rows so, and
            only such rows fit the fastest kernel.

    Returns:
        (..., V) in the dtype of `inner`.

    Raises:
        TableError: If the shapes or the dtype of the codes do not fit.

    Example:
        >>> codes = torch.tensor([[1, -2], [0, 3], [5, 5]], dtype=torch.int8)
        >>> int8_linear(torch.tensor([[1.0, 0.5]]), codes).tolist()
        [[0.0, 1.5, 7.5]]
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] < inner.shape[-1]:
        raise TableError(f"codes {codes.dtype} {tuple(codes.shape)} do not fit inner states {tuple(inner.shape)}")
    return _linear(inner, codes, None)


def packed_linear(
    inner: Tensor, packed: Tensor, bit_allocation: Allocation, *, expanded: ExpandedCodes | None = None
) -> Tensor:
    """The product `inner @ unpack(packed, bit_allocation).T`.

    On CUDA a Triton kernel reads the packed codes; on CPU the codes are those of `expanded`, if it is given. Elsewhere
    they are unpacked in chunks of rows; compilers, exporters and function transforms see plain operations. The
    result depends neither on where the codes lie in memory, nor on the state of `expanded`, nor on gradients.

    Args:
        inner: (..., r) floats of any dtype.
        packed: (V, bytes per row) uint8, on the same device; the layout is that of `pack`.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits; they sum to r.
        expanded: Where the int8 codes, V · `padded_rank(r)` bytes, are kept between calls on CPU.

    Returns:
        (..., V) in the dtype of `inner`.

    Raises:
        TableError: If the shapes or the dtype of the codes do not fit.

    Example:
        >>> packed = torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)  # -2, -1, 0 and 1 in two bits each
        >>> packed_linear(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), packed, (0, 0, 4, 0)).tolist()
        [[988.0]]
    """
    _check_packed(packed, bit_allocation, inner.shape[-1])
    if expanded is not None and packed.device.type == "cpu" and not _is_traced(inner, packed):
        return int8_linear(inner, expanded.get(packed, bit_allocation))
    return _linear(inner, packed, bit_allocation)


def _check_packed(packed: Tensor, bit_allocation: Allocation, rank: int) -> None:
    row_bytes, fits_rank = code_bytes(bit_allocation), sum(bit_allocation) == rank
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes or not fits_rank:
        raise TableError(
            f"codes {packed.dtype} {tuple(packed.shape)} of bit allocation {bit_allocation} do not fit rank {rank}"
        )


def _is_traced(inner: Tensor, codes: Tensor) -> bool:
    """Whether the operations are recorded or transformed, or the tensors stand for others, as fake ones do."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in (Tensor, Parameter) or tensor.is_meta for tensor in (inner, codes))
    )


def _linear(inner: Tensor, codes: Tensor, bit_allocation: Allocation | None) -> Tensor:
    if _is_traced(inner, codes):
        latents = codes[:, : inner.shape[-1]] if bit_allocation is None else unpack(codes, bit_allocation)
        return F.linear(inner, latents.to(inner.dtype))
    rows = inner.reshape(-1, inner.shape[-1])
    if torch.is_grad_enabled() and inner.requires_grad:
        product = _CodesLinear.apply(rows, codes, bit_allocation)
    else:
        product = _product(rows, codes, bit_allocation)
    return product.view(*inner.shape[:-1], len(codes))


class _CodesLinear(torch.autograd.Function):
    """Keeps the integer codes for the backward pass; autograd would keep the float ones, 4 to 32 times as large."""

    @staticmethod
    def forward(inner: Tensor, codes: Tensor, bit_allocation: Allocation | None) -> Tensor:
        return _product(inner, codes, bit_allocation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        inner, codes, ctx.bit_allocation = inputs
        ctx.rank = inner.shape[1]
        ctx.save_for_backward(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        dtype = _sum_dtype(grad)
        total = grad.new_zeros(len(grad), ctx.rank, dtype=torch.promote_types(grad.dtype, torch.float32))
        step = _chunk_rows(ctx.rank, dtype, codes.device)
        for first in range(0, len(codes), step):
            part = grad[:, first : first + step].to(dtype)
            latents = codes.new_empty(part.shape[1], ctx.rank, dtype=dtype)
            # Nothing in place: `create_graph=True` differentiates this again.
            total = total + part @ _decode(codes[first : first + step], ctx.bit_allocation, latents)
        return total.to(grad.dtype), None, None


def _product(inner: Tensor, codes: Tensor, bit_allocation: Allocation | None) -> Tensor:
    """The product of (n, r) rows, by the fastest way there is; without autograd."""
    if bit_allocation is None and _suits_int8_kernel(inner, codes):
        padded = F.pad(inner, (0, codes.shape[1] - inner.shape[1])).contiguous()
        return torch._weight_int8pack_mm(padded, codes, inner.new_ones(len(codes)))
    if bit_allocation is not None and _suits_triton(inner):
        return triton_linear(inner, codes, bit_allocation)
    return _chunked_product(inner, codes, bit_allocation)


def _suits_int8_kernel(inner: Tensor, codes: Tensor) -> bool:
    return (
        inner.dtype == torch.bfloat16  # other dtypes go through a scalar loop, several times slower than the cast
        and inner.device.type == "cpu"
        and 1 <= len(inner) <= INT8_KERNEL_ROWS
        and len(codes) > 0
        and codes.shape[1] % WIDTH_MULTIPLE == 0
        and codes.is_contiguous()
        and _has_int8_kernel()
    )


@functools.cache
def _has_int8_kernel() -> bool:
    """Whether this CPU is of a kind on which the kernel is known to be fast, and right with padded rows."""
    return hasattr(torch, "_weight_int8pack_mm") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _sum_dtype(inner: Tensor) -> torch.dtype:
    """What to multiply in: float16 products are slow on CPUs."""
    return torch.float32 if inner.dtype == torch.float16 and inner.device.type == "cpu" else inner.dtype


def _chunk_rows(rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of codes that are floats at a time."""
    num_bytes = BUFFER_BYTES * torch.get_num_threads() if device.type == "cpu" else DEVICE_BUFFER_BYTES
    return max(64, num_bytes // max(rank * dtype.itemsize, 1))


def _chunked_product(inner: Tensor, codes: Tensor, bit_allocation: Allocation | None) -> Tensor:
    """Casts chunk after chunk of the codes into one buffer; a fresh tensor each would cost more than the product."""
    num_rows, rank, dtype = len(codes), inner.shape[1], _sum_dtype(inner)
    states = inner.to(dtype)
    step = min(_chunk_rows(rank, dtype, codes.device), max(num_rows, 1))
    buffer = torch.empty(step, rank, dtype=dtype, device=codes.device)
    product = torch.empty(len(inner), num_rows, dtype=dtype, device=codes.device)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        latents = _decode(codes[first:last], bit_allocation, buffer[: last - first])
        torch.mm(states, latents.T, out=product[:, first:last])
    return product.to(inner.dtype)


def _suits_triton(inner: Tensor) -> bool:
    return inner.is_cuda and inner.element_size() <= 4 and len(inner) <= TRITON_ROWS and triton_works(inner.device)
