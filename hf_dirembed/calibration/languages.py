"""What words running text has: `wordfreq` lists, the forms in which words stand, the languages a model card states."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import numpy as np

from ..errors import WeightsError
from ..hub.metadata import card_metadata


FORM_SHARE = 6  # one listed word in six, the commonest, is taken in all its forms; the rest after a space only

# Where a word stands (what precedes it, capitalised?) and how often, in running text of a spaced script.
WORD_FORMS = ((" ", False, 0.80), (" ", True, 0.13), ("\n", True, 0.05), ("\n", False, 0.02))
# Without spaces, what stands before a word is another word: an ideographic comma, which no vocabulary merges.
UNSPACED_FORMS = (("、", False, 1.0),)
# wordfreq lists Korean morphemes: particles and endings follow without a space.
LANGUAGE_FORMS = {"zh": UNSPACED_FORMS, "ja": UNSPACED_FORMS, "ko": ((" ", False, 0.5), ("、", False, 0.5))}
# Relative frequencies of marks in edited text, as they stand after a letter.
MARKS: dict[str, float] = {
    ",": 40,
    ".": 40,
    ' "': 5,
    '"': 5,
    "'": 4,
    "-": 7,
    " -": 2,
    " (": 5,
    ")": 5,
    ":": 4,
    ";": 2,
    "?": 3,
    "!": 3,
}
MARKS |= {"/": 2, "...": 1, "’": 2, " “": 2, "”": 2, " –": 1, " —": 1, "\n": 8, "\n\n": 5, ".\n": 3, "%": 1, " $": 1}
MARKS |= {f" {digit}": 2 for digit in range(10)} | {f" {number}": 0.08 for number in range(10, 100)}
MARKS |= {f" {year}": 0.05 for year in range(1950, 2030)}
# wordfreq's lists are lower-case; this pronoun never is, and is one English word in eighty.
CAPITALISED = {"en": {"i", "i'm", "i've", "i'll", "i'd"}}
UNSPACED_MARKS = {"，": 35, "。": 30, "、": 10, "「": 4, "」": 4, "“": 3, "”": 3, "：": 3, "？": 3, "！": 3, "\n": 8}


def card_languages(path: str | Path) -> tuple[str, ...]:
    r"""The languages that a model card states (`language:` in the YAML head of README.md) and `wordfreq` knows.

    Args:
        path: A model folder, or its README.md.

    Returns:
        Languages of `wordfreq.available_languages()`; none if there is no card, or it says "multilingual" or only
        what no word list has. `token_weights` then goes by the vocabulary: see `tokenizer_languages`.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (pathlib.Path(folder) / "README.md").write_text("---\nlanguage: [de, code]\n---\n")
        ...     card_languages(folder)
        ('de',)
    """
    stated = card_metadata(path).get("language")
    stated = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    if "multilingual" in stated:
        return ()
    # YAML 1.1 reads an unquoted `no` as false
    found = (_known_language("no" if tag is False else str(tag)) for tag in stated)
    return tuple(dict.fromkeys(language for language in found if language))


def wordfreq_language(tag: str) -> str:
    """The language of `wordfreq.available_languages()` that a language tag means.

    Raises:
        WeightsError: If there is no word list for it.

    Example:
        >>> wordfreq_language("pt-BR"), wordfreq_language("zh-Hant")
        ('pt', 'zh')
    """
    if language := _known_language(tag):
        return language
    import wordfreq

    known = " ".join(sorted(wordfreq.available_languages()))
    raise WeightsError(f"no word list for language {tag!r}: choose among {known}, or count text of your own")


def _known_language(tag: str) -> str | None:
    """The `wordfreq` language of a tag, or None."""
    import langcodes
    import wordfreq  # here, because it takes a third of a second and few commands need it

    available = list(wordfreq.available_languages())
    if tag in available:  # matching would load a database of languages
        return tag
    try:
        # wordfreq unifies scripts: zh-Hant has the word list of zh
        for candidate in (tag, langcodes.Language.get(tag).language or "und"):
            match, _ = langcodes.closest_match(candidate, available, max_distance=10)
            if match != "und":
                return match
    except ValueError:  # not a language tag at all
        pass
    return None


def word_list(language: str, number: int) -> tuple[list[str], np.ndarray]:
    """The most frequent words of a language, lower-case, and their frequencies.

    Numbers, which wordfreq pools, are left out.

    Args:
        language: One of `wordfreq.available_languages()`.
        number: How many words, at most.

    Returns:
        The words and, (n,) float64, their frequencies, both in falling order.

    Example:
        >>> word_list("en", 3)[0]
        ['the', 'to', 'and']
    """
    import wordfreq

    small = wordfreq.available_languages("small")
    available = small if number <= 20_000 else wordfreq.available_languages()
    words, frequencies = [], []
    for centibels, bucket in enumerate(_buckets(available[language])):
        kept = [word for word in bucket if not any(map(str.isdigit, word))]
        words += kept
        frequencies += [10 ** (-centibels / 100)] * len(kept)
        if len(words) >= number:
            break
    return words[:number], np.array(frequencies[:number])


def _buckets(path: str) -> Iterator[list[str]]:
    """The words of a list of wordfreq's by their frequency, 1, 10^-.01, 10^-.02 and so on.

    `wordfreq.read_cBpack` reads a file to its end, where the beginning is wanted, and `get_frequency_dict` keeps it in
    memory for good.

    Raises:
        WeightsError: If the file is of another format.
    """
    with gzip.open(path) as file:
        unpacker = msgpack.Unpacker(file, raw=False)
        number, header = unpacker.read_array_header(), unpacker.unpack()
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != ("cB", 1):
            raise WeightsError(f"{path} is no word list of the format cB 1: install another version of wordfreq")
        for _ in range(number - 1):
            yield unpacker.unpack()


def word_forms(language: str, number: int) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Yields what precedes words in running text, the words as they stand there, and their frequencies."""
    words, frequencies = word_list(language, number)
    words = [_capitalise(word) if word in CAPITALISED.get(language, ()) else word for word in words]
    forms = LANGUAGE_FORMS.get(language, WORD_FORMS)
    common = -(-len(words) // FORM_SHARE)
    yield forms[0][0], words[common:], frequencies[common:]
    words, frequencies = words[:common], frequencies[:common]
    for before, capitalised, share in forms:
        yield before, [_capitalise(word) for word in words] if capitalised else words, share * frequencies


def _capitalise(word: str) -> str:
    return word[:1].upper() + word[1:]  # str.capitalize() would lower the rest


def is_unspaced(language: str) -> bool:
    """Whether words of a language follow each other without spaces."""
    return LANGUAGE_FORMS.get(language) is UNSPACED_FORMS
