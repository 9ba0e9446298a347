"""Measurements of tables, each in a process of its own."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import running
from benchmarks.peers.plots import draw
from benchmarks.peers.processes import run_process
from benchmarks.peers.registry import METHODS
from benchmarks.peers.report import Report
from benchmarks.peers.running import Bench, Point, Settings, measure_scaling, synthetic_table


def settings(**changed: Any) -> Settings:
    given = {"methods": ["svd"], "bits": (4.0,), "timeout": 60, "repeats": 3, "batches": (1,)}
    return Settings(**{**given, "progress": lambda line: None, **changed})


@pytest.mark.usefixtures("in_process")
def test_scaling_of_the_rows_asked_for(tmp_path: Path) -> None:
    points: list[Point] = []
    measure_scaling([600, 300], 16, settings(), tmp_path, points, lambda: None)
    assert [(point.method, point.rows) for point in points] == [
        ("dense", 300), ("svd", 300), ("dense", 600), ("svd", 600),
    ]  # fmt: skip
    for point in points:
        assert point.measured["fit_s"] >= 0
        assert point.measured["lookup"]["ms"] > 0
        assert point.measured["head"]["1"]["ms"] > 0
    report = Report("peers", {}, 16, scaling=points)
    assert re.search(r"^\| svd \| 3\.\d+ \| 300 \| 0\.0 \| \d", report.to_markdown(), re.MULTILINE)
    shown = draw(report)["scaling.svg"].decode()
    assert all(
        f">{title}</text>" in shown for title in ("fitting", "loading", "lookup of 32 x 128 tokens", "head, 1 state")
    )


@pytest.mark.parametrize(("kind", "sizes"), [("fit", [300]), ("lookup", [300]), ("head", [300, 600])])
def test_what_fails_but_in_a_head_is_not_tried_with_more_rows(
    kind: str, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(measurement: Any, job: str, *_: Any) -> tuple[dict[str, Any], str | None]:
        told = json.loads(job)
        return {}, "killed by signal 9" if (told["method"], told["kind"]) == ("svd", kind) else None

    monkeypatch.setattr(running, "run_process", run)
    points: list[Point] = []
    measure_scaling([300, 600], 16, settings(), tmp_path, points, lambda: None)
    assert [point.rows for point in points if point.method == "svd"] == sizes
    assert [point.rows for point in points if point.method == "dense"] == [300, 600]


def test_a_process_of_its_own(tmp_path: Path) -> None:
    bench = Bench(synthetic_table(300, 16), settings(), tmp_path)
    point = bench.measure(METHODS["svd"], 4.0, with_head=False, keep_rows=True)
    assert not point.failures
    assert point.measured["fit_peak_bytes"] is None or 0 <= point.measured["fit_peak_bytes"] < 1 << 30
    assert bench.rows().shape == (300, 16)
    too_small = bench.measure(METHODS["svd"], 0.01, with_head=True, keep_rows=True)
    assert set(too_small.failures) == {"fit"}
    assert too_small.failures["fit"].startswith("does not run here: ")
    assert "BudgetError: bits=0.01 holds no latent" in too_small.failures["fit"]


def test_a_measurement_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    bench = Bench(synthetic_table(300, 16), settings(timeout=0.01), tmp_path)
    point = bench.measure(METHODS["svd"], 4.0, with_head=True, keep_rows=False)
    assert point.failures == {"fit": "took longer than 0.01 s"}
    assert math.isnan(point.bits)


def press_and_stay(test: str) -> dict[str, Any]:
    """A measurement that presses Ctrl-C in the process of the test, and has no end."""
    print(os.getpid(), flush=True)
    os.kill(int(test), signal.SIGINT)
    while True:
        time.sleep(1)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupt_ends_the_measurement(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_process(press_and_stay, str(os.getpid()), tmp_path, 600)
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log.txt").read_text()), 0)


NEVER_READY = """
import os, pathlib, time
parent = os.getppid()
pathlib.Path("importing").touch()
while os.getppid() == parent:
    time.sleep(0.05)
"""
MEASURES = """
import json, pathlib
from benchmarks.peers import processes
if __name__ == "__main__":
    processes.PROCESSES.set_forkserver_preload(["never_ready"])
    processes.run_process(json.loads, "{}", pathlib.Path(), 600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is imported ahead")
def test_an_interrupt_does_not_wait_for_imports(tmp_path: Path) -> None:
    (tmp_path / "never_ready.py").write_text(NEVER_READY)
    (tmp_path / "measures.py").write_text(MEASURES)
    process = subprocess.Popen(
        [sys.executable, "measures.py"], stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the suite runs in the background
    )  # fmt: skip
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert stderr.endswith("KeyboardInterrupt\n")
    assert "never_ready" not in stderr, "what measuring processes are forked from is deaf to it"


def test_a_process_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing; what the one before said is not taken for it."""
    (tmp_path / "log.txt").write_text("KeyError: of the one before")
    (tmp_path / "gone.py").write_text("def measure(job): return {}")
    monkeypatch.syspath_prepend(tmp_path)
    gone = importlib.import_module("gone")
    (tmp_path / "gone.py").unlink()
    assert run_process(gone.measure, "{}", tmp_path, 600) == ({}, "does not run here: exit code 1")
