"""Where fitting runs: on a GPU where there is one, and to the same figures; all that is kept lies on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hf_dirembed.compression import compress_table
from hf_dirembed.compression.table import Table


OPTIONS: dict[str, dict[str, Any]] = {
    "transform": {"bits": 3},
    "transform with a metric": {"bits": 3, "hessian": torch.linspace(0.1, 1, 48).diag()},
    "direction": {"method": "direction", "rank": 12},
    "autoencoder": {"method": "autoencoder", "rank": 12},
    "svd": {"method": "svd", "rank": 12},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def rows() -> torch.Tensor:
    return torch.randn(900, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 48)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("has_gpu", [True, False])
def test_fitting_asks_for_a_gpu_where_there_is_one(name: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is recorded, and the CPU given in its place: the bytes are those of asking for the CPU."""
    asked, read_on = [], []
    module = sys.modules[compress_table.__module__]
    table_of = Table.__init__

    def cpu_instead(device: torch.device | str) -> torch.device:
        asked.append(str(device))
        return torch.device("cpu")

    def noticed(self: Table, *args: Any, device: torch.device | str = "cpu", **options: Any) -> None:
        read_on.append(str(device))
        table_of(self, *args, device=device, **options)

    expected = compress_table(rows(), device="cpu", **OPTIONS[name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(module, "_usable", cpu_instead)
    monkeypatch.setattr(Table, "__init__", noticed)
    found = compress_table(rows(), **OPTIONS[name])
    assert asked == ["cuda" if has_gpu else "cpu"]
    assert set(read_on) == {"cpu"}
    assert found.layout == expected.layout
    assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in found.tensors.items())
    compress_table(rows(), device="cpu", **OPTIONS[name])
    assert asked[1:] == ["cpu"]  # whoever names one gets that


@needs_gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gpu_fits_as_well(name: str) -> None:
    on_gpu = compress_table(rows(), **OPTIONS[name])
    on_cpu = compress_table(rows(), device="cpu", **OPTIONS[name])
    assert on_gpu.record.settings["device"] == "cuda"
    assert {tensor.device.type for tensor in on_gpu.tensors.values()} == {"cpu"}
    assert on_gpu.record.quality["mean_cosine"] == pytest.approx(on_cpu.record.quality["mean_cosine"], abs=2e-3)
