"""Calibration text, from a file, strings or a dataset, cut into windows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError


if TYPE_CHECKING:
    import datasets

# in quotes, because `datasets` need not be installed
Texts: TypeAlias = "str | Path | Iterable[str] | Iterable[Sequence[int]] | datasets.Dataset | datasets.IterableDataset"

CALIBRATION_TOKENS = 32_768  # unless told otherwise
BLOCK_CHARACTERS = 1 << 16  # of text are tokenised at once: few enough for any memory, enough to be quick


def windows(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, *, length: int, packed: bool = True
) -> Iterator[list[int]]:
    """Cuts texts into windows of token ids, one by one, special tokens around each as the tokenizer puts them.

    Args:
        texts: The path of a UTF-8 text file, strings, a `datasets` dataset with a column `text` or one string column,
            or windows of token ids, which are only cut where they are too long.
        tokenizer: The model's tokenizer.
        length: Most tokens of a window, special tokens included.
        packed: Texts are joined, as language models are trained, and every window is full but the last; otherwise
            no window holds more than one text (of a file: one line), as sentence encoders are used.

    Yields:
        Token ids, at least one and at most `length`.

    Raises:
        CalibrationError: If the texts are none of the above, or the special tokens leave no room for text.
    """
    prefix, suffix = _special_tokens(tokenizer)
    room = length - len(prefix) - len(suffix)
    if room < 1:
        raise CalibrationError(f"sequence_length={length} leaves no room beside special tokens: give a larger one")

    pending: list[int] = []
    for text in _blocks(_strings(texts, lines=not packed), packed):
        if not isinstance(text, str):
            yield from (text[start : start + length] for start in range(0, len(text), length))
            continue

        # Of packed text, what does not fill a window waits for more.
        pending += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(pending) - len(pending) % room if packed else len(pending)
        for start in range(0, whole, room):
            yield prefix + pending[start : min(start + room, whole)] + suffix
        pending = pending[whole:]

    if pending:
        yield prefix + pending + suffix


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after one text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _strings(texts: Texts, *, lines: bool) -> Iterator[str | list[int]]:
    """The texts one by one, whatever they are in: of a file its lines or its blocks of lines."""
    if isinstance(texts, str | Path):
        yield from _file(Path(texts), lines)
        return

    column = _text_column(texts)
    if not isinstance(texts, Iterable):
        raise CalibrationError(f"texts is a {type(texts).__name__}: give a path, strings or a dataset")

    item: Any
    for item in texts:
        text = item[column] if column else item
        if isinstance(text, str):
            yield text
        elif isinstance(text, Sequence | Tensor) and not isinstance(text, bytes):
            ids = text.tolist() if isinstance(text, Tensor) else list(text)
            if not all(isinstance(index, int) for index in ids):
                raise CalibrationError("texts holds a sequence of something but token ids: give strings")
            yield ids
        elif text is not None:  # an empty cell of a dataset
            raise CalibrationError(f"texts holds a {type(text).__name__}: give strings")


def _file(path: Path, lines: bool) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            if lines:
                yield from file
            else:
                while block := file.readlines(BLOCK_CHARACTERS):
                    yield "".join(block)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise CalibrationError(
            f"cannot read the calibration text {path} ({reason}): give the path of a UTF-8 text file, strings in a "
            "list, or 'self', which needs no text"
        ) from error


def check_file(path: str | Path) -> None:
    """Reads the beginning of a text file.

    Raises:
        CalibrationError: If that cannot be done.
    """
    next(_file(Path(path), lines=True), None)


def _text_column(texts: Any) -> str | None:
    """The column of a `datasets` dataset that holds the text; None for anything else."""
    if isinstance(texts, dict) and all(hasattr(split, "column_names") for split in texts.values()):
        raise CalibrationError(f"a dataset with splits {sorted(texts)}: give one of them")
    if not hasattr(texts, "column_names"):
        return None
    row = next(iter(texts), None)
    if row is None:
        return None
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(columns) != 1:
        raise CalibrationError(f"columns {sorted(row)}, none called text: give a dataset with one string column")
    return columns[0]


def _blocks(texts: Iterator[str | list[int]], joined: bool) -> Iterator[str | list[int]]:
    """Joins strings, with a blank line between, to blocks that are worth a call of the tokenizer."""
    block: list[str] = []
    size = 0
    for text in texts:
        if isinstance(text, str) and joined:
            block.append(text)
            size += len(text)
            if size >= BLOCK_CHARACTERS:
                yield "\n\n".join(block)
                block, size = [], 0
        elif text := text.strip() if isinstance(text, str) else text:
            yield text
    if block:
        yield "\n\n".join(block)
