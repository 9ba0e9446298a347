"""Whether Triton's kernels, and the modules that run them, give what float64 gives."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dirembed.remote.kernels_dirembed import PackedRows
from hf_dirembed.remote.triton_dirembed import triton_product, triton_read

from ..turns import random_rows
from .made import edge_tables, modules


# Of the sum of the sizes of the terms: latents and sums in float32 are rounded, in 16 bits states and results too.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
STATES = (1, 3, 16, 17, 70, 128)


class Check(NamedTuple):
    """What was compared.

    Attributes:
        what: Its name.
        dtype: Of the states, or of the rows.
        worst: The largest difference to float64, over what is allowed: up to 1 is right.
    """

    what: str
    dtype: torch.dtype
    worst: float


def on(rows: PackedRows, device: torch.device) -> PackedRows:
    """Packed rows on a device."""
    tensors = {name: each.to(device) for name, each in rows._asdict().items() if isinstance(each, Tensor)}
    return rows._replace(**tensors)  # type: ignore[arg-type]


def _excess(found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> float:
    """The largest difference over what is allowed; infinite where there are no numbers."""
    difference = (found.double().cpu() - expected).abs() / (TOLERANCE[dtype] * size + torch.finfo(dtype).tiny)
    worst = float(difference.max()) if difference.numel() else 0.0
    return worst if difference.isfinite().all() else float("inf")


def check_kernels(device: torch.device, *, narrow: bool = True) -> list[Check]:
    """Compares lookups and products with random codes of every shape.

    Args:
        device: Where the kernels run; the CPU under Triton's interpreter.
        narrow: Whether bfloat16 is among it, which the interpreter takes for integers.
    """
    found = []
    for name, (num_rows, rank, allocations) in edge_tables().items():
        torch.manual_seed(0)
        rows = random_rows(num_rows, rank, allocations, torch.device("cpu"))
        latents, there = rows.read(torch.arange(num_rows), torch.float64), on(rows, device)
        size = latents.abs() + 128 * 2 * rows.latents.bincount().max()  # terms of one latent may cancel out
        ids = torch.randint(0, num_rows, (3, 50))
        read = triton_read(there, ids.to(device))
        found.append(Check(f"rows, {name}", torch.float32, _excess(read, latents[ids], size[ids], torch.float32)))
        for dtype in TOLERANCE if narrow else (torch.float32, torch.float16):
            worst = 0.0
            for count in STATES:
                states = torch.randn(count, rank).to(dtype)
                if dtype == torch.float16:
                    states /= 64  # whose products stay below 65,504
                expected, sizes = states.double() @ latents.T, states.double().abs() @ size.T
                worst = max(worst, _excess(triton_product(there, states.to(device)), expected, sizes, dtype))
            found.append(Check(f"products, {name}", dtype, worst))
    return found


@torch.no_grad()
def check_modules(device: torch.device) -> list[Check]:
    """Compares embedding and head, with outliers, a row of zeros and a bias, with the same in float64 on the CPU."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        rows = random_rows(1_003, 96, [(3, 3, 30, 20), (50, 20, 26, 0)], torch.device("cpu"))
        rows = rows._replace(steps=rows.steps.clamp(max=-16))
        embedding, head = modules(rows, 100, 9, dtype)
        table, bias = copy.deepcopy(embedding).double().dense_weight(), head.bias.double()  # type: ignore[union-attr]
        embedding, head = embedding.to(device), head.to(device)
        size = table.abs() + table.abs().mean() * 8

        ids = torch.randint(0, 1_003, (4, 70))
        looked_up = embedding(ids.to(device))
        found.append(Check("embedding", dtype, _excess(looked_up, table[ids], size[ids], dtype)))
        for count in STATES:
            states = torch.randn(count, 100).to(dtype)
            expected, sizes = states.double() @ table.T + bias, states.double().abs() @ size.T + bias.abs()
            found.append(
                Check(f"head, {count} states", dtype, _excess(head(states.to(device)), expected, sizes, dtype))
            )
    return found
