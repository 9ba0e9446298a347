"""Packed codes on CUDA: kernels in Triton that read rows, and that multiply states with all of them.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes_dirembed import CLASS_BITS, QUARTER, SCALE_BIAS, RowClass, further_offsets
from .kernels_dirembed import PackedRows, code_steps, row_classes, row_scales, windows


try:  # torch brings Triton with its CUDA builds; inside `try`, transformers does not ask users to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


SCALE_OF_TWO = (SCALE_BIAS + QUARTER) << CLASS_BITS  # in a row's byte
BLOCK_ROWS = 64
BLOCK_CODES = 64
_KEPT = 256  # tables whose derived tensors are kept


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the kernels run on a device, tried once: Triton may be missing, lack a C compiler, not know the GPU."""
    if triton is None:
        return False
    rows = PackedRows(
        torch.full((3, 2), 255, dtype=torch.uint8, device=device),
        torch.arange(-128, 128, dtype=torch.int8, device=device).repeat(4, 1),
        torch.tensor([0, 1, 0], dtype=torch.int32, device=device),
        torch.zeros(3, dtype=torch.int8, device=device),
        torch.full((3,), SCALE_OF_TWO, dtype=torch.uint8, device=device),
        classes=(RowClass((2, 0, 0, 1)),),
        rank=2,
    )
    try:
        # The states are 255, 15 and 1: the first and the last code add to one latent.
        latents = triton_read(rows, torch.arange(3, device=device)).tolist()
        product = triton_product(rows, torch.eye(2, device=device)).T.tolist()
    except (RuntimeError, OSError, ImportError, triton.TritonError) as error:
        warnings.warn(f"codes are unpacked without Triton, which fails here: {error}", stacklevel=2)
        return False
    return latents == product == [[2.0, -225.0]] * 3


def triton_read(rows: PackedRows, ids: Tensor) -> Tensor:
    """What [`PackedRows.read`] gives in float32, by one kernel; no autograd, no checks.

    Nothing waits for the device, and no shape depends on the data.

    Args:
        rows: The codes of a table, on one CUDA device.
        ids: (...,) integers, the numbers of rows.

    Returns:
        (..., rank) float32.
    """
    ids = ids.contiguous()
    latents = torch.empty(*ids.shape, rows.rank, dtype=torch.float32, device=ids.device)
    if latents.numel() == 0:
        return latents
    derived, block = _derived(rows), 128
    of_table = derived.numbers, derived.scales, derived.latent_codes, derived.steps, derived.class_numbers
    pointers = [each.contiguous() for each in (*_stored(rows), *of_table)]
    grid = (ids.numel(), triton.cdiv(rows.rank, block))
    with torch.cuda.device_of(ids):
        _read_kernel[grid](
            ids, latents, *pointers, rows.rank, len(rows.latents), rows.weight.shape[1],
            num_classes=len(rows.classes), most=derived.latent_codes.shape[1], block=block,
        )  # fmt: skip
    return latents


def triton_product(rows: PackedRows, states: Tensor) -> Tensor:
    """The product of states with the latents of all rows, straight from the packed codes; no autograd, no checks.

    Sums are taken in float32. Nothing waits for the device, and no shape depends on the data.

    Args:
        rows: The codes of a table, on one CUDA device.
        states: (n, rank) float32, float16 or bfloat16.

    Returns:
        (n, num_rows) in the dtype of the states.
    """
    product = torch.empty(len(states), len(rows.weight), dtype=states.dtype, device=states.device)
    if product.numel() == 0:
        return product
    derived = _derived(rows)
    factors = states.float()[:, rows.latents.long()] * derived.steps
    if states.dtype == torch.bfloat16:  # float16 lacks the range, and float32 can do with as few digits
        factors = factors.to(states.dtype)
    precision = "tf32x3" if states.dtype == torch.float32 else "tf32"

    pointers = [
        each.contiguous()
        for each in (*_stored(rows)[:4], derived.numbers, derived.scales, derived.order, derived.blocks)
    ]
    block_states = min(64, max(16, triton.next_power_of_2(len(states))))  # a matrix instruction takes no less than 16
    grid = (len(derived.blocks), triton.cdiv(len(states), block_states))
    with torch.cuda.device_of(states):
        _product_kernel[grid](
            factors, product, *pointers, len(states), len(rows.weight), len(rows.latents), rows.weight.shape[1],
            block_states=block_states, block_rows=BLOCK_ROWS, block=BLOCK_CODES, precision=precision,
        )  # fmt: skip
    return product


class _Derived(NamedTuple):
    """What kernels take of a table besides its own tensors.

    Attributes:
        numbers: (4, codes of all classes) int32: byte, shift, mask and book of each, as [`windows`] has them.
        steps: (codes of all classes,) float32.
        scales: (256,) float32, what each byte of a row stands for.
        latent_codes: (classes, most, rank) int32, the codes that add to each latent; -1 where there are fewer.
        class_numbers: (classes, 2) int64, the bytes of a row beyond those of all rows, and where the class
            begins in the further bytes.
        order: (blocks * BLOCK_ROWS,) int32, the numbers of rows, class after class, each filled up with -1.
        blocks: (blocks, 5) int64 of each: its class's first code, number of codes and bytes beyond those of all rows,
            where the class begins in the further bytes, and how many rows of the class come before.
    """

    numbers: Tensor
    steps: Tensor
    scales: Tensor
    latent_codes: Tensor
    class_numbers: Tensor
    order: Tensor
    blocks: Tensor


_kept: OrderedDict[tuple[Any, ...], tuple[_Derived, tuple[Tensor, ...]]] = OrderedDict()


def _derived(rows: PackedRows) -> _Derived:
    """Derived tensors are kept, as graphs of CUDA must find nothing to do but launches.

    They are made again when a tensor changes. Tensors that they are made from are held: freed, their memory could come
    back as another's, with the same address.
    """
    sources = (rows.latents, rows.steps, rows.rows)
    key = (
        rows.classes,
        rows.rank,
        rows.weight.shape,
        *map(_identity, sources),
    )
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key][0]
    # What is made under `inference_mode` could not serve a training step later.
    with torch.inference_mode(False), torch.no_grad():
        derived = _derive(rows)
    _kept[key] = derived, tuple(each.detach() for each in sources)
    if len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return derived


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.device


def _derive(rows: PackedRows) -> _Derived:
    device = rows.weight.device
    found = [windows(each.bit_allocation) for each in rows.classes]
    numbers = torch.stack([torch.cat([window[part] for window in found]) for part in range(4)])
    steps, latent_codes = code_steps(rows.steps, torch.float32), _latent_codes(rows).to(device)
    own = [each.num_bytes - rows.weight.shape[1] for each in rows.classes]
    class_numbers = list(zip(own, further_offsets(rows.classes), strict=False))
    of_classes = torch.tensor(class_numbers, dtype=torch.int64, device=device)
    scales = row_scales(torch.arange(256, device=device).to(torch.uint8))
    return _Derived(
        numbers.int().to(device), steps, scales, latent_codes, of_classes, *_sorted_rows(rows, class_numbers)
    )


def _latent_codes(rows: PackedRows) -> Tensor:
    """As [`_Derived`] has it, on a CPU: each code's rank among those of its latent says where it goes."""
    first, found = 0, []
    for number, each in enumerate(rows.classes):
        latents = rows.of_class(number)[1].cpu()
        order = latents.argsort(stable=True)
        counts = latents.bincount(minlength=rows.rank)
        ranks = torch.arange(len(order)) - (counts.cumsum(0) - counts)[latents[order]]
        codes = torch.full((int(counts.max()), rows.rank), -1, dtype=torch.int32)
        codes[ranks, latents[order]] = (order + first).int()
        found.append(codes)
        first += each.num_codes
    most = max(len(codes) for codes in found)
    return torch.stack([F.pad(codes, (0, 0, 0, most - len(codes)), value=-1) for codes in found])


def _sorted_rows(rows: PackedRows, class_numbers: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The order and the blocks of [`_Derived`]."""
    num_rows = len(rows.weight)
    counts = [each.rows or 0 for each in rows.classes]
    counts[0] = num_rows - sum(counts)
    order = row_classes(rows.rows).argsort(stable=True)

    parts, blocks, first = [], [], 0
    of_classes = zip(rows.classes, class_numbers, counts, order.int().split(counts), strict=True)
    for each, further, count, mine in of_classes:
        parts.append(F.pad(mine, (0, -count % BLOCK_ROWS), value=-1))
        blocks += [(first, each.num_codes, *further, before) for before in range(0, count, BLOCK_ROWS)]
        first += each.num_codes
    return torch.cat(parts), torch.tensor(blocks, dtype=torch.int64, device=rows.weight.device)


def _stored(rows: PackedRows) -> tuple[Tensor, ...]:
    """The tensors that kernels read, where there is one class with others that they do not."""
    return (
        rows.weight,
        rows.weight if rows.further is None else rows.further,
        rows.codebook,
        rows.rows,
        rows.latents if rows.class_counts is None else rows.class_counts,
    )


if triton is not None:

    @triton.jit
    def _levels(  # type: ignore[no-untyped-def]
        weight, further, codebook, row_start, further_start, numbers, code, is_code, is_row, num_codes, shared, own
    ):  # fmt: skip
        """The levels of codes of rows, (rows, codes); with one row, (1, codes)."""
        byte = tl.load(numbers + code, is_code, other=0)[None, :]
        shift = tl.load(numbers + num_codes + code, is_code, other=0)[None, :]
        mask = tl.load(numbers + 2 * num_codes + code, is_code, other=0)[None, :]
        book = tl.load(numbers + 3 * num_codes + code, is_code, other=0)[None, :]
        is_level = is_row[:, None] & is_code[None, :]

        of_all, of_own = weight + row_start[:, None], further + further_start[:, None]
        words = tl.load(of_all + byte, is_level & (byte < shared), other=0).to(tl.int32)
        words |= tl.load(of_own + byte - shared, is_level & (byte >= shared), other=0).to(tl.int32)
        after = byte + 1  # a row's last byte has no next, whose bits none needs
        behind = tl.load(of_all + after, is_level & (after < shared), other=0).to(tl.int32)
        is_behind = is_level & (after >= shared) & (after < shared + own)
        behind |= tl.load(of_own + after - shared, is_behind, other=0).to(tl.int32)

        states = ((words | (behind << 8)) >> shift) & mask
        levels = tl.load(codebook + book + states, is_level, other=0).to(tl.float32) + 0.5
        return tl.where(is_level, levels, 0.0)

    @triton.jit
    def _read_kernel(  # type: ignore[no-untyped-def]
        ids, out, weight, further, codebook, row_bytes, class_counts, numbers, scales, latent_codes, steps,
        class_numbers, rank, num_codes, shared, num_classes: tl.constexpr, most: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Reads some latents of one row."""
        place = tl.program_id(0).to(tl.int64)
        row = tl.load(ids + place).to(tl.int64)
        of_row = tl.load(row_bytes + row).to(tl.int32)
        number, slot = 0, row * 0
        if num_classes > 1:
            within = tl.arange(0, 64)  # rows of a block
            number = of_row & 3
            others = tl.load(row_bytes + row // 64 * 64 + within, within < row % 64, other=0)
            before = tl.sum((((others.to(tl.int32) & 3) == number) & (within < row % 64)).to(tl.int32))
            count = tl.load(class_counts + row // 64 * (num_classes - 1) + number - 1, number > 0, other=0)
            slot = tl.where(number > 0, count + before, 0).to(tl.int64)
        own = tl.load(class_numbers + 2 * number)
        further_start = tl.load(class_numbers + 2 * number + 1) + slot * own

        latent = tl.program_id(1) * block + tl.arange(0, block)
        is_latent = latent < rank
        is_row = tl.full((1,), 1, tl.int1)
        one = tl.zeros((1,), tl.int64)
        total = tl.zeros((1, block), tl.float32)
        for each in range(most):
            code = tl.load(latent_codes + (number * most + each) * rank + latent, is_latent, other=-1)
            step = tl.load(steps + code, code >= 0, other=0.0)
            levels = _levels(
                weight, further, codebook, one + row * shared, one + further_start, numbers, code, code >= 0, is_row,
                num_codes, shared, own,
            )  # fmt: skip
            total += levels * step[None, :]
        total *= tl.load(scales + of_row)
        tl.store(out + place * rank + latent[None, :], total, is_latent[None, :])

    @triton.jit
    def _product_kernel(  # type: ignore[no-untyped-def]
        factors, product, weight, further, codebook, row_bytes, numbers, scales, order, blocks,
        num_states, num_rows, num_codes, shared,
        block_states: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        """Multiplies some states with some rows of one class, whose codes are looked up to registers."""
        of_block = blocks + tl.program_id(0) * 5
        first_code, count, own = tl.load(of_block), tl.load(of_block + 1), tl.load(of_block + 2)
        within = tl.arange(0, block_rows)
        further_start = tl.load(of_block + 3) + (tl.load(of_block + 4) + within) * own
        row = tl.load(order + tl.program_id(0) * block_rows + within).to(tl.int64)
        is_row = row >= 0
        state = (tl.program_id(1) * block_states + tl.arange(0, block_states)).to(tl.int64)
        is_state = state < num_states

        total = tl.zeros((block_rows, block_states), tl.float32)
        for start in range(0, count, block):
            is_code = start + tl.arange(0, block) < count
            code = first_code + start + tl.arange(0, block)
            levels = _levels(
                weight, further, codebook, row * shared, further_start, numbers, code, is_code, is_row,
                num_codes, shared, own,
            )  # fmt: skip
            is_factor = is_code[:, None] & is_state[None, :]
            factor = tl.load(factors + state[None, :] * num_codes + code[:, None], is_factor, other=0.0)
            # Levels are exact in every float dtype. Three TF32 products keep the accuracy of float32 states.
            total = tl.dot(levels.to(factor.dtype), factor, total, input_precision=precision)

        of_row = tl.load(row_bytes + row, is_row, other=0).to(tl.int32)
        total *= tl.load(scales + of_row)[:, None]
        out = product + state[None, :] * num_rows + row[:, None]
        tl.store(out, total.to(product.dtype.element_ty), is_row[:, None] & is_state[None, :])
