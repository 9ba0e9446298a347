"""GLUE: the nine tasks (Wang et al. 2019), their metrics, and fine-tuning on them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..errors import EvaluationError
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
from .glue_tasks import GLUE
from .running import check_counts, longest_input


if TYPE_CHECKING:
    from .data import Rows


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
