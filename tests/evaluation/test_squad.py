"""SQuAD: windows, spans and scores against brute force, a task that a tiny model learns, and broken data."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_dirembed.evaluation import EvaluationError, SquadSettings, squad
from hf_dirembed.evaluation.squad import score
from hf_dirembed.evaluation.squad_data import Question, load_squad
from hf_dirembed.evaluation.squad_spans import best_answer, cut_windows, label_window


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "house", "tree", "of", "and"]


def make_questions(number: int, words: int, seed: int) -> list[dict[str, Any]]:
    """Which colour is in it?"""
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        context = draw.choices(WORDS, k=words)
        answer = draw.choice(["green", "blue"])
        context.insert(draw.randrange(words), answer)
        text = " ".join(context)
        answers = {"text": [answer], "answer_start": [text.index(answer)]}
        rows.append({"id": str(index), "question": "a house", "context": text, "answers": answers})
    return rows


def write_official(file: Path, rows: list[dict[str, Any]]) -> Path:
    def asked(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        return {**row, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}

    paragraphs = [{"context": row["context"], "qas": [asked(row)]} for row in rows]
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return file


@pytest.mark.parametrize(("start", "padding_side"), [("dense", "right"), ("compressed", "left")])
def test_learns_where_the_answer_is_also_in_long_contexts(
    start: str, padding_side: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(start), tmp_path / "model")
    AutoTokenizer.from_pretrained(folder, padding_side=padding_side).save_pretrained(folder)
    write_official(tmp_path / "train-v1.1.json", make_questions(100, 12, 0))
    write_official(tmp_path / "dev-v1.1.json", make_questions(30, 30, 1))
    options = {
        "learning_rate": 5e-3,
        "batch_size": 8,
        "max_length": 24,
        "doc_stride": 6,
        "seeds": (0,),
        "device": "cpu",
    }
    found = squad(folder, tmp_path, settings=SquadSettings(epochs=5, **options))
    assert found.metrics["exact_match"] > 90
    assert found.metrics["f1"] >= found.metrics["exact_match"]
    assert (found.settings["num_train"], found.settings["num_eval"]) == (100, 30)
    untrained = squad(folder, tmp_path, limit=10, settings=SquadSettings(epochs=1e-6, **options))
    assert untrained.metrics["exact_match"] < 60
    assert untrained.settings["num_eval"] == 10


def test_windows_cover_the_context_and_hold_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = load_squad(make_questions(20, 40, 2)).questions
    windows = cut_windows(tokenizer, questions, 24, 6)
    assert len(windows) > 2 * len(questions)
    for number, question in enumerate(questions):
        of_question = [window for window in windows if window.question == number]
        covered = {index for each in of_question for span in each.spans if span for index in range(*span)}
        assert covered >= {index for index, character in enumerate(question.context) if character != " "}
        spans = [[span for span in window.spans if span] for window in of_question]
        for earlier, later in pairwise(spans):
            assert earlier[-6:] == later[:6]
        held = 0
        for window in of_question:
            assert len(window.inputs["input_ids"]) <= 24
            labelled = label_window(window, question)
            if labelled["start_positions"] == 0:
                continue
            held += 1
            first, last = (window.spans[labelled[f"{side}_positions"]] for side in ("start", "end"))
            assert first
            assert last
            assert question.context[first[0] : last[1]] == question.answers[0]
        assert held >= 1


def test_the_best_answer_is_the_best_of_all_spans(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = np.random.default_rng(0)
    for seed in range(5):
        question = load_squad(make_questions(1, 40, seed)).questions[0]
        windows = cut_windows(tokenizer, [question], 24, 6)
        logits = [(window, *draw.normal(size=(2, 30))) for window in windows]  # of 30 tokens, the last padding
        spans = [
            (start[i] + end[j], question.context[window.spans[i][0] : window.spans[j][1]])
            for window, start, end in logits
            for i in range(len(window.spans))
            for j in range(i, min(i + 4, len(window.spans)))
            if window.spans[i] and window.spans[j]
        ]
        assert best_answer(question, logits, n_best=30, max_answer_length=4) == max(spans)[1]
    nothing = [(window, -np.arange(30.0), np.arange(30.0)[::-1]) for window, *_ in logits]
    assert best_answer(question, nothing, n_best=1) == ""  # the highest of both are [CLS]


def official_f1(predicted: str, gold: str) -> float:
    def tokens(text: str) -> list[str]:
        bare = "".join(character for character in text.lower() if character.isalnum() or character.isspace())
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    ours, theirs = tokens(predicted), tokens(gold)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def test_scores_are_the_official_ones() -> None:
    cases = [
        ("The cat.", ("cat", "dog")),
        ("a green house", ("green", "green tree, green")),
        ("blue", ("green",)),
        ("", ("green",)),
    ]
    questions = [Question("same id", "?", "", golds, (0,) * len(golds)) for _, golds in cases]
    found = score(questions, [answer for answer, _ in cases])
    best = [max(official_f1(answer, gold) for gold in golds) for answer, golds in cases]
    assert found["f1"] == pytest.approx(100 * sum(best) / 4)
    assert found["exact_match"] == pytest.approx(25)


def test_reads_the_official_file_and_rows_alike(tmp_path: Path) -> None:
    rows = make_questions(3, 8, 0)
    file = write_official(tmp_path / "dev.json", rows)
    questions = load_squad(file).questions
    assert questions == load_squad(rows).questions
    content = json.loads(file.read_text())
    impossible = {"id": "x", "question": "?", "answers": [], "is_impossible": True}
    content["data"][0]["paragraphs"][0]["qas"].append(impossible)
    file.write_text(json.dumps(content))
    assert load_squad(file).questions == questions


def test_names_what_is_wrong(dense: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = make_questions(1, 8, 0)
    (tmp_path / "no.json").write_text('{"data": [{"paragraphs": [{}]}]}')
    (tmp_path / "text.json").write_text("the cat")
    for data, message in (
        (tmp_path / "no.json", r"no SQuAD file \(KeyError\('qas'\)"),
        (tmp_path / "text.json", "no SQuAD file"),
        ([], "holds no questions"),
        ([{"id": "1"}], "no column 'question', only"),
        ([{**row, "answers": {"text": [], "answer_start": []}}], "has no answer: give SQuAD v1.1"),
        ([{**row, "answers": {"text": ["red"], "answer_start": [0]}}], "is not where answer_start says"),
        ([{**row, "answers": {"text": ["the"], "answer_start": []}}], "is malformed"),
        ([{**row, "answers": None}], "is malformed"),
    ):
        with pytest.raises(EvaluationError, match=message):
            squad(dense, data, data)
    with pytest.raises(EvaluationError, match="leaves less than doc_stride=128"):
        squad(dense, [row], [row])
    with pytest.raises(EvaluationError, match="do not say what to train on"):
        squad(dense, [row])
    with pytest.raises(EvaluationError, match="n_best=0"):
        SquadSettings(n_best=0)
