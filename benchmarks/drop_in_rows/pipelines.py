"""Pipelines of all tasks, and SentenceTransformer, beside the expanded model."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from drop_in_subject import NEW_TOKENS, PROMPT, SENTENCES, Skip, Subject, close, exact, row
from transformers.pipelines import SUPPORTED_TASKS

import hf_dirembed


HEADS = {
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "zero-shot-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
ANSWERS_CLOSE = 1e-3


def headed(subject: Subject, auto: str) -> Path:
    """A folder with the compressed model and the expanded one, with the same new head."""
    folder = subject.work / auto
    if not folder.exists():
        torch.manual_seed(0)
        model = subject.load(auto=getattr(transformers, auto))
        if auto == "AutoModelForSequenceClassification":
            model.config.id2label, model.config.label2id = {0: "entailment", 1: "other"}, {"entailment": 0, "other": 1}
        for name, each in (("compressed", lambda: model), ("stock", lambda: hf_dirembed.expand(model))):
            each().save_pretrained(folder / name)
            subject.tokenizer.save_pretrained(folder / name)
    return folder


def said(call: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What a call answers, and of what it and transformers warn."""
    messages: set[str] = set()
    logger, handler = logging.getLogger("transformers"), logging.Handler()
    handler.emit = lambda record: messages.add(record.getMessage())  # type: ignore[method-assign]
    level, others = logger.level, logger.handlers[:]
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = call()
    finally:
        logger.handlers[:] = others
        logger.setLevel(level)
    return answer, messages | {str(each.message) for each in caught}


def differences(found: Any, expected: Any) -> list[float]:
    """Of the numbers in two answers, which are otherwise the same."""
    if isinstance(found, float):
        return [abs(found - expected)]
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), f"{found} is not {expected}"
        return [each for key in found for each in differences(found[key], expected[key])]
    if isinstance(found, (list, tuple)):
        assert len(found) == len(expected), f"{found} is not {expected}"
        return [each for pair in zip(found, expected, strict=True) for each in differences(*pair)]
    assert found == expected, f"{found!r} is not {expected!r}"
    return []


def pipeline(task: str, folder: Path, *arguments: Any, **options: Any) -> str:
    answers, warned = [], []
    for name in ("stock", "compressed"):
        pipe = partial(transformers.pipeline, task, str(folder / name))
        answer, messages = said(lambda pipe=pipe: pipe()(*arguments, **options))  # type: ignore[misc]
        answers.append(answer)
        warned.append({message.replace("DirEmbed", "").replace(str(folder / name), "") for message in messages})
    assert warned[1] <= warned[0], f"warns: {warned[1] - warned[0]}"
    largest = max(differences(*answers), default=0.0)
    assert largest <= ANSWERS_CLOSE, f"numbers differ by {largest:.1e}"
    return f"the expanded model's answer, numbers within {largest:.0e}; no warning of its own"


@row("pipeline", "text-generation", "causal")
def text_generation(subject: Subject) -> str:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return pipeline("text-generation", subject.work, PROMPT, **options)


@row("pipeline", "feature-extraction", "encoder")
def feature_extraction(subject: Subject) -> str:
    return pipeline("feature-extraction", subject.work, SENTENCES[1])


def with_head(task: str, subject: Subject) -> str:
    folder = headed(subject, HEADS[task])
    if task not in SUPPORTED_TASKS:
        models = (subject.load(folder / name, getattr(transformers, HEADS[task])) for name in ("compressed", "stock"))
        return f"this transformers has no such pipeline; its model: {close(*map(subject.answer, models))}"
    options: dict[str, Any] = {}
    sentence = SENTENCES[1]
    if task == "fill-mask":
        sentence = sentence.replace("harbour", subject.tokenizer.mask_token)
    elif task == "zero-shot-classification":
        options = {"candidate_labels": ["weather", "food", "music"]}
    elif task == "text-classification":
        options = {"top_k": None}
    return pipeline(task, folder, sentence, **options)


for name in HEADS:
    row("pipeline", f"{name}, with a new head", "encoder")(partial(with_head, name))


@row("SentenceTransformer", "load, encode, save, reload", "encoder")
def sentence_transformer(subject: Subject) -> str:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise Skip("sentence_transformers is not installed")
    from sentence_transformers import SentenceTransformer

    ours, stock = (SentenceTransformer(str(subject.work / name), device="cpu") for name in ("compressed", "stock"))
    found = ours.encode(SENTENCES, convert_to_tensor=True)
    ours.save_pretrained(str(subject.work / "sentences"))
    again = SentenceTransformer(str(subject.work / "sentences"), device="cpu")
    modules = [[type(module).__name__ for module in each] for each in (ours, stock, again)]
    assert modules[0] == modules[1] == modules[2], modules
    reloaded = exact(again.encode(SENTENCES, convert_to_tensor=True), found)
    expected = stock.encode(SENTENCES, convert_to_tensor=True)
    return f"{close(found, expected)}; reloaded {reloaded}; modules {', '.join(modules[0])}"
