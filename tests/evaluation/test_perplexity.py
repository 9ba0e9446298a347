"""Perplexity of causal models against a loop that asks the model for one token at a time."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_dirembed
from hf_dirembed.evaluation import EvaluationError, compare, perplexity


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = "the cat sat on a mat and the dog ran to the green house in a tree of blue a b c d e f g h . , x y z"


@pytest.fixture(scope="module")
def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        max_position_embeddings=64,
        initializer_range=0.5,
        tie_word_embeddings=True,
        **SIZES,
    )


@pytest.fixture(scope="module")
def model(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "[CLS]"
    return tokenizer


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, ids: list[int], prefix: list[int], window: int, stride: int) -> list[float]:
    """The loss of every token that has something before it in the first window that it is in."""
    losses = []
    for position, target in enumerate(ids):
        start = 0
        while start + window - len(prefix) <= position:
            start += stride
        context = prefix + ids[start:position]
        if context:
            logits = model(torch.tensor([context])).logits[0, -1].double()
            losses.append(-logits.log_softmax(dim=0)[target].item())
    return losses


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "batch_size"), [(8, None, 1), (8, 8, 3), (8, 3, 2), (9, 1, 4), (64, 16, 2), (2, 1, 8)]
)
def test_every_token_is_predicted_once_from_its_window(model, tokenizer, window, stride, batch_size, bos) -> None:
    tokenizer = with_bos(tokenizer) if bos else tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.bos_token_id] if bos else []
    room = window - len(prefix)
    losses = one_by_one(model.eval(), ids, prefix, window, min(stride or room, room))

    figures = perplexity(model, tokenizer, [TEXT], window=window, stride=stride, batch_size=batch_size)

    assert (figures.counted_tokens, figures.text_tokens) == (len(losses), len(ids))
    assert figures.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(figures.nll))
    assert (figures.window, figures.stride) == (window, min(stride or room, room))
    assert sum(figures.window_tokens) == len(losses)
    of_windows = iter(losses)  # window after window
    expected = [sum(itertools.islice(of_windows, count)) for count in figures.window_tokens]
    assert figures.window_nll == pytest.approx(expected, rel=1e-5)


def test_stops_at_max_tokens_and_leaves_the_model_as_it_was(model, tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    short = perplexity(model, tokenizer, [TEXT], window=8, max_tokens=10)
    assert short.text_tokens == 10
    assert [module.training for module in model.modules()] == modes
    words = TEXT.split()
    assert short.nll == pytest.approx(perplexity(model, tokenizer, [" ".join(words[:10])], window=8).nll)


def test_compares_a_compressed_model_with_its_reference(model, tokenizer) -> None:
    compressed = hf_dirembed.compress(copy.deepcopy(model), method="svd", rank=8)
    both = compare(perplexity, compressed, model, tokenizer, [TEXT], window=16)
    expanded = hf_dirembed.expand(copy.deepcopy(compressed))
    assert both.model.nll == pytest.approx(perplexity(expanded, tokenizer, [TEXT], window=16).nll, rel=1e-5)
    assert both.reference == perplexity(model, tokenizer, [TEXT], window=16)
    assert both.difference["nll"] == both.model.nll - both.reference.nll
    assert both.ratio["perplexity"] == both.model.perplexity / both.reference.perplexity != 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0 is no whole number"),
        ({"window": 65}, "exceeds the 64 tokens"),
        ({"window": 8, "stride": 9}, "stride=9 exceeds window=8"),
        ({"window": 8, "stride": 0}, "stride=0"),
        ({"window": 8, "max_tokens": 1}, "too short"),
    ],
)
def test_refuses_settings_that_do_not_fit(model, tokenizer, settings, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        perplexity(model, tokenizer, [TEXT], **settings)


def test_refuses_models_that_do_not_predict_the_next_token(config, tokenizer) -> None:
    bert = BertForMaskedLM(BertConfig(vocab_size=60, **SIZES))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    with pytest.raises(EvaluationError, match=r"no language-model head.*AutoModelForCausalLM"):
        perplexity(LlamaModel(config), tokenizer, [TEXT])
    for wrong in (bert, t5):
        with pytest.raises(EvaluationError, match="no causal language model"):
            perplexity(wrong, tokenizer, [TEXT], window=8)


def test_refuses_a_tokenizer_of_another_model_and_a_model_of_nan(model, tokenizer) -> None:
    small = LlamaForCausalLM(LlamaConfig(vocab_size=10, **SIZES))
    with pytest.raises(EvaluationError, match="beyond the model's 10 rows"):
        perplexity(small, tokenizer, [TEXT], window=8)
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="NaN"):
        perplexity(broken, tokenizer, [TEXT], window=8)
