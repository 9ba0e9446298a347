"""The evaluations by name: what each is called, what it takes, and what it gives, in one form for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.loading import load_model, load_tokenizer, resolve_checkpoint
from ..errors import EvaluationError
from .causal import perplexity
from .data import DatasetSource, load_pairs, load_text
from .finetuning import FineTunedFigures, FineTuningSettings
from .glue import glue
from .glue_tasks import GLUE
from .masked import masked_perplexity
from .results import ReferenceResult, Result
from .running import Figures, find_device, settings_of
from .similarity import POOLINGS, compare_sts, sts
from .squad import SquadSettings, squad


Name = str | os.PathLike[str]


@dataclass(frozen=True)
class Option:
    """A setting of tasks, as the command line has it.

    Attributes:
        name: What the argument of the task's function is called.
        type: What its text is converted with.
        help: What it says.
    """

    name: str
    type: Callable[[str], Any]
    help: str


@dataclass(frozen=True)
class Task:
    """An evaluation.

    Attributes:
        name: What it is called.
        help: What it measures.
        run: Takes model, reference (or None), data and options by name, and gives the result.
        options: What it takes.
    """

    name: str
    help: str
    run: Callable[..., Result]
    options: tuple[Option, ...]


def evaluate(task: str, model: Name, data: Any, reference: Name | None = None, **options: Any) -> Result:
    """Evaluates a model, and the one it is compared with, on a task.

    Args:
        task: One of `TASKS`.
        model: A folder or a Hub id, dense or compressed.
        data: A file in the official format of the task's data, or a dataset on the Hub.
        reference: A folder or a Hub id: what the model is compared with.
        **options: What the task takes; all have defaults but `subset` of `glue`.

    Raises:
        DirEmbedError: If a name is unknown, or task, model, data and options do not fit each other.

    Example:
        >>> evaluate("rouge", "some/model", "pairs.csv")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hf_dirembed.errors.EvaluationError: task 'rouge' is unknown: choose one of mlm-perplexity, ...
    """
    if task not in TASKS:
        raise EvaluationError(f"task {task!r} is unknown: choose one of {', '.join(TASKS)}")
    known = [option.name for option in TASKS[task].options]
    for name in options:
        if name not in known:
            raise EvaluationError(f"{task} takes no {name}: its options are {', '.join(known)}")
    result = TASKS[task].run(model, reference, data, **options)

    # Figures of a part of the data must not be taken for those of all of it.
    limit = options.get("limit")
    return result if limit is None else replace(result, settings={**result.settings, "limit": limit})


def _run_sts(
    model: Name, reference: Name | None, data: Any, *, config: str | None = None, split: str = "test", **options: Any
) -> Result:
    pairs = load_pairs(data, config=config, split=split)
    if reference is None:
        return _result("sts", pairs.source, sts(model, pairs, **options))
    both = compare_sts(model, reference, pairs, **options)
    return _result("sts", pairs.source, both.model, reference, both.reference, agreement=dict(both.agreement))


def _run_perplexity(
    model: Name,
    reference: Name | None,
    data: Any,
    *,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    limit: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Result:
    text = load_text(data, config=config, split=split, column=column)
    figures = [
        perplexity(*_load(each, device), text, max_tokens=limit, **options)
        for each in (model, reference)
        if each is not None
    ]
    return _result("perplexity", text.source, figures[0], reference, *figures[1:])


def _run_masked_perplexity(
    model: Name,
    reference: Name | None,
    data: Any,
    *,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    limit: int | None = None,
    device: str | None = None,
    masking: str = "whole-word",
    **options: Any,
) -> Result:
    if masking not in MASKINGS:
        raise EvaluationError(f"masking={masking!r} is unknown: choose one of {', '.join(MASKINGS)}")
    text = load_text(data, config=config, split=split, column=column)
    options.update(max_tokens=limit, whole_word=masking == "whole-word")

    compressed, tokenizer = _load(model, device)
    figures = masked_perplexity(compressed, tokenizer, text, **options)
    if reference is None:
        return _result("mlm-perplexity", text.source, figures)

    dense, _ = _load(reference, device)
    expected = masked_perplexity(dense, tokenizer, text, **options)
    input_only = masked_perplexity(compressed, tokenizer, text, head="dense", reference=dense, **options)

    result = _result("mlm-perplexity", text.source, figures, reference, expected)
    assert result.reference is not None
    # The reference's own head is the dense one: both of its figures are the same.
    for found, values in ((result.metrics, input_only), (result.reference.metrics, expected)):
        found.update({f"input_only_{name}": getattr(values, name) for name in values.MEASURES})
    return result


def _run_glue(model: Name, reference: Name | None, data: Any, *, subset: str | None = None, **options: Any) -> Result:
    if subset is None:
        raise EvaluationError(f"glue needs a subset: choose one of {', '.join(GLUE)}")
    return _run_fine_tuned("glue", partial(glue, subset=subset), FineTuningSettings, model, reference, data, **options)


def _run_squad(model: Name, reference: Name | None, data: Any, **options: Any) -> Result:
    return _run_fine_tuned("squad", squad, SquadSettings, model, reference, data, **options)


def _run_fine_tuned(
    task: str,
    tune: Callable[..., FineTunedFigures],
    settings: type[FineTuningSettings],
    model: Name,
    reference: Name | None,
    data: Any,
    **options: Any,
) -> Result:
    of_settings = {
        name: options.pop(name) for name in list(options) if name in {each.name for each in fields(settings)}
    }
    options["settings"] = settings(**of_settings)
    figures = tune(model, data=data, **options)
    compared = None
    if reference is not None:
        theirs = tune(reference, data=data, **options)
        compared = ReferenceResult(_name(reference), dict(theirs.metrics), dict(theirs.deviations))
    return Result(
        task=task, dataset=figures.data, metrics=dict(figures.metrics), settings=figures.settings,
        training=figures.training, deviations=dict(figures.deviations), reference=compared,
    )  # fmt: skip


def _result(
    task: str,
    source: DatasetSource,
    figures: Figures,
    reference: Name | None = None,
    expected: Figures | None = None,
    **further: Any,
) -> Result:
    """Makes a result of the figures of a model, and of its reference; these say which of their fields are measures."""
    settings = settings_of(figures)
    del settings["data"]
    if reference is not None and expected is not None:
        measures = {name: getattr(expected, name) for name in expected.MEASURES}
        further["reference"] = ReferenceResult(_name(reference), measures)
    metrics = {name: getattr(figures, name) for name in figures.MEASURES}
    return Result(task=task, dataset=source, metrics=metrics, settings=settings, **further)


def _name(model: Name) -> str:
    """A Hub id, or the name of a folder without what is above it: results are published."""
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)


def _load(model: Name, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = resolve_checkpoint(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise EvaluationError(f"{folder} has no tokenizer: save one beside the model")
    return load_model(folder).to(find_device(device)), tokenizer  # type: ignore[arg-type]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as the command line has them.

    Raises:
        ValueError: If they are no whole numbers.

    Example:
        >>> parse_seeds("0,1,2")
        (0, 1, 2)
    """
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} are no whole numbers: give some, like 0,1,2") from error


MASKINGS = ("whole-word", "token")

_CONFIG = Option("config", str, "The dataset's configuration.")
_SPLIT = Option("split", str, "The dataset's split to evaluate on.")
_COLUMN = Option("column", str, "The dataset's column that holds the text.")
_LIMIT = Option("limit", int, "Take only so many pairs, examples, questions, or tokens of text.")
_MAX_LENGTH = Option("max_length", int, "Most tokens of an input.")
_BATCH_SIZE = Option("batch_size", int, "Inputs at once; in fine-tuning, of a step.")
_DEVICE = Option("device", str, "Where to run.  [default: a GPU where there is one]")
_WINDOW = Option("window", int, "Most tokens that the model sees at once.")
_TEXT = (_CONFIG, _SPLIT, _COLUMN, _LIMIT, _WINDOW)
_TRAINING = (
    Option("train", str, "What to train on, if it does not belong to the data."),
    _CONFIG,
    _SPLIT,
    Option("train_split", str, "The dataset's split to train on."),
    _LIMIT,
    Option("seeds", parse_seeds, "One run for each, like 0,1,2; mean and standard deviation are given."),
    Option("epochs", float, "Passes over the training data."),
    Option("learning_rate", float, "At the start; it falls linearly to 0."),
    Option("weight_decay", float, "Of AdamW."),
    Option("warmup", float, "The share of the steps in which the learning rate rises."),
    _MAX_LENGTH,
    _BATCH_SIZE,
    _DEVICE,
)

TASKS = {
    task.name: task
    for task in (
        Task(
            "mlm-perplexity",
            "perplexity at masked positions; with a reference also with the reference's dense head (input only)",
            _run_masked_perplexity,
            (
                *_TEXT,
                Option("masking", str, f"What is masked: {' or '.join(MASKINGS)}."),
                Option("probability", float, "Of a word, or of a token, to be masked."),
                Option("seed", int, "Of the masks."),
                _BATCH_SIZE,
                _DEVICE,
            ),
        ),
        Task(
            "perplexity",
            "perplexity of a causal language model over windows of text",
            _run_perplexity,
            (*_TEXT, Option("stride", int, "Tokens between the starts of windows."), _BATCH_SIZE, _DEVICE),
        ),
        Task(
            "sts",
            "correlation of the cosine of sentence embeddings with gold similarities",
            _run_sts,
            (
                _CONFIG,
                _SPLIT,
                _LIMIT,
                Option("pooling", str, f"One of {', '.join(POOLINGS)}."),
                Option("prefix", str, "Put before every sentence, like 'query: ' for e5 models."),
                _MAX_LENGTH,
                _BATCH_SIZE,
                _DEVICE,
            ),
        ),
        Task(
            "glue",
            "fine-tuning on one of the nine tasks of GLUE",
            _run_glue,
            (Option("subset", str, f"One of {', '.join(GLUE)}."), *_TRAINING),
        ),
        Task(
            "squad",
            "fine-tuning on SQuAD v1.1",
            _run_squad,
            (
                *_TRAINING,
                Option("doc_stride", int, "Tokens of a long context that neighbouring windows share."),
                Option("n_best", int, "Starts, and ends, of answers that are tried in a window."),
                Option("max_answer_length", int, "Most tokens of an answer."),
            ),
        ),
    )
}
