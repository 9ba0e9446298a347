"""Calibration text where there is no data: what a language model writes, or words in no order for an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import CalibrationError
from ..progress import Progress, progress_bar
from .languages import word_forms, word_list, wordfreq_language
from .text import CALIBRATION_TOKENS
from .token_weights import LANGUAGE_WORDS, MAX_WORDS, tokenizer_languages


PROMPT_WORDS = 5_000  # beyond these, prompts would be names and typing errors
TEXT_WORDS = 4, 24  # of a text for an encoder: from a query to a long sentence


def self_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int = CALIBRATION_TOKENS,
    languages: Sequence[str] | None = None,
) -> Iterable[str] | Iterable[list[int]]:
    """Text to calibrate a model on without any data: its own, or for an encoder without a head words in no order.

    Args:
        model: A causal language model, or an encoder without a head.
        tokenizer: Its tokenizer.
        num_tokens: How many tokens a language model writes, at least. The stream of words has no end.
        languages: The languages of the words; by default those of the vocabulary, see `tokenizer_languages`.

    Returns:
        What `calibrate` takes. A language model has written all of it: while `calibrate` reads, the model's hooks are
        not there for generating.

    Raises:
        CalibrationError: If the model has a head and cannot generate.
        WeightsError: If a language has no word list.
    """
    if reads_words(model):
        return word_texts([wordfreq_language(tag) for tag in languages or tokenizer_languages(tokenizer)])
    return list(self_generated_texts(model, tokenizer, num_tokens=num_tokens, languages=languages))


def reads_words(model: PreTrainedModel) -> bool:
    """Whether `self_texts` of a model are words of the lists: it has no head to write with."""
    return model.get_output_embeddings() is None


def word_texts(languages: Sequence[str], *, seed: int = 0) -> Iterator[str]:
    """Words as frequent as in running text, in no order, without an end.

    What an encoder does with an error of a token hardly depends on the sense of the text: the sentences of an
    encyclopedia make nearly the same statistics. Each text is of one language, and the languages take turns.

    Args:
        languages: Some of `wordfreq.available_languages()`.
        seed: Where the random numbers start.

    Yields:
        Texts of 4 to 24 words.

    Example:
        >>> texts = word_texts(["en"])
        >>> [len(next(texts).split()) for _ in range(3)]
        [21, 17, 15]
    """
    generator = np.random.default_rng(seed)
    number = min(LANGUAGE_WORDS, MAX_WORDS // len(languages))
    for forms, cumulated in cycle([_forms(language, number) for language in dict.fromkeys(languages)]):
        length = generator.integers(*TEXT_WORDS, endpoint=True)
        drawn = np.searchsorted(cumulated, generator.random(length), side="right")
        yield "".join(forms[word] for word in drawn).strip() + "."


def _forms(language: str, number: int) -> tuple[list[str], np.ndarray]:
    """Words of a language, with the space that precedes them, if any, and their cumulated shares of running text."""
    forms: list[str] = []
    frequencies = []
    for before, words, shares in word_forms(language, number):
        forms += [" " * before.isspace() + word for word in words]
        frequencies.append(shares)
    cumulated = np.concatenate(frequencies).cumsum()
    return forms, cumulated / cumulated[-1]


def self_generated_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int = CALIBRATION_TOKENS,
    sequence_length: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    languages: Sequence[str] | None = None,
) -> Iterator[list[int]]:
    """Text that a causal language model writes itself, at temperature 1: calibration where there is no data.

    Half of the texts start from the tokens that start a document (BOS, or what ends the one before), half go on
    with the beginning of a frequent word, for variety. A text ends where the model ends it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        num_tokens: How many tokens to write, at least.
        sequence_length: Most tokens of a text.
        batch_size: Texts written at once; another number gives other texts.
        seed: Where the random numbers start; torch's own state is left as it was.
        languages: The languages of the words; by default those of the vocabulary, see `tokenizer_languages`.

    Yields:
        Token ids of one text. `calibrate` takes a list of them; not the generator itself, as the model cannot write
        while it is being calibrated.

    Raises:
        CalibrationError: If the model cannot generate.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CalibrationError(f"{type(model).__name__} writes no text of its own: give calibration text")

    generator = torch.Generator().manual_seed(seed)
    starts = list(dict.fromkeys(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None))
    words = _first_tokens(tokenizer, languages or tokenizer_languages(tokenizer))
    written = 0

    # Both kinds of start take turns, until enough is written.
    with progress_bar("Writing text to calibrate on", num_tokens, unit="token") as progress:
        for start, with_word in cycle([(start, word) for start in starts or [None] for word in (False, True)]):
            prompt = [] if start is None else [torch.full((batch_size,), start)]
            if with_word or start is None:
                prompt.append(words[torch.randint(len(words), (batch_size,), generator=generator)])

            batch_seed = int(torch.randint(2**31, (), generator=generator))
            prompts = torch.stack(prompt, dim=1)
            progress.advance(prompts.numel())
            for text in _generate(model, tokenizer, prompts, sequence_length, batch_seed, progress):
                written += len(text)
                yield text
            if written >= num_tokens:
                return


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, length: int, seed: int,
    progress: Progress,
) -> Iterator[list[int]]:  # fmt: skip
    """Samples one text for each row of prompts, (batch, n), each up to the end that the model gives it."""
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    ends |= {tokenizer.eos_token_id} - {None}

    # Plain sampling, whatever the model's own settings are.
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, use_cache=True,
        max_length=length, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0),
    )  # fmt: skip

    modes = {module: module.training for module in model.modules()}
    device = next(model.get_input_embeddings().parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        try:
            model.eval()
            prompts = prompts.to(device)
            mask = torch.ones_like(prompts)
            texts = cast(Any, model).generate(
                prompts, attention_mask=mask, generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Watch(progress, ends)]),
            ).tolist()  # fmt: skip
        finally:
            for module, training in modes.items():
                module.training = training

    # What follows the end of a text is padding.
    for text in texts:
        written = range(prompts.shape[1], len(text))
        yield text[: next((i + 1 for i in written if text[i] in ends), len(text))]


class _Watch(StoppingCriteria):
    """Stops no text: says how many tokens are written."""

    def __init__(self, progress: Progress, ends: set[int]) -> None:
        self._progress, self._ends = progress, torch.tensor(sorted(ends), dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1]  # of a text that ended, padding, which is one of the ends
        self._progress.advance(int(torch.isin(last, self._ends.to(last.device), invert=True).sum()))
        return torch.zeros_like(last, dtype=torch.bool)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, languages: Sequence[str]) -> Tensor:
    """The first token of each of the commonest words, as they start a text, (n,)."""
    lists = [word_list(language, PROMPT_WORDS // len(languages))[0] for language in languages]
    words = [word[:1].upper() + word[1:] for word in chain(*lists)]
    encoded = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids[0] for ids in encoded if ids])
