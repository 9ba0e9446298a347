"""Fixtures: a small tokenizer, and a quiet transformers. In the end the suite says how it attacked."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test asks the network
# This process's own: of two that write the same module one may read half of it.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.stand_in_hub import StandInHub


torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "house",
    "tree",
    "green",
    "blue",
]


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """A stand-in of the Hub, without repos."""
    with StandInHub() as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of fewer tokens than the tiny models have rows."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.,"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", pair)
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


@pytest.fixture(autouse=True)
def _the_tokenizer_stays_as_it_is(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test shares the tokenizer, so one that changes it, as a text-generation pipeline does, needs a copy."""
    if "tokenizer" not in request.fixturenames:
        yield
        return
    tokenizer = request.getfixturevalue("tokenizer")
    before = _settings(tokenizer)
    yield
    assert _settings(tokenizer) == before, "this test changed the tokenizer that all share: give it a copy"


def _settings(tokenizer: Any) -> dict[str, Any]:
    names = ("padding_side", "truncation_side", "model_input_names", "model_max_length", "special_tokens_map")
    return {"tokens": len(tokenizer), **{name: copy.copy(getattr(tokenizer, name)) for name in names}}


def pytest_unconfigure() -> None:
    """Leaves nothing behind."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


TRIED: list[str] = []  # an entry for each Hypothesis case of the test that runs
ATTACKS: Counter[str] = Counter()  # of all tests, whichever processes they ran in
MOST: dict[str, float] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Has every Hypothesis case counted."""
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None or hasattr(handle.inner_test, "counted"):
        return
    inner = handle.inner_test

    @functools.wraps(inner)
    def case(*args: Any, **kwargs: Any) -> Any:
        TRIED.append(item.nodeid)
        return inner(*args, **kwargs)

    case.counted = True  # type: ignore[attr-defined]
    handle.inner_test = case


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Has a test's report say how many cases it tried."""
    TRIED.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append(("Hypothesis cases", len(TRIED)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts what passed: cases, refusals, and the `kills` that tests record; of what is called `most` the largest."""
    if report.when == "call" and report.passed:
        ATTACKS["refusals of broken checkpoints"] += "attacks/test_broken_" in report.nodeid
        for name, number in report.user_properties:
            if name.startswith("most "):
                MOST[name] = max(number, MOST.get(name, number))
            else:
                ATTACKS[name] += number


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says it."""
    if said := ", ".join(f"{number:,} {what}" for what, number in ATTACKS.items() if number):
        terminalreporter.write_line(f"attacked by: {said}")
    for name, number in MOST.items():
        terminalreporter.write_line(f"{name}: {number:.2f}")
