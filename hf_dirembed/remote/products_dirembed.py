"""What runs packed codes: rows of latents, and the product of states with the latents of all rows.

Compiled kernels do both where there are any: those of the installed package on CPUs, Triton on CUDA. Everywhere else,
and for compilers, exporters and function transforms, plain operations do.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .codes_dirembed import TableError
from .kernels_dirembed import PackedRows
from .triton_dirembed import triton_product, triton_read, triton_works


logger = logging.get_logger(__name__)

BUFFER_BYTES = 4 << 20  # of float latents per thread: less is more operations, more leaves the cache
DEVICE_BUFFER_BYTES = 64 << 20  # the same on an accelerator, where launches cost more than memory
TRITON_STATES = 128  # with more of them, reading the codes is small beside the product, which cuBLAS does best


@dataclass
class Package:
    """What only the installed package does, with more than these files hold; it fills this in when it is imported.

    Attributes:
        compress_table: Compresses a table.
        shadow_latents: The floats that learn in place of a matrix's packed codes.
        find_tables: Every vocabulary table of a model, compressed or not.
        before_upload: Called with model, folder and repo before `push_to_hub` uploads the folder.
        compiled: Whether the compiled kernels for CPUs run here; if they do not, none of the next three is called.
        read_rows: `PackedRows.read` on CPUs: packed rows, row numbers and (rank,) exponents of latents, or None, to
            (..., rank) float32.
        patch_rows: Puts outliers and the row of zeros in the place of what codes stand for.
        rows_product: The product on CPUs: packed rows, (n, rank) float32 states, (n,) float32 offsets, or None, and
            the dtype of the result, to (n, V).
    """

    compress_table: Callable[..., Any] | None = None
    shadow_latents: Callable[[Any], nn.Module] | None = None
    find_tables: Callable[[Any], list[Any]] | None = None
    before_upload: Callable[[Any, str, str], None] | None = None
    compiled: Callable[[], bool] = bool
    read_rows: Callable[[PackedRows, Tensor, Tensor | None], Tensor] | None = None
    patch_rows: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int | None], None] | None = None
    rows_product: Callable[[PackedRows, Tensor, Tensor | None, torch.dtype], Tensor] | None = None


package = Package()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply in: CPUs are slow in 16 bits, or round otherwise than one another.

    Example:
        >>> product_dtype(torch.bfloat16, torch.device("cpu")), product_dtype(torch.bfloat16, torch.device("cuda"))
        (torch.float32, torch.bfloat16)
    """
    return torch.float32 if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype


def is_apart(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor has to be brought to a device: it holds numbers, and they are elsewhere.

    Example:
        >>> is_apart(torch.ones(1), torch.device("cpu")), is_apart(torch.ones(1), torch.device("meta"))
        (False, False)
    """
    return tensor.device != device and not tensor.is_meta and device.type != "meta"


def is_traced(*tensors: Tensor) -> bool:
    """Whether operations are recorded or transformed, or the tensors stand for others, as fake ones do."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not nn.Parameter) or tensor.is_meta:
            return True
    return False


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether the compiled kernels for CPUs take tensors: the one rule for it.

    They do where the package is installed with its library, for tensors on the CPU that hold numbers, while nothing is
    recorded, compiled or transformed.

    Example:
        >>> runs_compiled(torch.ones(1)) == package.compiled(), runs_compiled(torch.ones(1, device="meta"))
        (True, False)
    """
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return not is_traced(*tensors) and package.compiled()


def scaled(latents: Tensor, exponents: Tensor | None) -> Tensor:
    """Latents, (..., rank), times the powers of two of their exponents, (rank,) int8.

    Example:
        >>> scaled(torch.ones(2, 3), torch.tensor([0, 1, -1], dtype=torch.int8)).tolist()
        [[1.0, 2.0, 0.5], [1.0, 2.0, 0.5]]
    """
    return latents if exponents is None else latents * torch.exp2(exponents.to(latents.dtype))


def read_rows(
    rows: PackedRows, ids: Tensor, dtype: torch.dtype = torch.float32, exponents: Tensor | None = None
) -> Tensor:
    """The latents of rows, in the unit of their steps.

    Args:
        rows: The packed rows, checked.
        ids: (...,) integers, the numbers of the rows.
        dtype: The dtype of the latents; float32 where it is narrower.
        exponents: (rank,) int8, of powers of two that the latents are multiplied by; None for none.

    Returns:
        (..., rank) floats.

    Example:
        >>> from .codes_dirembed import RowClass
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
        >>> rows = PackedRows(  # a row of two codes, the symbols 7 and 2, of which both add to the first latent
        ...     weight=torch.tensor([[0x27]], dtype=torch.uint8), codebook=codebook,
        ...     latents=torch.tensor([0, 0], dtype=torch.int32), steps=torch.tensor([0, -8], dtype=torch.int8),
        ...     rows=torch.tensor([0x80], dtype=torch.uint8), classes=(RowClass((2, 0, 0, 0)),), rank=2,
        ... )  # fmt: skip
        >>> read_rows(rows, torch.tensor([0]))
        tensor([[-151.2500,    0.0000]])
    """
    dtype = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float32:
        if package.read_rows is not None and runs_compiled(ids, rows.weight):
            return package.read_rows(rows, ids, exponents)
        if rows.weight.is_cuda and not is_traced(ids, rows.weight) and triton_works(rows.weight.device):
            latents = triton_read(rows, ids.reshape(-1).long()).view(*ids.shape, rows.rank)
            return scaled(latents, exponents)
    return scaled(rows.read(ids, dtype), exponents)


def rows_product(
    states: Tensor, rows: PackedRows, offsets: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The product of states with the latents of all rows, `states @ latents.T`, plus a number for each state.

    Sums are taken in float32, in float64 for float64, and rounded once. Memory beyond the result is a buffer of a few
    megabytes. Gradients reach the states.

    Args:
        states: (..., rank) floats of any dtype, on the device of the rows.
        rows: The packed rows, checked; V of them.
        offsets: (...,) is added to all products of each state, in the dtype of the states; None for nothing.
        dtype: Of the result; by default that of the states.

    Returns:
        (..., V).

    Raises:
        TableError: If the states have another length than the latents.

    Example:
        >>> from .codes_dirembed import RowClass
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
        >>> rows = PackedRows(  # three rows of one code, the symbols 0, 1 and 2
        ...     weight=torch.tensor([[0], [1], [2]], dtype=torch.uint8), codebook=codebook,
        ...     latents=torch.zeros(1, dtype=torch.int32), steps=torch.zeros(1, dtype=torch.int8),
        ...     rows=torch.full((3,), 0x80, dtype=torch.uint8), classes=(RowClass((1, 0, 0, 0)),), rank=1,
        ... )  # fmt: skip
        >>> rows_product(torch.tensor([[2.0]]), rows).round()
        tensor([[-255., -253., -251.]])
    """
    if states.shape[-1] != rows.rank:
        raise TableError(f"states {tuple(states.shape)} do not fit {rows.rank} latents: pass those of one module")
    inner, dtype = product_dtype(states.dtype, states.device), dtype or states.dtype
    learns = torch.is_grad_enabled() and (states.requires_grad or (offsets is not None and offsets.requires_grad))
    if is_traced(states, rows.weight):
        latents = read_rows(rows, torch.arange(len(rows.weight), device=states.device), inner)
        product = F.linear(states.to(inner), latents.to(inner))
    else:
        flat, shape = states.reshape(-1, rows.rank).to(inner), (*states.shape[:-1], len(rows.weight))
        if inner == torch.float32 and not learns and package.rows_product is not None and runs_compiled(rows.weight):
            added = None if offsets is None else offsets.reshape(-1).to(inner)
            return package.rows_product(rows, flat, added, dtype).view(shape)
        product = (_RowsProduct.apply(flat, *rows) if learns else _product(flat, rows)).view(shape)
    return (product if offsets is None else product + offsets.unsqueeze(-1)).to(dtype)


class _RowsProduct(torch.autograd.Function):
    """Keeps packed codes for the backward pass; autograd would keep float latents, many times as large."""

    @staticmethod
    def forward(states: Tensor, *rows: Any) -> Tensor:
        return _product(states, PackedRows(*rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows = inputs[1:]
        ctx.others = [None if isinstance(each, Tensor) else each for each in rows]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.others, strict=True)
        rows = PackedRows(*(other if tensor is None else tensor for tensor, other in saved))
        total = grad.new_zeros(len(grad), rows.rank, dtype=torch.promote_types(grad.dtype, torch.float32))
        for chunk, latents in _chunks(rows, grad.dtype):
            # Nothing in place: `create_graph=True` differentiates this again.
            total = total + grad[:, chunk] @ latents
        return total.to(grad.dtype), *[None] * len(rows)


def _product(states: Tensor, rows: PackedRows) -> Tensor:
    """The product of (n, rank) states, by the fastest way there is; without autograd."""
    device = rows.weight.device
    if states.dtype == torch.float32 and package.rows_product is not None and runs_compiled(rows.weight):
        return package.rows_product(rows, states, None, states.dtype)
    narrow = states.dtype.itemsize <= 4 and len(states) <= TRITON_STATES
    if device.type == "cuda" and narrow and triton_works(device):
        return triton_product(rows, states.contiguous())
    if device.type == "cpu" and package.rows_product is None:
        logger.warning_once(
            "without the package hf_dirembed a head unpacks its whole table in every step, which takes tens of times "
            "as long: import hf_dirembed, or make a dense model with hf-dirembed expand"
        )

    product = torch.empty(len(states), len(rows.weight), dtype=states.dtype, device=device)
    for chunk, latents in _chunks(rows, states.dtype):
        torch.mm(states, latents.T, out=product[:, chunk])
    return product


def _chunks(rows: PackedRows, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The latents of all rows, (n, rank) floats, chunk after chunk, and which rows these are."""
    num_rows, device = len(rows.weight), rows.weight.device
    room = BUFFER_BYTES * torch.get_num_threads() if device.type == "cpu" else DEVICE_BUFFER_BYTES
    step = max(64, room // (rows.rank * dtype.itemsize))
    for first in range(0, num_rows, step):
        chunk = slice(first, min(first + step, num_rows))
        ids = torch.arange(chunk.start, chunk.stop, device=device)
        yield chunk, read_rows(rows, ids, dtype).to(dtype)
