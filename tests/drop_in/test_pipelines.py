"""Pipelines: what the expanded model answers, and nothing logged or warned."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from tiny import make
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.pipelines import SUPPORTED_TASKS

import hf_dirembed


TEXT = "the cat sat on the [MASK] of a green house"
TASKS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    "fill-mask": ("bert", "AutoModelForMaskedLM", (TEXT,), {}),
    "feature-extraction": ("bert", "AutoModel", (TEXT,), {}),
    "text-classification": ("bert", "AutoModelForSequenceClassification", (TEXT,), {"top_k": None}),
    "token-classification": ("bert", "AutoModelForTokenClassification", (TEXT,), {}),
    "zero-shot-classification": (
        "bert",
        "AutoModelForSequenceClassification",
        (TEXT,),
        {"candidate_labels": ["cat", "dog", "tree"]},
    ),
    "question-answering": (
        "bert",
        "AutoModelForQuestionAnswering",
        (),
        {"question": "the cat sat on", "context": "the dog ran to the tree and the cat sat on a mat"},
    ),
    "text-generation": ("llama-tied", "AutoModelForCausalLM", (TEXT,), {"max_new_tokens": 5, "do_sample": False}),
    "summarization": ("bart", "AutoModelForSeq2SeqLM", (TEXT,), {"max_new_tokens": 5}),
}


def rounded(answer: Any) -> Any:
    """Scores up to rounding, for the expanded model sums in another order."""
    if isinstance(answer, dict):
        return {key: rounded(value) for key, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        return [rounded(value) for value in answer]
    return pytest.approx(float(answer), rel=1e-3, abs=1e-4) if hasattr(answer, "__float__") else answer


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """What transformers logs as a warning, or worse."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    return caplog.records


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(
    task: str, tokenizer: PreTrainedTokenizerFast, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    if task not in SUPPORTED_TASKS:
        pytest.skip("this transformers does not have it any more")
    name, auto, arguments, options = TASKS[task]
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = make(name, auto)
    if task == "zero-shot-classification":
        model.config.id2label = {0: "entailment", 1: "contradiction"}
        model.config.label2id = {"entailment": 0, "contradiction": 1}
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "compressed")
    dense = hf_dirembed.expand(getattr(transformers, auto).from_pretrained(tmp_path / "compressed"))
    for part in (dense, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    expected = pipeline(task, str(tmp_path / "dense"))(*arguments, **options)
    noise = {(record.name, record.getMessage()) for record in records}
    records.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = pipeline(task, str(tmp_path / "compressed"))(*arguments, **options)
    assert rounded(expected) == answer
    # Of the tiny models' own makings, the stock one is warned of, too.
    assert {(record.name, record.getMessage()) for record in records} <= noise


@pytest.mark.parametrize("auto", ["AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM"])
def test_models_of_pipelines_that_are_gone(auto: str) -> None:
    """Their models answer as the expanded ones do."""
    name = "bert" if auto == "AutoModelForQuestionAnswering" else "bart"
    model = make(name, auto)
    with torch.no_grad():
        found = model(**FAMILIES[name].inputs())
        expected = hf_dirembed.expand(model)(**FAMILIES[name].inputs())
    for key in ("start_logits", "end_logits", "logits"):
        if key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
