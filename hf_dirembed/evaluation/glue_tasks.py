"""GLUE's nine tasks (Wang et al. 2019) and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .data import require
from .finetuning import Metrics


def _accuracy(predicted: np.ndarray, gold: np.ndarray) -> Metrics:
    return {"accuracy": float(require("sklearn.metrics").accuracy_score(gold, predicted))}


def _accuracy_and_f1(predicted: np.ndarray, gold: np.ndarray) -> Metrics:
    f1 = require("sklearn.metrics").f1_score(gold, predicted, zero_division=0.0)
    return {**_accuracy(predicted, gold), "f1": float(f1)}


def _matthews(predicted: np.ndarray, gold: np.ndarray) -> Metrics:
    return {"matthews_correlation": float(require("sklearn.metrics").matthews_corrcoef(gold, predicted))}


def _correlations(predicted: np.ndarray, gold: np.ndarray) -> Metrics:
    stats = require("scipy.stats")
    found = {"pearson": stats.pearsonr(predicted, gold), "spearman": stats.spearmanr(predicted, gold)}
    return {name: float(result.statistic) for name, result in found.items()}


@dataclass(frozen=True)
class GlueTask:
    """One of the nine tasks.

    Attributes:
        folder: Its folder in the official download.
        columns: The sentences' columns: the names in the Hub's dataset first, then in the official files.
        labels: Names of the classes, in the order of the Hub's dataset; empty for regression.
        metrics: The official metrics of predicted against gold labels.
        sets: What it is evaluated on: what to append to the metrics' names, the Hub's split, the official file.
    """

    folder: str
    columns: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metrics: Callable[[np.ndarray, np.ndarray], Metrics]
    sets: tuple[tuple[str, str, str], ...] = (("", "validation", "dev.tsv"),)

    def score(self, logits: np.ndarray, gold: Sequence[float]) -> Metrics:
        """The metrics of logits, (examples, classes), or (examples, 1) for regression."""
        predicted = logits.argmax(axis=-1) if self.labels else logits[:, 0]
        return self.metrics(predicted, np.asarray(gold))


_PAIR = (("sentence1",), ("sentence2",))
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_SETS = (
    ("", "validation_matched", "dev_matched.tsv"),
    ("_mismatched", "validation_mismatched", "dev_mismatched.tsv"),
)
GLUE = {
    "cola": GlueTask("CoLA", (("sentence",),), ("unacceptable", "acceptable"), _matthews),
    "sst2": GlueTask("SST-2", (("sentence",),), ("negative", "positive"), _accuracy),
    "mrpc": GlueTask(
        "MRPC",
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        ("not_equivalent", "equivalent"),
        _accuracy_and_f1,
    ),
    "stsb": GlueTask("STS-B", _PAIR, (), _correlations),
    "qqp": GlueTask("QQP", (("question1",), ("question2",)), ("not_duplicate", "duplicate"), _accuracy_and_f1),
    "mnli": GlueTask(
        "MNLI",
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("entailment", "neutral", "contradiction"),
        _accuracy,
        _MNLI_SETS,
    ),
    "qnli": GlueTask("QNLI", (("question",), ("sentence",)), _ENTAILMENT, _accuracy),
    "rte": GlueTask("RTE", _PAIR, _ENTAILMENT, _accuracy),
    "wnli": GlueTask("WNLI", _PAIR, ("not_entailment", "entailment"), _accuracy),
}
