"""GLUE: the nine tasks (Wang et al. 2019), their metrics, and fine-tuning on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from .data import EvaluationError, require
from .finetuning import (
    Example,
    FineTunedFigures,
    FineTuningSettings,
    Metrics,
    load_start,
    over_seeds,
    train_and_predict,
)
from .glue_data import LabelledTexts, find_sets, load_labelled
from .running import check_counts, longest_input


if TYPE_CHECKING:
    from .data import Rows


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


def glue(
    model: str | os.PathLike[str],
    subset: str,
    data: str | os.PathLike[str] | Rows,
    train: str | os.PathLike[str] | Rows | None = None,
    *,
    config: str | None = None,
    split: str | None = None,
    train_split: str = "train",
    limit: int | None = None,
    settings: FineTuningSettings | None = None,
) -> FineTunedFigures:
    """Fine-tunes a model on a GLUE task and evaluates it, once for each seed.

    Of a compressed model the decoder trains and the codes stay, whatever the method; of a dense one the table trains.

    Args:
        model: A folder or a Hub id, dense or compressed.
        subset: One of `GLUE`.
        data: What to evaluate on: the folder of the official download (its files for evaluation and training are
            known then); a TSV file in the official format, or without a header and of the columns sentence(s), label;
            the Hub id of a dataset; or rows with the columns of the Hub's `nyu-mll/glue`.
        train: What to train on, in any of these forms; by default what belongs to the folder or the dataset.
        config: The datasets' configuration; by default `subset`.
        split: The dataset's split to evaluate on; by default its validation split, both of them for `mnli`.
        train_split: The split to train on.
        limit: Train and evaluate on so many examples, from the first on, for a quick look.
        settings: How to train; by default as [`FineTuningSettings`] says.

    Raises:
        CheckpointError: If there is no such model, or it cannot be loaded.
        EvaluationError: If the task is unknown, or the data or the model does not fit it.
    """
    if subset not in GLUE:
        raise EvaluationError(f"subset={subset!r} is no task of GLUE: choose one of {', '.join(GLUE)}")
    check_counts(limit=limit)
    task, settings = GLUE[subset], settings or FineTuningSettings()
    sets, trained_on = find_sets(task, data, train, config or subset, split, train_split)
    evaluated = {suffix: load_labelled(task, *where, limit=limit) for suffix, where in sets.items()}
    training = load_labelled(task, *trained_on, limit=limit)

    def run(seed: int) -> Metrics:
        start, tokenizer = load_start(
            model, AutoModelForSequenceClassification, seed=seed, train_decoder=settings.train_decoder,
            num_labels=len(task.labels) or 1,
            problem_type="single_label_classification" if task.labels else "regression",
        )  # fmt: skip
        length = min(settings.max_length, longest_input(start, tokenizer))
        examples = [_examples(tokenizer, each, length) for each in evaluated.values()]
        labelled = zip(_examples(tokenizer, training, length), training.labels, strict=True)
        logits = train_and_predict(
            start,
            tokenizer,
            [{**inputs, "labels": label} for inputs, label in labelled],
            examples,
            settings,
            seed=seed,
        )
        scores = zip(evaluated.items(), logits, strict=True)
        return {
            name + suffix: value
            for (suffix, texts), (found, *_) in scores
            for name, value in task.score(found, texts.labels).items()
        }

    means, deviations, runs = over_seeds(run, settings.seeds)
    first = next(iter(evaluated.values()))
    counts = {"num_train": len(training.labels), "num_eval": sum(len(each.labels) for each in evaluated.values())}
    recorded = {"subset": subset, **settings.recorded(), **counts}
    return FineTunedFigures(means, deviations, runs, first.source, training.source, recorded)


def _examples(tokenizer: PreTrainedTokenizerBase, texts: LabelledTexts, max_length: int) -> list[Example]:
    encoded = tokenizer(*map(list, texts.texts), truncation=True, max_length=max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
