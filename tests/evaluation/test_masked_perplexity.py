"""Perplexity of masked models: the masks are the collator's, the lent head is the reference's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

import hf_dirembed
from hf_dirembed.evaluation import EvaluationError, compare, dense_head, masked_perplexity


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = "the cat, sat on a mat. and the dog, ran to the green house. in a tree of blue " * 12
OPTIONS = {"window": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer) + 3, max_position_embeddings=32, initializer_range=0.5, **SIZES)
    return BertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def compressed(model: BertForMaskedLM) -> BertForMaskedLM:
    return hf_dirembed.compress(copy.deepcopy(model), method="svd", rank=6)


def seen(model: BertForMaskedLM, *args, **options) -> Tensor:
    """The inputs that an evaluation shows to a model."""
    inputs: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].clone()))
    masked_perplexity(model, *args, **options)
    hook.remove()
    return torch.cat(inputs)


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_are_the_collators_and_the_same_for_every_model(model, compressed, tokenizer, whole_word) -> None:
    options = {**OPTIONS, "whole_word": whole_word, "seed": 3, "probability": 0.3}
    figures = masked_perplexity(model, tokenizer, [TEXT], **options)

    ids = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    examples = []
    for start in range(0, len(ids["input_ids"]), 30):  # and [CLS] and [SEP] around
        part = ids["input_ids"][start : start + 30]
        padding = 30 - len(part)
        examples.append(
            {
                "input_ids": [2, *part, 3, *[0] * padding],
                "attention_mask": [1] * (len(part) + 2) + [0] * padding,
                "special_tokens_mask": [1, *[0] * len(part), 1, *[1] * padding],
                "offset_mapping": [(0, 0), *ids["offset_mapping"][start : start + 30], *[(0, 0)] * (padding + 1)],
            }
        )
    collator = DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=0.3,
        whole_word_mask=whole_word,
        seed=3,
        **({"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole_word else {}),
    )
    losses: list[float] = []
    expected = []
    for example in examples:
        batch = collator([example])
        labels = batch.pop("labels")
        expected.append(batch["input_ids"])
        with torch.no_grad():
            logits = model(**batch).logits
        losses += F.cross_entropy(logits[labels != -100].double(), labels[labels != -100], reduction="none").tolist()

    assert (figures.masked_tokens, figures.text_tokens) == (len(losses), len(ids["input_ids"]))
    assert figures.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(figures.nll))
    for other in (model, compressed):
        assert seen(other, tokenizer, [TEXT], **options).equal(torch.cat(expected))
    assert masked_perplexity(model, tokenizer, [TEXT], **{**options, "batch_size": 1}).nll == pytest.approx(
        figures.nll
    )
    assert not seen(model, tokenizer, [TEXT], **{**options, "seed": 4}).equal(torch.cat(expected))


def test_whole_words_are_masked_where_tokens_hold_the_space_before_them(model) -> None:
    pieces = ["<unk>", "<pad>", "<mask>", "▁cat", "▁dog", ","]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)
    shown = seen(model, tokenizer, [("cat, dog, " * 160).strip()], **OPTIONS, probability=0.3).view(-1, 2)
    assert len(shown) == 320
    masked = shown == 2
    assert masked[:, 0].equal(masked[:, 1])  # a word and the comma that no space parts from it
    assert 0.2 < masked.float().mean() < 0.4
    assert set(masked.view(-1, 32).sum(dim=1).tolist()).isdisjoint({0, 32})  # a window is not one word


def test_dense_head_equals_a_model_whose_embedding_alone_is_compressed(model, compressed, tokenizer) -> None:
    input_only = copy.deepcopy(model)
    table = compressed.get_input_embeddings().dense_weight()
    input_only.bert.embeddings.word_embeddings = nn.Embedding.from_pretrained(table, padding_idx=0)
    assert input_only.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)
    expected = masked_perplexity(input_only, tokenizer, [TEXT], **OPTIONS)

    compressed.train()
    before = dict(compressed.named_modules())
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    options = {**OPTIONS, "head": "dense", "reference": model}
    both = compare(masked_perplexity, compressed, model, tokenizer, [TEXT], **options)
    tied = masked_perplexity(compressed, tokenizer, [TEXT], **OPTIONS)

    assert (both.model.head, tied.head) == ("dense", "tied")
    assert both.model.nll == pytest.approx(expected.nll, rel=1e-5)
    assert both.reference.nll == masked_perplexity(model, tokenizer, [TEXT], **OPTIONS).nll
    assert both.model.masked_tokens == tied.masked_tokens == both.reference.masked_tokens
    assert abs(tied.nll - expected.nll) > 1e-3
    assert compressed.training
    assert dict(compressed.named_modules()) == before
    assert all(tensor.equal(state[name]) for name, tensor in compressed.state_dict().items())


def test_own_head_comes_back_after_an_error(model, compressed) -> None:
    own = compressed.get_output_embeddings()
    with pytest.raises(RuntimeError, match=r"with .*nn\..*\.Linear'"), dense_head(compressed, model):
        raise RuntimeError(f"stopped with {type(compressed.get_output_embeddings())}")
    assert compressed.get_output_embeddings() is own
    with dense_head(compressed, copy.deepcopy(model).to(torch.bfloat16)):
        assert compressed.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 33}, "window=33 exceeds the 32 tokens"),
        ({"window": 2}, "no room for text"),
        ({"probability": 0}, "probability=0"),
        ({"probability": 1e-6}, "masks nothing"),
        ({"head": "open"}, "head='open' is unknown"),
        ({"head": "dense"}, "give it as the reference"),
    ],
)
def test_refuses_settings_that_do_not_fit(model, tokenizer, settings, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        masked_perplexity(model, tokenizer, [TEXT], **{**OPTIONS, **settings})


def test_refuses_models_and_tokenizers_of_another_kind(model, compressed, tokenizer) -> None:
    with pytest.raises(EvaluationError, match=r"no language-model head.*AutoModelForMaskedLM"):
        masked_perplexity(BertModel(model.config), tokenizer, [TEXT], **OPTIONS)
    other = BertForMaskedLM(BertConfig(vocab_size=70, **SIZES))
    for wrong in (other, compressed):
        with pytest.raises(EvaluationError, match="that this one was compressed from"):
            masked_perplexity(compressed, tokenizer, [TEXT], **OPTIONS, head="dense", reference=wrong)
    maskless = copy.deepcopy(tokenizer)
    maskless.mask_token = None
    with pytest.raises(EvaluationError, match="no fast tokenizer with a mask"):
        masked_perplexity(model, maskless, [TEXT], **OPTIONS)


def test_max_tokens_counts_whole_windows(model, tokenizer) -> None:
    assert masked_perplexity(model, tokenizer, [TEXT], **OPTIONS, max_tokens=31).text_tokens == 60
