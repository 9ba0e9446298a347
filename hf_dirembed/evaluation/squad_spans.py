"""Answers as spans of tokens: long contexts cut into overlapping windows, and the best span found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError
from .finetuning import Example
from .squad_data import Question


@dataclass(frozen=True)
class Window:
    """A question with as much of its context as fits.

    Attributes:
        question: Its number among the questions.
        inputs: What the model is given.
        spans: For each token the characters of the context that it stands for; None where it stands for none.
    """

    question: int
    inputs: Example
    spans: tuple[tuple[int, int] | None, ...]


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_length: int, doc_stride: int
) -> list[Window]:
    """Sets each question before its context, and cuts contexts that are too long into overlapping windows.

    Args:
        tokenizer: A fast one.
        questions: What is asked.
        max_length: Most tokens of a window, the question and special ones included.
        doc_stride: How many tokens of the context neighbouring windows share.

    Raises:
        EvaluationError: If the tokenizer is no fast one, or a question leaves too little room for its context.
    """
    if not tokenizer.is_fast:
        raise EvaluationError(f"{type(tokenizer).__name__} is no fast tokenizer: SQuAD needs one, which knows offsets")

    texts = [question.text for question in questions]
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    if longest + special + doc_stride >= max_length:
        raise EvaluationError(
            f"max_length={max_length} leaves less than doc_stride={doc_stride} tokens beside a question of {longest}: "
            "give a larger max_length or a smaller doc_stride"
        )

    encoded = tokenizer(
        texts, [question.context for question in questions], truncation="only_second", max_length=max_length,
        stride=doc_stride, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    numbers, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")

    windows = []
    for index, (number, spans) in enumerate(zip(numbers, offsets, strict=True)):
        in_context = [sequence == 1 for sequence in encoded.sequence_ids(index)]
        kept = tuple(span if inside else None for span, inside in zip(spans, in_context, strict=True))
        windows.append(Window(number, {name: values[index] for name, values in encoded.items()}, kept))
    return windows


def label_window(window: Window, question: Question) -> Example:
    """The window with the tokens at which the first answer starts and ends; the first token where it is not in it.

    Example:
        >>> question = Question("1", "Who?", "It was Rollo.", ("Rollo",), (7,))
        >>> window = Window(0, {"input_ids": [2, 8, 3, 5, 6, 9, 7, 3]},
        ...                 (None, None, None, (0, 2), (3, 6), (7, 12), (12, 13), None))
        >>> label_window(window, question)
        {'input_ids': [2, 8, 3, 5, 6, 9, 7, 3], 'start_positions': 5, 'end_positions': 5}
    """
    start = question.starts[0]
    end = start + len(question.answers[0])
    tokens = [index for index, span in enumerate(window.spans) if span and span[0] < end and span[1] > start]
    spans = [span for span in window.spans if span]
    whole = bool(tokens) and spans[0][0] <= start and spans[-1][1] >= end
    first, last = (tokens[0], tokens[-1]) if whole else (0, 0)
    return {**window.inputs, "start_positions": first, "end_positions": last}


def best_answer(
    question: Question,
    windows: Sequence[tuple[Window, np.ndarray, np.ndarray]],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> str:
    """The span of the context with the highest sum of start and end logit, over all windows of the question.

    Args:
        question: What is asked.
        windows: Each window with the logits of its tokens for start and end; padding may follow.
        n_best: Of the starts, and of the ends, only so many of the highest logits in a window are tried.
        max_answer_length: Most tokens of an answer.

    Returns:
        The answer; nothing where no pair of start and end makes a span.

    Example:
        >>> question = Question("1", "Who?", "It was Rollo.", ("Rollo",), (7,))
        >>> window = Window(0, {}, (None, (0, 2), (3, 6), (7, 12), (12, 13), None))
        >>> start, end = np.array([9.0, 0, 1, 5, 0, 0]), np.array([9.0, 0, 7, 6, 0, 0])
        >>> best_answer(question, [(window, start, end)])
        'Rollo'
    """
    best, answer = -np.inf, ""
    for window, start_logits, end_logits in windows:
        length = len(window.spans)
        for start in np.argsort(-start_logits[:length], kind="stable")[:n_best]:
            for end in np.argsort(-end_logits[:length], kind="stable")[:n_best]:
                first, last = window.spans[start], window.spans[end]
                if first is None or last is None or not 0 <= end - start < max_answer_length:
                    continue
                if (score := start_logits[start] + end_logits[end]) > best:
                    best, answer = score, question.context[first[0] : last[1]]
    return answer
