"""Long work says how far it is: bars that run from nothing to all, on stderr alone, as transformers' switches say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from families import FAMILIES
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

import hf_dirembed
from hf_dirembed import TransformSettings, progress
from hf_dirembed.calibration.self_text import self_generated_texts
from hf_dirembed.checkpoints.convert import compress_checkpoint
from hf_dirembed.cli import main
from hf_dirembed.compression import compress_table


WORDS = ["the cat sat on the mat", "a dog ran to the green house"] * 20


class Recorded(tqdm):  # type: ignore[type-arg]
    """A bar that remembers how far it was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = [self.n]

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        self.seen.append(self.n)
        return shown


@pytest.fixture
def bars() -> Iterator[list[Recorded]]:
    """Every bar of ours that is made, where bars are shown."""
    made: list[Recorded] = []

    def record(factory: Any, args: Any, kwargs: Any) -> Any:
        if "delay" not in kwargs or not issubclass(factory, tqdm):  # of transformers, or switched off
            return factory(*args, **kwargs)
        made.append(Recorded(*args, **kwargs))
        return made[-1]

    before = transformers.logging.set_tqdm_hook(record)
    transformers.logging.enable_progress_bar()
    yield made
    transformers.logging.disable_progress_bar()
    transformers.logging.set_tqdm_hook(before)


def check(bar: Recorded, description: str, steps: int) -> None:
    """A bar runs to its end, in steps of which none is too large, and none is backwards."""
    assert bar.desc == description
    assert bar.n == pytest.approx(bar.total)
    assert len(bar.seen) > steps
    assert all(after >= before for before, after in pairwise(bar.seen))


def table(rows: int = 12_000) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.1, 16)


def test_fitting_a_table(bars: list[Recorded]) -> None:
    compress_table(table(), bits=3)
    compress_table(table(), bits=3, settings=TransformSettings(large_rows=4_000, fitted_rows=2_000))
    compress_table(table(), method="direction", rank=4)
    transform, large, direction = bars
    check(transform, "Fitting 12000 x 16", 4)
    check(large, "Fitting 12000 x 16", 64)
    check(direction, "Fitting 12000 x 16", 4)
    for bar in (transform, large):  # no step stands for most of the work
        assert max(after - before for before, after in pairwise(bar.seen)) < 0.75 * bar.total


@pytest.mark.parametrize("calibration", [WORDS, "self", None])
def test_a_whole_model(calibration: Any, bars: list[Recorded], tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["bert"].make("AutoModel")
    hf_dirembed.compress(model, tokenizer, bits=6, calibration=calibration, languages="en")
    *calibrating, fitting = bars
    check(fitting, "Fitting embeddings.word_embeddings", 3)
    assert [bar.desc for bar in calibrating] == ["Calibrating"] * (calibration is not None)
    for bar in calibrating:
        assert len(bar.seen) > 1
        assert 0 < bar.n <= bar.total


def test_several_tables_have_one_bar(bars: list[Recorded], tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama-untied"].make("AutoModelForCausalLM")
    hf_dirembed.compress(model, tokenizer, bits=6, languages="en")
    measuring, fitting = bars
    check(measuring, "Measuring tables", 2)
    check(fitting, "Fitting 2 tables", 6)


def test_a_model_that_writes_its_own_text(bars: list[Recorded], tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama-tied"].make("AutoModelForCausalLM")
    options: dict[str, Any] = {"num_tokens": 200, "sequence_length": 24, "batch_size": 8, "languages": ["en"]}
    texts = list(self_generated_texts(model, tokenizer, **options))
    (writing,) = bars
    check(writing, "Writing text to calibrate on", 20)
    assert sum(map(len, texts)) >= 200


def test_a_stream_of_rows(bars: list[Recorded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    FAMILIES["bert"].make("AutoModel").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", bits=6)
    (fitting,) = bars
    check(fitting, "Fitting embeddings.word_embeddings", 3)


@pytest.mark.parametrize("shown", [True, False])
def test_the_command_line(
    shown: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    FAMILIES["bert"].make("AutoModel").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    if shown:
        transformers.logging.enable_progress_bar()
    try:
        text = tmp_path / "text"
        text.write_text("\n".join(WORDS))
        options = ["--bits", "6", "--json", "--calibrate", str(text)]
        done = CliRunner().invoke(main, ["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *options])
    finally:
        transformers.logging.disable_progress_bar()
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bits_per_weight"] <= 6
    assert ("Fitting embeddings.word_embeddings" in done.stderr) == shown
    assert ("Calibrating" in done.stderr) == shown
