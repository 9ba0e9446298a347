"""GLUE's data: from the official files, from datasets on the Hub, and from memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers.utils import logging

from ..errors import EvaluationError
from .data import DatasetSource, file_source, load_rows, read_file
from .glue_tasks import GlueTask


Where: TypeAlias = tuple[Any, str | None, str]  # a file, a dataset or rows; its configuration and split

LABEL_COLUMNS = ("label", "gold_label", "Quality", "is_duplicate", "score")
_COLA_COLUMNS = ("source", "label", "star", "sentence")  # the one official file without a header
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LabelledTexts:
    """Examples of a GLUE task.

    Attributes:
        texts: One sequence of sentences, or two of equal length.
        labels: Classes, or scores for regression.
        source: Where they are from.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    source: DatasetSource


def find_sets(
    task: GlueTask, data: Any, train: Any, config: str, split: str | None, train_split: str
) -> tuple[dict[str, Where], Where]:
    """What to evaluate on, by what is appended to the metrics' names, and what to train on.

    Raises:
        EvaluationError: If nothing says what to train on.
    """
    folder = _official_folder(task, data)
    if folder is not None:
        sets: dict[str, Where] = {suffix: (folder / file, None, "") for suffix, _, file in task.sets}
        train = folder / "train.tsv" if train is None else train
    elif not isinstance(data, (str, os.PathLike)) or os.path.isfile(data):
        sets = {"": (data, None, "")}
        if train is None:
            raise EvaluationError("a file or rows to evaluate on do not say what to train on: give that as train")
    else:
        names = task.sets if split is None else (("", split, ""),)
        sets = {suffix: (data, config, name) for suffix, name, _ in names}
        train = data if train is None else train

    if (folder := _official_folder(task, train)) is not None:
        train = folder / "train.tsv"
    return sets, (train, config, train_split)


def _official_folder(task: GlueTask, data: Any) -> Path | None:
    """The task's folder in an official download: `data` itself or its subfolder."""
    if not isinstance(data, (str, os.PathLike)):
        return None
    return next(
        (folder for folder in (Path(data), Path(data) / task.folder) if (folder / "train.tsv").is_file()), None
    )


def load_labelled(
    task: GlueTask, source: Any, config: str | None, split: str, *, limit: int | None = None
) -> LabelledTexts:
    """Reads examples of a GLUE task.

    Raises:
        EvaluationError: If there is no such file, dataset or split, a column is missing, or a label is none.

    Example:
        >>> from hf_dirembed.evaluation.glue_tasks import GLUE
        >>> rows = [{"question": "Who?", "sentence": "Me.", "label": "entailment"}]
        >>> examples = load_labelled(GLUE["qnli"], rows, None, "train")
        >>> examples.texts, examples.labels
        ((('Who?',), ('Me.',)), (0,))
    """
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        name, origin = os.fspath(source), file_source(source)
        rows: Iterable[Any] = _read_tsv(task, source)
    else:
        rows, name, origin = load_rows(source, config, split)

    columns: list[list[str]] = [[] for _ in task.columns]
    labels: list[float] = []
    for number, row in enumerate(rows, start=1):
        if len(labels) == limit:
            break
        for column, aliases in zip(columns, task.columns, strict=True):
            column.append(_sentence(row, aliases, number, name))
        labels.append(_label(row, task.labels, number, name))

    if not labels:
        raise EvaluationError(f"{name} holds no examples: give a file or a dataset that does")
    return LabelledTexts(tuple(map(tuple, columns)), tuple(labels), origin)


def _read_tsv(task: GlueTask, file: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows of a file in the official format, which quotes nothing."""
    lines = [line.split("\t") for line in read_file(file).split("\n") if line]
    header = lines[0] if lines else []

    if all(set(names) & set(header) for names in (*task.columns, LABEL_COLUMNS)):
        lines = lines[1:]
        whole = [line for line in lines if len(line) >= len(header)]
        if len(whole) < len(lines):  # as GLUE's own QQP has some
            logger.warning(f"{os.fspath(file)}: {len(lines) - len(whole)} rows with too few columns are left out")
        return [dict(zip(header, line, strict=False)) for line in whole]

    # Without a header the columns are in a fixed order.
    plain = (*(names[0] for names in task.columns), LABEL_COLUMNS[0])
    columns = _COLA_COLUMNS if task.folder == "CoLA" and len(header) == len(_COLA_COLUMNS) else plain
    for number, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise EvaluationError(
                f"row {number} of {os.fspath(file)} has {len(line)} columns: the columns must be "
                f"{', '.join(columns)}, in this order or named by a header"
            )

    return [dict(zip(columns, line, strict=True)) for line in lines]


def _sentence(row: Any, aliases: Sequence[str], number: int, name: str) -> str:
    sentence = _value(row, aliases, name)
    if not isinstance(sentence, str):
        raise EvaluationError(f"row {number} of {name} holds {sentence!r:.80} where text is due: mend the row")
    return sentence


def _label(row: Any, classes: Sequence[str], number: int, name: str) -> float:
    value = _value(row, LABEL_COLUMNS, name)
    if value in classes:
        return classes.index(value)
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label) or (classes and label not in range(len(classes))):
        expected = f"one of {', '.join(classes)} or their numbers from 0" if classes else "a finite number"
        hint = ", and -1 stands for labels that are not given out: choose another split" if label == -1 else ""
        raise EvaluationError(f"row {number} of {name} has the label {value!r:.80}: it must be {expected}{hint}")
    return int(label) if classes else label


def _value(row: Any, aliases: Sequence[str], name: str) -> Any:
    found = next((alias for alias in aliases if alias in row), None) if isinstance(row, Mapping) else None
    if found is None:
        columns = sorted(map(str, row)) if isinstance(row, Mapping) else "none"
        raise EvaluationError(f"{name} has no column {' or '.join(map(repr, aliases))}, only {columns}: add it")
    return row[found]
