"""SQuAD v1.1: exact match and F1 of a model that is fine-tuned to find answers in their context."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import AutoModelForQuestionAnswering

from ..errors import EvaluationError
from .data import require
from .finetuning import FineTunedFigures, FineTuningSettings, Metrics, load_start, over_seeds, train_and_predict
from .running import check_counts, longest_input
from .squad_data import Question, find_questions, load_squad
from .squad_spans import Window, best_answer, cut_windows, label_window


if TYPE_CHECKING:
    from .data import Rows


@dataclass(frozen=True)
class SquadSettings(FineTuningSettings):
    """How a model is fine-tuned on SQuAD; the defaults are those of the published code of Bałazy et al. 2021.

    That code takes `doc_stride` for the tokens *between* the starts of windows, as transformers' run_squad did; here
    it is what windows share, as in run_qa, so there are fewer windows of a long context. It cuts questions to 64
    tokens too, which here none are.

    Attributes:
        epochs: Passes over the training data. What is not named here is as in [`FineTuningSettings`].
        learning_rate: AdamW's learning rate at the start; it falls linearly to 0.
        batch_size: Windows of a step.
        max_length: Most tokens of a window: question, context and special ones.
        doc_stride: Tokens of a long context that neighbouring windows share.
        n_best: Starts, and ends, that are tried in a window.
        max_answer_length: Most tokens of an answer.
    """

    epochs: float = 3.0
    learning_rate: float = 3e-5
    batch_size: int = 16
    max_length: int = 384
    doc_stride: int = 128
    n_best: int = 20
    max_answer_length: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(doc_stride=self.doc_stride, n_best=self.n_best, max_answer_length=self.max_answer_length)


def squad(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Rows,
    train: str | os.PathLike[str] | Rows | None = None,
    *,
    config: str | None = None,
    split: str = "validation",
    train_split: str = "train",
    limit: int | None = None,
    settings: SquadSettings | None = None,
) -> FineTunedFigures:
    """Fine-tunes a model on SQuAD v1.1 and evaluates it, once for each seed.

    Of a compressed model the decoder trains and the codes stay, whatever the method; of a dense one the table trains.

    Args:
        model: A folder or a Hub id, dense or compressed, with a fast tokenizer.
        data: What to evaluate on: a folder with `train-v1.1.json` and `dev-v1.1.json`, a file in that format, the Hub
            id of a dataset, or rows with the columns of the Hub's `rajpurkar/squad`.
        train: What to train on, in any of these forms; by default what belongs to the folder or the dataset.
        config: The datasets' configuration.
        split: The dataset's split to evaluate on.
        train_split: The split to train on.
        limit: Train and evaluate on so many questions, from the first on, for a quick look.
        settings: How to train; by default as [`SquadSettings`] says.

    Raises:
        CheckpointError: If there is no such model, or it cannot be loaded.
        EvaluationError: If the data or the model does not fit the task.
    """
    check_counts(limit=limit)
    settings = settings or SquadSettings()
    (evaluated_on, split), (trained_on, train_split) = find_questions(data, train, split, train_split)
    evaluated = load_squad(evaluated_on, config=config, split=split)
    training = load_squad(trained_on, config=config, split=train_split)
    asked, taught = evaluated.questions[:limit], training.questions[:limit]
    require("torchmetrics")  # before anything is trained

    def run(seed: int) -> Metrics:
        start, tokenizer = load_start(
            model, AutoModelForQuestionAnswering, seed=seed, train_decoder=settings.train_decoder
        )
        tokenizer.padding_side = "right"  # positions of answers count from the left
        length = min(settings.max_length, longest_input(start, tokenizer))
        windows = cut_windows(tokenizer, asked, length, settings.doc_stride)
        labelled = [
            label_window(window, taught[window.question])
            for window in cut_windows(tokenizer, taught, length, settings.doc_stride)
        ]
        inputs = [window.inputs for window in windows]
        ((starts, ends, *_),) = train_and_predict(start, tokenizer, labelled, [inputs], settings, seed=seed)
        return score(asked, _answers(asked, windows, starts, ends, settings))

    means, deviations, runs = over_seeds(run, settings.seeds)
    recorded = {**settings.recorded(), "num_train": len(taught), "num_eval": len(asked)}
    return FineTunedFigures(means, deviations, runs, evaluated.source, training.source, recorded)


def _answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    starts: np.ndarray,
    ends: np.ndarray,
    settings: SquadSettings,
) -> list[str]:
    """The answer to each question; starts and ends are logits, (windows, tokens)."""
    of_question: list[list[tuple[Window, np.ndarray, np.ndarray]]] = [[] for _ in questions]
    for window, start, end in zip(windows, starts, ends, strict=True):
        of_question[window.question].append((window, start, end))
    return [
        best_answer(question, each, n_best=settings.n_best, max_answer_length=settings.max_answer_length)
        for question, each in zip(questions, of_question, strict=True)
    ]


def score(questions: Sequence[Question], answers: Sequence[str]) -> Metrics:
    """SQuAD's metrics, in percent: as torchmetrics takes them, after the official script.

    Raises:
        EvaluationError: If there are not as many answers as questions.

    Example:
        >>> question = Question("1", "Who led?", "It was, Rollo.", ("Rollo",), (8,))
        >>> score([question, question], ["the rollo!", "was Rollo"])
        {'exact_match': 50.0, 'f1': 83.33333587646484}
    """
    if len(questions) != len(answers):
        raise EvaluationError(f"there are {len(answers)} answers to {len(questions)} questions: give one for each")
    predicted = [{"id": str(index), "prediction_text": answer} for index, answer in enumerate(answers)]
    gold = [
        {"id": str(index), "answers": {"text": list(question.answers), "answer_start": list(question.starts)}}
        for index, question in enumerate(questions)
    ]
    found = require("torchmetrics.functional.text").squad(predicted, gold)
    return {name: float(value) for name, value in found.items()}
