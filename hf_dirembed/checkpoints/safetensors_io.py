"""Safetensors files by byte ranges: what is only copied is never a tensor in memory, no file is mapped as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from ..compression.row_files import FileRows
from ..errors import CheckpointError


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPY_BYTES = 1 << 24  # at once


@dataclass(frozen=True)
class StoredFile:
    """What the header of a safetensors file says.

    Attributes:
        path: The file.
        metadata: Free text by name; None without any.
        tensors: Of each tensor by name its `dtype`, `shape` and `data_offsets`, as they stand in the header.
        start: The byte that the offsets are counted from.
    """

    path: Path
    metadata: dict[str, str] | None
    tensors: dict[str, dict[str, Any]]
    start: int

    @classmethod
    def read(cls, path: Path) -> StoredFile:
        """Reads the header.

        Raises:
            SafetensorError: If the file is malformed.
            OSError: If it cannot be read.

        Example:
            >>> import tempfile
            >>> from safetensors.torch import save_file
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     save_file({"a": torch.ones(2, 3)}, f"{folder}/a.safetensors", {"format": "pt"})
            ...     stored = StoredFile.read(Path(folder, "a.safetensors"))
            >>> stored.metadata, stored.tensors["a"]["shape"], stored.num_bytes("a")
            ({'format': 'pt'}, [2, 3], 24)
        """
        # The library checks it. Its framework "np" maps for reading alone; "pt" reserves memory for the whole file.
        with safe_open(path, framework="np"), open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return cls(path, header.pop("__metadata__", None), header, 8 + size)

    def dtype(self, name: str) -> torch.dtype | None:
        """The floating dtype of a tensor; None for another."""
        return DTYPES.get(self.tensors[name]["dtype"])

    def rows(self, name: str) -> FileRows:
        """The rows of a matrix, of which slices become tensors."""
        tensor = self.tensors[name]
        return FileRows(self.path, tuple(tensor["shape"]), self.dtype(name), self.start + tensor["data_offsets"][0])

    def num_bytes(self, name: str) -> int:
        """The bytes of a tensor in the file."""
        begin, end = self.tensors[name]["data_offsets"]
        return end - begin

    def copy(self, name: str, target: BinaryIO) -> None:
        """Appends the bytes of a tensor to another file."""
        with open(self.path, "rb") as file:
            file.seek(self.start + self.tensors[name]["data_offsets"][0])
            left = self.num_bytes(name)
            while left:
                data = file.read(min(left, COPY_BYTES))
                if not data:
                    raise CheckpointError(f"{self.path} has become shorter while it was read: try again")
                target.write(data)
                left -= len(data)


def write_merged(
    target: Path, parts: Iterable[tuple[StoredFile, Iterable[str]]], metadata: Mapping[str, str] | None
) -> None:
    """Writes tensors of several safetensors files into one, byte for byte.

    Args:
        target: The new file.
        parts: Files, with the names of those of their tensors that are taken.
        metadata: Of the new file.
    """
    chosen = {name: stored for stored, names in parts for name in names}

    def alignment(name: str) -> tuple[int, str]:
        shape = chosen[name].tensors[name]["shape"]
        return -(chosen[name].num_bytes(name) // max(prod(shape), 1)), name

    order = sorted(chosen, key=alignment)  # wide numbers first, so that each starts at a multiple of its size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        end = offset + chosen[name].num_bytes(name)
        header[name] = {**chosen[name].tensors[name], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            chosen[name].copy(name, file)
