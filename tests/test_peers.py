"""The benchmark against the methods of other packages: from the command to its report and plots, on tiny models."""

from __future__ import annotations

import contextlib
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
import torch
from families import FAMILIES
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.peers import command, methods, running, static
from benchmarks.peers.command import main
from benchmarks.peers.methods import Method, Stored, Table
from benchmarks.peers.noise import difference
from benchmarks.peers.plots import draw
from benchmarks.peers.record import read
from benchmarks.peers.registry import METHODS
from benchmarks.peers.report import ModelReport, Report, compare, comparison_parts, failures
from benchmarks.peers.running import Bench, Point, Settings, measure_scaling, synthetic_table
from hf_dirembed import BudgetError


pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

PAIRS = """the cat sat on a mat,a cat on the mat,4.5
the house,a green tree,0.5
a dog ran to the house,the dog ran,4.0
green,blue,2.0
the cat,a b c d e,0.0
"""


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return tmp_path / "pairs.csv"


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**{**FAMILIES["bert"].arguments, "vocab_size": 400, "initializer_range": 0.3})
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def causal(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    FAMILIES["llama-tied"].make("AutoModelForCausalLM").save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures without processes: starting one takes seconds."""

    def run(measurement: Any, job: str, work: Path, timeout: float) -> tuple[dict[str, Any], str | None]:
        try:
            return json.loads(json.dumps(measurement(job))), None
        except BudgetError as error:
            return {}, str(error)

    monkeypatch.setattr(running, "run_process", run)


def settings(**changed: Any) -> Settings:
    given = {"methods": ["svd"], "bits": (4.0,), "timeout": 60, "repeats": 3, "batches": (1,)}
    return Settings(**{**given, "progress": lambda line: None, **changed})


@pytest.mark.usefixtures("in_process")
def test_a_run_from_the_command_to_the_plot(
    encoder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A method at a budget that it meets and at one too small, and one without its package."""
    found = methods.find_spec
    monkeypatch.setattr(methods, "find_spec", lambda name: None if name == "tltorch" else found(name))
    out = tmp_path / "out"
    told = ["--pairs", pairs, "--bits", "8,0.01", "--methods", "svd,tltorch-tt", "--repeats", 3, "--out", out]
    assert main([str(encoder), *map(str, told)]) == 0
    report = json.loads((out / "report.json").read_text())
    (model,) = report["models"]
    dense, fitted, too_small, *missing = model["points"]
    assert dense["quality"] == {"pairs.csv": 0}
    assert dense["measured"]["bits"] == 32
    assert 7 < fitted["measured"]["bits"] <= 8
    assert fitted["measured"]["file_bytes"] >= fitted["measured"]["bits"] * 400 * 32 / 8
    assert fitted["measured"]["lookup"]["ratio"] > 0
    assert -200 <= fitted["quality"]["pairs.csv"] != 0
    assert "head" not in fitted["measured"], "an encoder has none"
    assert too_small["failures"]["fit"].startswith("bits=0.01 holds no latent")
    shown = (out / "report.md").read_text()
    assert shown == capfd.readouterr().out.removesuffix("\n")
    assert len(missing) == 2
    assert "- tltorch-tt: needs tltorch: pip install 'hf_dirembed[benchmarks]'\n" in shown
    assert re.search(r"^\| svd \| 7\.\d+ \| 0\.01 \| [+-]\d", shown, re.MULTILINE)
    assert str(tmp_path) not in shown
    assert ">svd</text>" in (out / "quality-encoder.svg").read_text()


def test_model2vec_takes_the_whole_encoder(
    encoder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [str(encoder), "--pairs", str(pairs), "--methods", "model2vec", "--repeats", "3"]
    monkeypatch.setattr(command, "run_process", lambda run, job, *_: (json.loads(json.dumps(run(job))), None))
    monkeypatch.setattr(command, "measure_subject", lambda *_: [])
    if static.missing_packages() is None:
        assert main([*told, "--out", str(tmp_path / "out")]) == 0
        (model,) = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
        assert -100 <= model["static"]["quality"]["pairs.csv"] <= 100
        assert 0 < model["static"]["model_bytes"] < model["static"]["dense_model_bytes"]
        assert "**model2vec** is another kind of thing" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.setattr(static, "find_spec", lambda name: None)
    assert main([*told, "--out", str(tmp_path / "without")]) == 0
    shown = (tmp_path / "without" / "report.md").read_text()
    assert "model2vec: needs model2vec and skeletoken: pip install 'hf_dirembed[benchmarks]'" in shown


@pytest.mark.usefixtures("in_process")
def test_a_language_model_with_its_head(causal: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and the dog ran to the green house in a tree of blue . " * 20)
    out = tmp_path / "out"
    told = ["--text", text, "--calibrate", text, "--bits", 9, "--methods", "transform,direction", "--batches", "1,2"]
    assert main([str(causal), *map(str, told), "--repeats", "3", "--plots", "png", "--out", str(out)]) == 0
    (model,) = json.loads((out / "report.json").read_text())["models"]
    assert model["tied"]
    assert [point["method"] for point in model["points"]] == ["dense", "transform", "direction"]
    for point in model["points"]:
        assert set(point["measured"]["head"]) == {"1", "2"}
        assert 0 < point["quality"]["text.txt"] < math.inf
    assert model["points"][0]["quality"]["text.txt"] == 1
    assert (out / "quality-causal.png").read_bytes().startswith(b"\x89PNG")


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


GOLD = torch.arange(200.0)


def cosines(error: float, seed: int = 0) -> list[float]:
    """Cosines that follow the gold scores but for an error."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    return ((GOLD + 200 * error * noise) / 200).tolist()


def encoder_report(points: dict[tuple[str, float], list[float]]) -> ModelReport:
    """Of methods with these cosines at these bits."""
    found = [
        Point(method, bits, 100, {"bits": bits, "fit_s": bits}, {"file": -1.0}, items={"file": items})
        for (method, bits), items in {("dense", 32): GOLD.tolist(), **points}.items()
    ]
    base = {"file": GOLD.tolist()}
    return ModelReport("m", "Spearman x 100", "difference", False, (100, 8), False, {"file": 90}, found, base=base)


def test_a_difference_within_the_noise_is_said_to_be_that() -> None:
    model = encoder_report(
        {
            ("transform", 4): cosines(0.3),
            ("transform", 2): cosines(0.6),
            ("svd", 4): cosines(0),  # ours
            ("torchao-int8", 8): cosines(0.3),  # a tie
            ("torchao-int4", 4.5): cosines(0.31, seed=1),
            ("torchao-int3", 3.5): cosines(0.1),  # against 2 bits, as 4 are more than its own
            ("torchao-int2", 2.5): cosines(1.5),
            ("sklearn-svd", 1): cosines(0),  # in fewer bits than any of ours
        }
    )
    model.comparisons = compare(model)
    found = {each.method: (each.against, each.verdict) for each in model.comparisons}
    assert found == {
        "torchao-int8": (4, "within the noise"),
        "torchao-int4": (4, "within the noise"),
        "torchao-int3": (2, "better"),
        "torchao-int2": (2, "worse"),
    }
    intro, shown, faster = comparison_parts(model)
    assert "the 95% interval of a paired bootstrap over the 200 pairs (2,000 draws)" in intro
    assert re.search(r"^\| torchao-int4 .* \| [+-][\d.]+ \| -[\d.]+ to \+[\d.]+ \| within the noise \|$", shown, re.M)
    assert re.search(r"^\| torchao-int3 .* \| \+[\d.]+ \| \+[\d.]+ to \+[\d.]+ \| \*\*better\*\* \|$", shown, re.M)
    assert faster == "- Faster than transform in fitting: sklearn-svd"


def test_nothing_to_compare_with() -> None:
    assert comparison_parts(encoder_report({("torchao-int4", 4): cosines(0)})) == []
    model = encoder_report({("transform", 4): cosines(0.3), ("torchao-int2", 2.5): cosines(0.3)})
    model.comparisons = compare(model)
    said, faster = comparison_parts(model)
    assert said == "No method of another package has as many bits as transform or more."
    assert faster == "- Faster than transform in fitting: torchao-int2"


def test_the_interval_of_perplexities_is_that_of_the_windows_losses() -> None:
    """Against the normal distribution, which the mean of so many losses has."""
    seeded = torch.Generator().manual_seed(0)
    dense = 100 + 10 * torch.randn(400, generator=seeded)
    ours, theirs = dense + 5, dense + 5 + 4 * torch.randn(400, generator=seeded)
    counts = torch.full((400,), 50.0)
    found, interval = difference("perplexity", *(each.tolist() for each in (theirs, ours, dense, counts)))
    ratio = math.exp(5 / 50)
    by = (theirs - ours).double()
    assert found == pytest.approx(ratio * (math.exp(by.mean() / 50) - 1))
    spread = 1.96 * ratio * float(by.std()) / 50 / 400**0.5
    assert interval == pytest.approx((found - spread, found + spread), abs=0.15 * spread)
    assert difference("perplexity", [3.0], [2.0], [1.0], [1.0])[1] is None


def test_a_failure_is_told_once() -> None:
    points = [Point("tltorch-tt", bits, 100, {"head": None}, {}, {"lookup": "killed by signal 9"}) for bits in (4, 2)]
    assert failures(points) == [
        "tltorch-tt, lookup: killed by signal 9",
        "tltorch-tt, head: its package has none over this table",
    ]


MISTAKES = {
    "no model": ([], "name a MODEL"),
    "no such model": (["{tmp}/nowhere"], "neither a folder"),
    "no data": (["{encoder}"], "give --pairs"),
    "no such data": (["{encoder}", "--pairs", "{tmp}/no.csv"], "no.csv"),
    "no such method": (["{encoder}", "--methods", "svd,magic"], "'magic' is no method: choose among dense, transform"),
    "no such budget": (["{encoder}", "--bits", "4,-1"], "give some like 4,2"),
    "no rows": (["--rows", "10000,0"], "give some like 4,2"),
    "no such calibration text": (["{encoder}", "--calibrate", "{tmp}/no.txt"], "no.txt"),
    "an existing folder": (["{encoder}", "--out", "{encoder}"], "exists already: remove it, or"),
    "nothing to go on with": (["{encoder}", "--out", "{encoder}", "--resume"], "holds no report to go on with"),
    "one name twice": (["{encoder}", "--pairs", "a/pairs.csv", "--pairs", "b/pairs.csv"], "two files are called"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[name]
    before = sorted(tmp_path.rglob("*"))
    filled = [each.format(tmp=tmp_path, encoder=encoder) for each in arguments]
    assert main(["--out", str(tmp_path / "out"), *filled]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    *progress, line = shown.err.splitlines()
    assert line.startswith("peers: ")
    assert expected in line
    assert all("the dense model" in each for each in progress)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def asked(encoder: Path, pairs: Path) -> list[str]:
    return [str(encoder), "--pairs", str(pairs), "--bits", "8,6", "--methods", "svd,direction", "--repeats", "3"]


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Presses Ctrl-C as a terminal does, so that the measuring process hears it, too; what the run then says.

    Once more if nothing happens: Python drops an exception that is raised in a destructor or a callback.
    """
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=60)
    process.kill()
    raise AssertionError("it hears no Ctrl-C")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_what_an_interrupted_run_has_measured_is_kept(asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers", *asked, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the suite runs in the background
    )  # fmt: skip
    while not (out / "report.json").exists() or len(read(out).models[0].points) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    stdout, stderr = interrupt(process)
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
