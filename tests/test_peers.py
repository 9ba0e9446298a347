"""The benchmark against the methods of other packages: from the command to its report and plots, on tiny models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.peers import __main__ as command
from benchmarks.peers import methods, running, static
from benchmarks.peers.__main__ import main
from benchmarks.peers.methods import Method, Stored, Table
from benchmarks.peers.registry import METHODS
from benchmarks.peers.report import ModelReport, failures, wins
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
def test_scaling_goes_up_to_the_rows_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SIZES", (300, 600, 900))
    points = measure_scaling(600, 16, settings(), tmp_path)
    assert [(point.method, point.rows) for point in points] == [
        ("dense", 300), ("svd", 300), ("dense", 600), ("svd", 600),
    ]  # fmt: skip
    assert all(point.measured["fit_s"] >= 0 and point.measured["lookup"]["ms"] > 0 for point in points)


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


def test_ties_are_no_wins_and_more_bits_are_no_merit() -> None:
    def point(method: str, bits: float, quality: float) -> Point:
        return Point(method, bits, 100, {"bits": bits, "fit_s": bits}, {"file": quality})

    points = [
        point("dense", 32, 0),
        point("transform", 4, -0.5),
        point("transform", 2, -1.0),
        point("svd", 4, 3.0),  # ours
        point("torchao-int4", 4.5, -0.5),  # a tie
        point("torchao-int2", 2.5, -0.9),  # better than 2 bits, and 4 are more than its own
        point("sklearn-svd", 1, 5.0),  # in fewer bits than any of ours
    ]
    model = ModelReport("m", "Spearman", "difference", False, (100, 8), False, {"file": 90}, points)
    better, faster = wins(model)
    assert better == "**torchao-int2 is better than transform on file**: -0.9 in 2.5 bits against -1 in 2 bits"
    assert faster == "Faster than transform in fitting: sklearn-svd"
    model.points = points[:5]
    assert wins(model) == ["No method of another package is better than transform of as many bits or fewer"]


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
    "too few rows": (["--rows", "10"], "--rows"),
    "an existing folder": (["{encoder}", "--out", "{encoder}"], "exists already"),
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
