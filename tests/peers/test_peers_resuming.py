"""A run that was stopped: what it keeps, and how it is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import running
from benchmarks.peers.command import main
from benchmarks.peers.record import read


pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture
def asked(encoder: Path, pairs: Path) -> list[str]:
    return [str(encoder), "--pairs", str(pairs), "--bits", "8,6", "--methods", "svd,direction", "--repeats", "3"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_what_an_interrupted_run_has_measured_is_kept(asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers", *asked, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the suite runs in the background
    )  # fmt: skip
    while not (out / "report.json").exists() or len(read(out).models[0].points) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the measuring process hears it, too
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, "")
    *progress, line = (each for each in stderr.splitlines() if each)
    kept = read(out).num_rows
    assert line == f"peers: interrupted; {kept} rows are kept in {out}: the same command with --resume goes on"
    assert all(": " in each and "Traceback" not in each for each in progress)
    assert sorted(file.name for file in out.iterdir()) == ["items.safetensors", "report.json"]


@pytest.mark.usefixtures("in_process")
def test_resuming_measures_what_is_missing_alone(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, str, float | None]] = []
    whole = running.run_process
    stop_at = 5

    def run(measurement: Any, job: str, work: Path, timeout: float) -> tuple[dict[str, Any], str | None]:
        told = json.loads(job)
        measured.append((told["method"], told["kind"], told["bits"]))
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return whole(measurement, job, work, timeout)

    monkeypatch.setattr(running, "run_process", run)
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out)]) == 130
    assert measured[-1] == ("direction", "fit", 6)
    assert "peers: interrupted; 2 rows are kept" in capsys.readouterr().err
    assert main([*asked, "--out", str(out)]) == 2
    assert f"{out} exists already: go on with it by --resume" in capsys.readouterr().err
    assert main([*asked, "--limit", "4", "--out", str(out), "--resume"]) == 2
    assert f"{out} was begun with limit None, and this is 4: give the same" in capsys.readouterr().err
    before = read(out).models[0].points
    assert main([*asked, "--out", str(out), "--resume"]) == 0
    assert len(measured) == len(set(measured)) + 1, "only the interrupted one is measured again"
    report = json.loads((out / "report.json").read_text())
    (model,) = report["models"]
    assert [(point["method"], point["asked_bits"]) for point in model["points"]] == [
        ("dense", None), ("direction", 8), ("direction", 6), ("svd", 8), ("svd", 6),
    ]  # fmt: skip
    assert read(out).models[0].points[:2] == before
    assert "--resume" not in report["command"]
    assert {file.name for file in out.iterdir()} == {
        "items.safetensors", "quality-encoder.svg", "report.json", "report.md",
    }  # fmt: skip
    done = list(measured)
    assert main([*asked, "--out", str(out), "--resume"]) == 0
    assert measured == done


@pytest.mark.usefixtures("in_process")
def test_scaling_alone_goes_on_too(tmp_path: Path) -> None:
    told = ["--rows", "300", "--dim", "16", "--methods", "svd", "--batches", "1", "--repeats", "3"]
    out = tmp_path / "out"
    assert main([*told, "--out", str(out)]) == 0
    (out / "report.md").unlink()
    assert main([*told, "--out", str(out), "--resume"]) == 0
    assert "| svd | " in (out / "report.md").read_text()
    assert [point.method for point in read(out).scaling] == ["dense", "svd"]


@pytest.mark.usefixtures("in_process")
def test_what_failed_is_tried_again(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = running.run_process, tmp_path / "out"
    monkeypatch.setattr(running, "run_process", lambda *_: ({}, "took longer than 1 s"))
    assert main([*asked, "--out", str(out)]) == 0
    assert "- svd: took longer than 1 s" in (out / "report.md").read_text()
    monkeypatch.setattr(running, "run_process", whole)
    assert main([*asked, "--out", str(out), "--resume"]) == 0
    assert "took longer" not in (out / "report.md").read_text()
    assert len(read(out).models[0].points) == 5


@pytest.mark.usefixtures("in_process")
def test_a_spoiled_report_is_refused_in_one_line(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out)]) == 0
    whole = (out / "report.json").read_text()
    for spoiled in (whole[:100], "[]", '{"command": "peers"}', whole.replace('"points"', '"dots"')):
        (out / "report.json").write_text(spoiled)
        capsys.readouterr()
        assert main([*asked, "--out", str(out), "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out} holds no report to go on with" in line
    (out / "report.json").write_text(whole)
    (out / "items.safetensors").write_bytes(b"no")
    assert main([*asked, "--out", str(out), "--resume"]) == 2
    assert "holds no report to go on with" in capsys.readouterr().err
