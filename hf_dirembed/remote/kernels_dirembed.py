"""Packed codes: their bits, and the product of a head with them, fast on CPU and CUDA, plain everywhere else.

A row's latents of 8 bits are plain integers. Those of 4, 2 and 1 bits are trellis coded: the symbols of a section are
read as one stream, and a latent is looked up by the last 8 bits of it, so that few bits of its own choose among 256
levels (trellis-coded quantisation, Marcellin & Fischer 1990, over the bitshift trellis of Tseng et al. 2024, "QTIP").

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .codes_dirembed import (
    BIT_WIDTHS,
    CODEBOOK_SHAPE,
    NO_STEP,
    OCTAVE,
    STATE_BITS,
    TableError,
    TableLayout,
    code_bytes,
)


try:  # torch brings Triton with its CUDA builds; inside `try`, transformers does not ask users to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


HALF = 0.5  # what a mid-rise quantiser's integer stands for is half a step above it


def pack(symbols: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Packs symbols into bytes, the widest latents first.

    A section of n latents of w bits takes m = ⌈n·w/8⌉ bytes; latent s·m + k of the section sits in byte k at bit s·w,
    so that unpacking works on whole contiguous sections.

    Args:
        symbols: (n, rank) uint8; that of a latent of w bits is below 2^w.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Raises:
        TableError: If a symbol does not fit into its bits.

    Example:
        >>> packed = pack(torch.tensor([[255, 3, 1, 1, 0]], dtype=torch.uint8), (1, 0, 2, 2))
        >>> packed.tolist(), [section.tolist() for _, section in sections(packed, (1, 0, 2, 2))]
        ([[255, 7, 1]], [[[255]], [[3, 1]], [[1, 0]]])
    """
    packed, first = [], 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        section, first = symbols[:, first : first + count], first + count
        per_byte = 8 // width
        num_bytes = math.ceil(count / per_byte)
        if section.numel() and (largest := int(section.max())) >> width:
            raise TableError(f"symbol {largest} does not fit into {width} bits: quantise the codes again")
        planes = F.pad(section, (0, num_bytes * per_byte - count)).view(len(symbols), per_byte, num_bytes)
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=symbols.device).view(1, per_byte, 1) * width
        packed.append((planes << shifts).sum(dim=1, dtype=torch.uint8))
    return torch.cat(packed, dim=1)


def sections(packed: Tensor, bit_allocation: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The symbols of packed rows, width by width, by plain operations that compilers and exporters know.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Yields:
        The width, and (..., count) int32 symbols, for each width that has any.
    """
    first = 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        num_bytes = math.ceil(count * width / 8)
        section, first = packed[..., first : first + num_bytes], first + num_bytes
        if width < 8 and count:
            # In 32 bits, as exporters to ONNX have no shifts of bytes.
            wide, mask = section.int(), (1 << width) - 1
            planes = [(wide >> shift) & mask for shift in range(0, 8, width)]
            section = torch.cat(planes, dim=-1)[..., :count]
        if count:
            yield width, section.int()


def trellis_states(symbols: Tensor, width: int) -> Tensor:
    """The state of each latent: its own symbol in the low bits, those of the latents behind it above.

    The stream runs from the weakest latent to the strongest, as its first symbols have least to choose from.

    Args:
        symbols: (..., count) integers, each below 2^width.
        width: Bits of a symbol.

    Returns:
        (..., count) int32, below 256.

    Example:
        >>> trellis_states(torch.tensor([1, 2, 3], dtype=torch.uint8), width=2).tolist()
        [57, 14, 3]
    """
    states, known = symbols.int(), 1
    while known * width < STATE_BITS:  # doubles how many symbols each state knows
        behind = F.pad(states[..., known:], (0, min(known, states.shape[-1])))
        states = states | (behind << (known * width))
        known *= 2
    return states


def unpack(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor) -> Tensor:
    """The latents of packed rows, less ½.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, the levels of the trellis's states at 4, 2 and 1 bits, less ½.

    Returns:
        (..., rank) int8.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack(torch.tensor([[200, 0b10]], dtype=torch.uint8), (1, 0, 0, 2), codebook).tolist()
        [[72, -126, -127]]
    """
    latents = []
    for width, symbols in sections(packed, bit_allocation):
        if width == 8:
            latents.append((symbols - 128).to(torch.int8))
        else:
            latents.append(codebook[BIT_WIDTHS.index(width) - 1][trellis_states(symbols, width).long()])
    return torch.cat(latents, dim=-1)


def unpack_levels(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The half-integers that packed rows stand for, (..., rank): [`unpack`] and ½.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack_levels(torch.tensor([[200]], dtype=torch.uint8), (1, 0, 0, 0), codebook, torch.float32).tolist()
        [[72.5]]
    """
    return unpack(packed, bit_allocation, codebook).to(dtype) + HALF


def refinement_steps(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What a second stage's half-integers are multiplied by to be in the first stage's unit.

    Args:
        exponents: (rank,) int8, in eighths of a power of two; -128 for a step of 0.
        dtype: The dtype of the steps.

    Example:
        >>> refinement_steps(torch.tensor([0, -8, 4, -128], dtype=torch.int8), torch.float64)[[0, 1, 3]].tolist()
        [1.0, 0.5, 0.0]
    """
    wide = exponents.to(torch.promote_types(dtype, torch.float32))
    return torch.exp2(wide / OCTAVE).masked_fill(exponents == NO_STEP, 0).to(dtype)


class PackedCodes(NamedTuple):
    """Packed rows with all that it takes to read them.

    Attributes:
        packed: (V, bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, as [`unpack`] takes it.
    """

    packed: Tensor
    bit_allocation: tuple[int, ...]
    codebook: Tensor

    @property
    def rank(self) -> int:
        """Latents of a row."""
        return sum(self.bit_allocation)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The latents of rows, less ½: (n, rank) int8."""
        return unpack(self.packed[rows], self.bit_allocation, self.codebook)

    def check(self, rank: int) -> None:
        """Refuses tensors that are not what the allocation makes them.

        Raises:
            TableError: If shapes or dtypes do not fit each other or the rank.
        """
        packed, codebook = self.packed, self.codebook
        if (
            (packed.dtype, packed.shape[1:]) != (torch.uint8, (code_bytes(self.bit_allocation),))
            or (codebook.dtype, codebook.shape) != (torch.int8, CODEBOOK_SHAPE)
            or self.rank != rank
        ):
            raise TableError(
                f"codes {packed.dtype} {tuple(packed.shape)} of bit allocation {self.bit_allocation} and codebook "
                f"{codebook.dtype} {tuple(codebook.shape)} do not fit rank {rank}: pass those of one module"
            )


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


def expanded_bytes(num_rows: int, layout: TableLayout) -> int:
    """Bytes that the codes of a tied head take on CPU once they are expanded; none for float codes.

    Example:
        >>> layout = TableLayout("transform", 300, "packed", "float16", bias=True, bit_allocation=(0, 0, 0, 300))
        >>> expanded_bytes(1000, layout)
        304000
    """
    if layout.bit_allocation is None:
        return 0
    further = layout.refinement.rows * padded_rank(layout.refinement.rank) if layout.refinement else 0
    return num_rows * padded_rank(layout.base_rank) + further


class ExpandedCodes:
    """Packed codes expanded to int8 once, at their first use, and again whenever the packed tensor has changed.

    A cache: copies, pickles and state dicts of what holds it leave the expansion out. Changes are told by the
    tensor's memory, shape, device and version counter; the counter misses writes through `.data` and to tensors made
    under `torch.inference_mode()`: call `clear` after those.

    Example:
        >>> expanded = ExpandedCodes()
        >>> expanded.num_bytes
        0
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> packed = torch.tensor([[7, 1]], dtype=torch.uint8)
        >>> expanded.get(PackedCodes(packed, (0, 0, 2, 2), codebook))[:, :4].tolist()
        [[-121, -127, -127, -128]]
        >>> expanded.num_bytes
        16
    """

    def __init__(self) -> None:
        self._entry: tuple[PackedCodes, tuple[Any, ...], Tensor] | None = None

    def get(self, codes: PackedCodes) -> Tensor:
        """The codes as (V, `padded_rank(rank)`) int8; the columns beyond the rank are zero.

        Raises:
            TableError: If the tensors of `codes` do not fit each other.
        """
        key = tuple(_identity(part) if isinstance(part, Tensor) else part for part in codes)
        if (entry := self._entry) is None or entry[1] != key:
            self._entry = None  # the old codes go before the new ones come
            # Held, the packed memory cannot be freed and come back as another tensor's at the same address.
            held = PackedCodes(codes.packed.detach(), codes.bit_allocation, codes.codebook.detach())
            entry = self._entry = held, key, _expand(held)
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


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.device


def _expand(codes: PackedCodes) -> Tensor:
    codes.check(codes.rank)
    # What is made under `inference_mode` could not serve a training step later.
    with torch.inference_mode(False), torch.no_grad():
        num_rows = len(codes.packed)
        expanded = torch.zeros(num_rows, padded_rank(codes.rank), dtype=torch.int8, device=codes.packed.device)
        step = max(1, BUFFER_BYTES // codes.rank)  # rows whose intermediates stay small
        for first in range(0, num_rows, step):
            rows = slice(first, first + step)
            expanded[rows, : codes.rank] = codes.unpack(rows)
    return expanded


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
    return _linear(inner, codes)


def packed_linear(inner: Tensor, codes: PackedCodes, *, expanded: ExpandedCodes | None = None) -> Tensor:
    """The product `inner @ codes.unpack().T`.

    On CUDA a Triton kernel reads the packed codes; on CPU the codes are those of `expanded`, if it is given. Elsewhere
    they are unpacked in chunks of rows; compilers, exporters and function transforms see plain operations. The
    result depends neither on where the codes lie in memory, nor on the state of `expanded`, nor on gradients.

    Args:
        inner: (..., r) floats of any dtype.
        codes: Packed codes of rank r and V rows, on the same device.
        expanded: Where the int8 codes, V · `padded_rank(r)` bytes, are kept between calls on CPU.

    Returns:
        (..., V) in the dtype of `inner`.

    Raises:
        TableError: If the shapes or the dtypes do not fit.

    Example:
        >>> packed = torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)  # the symbols 0, 1, 2 and 3
        >>> codebook = (torch.arange(256) % 4).to(torch.int8).repeat(3, 1)  # levels that are the symbols
        >>> codes = PackedCodes(packed, (0, 0, 4, 0), codebook)
        >>> packed_linear(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), codes).tolist()
        [[3210.0]]
    """
    codes.check(inner.shape[-1])
    if expanded is not None and codes.packed.device.type == "cpu" and not _is_traced(inner, codes.packed):
        return int8_linear(inner, expanded.get(codes))
    return _linear(inner, codes)


def _is_traced(inner: Tensor, codes: Tensor) -> bool:
    """Whether the operations are recorded or transformed, or the tensors stand for others, as fake ones do."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in (Tensor, Parameter) or tensor.is_meta for tensor in (inner, codes))
    )


def _linear(inner: Tensor, codes: Tensor | PackedCodes) -> Tensor:
    tensors = codes if isinstance(codes, PackedCodes) else (codes, None, None)
    if _is_traced(inner, tensors[0]):
        return F.linear(inner, _latents(codes, slice(None), inner.shape[-1]).to(inner.dtype))
    rows = inner.reshape(-1, inner.shape[-1])
    if torch.is_grad_enabled() and inner.requires_grad:
        product = _CodesLinear.apply(rows, *tensors)
    else:
        product = _product(rows, codes)
    return product.view(*inner.shape[:-1], len(tensors[0]))


def _latents(codes: Tensor | PackedCodes, rows: slice, rank: int) -> Tensor:
    """Rows of codes as int8."""
    return codes.unpack(rows) if isinstance(codes, PackedCodes) else codes[rows, :rank]


def _num_rows(codes: Tensor | PackedCodes) -> int:
    return len(codes.packed if isinstance(codes, PackedCodes) else codes)


class _CodesLinear(torch.autograd.Function):
    """Keeps the integer codes for the backward pass; autograd would keep the float ones, 4 to 32 times as large."""

    @staticmethod
    def forward(inner: Tensor, codes: Tensor, bit_allocation: Allocation | None, codebook: Tensor | None) -> Tensor:
        return _product(inner, _codes(codes, bit_allocation, codebook))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        inner, codes, ctx.bit_allocation, codebook = inputs
        ctx.rank = inner.shape[1]
        ctx.save_for_backward(codes, codebook)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tensor, codebook = ctx.saved_tensors
        codes = _codes(tensor, ctx.bit_allocation, codebook)
        dtype = _sum_dtype(grad)
        total = grad.new_zeros(len(grad), ctx.rank, dtype=torch.promote_types(grad.dtype, torch.float32))
        step = _chunk_rows(ctx.rank, dtype, tensor.device)
        for first in range(0, len(tensor), step):
            rows = slice(first, first + step)
            # Nothing in place: `create_graph=True` differentiates this again.
            total = total + grad[:, rows].to(dtype) @ _latents(codes, rows, ctx.rank).to(dtype)
        return total.to(grad.dtype), None, None, None


def _codes(codes: Tensor, bit_allocation: Allocation | None, codebook: Tensor | None) -> Tensor | PackedCodes:
    return codes if bit_allocation is None or codebook is None else PackedCodes(codes, bit_allocation, codebook)


def _product(inner: Tensor, codes: Tensor | PackedCodes) -> Tensor:
    """The product of (n, r) rows, by the fastest way there is; without autograd."""
    if isinstance(codes, PackedCodes):
        return triton_linear(inner, *codes) if _suits_triton(inner) else _chunked_product(inner, codes)
    if _suits_int8_kernel(inner, codes):
        padded = F.pad(inner, (0, codes.shape[1] - inner.shape[1])).contiguous()
        return torch._weight_int8pack_mm(padded, codes, inner.new_ones(len(codes)))
    return _chunked_product(inner, codes)


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


def _chunked_product(inner: Tensor, codes: Tensor | PackedCodes) -> Tensor:
    """Casts chunk after chunk of the codes into one buffer; a fresh tensor each would cost more than the product."""
    num_rows, rank, dtype = _num_rows(codes), inner.shape[1], _sum_dtype(inner)
    states = inner.to(dtype)
    step = min(_chunk_rows(rank, dtype, inner.device), max(num_rows, 1))
    buffer = torch.empty(step, rank, dtype=dtype, device=inner.device)
    product = torch.empty(len(inner), num_rows, dtype=dtype, device=inner.device)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        latents = buffer[: rows.stop - first].copy_(_latents(codes, rows, rank))
        torch.mm(states, latents.T, out=product[:, rows])
    return product.to(inner.dtype)


def _suits_triton(inner: Tensor) -> bool:
    return inner.is_cuda and inner.element_size() <= 4 and len(inner) <= TRITON_ROWS and triton_works(inner.device)
