"""What benchmarks that time competitors share: they take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_dirembed.remote.codes_dirembed import CODEBOOK_SHAPE, RowClass
from hf_dirembed.remote.kernels_dirembed import PackedRows, count_classes, pack_rows


FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
)  # that matter to products


CLOCKS = {"wall": time.perf_counter, "cores": time.process_time}


@torch.inference_mode()
def best_seconds(
    contest: dict[str, Callable[[], Any]], repeats: int, device: torch.device, clock: str = "wall"
) -> dict[str, float]:
    """The least time of each competitor: what others do on the machine can only add to it.

    The clock `cores` counts what all cores did for this process: beside much other work, with one thread, it is what
    can be compared.
    """
    now = CLOCKS[clock]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = dict.fromkeys(contest, float("inf"))
    for repeat in range(repeats + 2):  # the first two compile and warm up
        for name, run in contest.items():
            wait()
            start = now()
            run()
            wait()
            if repeat >= 2:
                best[name] = min(best[name], now() - start)
    return best


def machine(device: torch.device) -> str:
    """What a benchmark ran on, in one line."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    name, features = platform.machine(), set()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name = lines.get("model name", name)
        features = set(f"{lines.get('flags', '')} {lines.get('Features', '')}".split())
    known = ", ".join(each for each in FEATURES if each in features)
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads of {name} ({known})"


def random_rows(num_rows: int, rank: int, allocations: list[tuple[int, ...]], device: torch.device) -> PackedRows:
    """Packed rows of random codes: each is of any of the classes."""
    allocations = sorted(allocations, key=lambda each: RowClass(each).num_bytes)
    numbers = torch.randint(0, len(allocations), (num_rows,))
    classes = tuple(
        RowClass(each, int((numbers == number).sum()) if number else None) for number, each in enumerate(allocations)
    )
    shared, num_codes = classes[0].num_bytes, sum(each.num_codes for each in classes)
    latents = [torch.arange(each.num_codes) % rank for each in classes]
    tensors = {
        "weight": torch.randint(0, 256, (num_rows, shared), dtype=torch.uint8),
        "codebook": torch.randint(-128, 128, CODEBOOK_SHAPE, dtype=torch.int8),
        "latents": torch.cat(latents).int(),
        "steps": torch.randint(-40, 9, (num_codes,), dtype=torch.int8),
        "rows": pack_rows(numbers, torch.rand(num_rows) + 0.5),
    }
    if len(classes) > 1:
        tensors["class_counts"] = count_classes(tensors["rows"], len(classes))
        further = sum((each.rows or 0) * (each.num_bytes - shared) for each in classes)
        tensors["further"] = torch.randint(0, 256, (further,), dtype=torch.uint8)
    return PackedRows(**{name: each.to(device) for name, each in tensors.items()}, classes=classes, rank=rank)
