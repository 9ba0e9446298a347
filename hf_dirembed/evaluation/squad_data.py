"""SQuAD v1.1: questions from the official JSON, from datasets on the Hub, and from memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .data import DatasetSource, file_source, load_rows, read_file


TRAIN_FILE, DEV_FILE = "train-v1.1.json", "dev-v1.1.json"


@dataclass(frozen=True)
class Question:
    """A question whose answer is a span of its context.

    Attributes:
        id: What it is known by.
        text: The question.
        context: The paragraph.
        answers: What people answered, each verbatim in the context.
        starts: The character at which each answer starts.
    """

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions and where they are from."""

    questions: tuple[Question, ...]
    source: DatasetSource


def load_squad(source: Any, *, config: str | None = None, split: str = "validation") -> Questions:
    """Reads SQuAD.

    Args:
        source: A file in the official JSON format, the Hub id of a dataset, or rows, with the columns of the Hub's
            `rajpurkar/squad`. Of SQuAD 2.0 the questions that are marked impossible are left out.
        config: The dataset's configuration.
        split: The dataset's split.

    Raises:
        EvaluationError: If there is no such file, dataset or split, or a question is malformed.

    Example:
        >>> answers = {"text": ["Rollo"], "answer_start": [8]}
        >>> row = {"id": "1", "question": "Who led?", "context": "It was, Rollo.", "answers": answers}
        >>> load_squad([row]).questions
        (Question(id='1', text='Who led?', context='It was, Rollo.', answers=('Rollo',), starts=(8,)),)
    """
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        name, origin = os.fspath(source), file_source(source)
        rows: Iterable[Any] = _read_json(source)
    else:
        rows, name, origin = load_rows(source, config, split)
    questions = tuple(_question(row, name) for row in rows)
    if not questions:
        raise EvaluationError(f"{name} holds no questions: give a file or a dataset that does")
    return Questions(questions, origin)


def find_questions(data: Any, train: Any, split: str, train_split: str) -> tuple[tuple[Any, str], tuple[Any, str]]:
    """What to evaluate on and what to train on, each with its split.

    Raises:
        EvaluationError: If nothing says what to train on.
    """
    if _is_official(data):
        train = Path(data) / TRAIN_FILE if train is None else train
        data = Path(data) / DEV_FILE
    elif train is None:
        if not isinstance(data, (str, os.PathLike)) or os.path.isfile(data):
            raise EvaluationError("a file or rows to evaluate on do not say what to train on: give that as train")
        train = data
    if _is_official(train):
        train = Path(train) / TRAIN_FILE
    return (data, split), (train, train_split)


def _is_official(data: Any) -> bool:
    """Whether it is a folder with the official files."""
    return isinstance(data, (str, os.PathLike)) and (Path(data) / DEV_FILE).is_file()


def _read_json(file: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The questions of an official file as the Hub's dataset has them."""
    try:
        for article in json.loads(read_file(file))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    if asked.get("is_impossible", False):
                        continue
                    answers = {key: [each[key] for each in asked["answers"]] for key in ("text", "answer_start")}
                    yield {**asked, "context": paragraph["context"], "answers": answers}
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{os.fspath(file)} is no SQuAD file ({error!r:.120}): give JSON in the official format of SQuAD v1.1"
        ) from error


def _question(row: Any, name: str) -> Question:
    missing = [
        key for key in ("id", "question", "context", "answers") if not isinstance(row, Mapping) or key not in row
    ]
    if missing:
        columns = sorted(map(str, row)) if isinstance(row, Mapping) else "none"
        raise EvaluationError(
            f"{name} has no column {missing[0]!r}, only {columns}: the columns must be id, question, context, answers"
        )

    answers = row["answers"]
    try:
        spans = list(zip(answers["text"], answers["answer_start"], strict=True))
        wrong = [answer for answer, start in spans if row["context"][start : start + len(answer)] != answer]
        text = row["question"].strip()
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise EvaluationError(f"question {row['id']!r:.80} of {name} is malformed ({error!r:.80}): mend it") from error

    if not spans:
        raise EvaluationError(
            f"question {row['id']!r:.80} of {name} has no answer: give SQuAD v1.1, where all have one, and a split "
            "whose answers are given out"
        )
    if wrong:
        raise EvaluationError(
            f"the answer {wrong[0]!r:.60} to question {row['id']!r:.80} of {name} is not where answer_start says: "
            "mend the file"
        )

    return Question(str(row["id"]), text, row["context"], tuple(answers["text"]), tuple(answers["answer_start"]))
