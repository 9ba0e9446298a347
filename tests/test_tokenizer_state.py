"""Tokenizers that carry state of earlier uses: figures, counts and calibration do not depend on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_dirembed.calibration.calibrate import calibrate
from hf_dirembed.calibration.text import windows
from hf_dirembed.calibration.token_weights import count_tokens, token_weights
from hf_dirembed.evaluation import masked_perplexity, perplexity, sts


TEXT = "the cat sat on a mat and the dog ran to the green house in a tree of blue " * 5
PAIRS = [("the cat sat", "a dog ran to the house", 1.0), ("a tree", "the tree", 5.0), ("the blue cat ran", "mat", 0.0)]


@pytest.fixture(params=["sides", "backend", "saved"])
def used(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """The tokenizer after a text-generation pipeline, after calls that truncated and padded, or saved after those."""
    used = copy.deepcopy(tokenizer)
    if request.param == "sides":
        used.padding_side = used.truncation_side = "left"
        return used
    used.backend_tokenizer.enable_truncation(5, stride=1, direction="left")
    used.backend_tokenizer.enable_padding(direction="left", length=9, pad_id=4)
    if request.param == "backend":
        return used
    used.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def masked(tokenizer: Any, **options: Any) -> Any:
    model = FAMILIES["bert"].make("AutoModelForMaskedLM")
    return masked_perplexity(model, tokenizer, [TEXT], window=16, **options)


def counted_of_a_calibration(tokenizer: Any) -> list[float]:
    model = FAMILIES["bert"].make("AutoModelForMaskedLM")
    return calibrate(model, tokenizer, [TEXT], max_tokens=60, sequence_length=16).counts.tolist()


USES: dict[str, Callable[[Any], Any]] = {
    "masked perplexity of words": masked,
    "masked perplexity of tokens": lambda tokenizer: masked(tokenizer, whole_word=False, max_tokens=40),
    "perplexity": lambda tokenizer: perplexity(
        FAMILIES["llama-tied"].make("AutoModelForCausalLM"), tokenizer, [TEXT], window=16
    ),
    "sts": lambda tokenizer: sts(FAMILIES["bert"].make("AutoModel"), PAIRS, tokenizer, pooling="cls"),
    "counts": lambda tokenizer: count_tokens(tokenizer, [TEXT], 160).tolist(),
    "expected counts": lambda tokenizer: token_weights(tokenizer, 160, languages="en").tolist(),
    "windows of calibration": lambda tokenizer: list(windows([TEXT], tokenizer, length=16)),
    "calibration": counted_of_a_calibration,
}


@pytest.mark.parametrize("use", USES)
def test_what_a_tokenizer_was_used_for_before_does_not_matter(
    use: str, used: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    expected = USES[use](tokenizer)
    before = used.padding_side, used.truncation_side
    torch.manual_seed(0)
    assert USES[use](used) == expected
    assert (used.padding_side, used.truncation_side) == before
