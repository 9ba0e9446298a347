"""Perplexity of masked language models, with their own head or with the one that was never compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..remote.tables_dirembed import embedding_of
from .data import Text, load_text
from .running import IGNORED, check_counts, check_head, check_window, exp, longest_input, mean_nll


if TYPE_CHECKING:
    from .data import TextSource


@dataclass(frozen=True)
class MaskedPerplexityFigures:
    """The perplexity of a masked language model, and how it was taken.

    Attributes:
        perplexity: exp(`nll`), per masked token.
        nll: The mean negative log-likelihood of a masked token, in nats.
        masked_tokens: Tokens that were masked, and so predicted.
        text_tokens: Tokens of the text that was read, special ones not counted.
        data: Where the text is from.
        window: Most tokens that the model sees at once, special ones included.
        whole_word: Whether words were masked whole.
        probability: How likely a token, or a word, is to be masked.
        seed: Where the random numbers of the masks start.
        head: `tied`, the model's own; or `dense`, the reference's, so that only the input side is compressed.
    """

    MEASURES: ClassVar[tuple[str, ...]] = ("perplexity", "nll")
    ITEMS: ClassVar[tuple[str, ...]] = ()

    perplexity: float
    nll: float
    masked_tokens: int
    text_tokens: int
    data: str
    window: int
    whole_word: bool
    probability: float
    seed: int
    head: str


def masked_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource | Text,
    *,
    whole_word: bool = True,
    probability: float = 0.15,
    seed: int = 0,
    head: Literal["tied", "dense"] = "tied",
    reference: PreTrainedModel | None = None,
    window: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 16,
) -> MaskedPerplexityFigures:
    """Perplexity at masked positions; the masks depend on text, tokenizer, seed and settings, never on the model.

    Args:
        model: A masked language model, dense or compressed; evaluated on the device it is on.
        tokenizer: Its tokenizer, a fast one.
        text: Whatever `load_text` takes, or what it returned.
        whole_word: Mask whole words, all of their tokens by the mask token. Words are what whitespace separates.
            Otherwise tokens, of which 80 % become the mask token, 10 % a random one, and 10 % stay (BERT's scheme).
        probability: How likely a word, or a token, is to be masked.
        seed: Where the random numbers of the masks start.
        head: `dense` measures what compressing the input alone costs, as the paper does (Bałazy et al. 2021):
            the reference's head predicts. `tied` measures the model as it is.
        reference: The dense model, for `head="dense"`.
        window: Most tokens that the model sees at once, special ones included.
        max_tokens: Stop after the window in which so many tokens of the text are reached, for a quick look.
        batch_size: Windows at once; it does not change the masks.

    Raises:
        EvaluationError: If the model is no masked language model, or the text or a setting does not fit.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "cat": 3}, unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> special = dict(unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertForMaskedLM(BertConfig(vocab_size=4, **sizes))
        >>> figures = masked_perplexity(model, tokenizer, ["cat " * 1000])
        >>> figures.text_tokens, 120 < figures.masked_tokens < 180
        (1000, True)
    """
    check_counts(window=window, max_tokens=max_tokens, batch_size=batch_size)
    check_head(model, "AutoModelForMaskedLM")
    if head not in ("tied", "dense"):
        raise EvaluationError(f"head={head!r} is unknown: choose tied or dense")
    if head == "dense" and reference is None:
        raise EvaluationError("head='dense' takes the head of the dense model: give it as the reference")
    if not 0 < probability <= 1:
        raise EvaluationError(f"probability={probability!r} is not above 0 and at most 1: 0.15 is usual")
    check_window(window, longest_input(model, tokenizer))

    data = load_text(text)
    windows, text_tokens = _windows(tokenizer, data.content, window, max_tokens, whole_word)
    batches = _mask(tokenizer, windows, whole_word, probability, seed, batch_size)

    with dense_head(model, reference) if head == "dense" and reference is not None else nullcontext():
        nll, masked = mean_nll(model, batches, description=f"mlm-perplexity ({head} head)")
    return MaskedPerplexityFigures(
        exp(nll), nll, masked, text_tokens, data.name, window, whole_word, probability, seed, head
    )


@contextmanager
def dense_head(model: PreTrainedModel, reference: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lends a model the language-model head, weight and bias, of another; afterwards it has its own again.

    Nothing is copied if both are on the same device in the same dtype. Saving or tying the model meanwhile would
    undo the loan.

    Args:
        model: Compressed or dense.
        reference: The dense model that it was made from.

    Raises:
        EvaluationError: If one has no head, the reference's is compressed too, or their shapes differ.
    """
    for candidate in (model, reference):
        check_head(candidate, "the AutoModel class that it was saved from")

    own: Any = model.get_output_embeddings()
    lent: Any = reference.get_output_embeddings()
    expected = (own.weight.shape[0], embedding_of(model).embedding_dim)
    if tuple(lent.weight.shape) != expected:
        raise EvaluationError(
            f"the reference's head is a {type(lent).__name__} of shape {list(lent.weight.shape)}, not a dense one of "
            f"{list(expected)}: give the dense model that this one was compressed from"
        )

    device, dtype = model.device, model.dtype
    if (lent.weight.device, lent.weight.dtype) != (device, dtype):
        lent = deepcopy(lent).to(device, dtype)

    name = next(name for name, module in model.named_modules() if module is own)
    model.set_submodule(name, lent)
    try:
        yield model
    finally:
        model.set_submodule(name, own)


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str, window: int, max_tokens: int | None, whole_word: bool
) -> tuple[list[dict[str, Any]], int]:
    """Cuts the text into windows with special tokens around each, all padded to one length."""
    if not tokenizer.is_fast or tokenizer.mask_token is None or tokenizer.pad_token is None:
        raise EvaluationError(
            f"{type(tokenizer).__name__} is no fast tokenizer with a mask and a padding token: "
            "give that of a masked language model, or take perplexity"
        )
    room = window - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise EvaluationError(f"window={window} leaves no room for text beside special tokens: give a larger one")

    with _from_left_to_right(tokenizer):
        encoded = tokenizer(
            text, truncation=True, max_length=window, padding=True, padding_side="right", verbose=False,
            return_overflowing_tokens=True, return_special_tokens_mask=True, return_offsets_mapping=whole_word,
        )  # fmt: skip
    encoded.pop("overflow_to_sample_mapping")

    kept = len(encoded["input_ids"]) if max_tokens is None else -(-max_tokens // room)
    windows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)][:kept]
    if whole_word:
        for row in windows:
            row["offset_mapping"] = _trimmed(text, row["offset_mapping"])
    return windows, sum(row["special_tokens_mask"].count(0) for row in windows)


@contextmanager
def _from_left_to_right(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Lets a tokenizer cut windows from the start of the text on, whichever end it was told to keep before."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side


def _trimmed(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Takes leading spaces out of offsets.

    The collator sees a new word where there is a gap between tokens, and SentencePiece and some byte-level tokenizers
    leave none: untrimmed, a whole window would be one word.
    """
    return [(end - len(text[start:end].lstrip()), end) for start, end in offsets]


def _mask(
    tokenizer: PreTrainedTokenizerBase,
    windows: list[dict[str, Any]],
    whole_word: bool,
    probability: float,
    seed: int,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    collator = DataCollatorForLanguageModeling(
        tokenizer=tokenizer,
        whole_word_mask=whole_word,
        mlm_probability=probability,
        mask_replace_prob=1.0 if whole_word else 0.8,  # all that the collator offers for whole words
        random_replace_prob=0.0 if whole_word else 0.1,
        seed=seed,
    )
    # One window at a time: the masks are drawn window after window, whatever the batch size.
    masked = [collator([window]) for window in windows]
    if all(bool((window["labels"] == IGNORED).all()) for window in masked):
        raise EvaluationError(f"probability={probability} masks nothing of this text: give more text, or a larger one")
    batches = (masked[start : start + batch_size] for start in range(0, len(masked), batch_size))
    return [{name: torch.cat([window[name] for window in batch]) for name in batch[0]} for batch in batches]
