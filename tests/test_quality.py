"""The commands that compare tables: by quality at equal bytes, and by what they learn from a text."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_tables import read_table
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Cells = Callable[..., list[list[str]]]
WORDS = "the cat sat on the mat and the dog ran to the green house of the blue tree"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with an encoder, a causal language model, pairs and text."""
    folder = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=160, **sizes)).save_pretrained(folder / "encoder")
    LlamaForCausalLM(LlamaConfig(vocab_size=160, tie_word_embeddings=True, **sizes)).save_pretrained(folder / "causal")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 512
    for name in ("encoder", "causal"):
        tokenizer.save_pretrained(folder / name)
    words = WORDS.split()
    sentences = [" ".join(words[start : start + 4]) for start in range(12)]
    pairs = [
        f"{one},{other},{abs(i - j) % 6}.0\n" for i, one in enumerate(sentences) for j, other in enumerate(sentences)
    ]
    (folder / "pairs.csv").write_text("".join(pairs))
    (folder / "text.txt").write_text(f"{WORDS} . " * 60)
    return folder


@pytest.fixture
def cells(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cells:
    """Runs a script where the models lie: the cells of the table that it prints."""

    def run(script: str, *arguments: str) -> list[list[str]]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [script, *" ".join(arguments).split()])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return read_table(capsys.readouterr().out)

    return run


def test_pairs_at_equal_bytes(cells: Cells) -> None:
    header, dense, *rows = cells("quality.py", "sts encoder --pairs pairs.csv --bits 16 8 --methods svd")
    assert header == ["table", "bits per weight", "fit, s", "pairs.csv", "error"]
    assert dense[:2] == ["dense", "32"]
    assert [row[0] for row in rows] == [*(f"int{width}, groups of 32" for width in (4, 3, 2)), "svd", "svd"]
    errors = [float(row[4]) for row in rows]
    assert errors[0] < errors[1] < errors[2]
    assert errors[3] < errors[4]
    assert all(float(row[1]) <= budget for row, budget in zip(rows, (4.5, 3.5, 2.5, 16, 8), strict=True))


def test_seeds_of_a_calibrated_table(cells: Cells) -> None:
    told = "--calibrate self --calibration-tokens 500 --languages en --bits 6 --seeds 0 1 --integers"
    _, _, *rows = cells("quality.py", "sts encoder --pairs pairs.csv", told)
    assert [row[0] for row in rows] == ["transform, seed 0", "transform, seed 1"]
    assert all(0 < float(row[1]) <= 6 for row in rows)


def test_perplexity_at_equal_bytes(cells: Cells) -> None:
    options = "--bits 31 16 --methods svd --integers"
    header, _, whole, half = cells("quality.py", "perplexity causal --text text.txt", options)
    assert header[3:] == ["text.txt"]
    assert [whole[3][-1], half[3][-1]] == ["x", "x"]
    assert abs(float(whole[3][:-1]) - 1) <= abs(float(half[3][:-1]) - 1) + 1e-4


def test_what_a_table_learns(cells: Cells) -> None:
    options = "--bits 16 --steps 6 --batch 2 --window 16 --rates 3e-2 --spreads .1"
    header, dense, start, *learnt = cells("table_training.py", "causal --train text.txt --held-out text.txt", options)
    assert header == ["what learns", "rate", "bits per weight", "perplexity, text.txt", "training, s"]
    assert [dense[0], start[0]] == ["nothing, dense", "nothing"]
    assert [row[0] for row in learnt] == ["decoder", "decoder and codes", "dense table, compressed again"]
    assert all(float(row[3]) < float(start[3]) for row in learnt)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_integers_are_the_nearest_of_their_group(width: int, seed: int) -> None:
    integer_table = runpy.run_path(str(BENCHMARKS / "quality.py"))["integer_table"]
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    found = integer_table(rows, width).view(-1, 32)
    groups = rows.view(-1, 32)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    levels = low.unsqueeze(2) + (high - low).unsqueeze(2) * torch.linspace(0, 1, 2**width)
    nearest = (groups.unsqueeze(2) - levels).abs().amin(dim=2)
    assert torch.allclose((found - groups).abs(), nearest, atol=1e-5)
    assert all(len(group.unique()) <= 2**width for group in found)
