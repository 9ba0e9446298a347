"""Perplexity of causal language models, over strided windows of running text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from .data import Text, load_text
from .running import IGNORED, check_counts, check_head, check_window, exp, longest_input, sum_nll


if TYPE_CHECKING:
    from .data import TextSource


@dataclass(frozen=True)
class PerplexityFigures:
    """The perplexity of a causal language model, and how it was taken.

    Attributes:
        perplexity: exp(`nll`), per token.
        nll: The mean negative log-likelihood of a counted token, in nats.
        counted_tokens: Tokens that were predicted.
        text_tokens: Tokens of the text that was read. Those not counted had nothing before them in their window.
        data: Where the text is from.
        window: Most tokens that the model sees at once, BOS included where the tokenizer sets one.
        stride: Tokens from the start of one window to that of the next: all but the first count these only.
        window_nll: The sum over the counted tokens of each window, in nats.
        window_tokens: How many these are.
    """

    MEASURES: ClassVar[tuple[str, ...]] = ("perplexity", "nll")
    ITEMS: ClassVar[tuple[str, ...]] = ("window_nll", "window_tokens")

    perplexity: float
    nll: float
    counted_tokens: int
    text_tokens: int
    data: str
    window: int
    stride: int
    window_nll: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource | Text,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
) -> PerplexityFigures:
    """Perplexity of a causal language model, as https://huggingface.co/docs/transformers/perplexity takes it.

    One thing differs: where the tokenizer begins a text with BOS, every window begins with it, not only the first;
    models like Gemma are lost without. Perplexities per token compare only where the tokenizer is the same.

    Args:
        model: A causal language model, dense or compressed; evaluated on the device it is on.
        tokenizer: Its tokenizer.
        text: Whatever `load_text` takes, or what it returned.
        window: Most tokens that the model sees at once.
        stride: Tokens between the starts of windows, at most `window`; by default there is no overlap. The smaller,
            the more context each token has, and the longer it takes.
        max_tokens: Stop after so many tokens of the text, for a quick look.
        batch_size: Windows at once; the logits take batch_size x window x V numbers.

    Raises:
        EvaluationError: If the model is no causal language model, or the text or a setting does not fit.

    Example:
        >>> from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=384, **sizes))
        >>> figures = perplexity(model, ByT5Tokenizer(), ["The cat sat on the mat."], window=8, stride=4)
        >>> figures.counted_tokens, figures.text_tokens, 300 < figures.perplexity < 500
        (22, 23, True)
    """
    check_counts(window=window, stride=stride, max_tokens=max_tokens, batch_size=batch_size)
    check_head(model, "AutoModelForCausalLM")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise EvaluationError(f"{type(model).__name__} is no causal language model: load one, or take mlm-perplexity")
    check_window(window, longest_input(model))
    if stride is not None and stride > window:
        raise EvaluationError(f"stride={stride} exceeds window={window} and would skip text: give at most that")

    data = load_text(text)
    ids = tokenizer(data.content, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    prefix = _bos(tokenizer)
    room = window - len(prefix)  # for text
    if room < 1:
        raise EvaluationError(f"window={window} leaves no room for text beside BOS: give a larger one")

    stride = min(stride or room, room)
    windows = _windows(torch.tensor(prefix, dtype=torch.long), torch.tensor(ids, dtype=torch.long), room, stride)
    batches = [_batch(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]

    totals, counts = sum_nll(model, batches, description="perplexity")
    nll, counted = totals.sum().item() / int(counts.sum()), int(counts.sum())
    items = tuple(totals.tolist()), tuple(counts.tolist())
    return PerplexityFigures(exp(nll), nll, counted, len(ids), data.name, window, stride, *items)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if the tokenizer begins a text with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _windows(prefix: Tensor, ids: Tensor, room: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of each window; only tokens that no window before has had are labels."""
    windows = []
    end = 0
    for start in range(0, len(ids), stride):
        before, end = end, min(start + room, len(ids))
        inputs = torch.cat([prefix, ids[start:end]])
        targets = inputs.clone()
        targets[: len(prefix) + before - start] = IGNORED
        # The logits at a position predict the token after it: labels move one to the left.
        windows.append((inputs, torch.cat([targets[1:], targets.new_full((1,), IGNORED)])))
        if end == len(ids):
            break
    return windows


def _batch(windows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Makes a batch of windows, padded on the right, which no causal model sees."""
    inputs, labels = zip(*windows, strict=True)
    return {
        "input_ids": pad_sequence(list(inputs), batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
    }
