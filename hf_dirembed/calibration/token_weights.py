"""Token weights: how often each row of an embedding table is used, known or expected without any text.

Errors of frequent tokens matter more than errors of rare ones, so every method of this package can weigh the rows.
In order of preference the weights come from counts of real text, from word-frequency lists (package `wordfreq`, over
40 languages) pushed through the tokenizer, and from the order or the scores of the tokenizer's own vocabulary. The
less certain source is always kept as a floor under the better one: a table is used on text that nobody counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import WeightsError
from .languages import MARKS, UNSPACED_MARKS, is_unspaced, word_forms, word_list, wordfreq_language
from .languages import card_languages as card_languages


RANK_OFFSET = 50  # of the Zipf-Mandelbrot law 1 / (rank + 50) that BPE and WordPiece vocabularies roughly follow
PRIOR_SHARE = 0.15  # of the weight is the vocabulary's own prior: words that no list has, other domains
UNIFORM_SHARE = 0.05  # of the prior is spread evenly: no row may become free to destroy
PSEUDO_COUNTS = 10_000  # tokens that the expected weights are worth beside counts: a short text says little
PUNCTUATION_SHARE = 0.15  # of the tokens of edited text are punctuation, numbers and line ends
TEXT_LENGTH = 64  # tokens of a typical input (sentences to paragraphs), which carry the special tokens once
LANGUAGE_WORDS = 60_000  # of one language, 97 % of running English; the prior stands in for rarer words
MAX_WORDS = 100_000  # over all languages, which bounds the time
CHUNK_WORDS = 1_000  # tokenised as one text: one call costs far more than one word
COVERED_FERTILITY = 1.5  # tokens per word, relative to the tokenizer's best language, up to which one is covered
PROBE_WORDS = slice(500, 1500)  # content words: the commonest function words are tokens of any Latin vocabulary

# Vocabulary entries that no running text yields: [unused12], <extra_id_3>, <|reserved_7|>, <0x0A>.
PLACEHOLDER = re.compile(r"\[\w[\w ]*\]|<[^<>\s]+>")
PLAIN = {  # token ids and nothing else
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


def token_weights(
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    *,
    languages: str | Sequence[str] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Weighs every row of an embedding table by how often its token is expected in use.

    Args:
        tokenizer: The tokenizer of the table.
        num_rows: Rows of the table; those beyond the vocabulary (padding) get the floor.
        languages: Language tags of the text to expect ("en", or ["en", "de"]), in equal parts; by default those
            that the vocabulary was made for, see `tokenizer_languages`.
        counts: Token counts of real text, (num_rows,), see `count_tokens`; the expected weights become their floor.

    Returns:
        The weights, (num_rows,) float64, positive, of sum 1.

    Raises:
        WeightsError: If the table has too few rows for the tokenizer, a language has no word list, or the counts
            are not `num_rows` non-negative numbers.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")  # doctest: +SKIP
        >>> weights = token_weights(tokenizer, 30522, languages="en")  # doctest: +SKIP
        >>> the, zeal = tokenizer.convert_tokens_to_ids(["the", "zeal"])  # doctest: +SKIP
        >>> bool(weights[the] > 1000 * weights[zeal])  # doctest: +SKIP
        True
    """
    prior = tokenizer_prior(tokenizer, num_rows)
    told = (languages,) if isinstance(languages, str) else tuple(languages or ())
    known = tuple(dict.fromkeys(wordfreq_language(tag) for tag in told)) or tokenizer_languages(tokenizer)
    weights = (1 - PRIOR_SHARE) * expected_frequencies(tokenizer, num_rows, known) + PRIOR_SHARE * prior
    return weights if counts is None else mix_counts(counts, weights)


def mix_counts(counts: Tensor, floor: Tensor, *, floor_share: float = PRIOR_SHARE) -> Tensor:
    """Mixes token counts with a floor of expected weights, the more of the floor the shorter the counted text.

    Args:
        counts: (num_rows,), non-negative.
        floor: (num_rows,) float64, of sum 1.
        floor_share: The least share of the floor, however long the text.

    Returns:
        (num_rows,) float64, of sum 1.

    Raises:
        WeightsError: If the counts are not `num_rows` finite, non-negative numbers.

    Example:
        >>> import torch
        >>> mix_counts(torch.tensor([90_000, 0]), torch.tensor([0.5, 0.5]).double(), floor_share=0.5).tolist()
        [0.75, 0.25]
    """
    counts = torch.as_tensor(counts).detach().to(device="cpu", dtype=torch.float64)
    if counts.shape != floor.shape:
        raise WeightsError(f"counts of shape {tuple(counts.shape)}: give one count for each of {len(floor)} rows")
    if not (counts.isfinite().all() and (counts >= 0).all()):
        raise WeightsError("counts hold a negative, infinite or NaN value: give the number of times a token occurs")
    total = counts.sum()
    share = max(floor_share, PSEUDO_COUNTS / (PSEUDO_COUNTS + float(total)))
    return (1 - share) * counts / total.clamp_min(1) + share * floor if total else floor


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], num_rows: int) -> Tensor:
    """Counts the tokens of texts as a model is given them, special tokens included.

    Args:
        tokenizer: The tokenizer of the table.
        texts: Strings, taken one by one.
        num_rows: Rows of the table.

    Returns:
        The counts, (num_rows,) float64.

    Raises:
        WeightsError: If `texts` is one string, or yields anything but strings, or a token is beyond the table.
    """
    if isinstance(texts, str):
        raise WeightsError("texts is one string, which would be read letter by letter: give [text]")
    counts = np.zeros(num_rows)
    remaining = iter(texts)
    while batch := list(islice(remaining, CHUNK_WORDS)):
        if wrong := next((text for text in batch if not isinstance(text, str)), None):
            raise WeightsError(f"texts holds a {type(wrong).__name__}: give strings")
        _add(counts, np.concatenate([np.asarray(ids, dtype=np.int64) for ids in _tokenize(tokenizer, batch, True)]))
    return torch.from_numpy(counts)


def tokenizer_prior(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Tensor:
    """The token frequencies that the vocabulary itself implies, with no word list and no text.

    A SentencePiece unigram model states log-probabilities. BPE and WordPiece vocabularies are ordered by frequency,
    roughly, so a token of rank r gets 1 / (r + 50). Special, added and placeholder tokens and padding rows take no
    rank, and get the mean: what the vocabulary was trained on never held them, but a prompt or a fine-tuning may.

    Args:
        tokenizer: The tokenizer of the table.
        num_rows: Rows of the table.

    Returns:
        The prior, (num_rows,) float64, positive, of sum 1.

    Raises:
        WeightsError: If the vocabulary has ids beyond the table.
    """
    vocabulary = tokenizer.get_vocab()
    if vocabulary and max(vocabulary.values()) >= num_rows:
        raise WeightsError(
            f"the tokenizer knows token id {max(vocabulary.values())}, the table ends at {num_rows - 1}: "
            "give the tokenizer that belongs to the model, or resize the model's embeddings to it"
        )
    tokens: list[str | None] = [None] * num_rows
    for token, index in vocabulary.items():
        tokens[index] = token
    outside = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, None}
    text = np.array([token not in outside and not PLACEHOLDER.fullmatch(token or "") for token in tokens])

    prior = np.zeros(num_rows)
    scores = _unigram_scores(tokenizer)
    if scores is None:
        prior[text] = 1 / (np.arange(text.sum()) + RANK_OFFSET)
    else:
        stated = np.full(num_rows, -np.inf)
        stated[: len(scores)] = scores[:num_rows]
        text &= np.isfinite(stated) & (stated < 0)  # control and user-defined pieces have score 0, not a probability
        prior[text] = np.exp(stated[text])
    prior[~text] = prior[text].mean() if text.any() else 1.0
    prior = (1 - UNIFORM_SHARE) * prior / prior.sum() + UNIFORM_SHARE / num_rows
    return torch.from_numpy(prior)


def expected_frequencies(tokenizer: PreTrainedTokenizerBase, num_rows: int, languages: Sequence[str]) -> Tensor:
    """The expected frequency of every token in running text of some languages, in equal parts.

    Every word of a `wordfreq` list is tokenised in the forms in which text has it (after a space or at the start of
    a line, lower-case or capitalised), and gives its frequency to its tokens. Punctuation, numbers and line ends
    have a fixed share, and so have the special tokens that the tokenizer puts around a text.

    Args:
        tokenizer: The tokenizer of the table.
        num_rows: Rows of the table.
        languages: Languages of `wordfreq.available_languages()`.

    Returns:
        The frequencies, (num_rows,) float64, non-negative, of sum 1.
    """
    total = np.zeros(num_rows)
    for language in languages:
        words, marks = np.zeros(num_rows), np.zeros(num_rows)
        for before, forms, frequencies in word_forms(language, min(LANGUAGE_WORDS, MAX_WORDS // len(languages))):
            _add_words(words, tokenizer, forms, frequencies, before)
        unspaced = is_unspaced(language)
        signs = UNSPACED_MARKS if unspaced else MARKS
        _add_words(marks, tokenizer, list(signs), np.array(list(signs.values())), "的" if unspaced else " a")
        total += (1 - PUNCTUATION_SHARE) * _normalised(words) + PUNCTUATION_SHARE * _normalised(marks)
    total = _normalised(total)
    special = Counter(next(_tokenize(tokenizer, ["a"], True))) - Counter(next(_tokenize(tokenizer, ["a"], False)))
    for index, number in special.items():
        total[index] += number / TEXT_LENGTH
    return torch.from_numpy(_normalised(total))


def tokenizer_languages(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The languages that a vocabulary was made for: those whose common words it keeps in few tokens.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        Languages of `wordfreq.available_languages()`, the best covered first: ("en",) for an English vocabulary,
        dozens for a multilingual one; ("en",) too if the vocabulary covers none.
    """
    import wordfreq

    fertility = {}
    for language in sorted(wordfreq.available_languages("small")):
        words, _ = word_list(language, PROBE_WORDS.stop)
        words = words[PROBE_WORDS]
        ids, _ = _tokens_of_words(tokenizer, words, "、" if is_unspaced(language) else " ")
        if np.mean(ids == tokenizer.unk_token_id) < 0.01 and len(ids):
            fertility[language] = len(ids) / len(words)
    best = min(fertility.values(), default=np.inf)
    covered = [language for language, tokens in fertility.items() if tokens <= COVERED_FERTILITY * best]
    return tuple(sorted(covered, key=fertility.__getitem__)) if best < 2 * COVERED_FERTILITY else ("en",)


def _normalised(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum() if counts.any() else counts


def _add_words(
    counts: np.ndarray, tokenizer: PreTrainedTokenizerBase, words: list[str], frequencies: np.ndarray, before: str
) -> None:
    """Adds each word's frequency to the counts of its tokens."""
    ids, owners = _tokens_of_words(tokenizer, words, before)
    _add(counts, ids, frequencies[owners])


def _tokens_of_words(
    tokenizer: PreTrainedTokenizerBase, words: list[str], before: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenises words in context, `before` preceding each: token ids, and the number of the word each belongs to.

    The words of a chunk are one text, as the tokenizer's own pre-tokenisation would see it; character offsets say
    whose a token is: the word's in which it ends. A space belongs to the word that follows it, anything else that
    stands before a word to none.
    """
    if not tokenizer.is_fast:  # no offsets: word by word
        encoded = _tokenize(tokenizer, [before + word if before == " " else word for word in words], False)
        ids = [np.asarray(tokens, dtype=np.int64) for tokens in encoded]
        return np.concatenate(ids), np.repeat(np.arange(len(words)), [len(tokens) for tokens in ids])

    all_ids, all_owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    starts = range(0, len(words), CHUNK_WORDS)
    if not starts:
        return all_ids[0], all_owners[0]

    chunks = ["".join(before + word for word in words[start : start + CHUNK_WORDS]) for start in starts]
    encoded = tokenizer(chunks, return_offsets_mapping=True, **PLAIN)

    for start, ids, offsets in zip(starts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        lengths = np.array([len(before) + len(word) for word in words[start : start + CHUNK_WORDS]])
        ends = np.cumsum(lengths)
        last = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1] - 1  # the token's last character
        owner = np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1)
        within = (last >= (ends - lengths)[owner] + len(before)) | (before == " ")

        all_ids.append(np.asarray(ids, dtype=np.int64)[within])
        all_owners.append(start + owner[within])

    return np.concatenate(all_ids), np.concatenate(all_owners)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> Iterator[list[int]]:
    yield from tokenizer(texts, **{**PLAIN, "add_special_tokens": special})["input_ids"]


def _add(counts: np.ndarray, ids: np.ndarray, frequencies: np.ndarray | None = None) -> None:
    """Adds to the counts of token ids in place."""
    if len(ids) and ids.max() >= len(counts):
        raise WeightsError(f"token id {ids.max()} is beyond the table's {len(counts)} rows: wrong tokenizer?")
    counts += np.bincount(ids, frequencies, minlength=len(counts))


def _unigram_scores(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """The log-probabilities of a SentencePiece unigram vocabulary by id, or None for any other tokenizer."""
    if not tokenizer.is_fast:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "Unigram":
        return None
    return np.array([score for _, score in model["vocab"]], dtype=np.float64)
