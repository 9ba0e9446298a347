"""The benchmark for GPUs, as far as it runs where there is none; what in lookups and heads would wait for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed import make_embedding, make_head

from benchmarks.gpu import checks, speed
from benchmarks.gpu.__main__ import NO_GPU, main
from hf_dirembed.remote import modules_dirembed
from hf_dirembed.remote.products_dirembed import read_rows, rows_product


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert capsys.readouterr().err == f"{NO_GPU}\n"


def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    assert main(["--device", "cpu", "--small", "--eager", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "14 of 14 comparisons" in page
    assert page.count("| ours") == 4  # lookup, head, and generation with tables in two places
    assert page.count("| 100 % |") == 3


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = modules_dirembed.rows_product
    monkeypatch.setattr(modules_dirembed, "rows_product", lambda *values: product(*values) * (1 + 1e-3))
    monkeypatch.setattr(checks, "STATES", (1,))
    monkeypatch.setattr("benchmarks.gpu.__main__.race_lookups", lambda *_: (_ for _ in ()).throw(ValueError("lost")))
    monkeypatch.setattr(speed, "STATES", (1,))
    monkeypatch.setattr("benchmarks.gpu.__main__.contestants", lambda *_: {})
    assert main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.md")]) == 1
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "3 of 4 comparisons" in page
    assert "Failed: ValueError: lost" in page
    assert "| ours" in page


def test_every_shape_of_a_table_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain operations in the place of the kernels: wrong scales are found."""
    monkeypatch.setattr(checks, "triton_read", read_rows)
    monkeypatch.setattr(checks, "triton_product", lambda rows, states: rows_product(states, rows))
    found = checks.check_kernels(torch.device("cpu"))
    assert len(found) == 4 * len(checks.edge_tables())
    assert all(each.worst <= 1 for each in found)
    assert {len(allocations) for _, _, allocations in checks.edge_tables().values()} == {1, 2, 4}
    monkeypatch.setattr(checks, "triton_read", lambda rows, ids: read_rows(rows._replace(rows=rows.rows ^ 4), ids))
    assert all(each.worst > 1 for each in checks.check_kernels(torch.device("cpu")) if each.what.startswith("rows"))


@pytest.mark.parametrize("count", [1, 200])
def test_no_shape_depends_on_data(count: int) -> None:
    """On the meta device there is no data, on a GPU it would be waited for, and no graph could be captured."""
    embedding, head = make_embedding().to("meta"), make_head().to("meta")
    ids = torch.zeros(2, count, dtype=torch.long, device="meta")
    with torch.no_grad():
        rows = embedding(ids)
        assert (rows.shape, rows.device.type) == ((2, count, 32), "meta")
        assert head(rows).shape == (2, count, 160)
