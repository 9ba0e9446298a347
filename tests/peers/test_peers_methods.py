"""Every method, ours and those of other packages: what it keeps of a table, and the rows that come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peers.methods import Method, Stored, Table
from benchmarks.peers.registry import METHODS
from benchmarks.peers.running import synthetic_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_keeps_gives_its_rows_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    method = METHODS[name]
    if not method.is_installed:
        pytest.skip(f"{method.package} is not installed")
    if name == "torchao-int4-packed":
        pytest.skip("needs kernels that torchao's wheels for this machine lack")
    table = synthetic_table(640, 64)
    rows = (table.rows / torch.arange(1, 65)).to(dtype)  # so that few latents hold much
    stored, loaded = round_trip(method, Table(rows, table.weights), tmp_path / "stored.safetensors")
    assert loaded.kept_bits == stored.kept_bits
    if method.has_budget:
        assert loaded.kept_bits <= 6
    with torch.no_grad():
        run = method.load(loaded)
        found = run.embedding(torch.arange(640).view(10, 64))
        assert (found.shape, found.dtype) == ((10, 64, 64), dtype)
        found = found.view(640, 64)
        assert error(found, rows) < {"tltorch-tt": 1, "torchao-int2": 0.6, "torchao-int3": 0.3}.get(name, 0.2)
        if run.head is not None:
            states = torch.randn(3, 64, dtype=dtype)
            assert error(run.head(states), states.float() @ found.float().T) < 0.03


def round_trip(method: Method, table: Table, file: Path) -> tuple[Stored, Stored]:
    stored = method.fit(table, 6.0 if method.has_budget else None)
    stored.save(file)
    return stored, Stored.load(file)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
