"""The results file: what is merged, what is refused, and that it is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hf_dirembed.evaluation import DatasetSource, EvaluationError, ReferenceResult, Result, load_results, save_result
from hf_dirembed.evaluation.results import RESULTS_NAME


RESULT = Result(
    task="glue",
    dataset=DatasetSource("glue", "sst2", "validation", revision="0" * 40),
    metrics={"accuracy": 0.9},
    settings={"epochs": 3.0, "seeds": [0, 1]},
    training=DatasetSource("train.tsv", sha256="1" * 64),
    deviations={"accuracy": 0.01},
    reference=ReferenceResult("me/dense", {"accuracy": 0.92}, {"accuracy": 0.02}),
    arguments=("evaluate", "out"),
)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_results(tmp_path) == []
    save_result(tmp_path, RESULT)
    assert load_results(tmp_path) == [RESULT]
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS_NAME]
    assert RESULT.difference == {"accuracy": pytest.approx(-0.02)}
    assert {"python", "hf_dirembed", "torch"} <= RESULT.versions.keys()


def test_the_same_measurement_replaces_and_another_adds(tmp_path: Path) -> None:
    others = [
        replace(RESULT, task="sts"),
        replace(RESULT, dataset=replace(RESULT.dataset, split="test")),
        replace(RESULT, settings={"epochs": 2.0, "seeds": [0, 1]}),
    ]
    for result in (RESULT, *others):
        save_result(tmp_path, result)
    again = replace(RESULT, metrics={"accuracy": 0.8}, date="2030-01-01T00:00:00+00:00", reference=None)
    save_result(tmp_path, again)
    assert load_results(tmp_path) == [again, *others]


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    save_result(tmp_path, replace(RESULT, metrics={"perplexity": math.inf, "nll": 800.0}))
    (found,) = load_results(tmp_path)
    assert found.metrics == {"perplexity": None, "nll": 800.0}
    assert "Infinity" not in (tmp_path / RESULTS_NAME).read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2, "results": []}', '{"format": 1, "results": [{}]}'])
def test_refuses_a_file_that_is_none_and_leaves_it(content: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS_NAME).write_text(content)
    for attempt in (lambda: load_results(tmp_path), lambda: save_result(tmp_path, RESULT)):
        with pytest.raises(EvaluationError, match=RESULTS_NAME):
            attempt()
    assert (tmp_path / RESULTS_NAME).read_text() == content


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_result(tmp_path, RESULT)
    before = (tmp_path / RESULTS_NAME).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluationError, match="No space left"):
        save_result(tmp_path, replace(RESULT, task="sts"))
    assert (tmp_path / RESULTS_NAME).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS_NAME]
    assert json.loads(before)["format"] == 1
