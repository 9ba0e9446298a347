"""What models are evaluated on: running text and sentence pairs, from a file, a dataset or memory."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import EvaluationError


if TYPE_CHECKING:
    import datasets

    Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset | Iterable[Mapping[str, Any]]
    TextSource: TypeAlias = str | os.PathLike[str] | Iterable[str] | Rows
    PairSource: TypeAlias = str | os.PathLike[str] | Iterable[Sequence[Any]] | Rows


_FILE_NAME = re.compile(
    r"^(\.|~|/)|\.(txt|text|md|csv|tsv|json|jsonl|parquet|gz)$|/.*/", re.IGNORECASE
)  # as no dataset's
_REVISION = re.compile(r"@([0-9a-f]{40})/")  # in the address that `datasets` has a file from


@dataclass(frozen=True)
class DatasetSource:
    """Where data is from, exactly enough to have the same again.

    Attributes:
        name: The Hub id of a dataset, the name of a local file or folder (without what is above it), or `memory`.
        config: The dataset's configuration, like `sst2`.
        split: The dataset's split.
        revision: The commit of the dataset on the Hub, where `datasets` says.
        sha256: The hash of a local file.
    """

    name: str = "memory"
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.name, self.config, self.split) if part)


@dataclass(frozen=True)
class Text:
    """Running text and where it is from.

    Attributes:
        content: All of it; documents are joined by an empty line.
        name: The file, or the dataset with its configuration and split.
        source: Where it is from, as results record it.
    """

    content: str
    name: str
    source: DatasetSource = field(default_factory=DatasetSource, repr=False)


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences with gold similarities.

    Attributes:
        first: One sentence of each pair.
        second: The other.
        scores: The gold similarity of each pair, on any scale.
        name: The file, or the dataset with its configuration and split.
        source: Where they are from, as results record it.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]
    name: str
    source: DatasetSource = field(default_factory=DatasetSource, repr=False)


def require(module: str, extra: str = "eval") -> Any:
    """Imports a module of an optional package.

    Raises:
        EvaluationError: If it is not installed.

    Example:
        >>> require("no_such_module")
        Traceback (most recent call last):
        ...
        hf_dirembed.errors.EvaluationError: no_such_module is not installed: pip install 'hf_dirembed[eval]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise EvaluationError(f"{package} is not installed: pip install 'hf_dirembed[{extra}]'") from error


def load_text(
    source: TextSource | Text, *, config: str | None = None, split: str = "test", column: str = "text"
) -> Text:
    r"""Reads running text.

    Args:
        source: A UTF-8 text file, the Hub id of a dataset, a loaded `datasets` dataset, or strings. A single string
            always names a file or a dataset: text itself goes in a list.
        config: The dataset's configuration, like `wikitext-2-raw-v1`.
        split: The dataset's split.
        column: The dataset's column that holds the text. Rows are joined by empty lines, as in
            https://huggingface.co/docs/transformers/perplexity.

    Raises:
        EvaluationError: If there is no such file, dataset, split or column, or no text in it.

    Example:
        >>> load_text(["The cat sat.", "The dog ran."])
        Text(content='The cat sat.\n\nThe dog ran.', name='memory')
    """
    if isinstance(source, Text):
        return source
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        content, name, origin = read_file(source), os.fspath(source), file_source(source)
    else:
        rows, name, origin = load_rows(source, config, split)
        content = "\n\n".join(_string(row, column, name) for row in rows)
    if not content.strip():
        raise EvaluationError(f"{name} holds no text: give a file or a dataset that does")
    return Text(content, name, origin)


def load_pairs(source: PairSource | SentencePairs, *, config: str | None = None, split: str = "test") -> SentencePairs:
    """Reads sentence pairs with gold similarities.

    Args:
        source: A CSV file without a header, of the columns sentence1, sentence2 and score; or the Hub id of a
            dataset, or a loaded dataset, with columns `sentence1`, `sentence2` and `score` (or `label`); or triples.
        config: The dataset's configuration.
        split: The dataset's split.

    Raises:
        EvaluationError: If there is no such file, dataset, split or column, or a row is malformed.

    Example:
        >>> load_pairs([("A cat sat.", "A cat was sitting.", 4.8), ("A cat sat.", "Prices rose.", 0)]).scores
        (4.8, 0.0)
    """
    if isinstance(source, SentencePairs):
        return source

    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        name, origin = os.fspath(source), file_source(source)
        try:
            rows: Iterable[Any] = list(csv.reader(io.StringIO(read_file(source, newline=""), newline="")))
        except csv.Error as error:
            raise EvaluationError(
                f"{name} is no CSV file ({error}): give sentence1,sentence2,score in quotes"
            ) from error
    else:
        rows, name, origin = load_rows(source, config, split)

    triples = [_pair(row, number, name) for number, row in enumerate(rows, start=1)]
    if not triples:
        raise EvaluationError(f"{name} holds no sentence pairs: give a file or a dataset that does")

    first, second, scores = zip(*triples, strict=True)
    return SentencePairs(first, second, scores, name, origin)


def read_file(file: str | os.PathLike[str], newline: str | None = None) -> str:
    """The text of a UTF-8 file.

    Raises:
        EvaluationError: If it cannot be read, or is no UTF-8.
    """
    try:
        with open(file, encoding="utf-8-sig", newline=newline) as opened:
            return opened.read()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{os.fspath(file)} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    except OSError as error:
        raise EvaluationError(f"{os.fspath(file)} cannot be read ({error.strerror}): check its permissions") from error


def file_source(file: str | os.PathLike[str]) -> DatasetSource:
    """Says which local file it is, whatever its folder.

    Raises:
        EvaluationError: If it cannot be read.
    """
    try:
        return DatasetSource(Path(file).name, sha256=hashlib.sha256(Path(file).read_bytes()).hexdigest())
    except OSError as error:
        raise EvaluationError(f"{os.fspath(file)} cannot be read ({error.strerror}): check its permissions") from error


def load_rows(source: Any, config: str | None, split: str) -> tuple[Iterable[Any], str, DatasetSource]:
    """The rows of a dataset, or what is in memory already; its name; and where it is from.

    Raises:
        EvaluationError: If there is no such dataset, configuration or split.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise EvaluationError(f"{source!r} is no data: give a file, a dataset or a list")
        return source, "memory", DatasetSource()

    name = os.fspath(source)
    if _FILE_NAME.search(name) and not os.path.exists(name):
        raise EvaluationError(f"there is no file {name[:200]}: check its name, or give the id of a dataset on the Hub")
    datasets = require("datasets")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    # What `datasets` raises for a name, a configuration, a split or a script that it cannot use.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise EvaluationError(
            f"{name[:100]!r} is neither a file here nor a dataset with split {split!r} that `datasets` loads "
            f"({reason[:200]}): check the name, its configuration and the split"
        ) from error

    # Files of a dataset on the Hub have its commit in their address.
    commits = {_REVISION.search(url) for url in rows.info.download_checksums or ()}
    revision = next((commit[1] for commit in commits if commit), None)
    origin = DatasetSource(Path(name).name if os.path.isdir(name) else name, config, split, revision)
    return rows, "/".join(part for part in (name, config, split) if part), origin


def _string(row: Any, column: str, name: str) -> str:
    if isinstance(row, Mapping):
        if column not in row:
            raise EvaluationError(f"{name} has no column {column!r}, only {sorted(row)}: name the one with the text")
        row = row[column]
    if not isinstance(row, str):
        raise EvaluationError(f"{name} holds {row!r:.80} where text is due: give strings, or name a column of them")
    return row


def _pair(row: Any, number: int, name: str) -> tuple[str, str, float]:
    if isinstance(row, Mapping):
        score = "score" if "score" in row else "label"
        missing = [column for column in ("sentence1", "sentence2", score) if column not in row]
        if missing:
            raise EvaluationError(
                f"{name} has no column {missing[0]!r}, only {sorted(row)}: "
                "the columns must be sentence1, sentence2 and score (or label)"
            )
        row = [row["sentence1"], row["sentence2"], row[score]]

    if isinstance(row, str) or len(row) != 3 or not all(isinstance(sentence, str) for sentence in row[:2]):
        raise EvaluationError(f"row {number} of {name} is {row!r:.120}: give sentence1, sentence2 and score")

    try:
        value = float(row[2])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise EvaluationError(
            f"row {number} of {name} has the score {row[2]!r:.80}, which is no finite number: "
            "mend the row, or remove it if it is a header"
        )

    return row[0], row[1], value
