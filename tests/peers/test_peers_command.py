"""The benchmark of other packages: from the command to its report and plots, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.peers import command, methods, static
from benchmarks.peers.command import main


pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


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


MISTAKES = {
    "no model": ([], "name a MODEL"),
    "no such model": (["{tmp}/nowhere"], "no folder here, and no id of the Hub"),
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
