"""Matrices of rows in files: read a slice at a time, written a slice at a time, never in memory as a whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError
from .table import RowSource


COPY_BYTES = 1 << 26  # that are copied at once


@dataclass(frozen=True)
class FileRows:
    """A row-major matrix in a file, of which slices become tensors.

    The file is opened anew for each slice, so that threads and processes can read at the same time.

    Attributes:
        path: The file.
        shape: `(num_rows, dim)`.
        dtype: Of the numbers; None for one that torch has no name for, of which nothing can be read.
        start: The byte that the matrix starts at.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = FileRows(Path(folder, "rows"), (3, 2), torch.uint8)
        ...     _ = rows.path.write_bytes(bytes(range(6)))
        ...     rows[1:3].tolist()
        [[2, 3], [4, 5]]
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int = 0

    def __getitem__(self, rows: slice, /) -> Tensor:
        assert self.dtype is not None
        first, stop, _ = rows.indices(self.shape[0])
        found = torch.empty((max(stop - first, 0), *self.shape[1:]), dtype=self.dtype)
        if found.numel():
            data = found.view(torch.uint8).numpy().data.cast("B")
            with open(self.path, "rb") as file:
                file.seek(self.start + first * (len(data) // len(found)))
                if file.readinto(data) != len(data):
                    raise CheckpointError(f"{self.path} has become shorter while it was read: try again")
        return found


class JoinedRows:
    """Matrices of the same columns as one, the rows of each below those of the one before.

    Example:
        >>> JoinedRows([torch.tensor([[1], [2]]), torch.tensor([[3]])])[1:3].tolist()
        [[2], [3]]
    """

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.shape[0] for part in parts)]
        self.shape, self.dtype = (self._starts[-1], *parts[0].shape[1:]), parts[0].dtype

    def __getitem__(self, rows: slice, /) -> Tensor:
        first, stop, _ = rows.indices(self.shape[0])
        found: list[Tensor] = []
        position = bisect_right(self._starts, first) - 1
        while first < stop or not found:
            position = min(position, len(self._parts) - 1)
            start, end = self._starts[position], min(stop, self._starts[position + 1])
            found.append(self._parts[position][first - start : max(end, first) - start])
            first, position = max(end, first), position + 1
        return found[0] if len(found) == 1 else torch.cat(found)


class RowSink(Protocol):
    """Where rows go that are made some at a time."""

    def put(self, first: int, rows: Tensor) -> None:
        """Takes the rows from number `first` on."""

    def tensor(self) -> Tensor:
        """All of them."""


MakeSink: TypeAlias = Callable[[str, tuple[int, ...]], RowSink]  # of a tensor's name and shape


def memory_sink(tensor: str, shape: tuple[int, ...]) -> RowSink:
    """Makes the place for a tensor in memory."""
    return MemorySink(shape)


class MemorySink:
    """Rows of bytes in memory.

    Args:
        shape: `(num_rows, bytes)`, or `(num_rows,)`.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = torch.empty(shape, dtype=torch.uint8)

    def put(self, first: int, rows: Tensor) -> None:
        """Takes the rows from number `first` on."""
        self._rows[first : first + len(rows)] = rows.cpu()

    def tensor(self) -> Tensor:
        """All of them."""
        return self._rows


@dataclass(frozen=True)
class FileSink:
    """Rows of bytes in a file; several processes may write theirs at the same time.

    Attributes:
        path: The file; `create` makes it.
        shape: `(num_rows, bytes)`, or `(num_rows,)`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = FileSink.create(Path(folder, "rows"), (3, 2))
        ...     sink.put(1, torch.tensor([[7, 8]], dtype=torch.uint8))
        ...     sink.tensor().tolist()
        [[0, 0], [7, 8], [0, 0]]
    """

    path: Path
    shape: tuple[int, ...]

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...]) -> FileSink:
        """Makes the file, full of zeros, which take no room on most disks."""
        with open(path, "wb") as file:
            file.truncate(prod(shape))
        return cls(path, shape)

    def put(self, first: int, rows: Tensor) -> None:
        """Writes the rows from number `first` on."""
        with open(self.path, "rb+") as file:
            file.seek(first * prod(self.shape[1:]))
            file.write(rows.cpu().contiguous().numpy().data)

    def tensor(self) -> Tensor:
        """All rows, mapped: they take memory only where they are touched."""
        mapped = torch.from_file(str(self.path), shared=True, size=prod(self.shape), dtype=torch.uint8)
        return mapped.view(self.shape)


@dataclass(frozen=True)
class TableFiles:
    """Tables in files, and a folder for what is made of them and is too large for the memory.

    Attributes:
        rows: Of each table, by the path of its module.
        folder: Where files may be made.
    """

    rows: Mapping[str, RowSource]
    folder: Path

    def blocks(self, path: str, widths: Sequence[int]) -> list[FileRows]:
        """Blocks of columns of a table, each in a file of its own; see `split_columns`."""
        files = [self.folder / f"{path}.{number}.rows" for number in range(len(widths))]
        return split_columns(self.rows[path], widths, files)

    def codes(self, path: str, tensor: str) -> Path:
        """The file for a tensor of a matrix, by the path of its module; not there where the tensor is in memory."""
        return self.folder / f"{path}.{tensor}.codes"

    def make_sink(self, path: str) -> MakeSink:
        """What makes such files, for the tensors of a matrix."""
        return partial(self._make_sink, path)

    def _make_sink(self, path: str, tensor: str, shape: tuple[int, ...]) -> RowSink:
        return FileSink.create(self.codes(path, tensor), shape)


def split_columns(rows: RowSource, widths: Sequence[int], files: Sequence[Path]) -> list[FileRows]:
    """Copies blocks of columns of a matrix into files of their own, in one pass over it.

    A block is then read without the rest of each row, however often.

    Args:
        rows: (num_rows, dim).
        widths: The columns of each block; they sum to `dim`.
        files: A new one for each block.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [Path(folder, name) for name in "ab"]
        ...     [block[0:2].tolist() for block in split_columns(torch.arange(6).view(2, 3), [1, 2], files)]
        [[[0], [3]], [[1, 2], [4, 5]]]
    """
    assert rows.dtype is not None
    num_rows, dim = rows.shape[0], rows.shape[1]
    step = max(1, COPY_BYTES // (dim * rows.dtype.itemsize))
    for path in files:
        path.write_bytes(b"")
    for first in range(0, num_rows, step):
        blocks = rows[slice(first, min(first + step, num_rows))].split(list(widths), dim=1)
        for path, block in zip(files, blocks, strict=True):
            with open(path, "ab") as file:
                file.write(block.contiguous().view(torch.uint8).numpy().data)
    return [FileRows(path, (num_rows, width), rows.dtype) for path, width in zip(files, widths, strict=True)]
