"""Compressing a checkpoint whose model does not fit into memory: only its tables are read, chunk by chunk.

The model is built on the meta device, to learn from its class which tensors are tables and what is tied to them. The
tables' rows are read from the files as they are needed, the shards that hold tables are written anew from the bytes of
the old ones, and all others are copied as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..calibration.head_norm import norm_before_head
from ..compression.row_files import JoinedRows, TableFiles
from ..compression.table import RowSource
from ..errors import CheckpointError, TableError
from ..pipeline import compress_model
from ..remote.checks_dirembed import checked_codes, shards_of
from ..remote.codes_dirembed import checksum_of_bytes
from ..remote.configuration_dirembed import MODEL_TYPE
from ..remote.tables_dirembed import table_at, tied_modules
from ..request import CompressionRequest
from ..tables import VocabularyTable, choose_tables, is_head
from .loading import as_unreadable_error, model_class, model_on_meta
from .safetensors_io import COPY_BYTES, StoredFile, write_merged


_BY_ROW = ("weight", "row_weight")  # tensors of codes that may be in files of their own

# Of a config, what says that a checkpoint's tensors are not what the model has: cast, renamed or quantised.
_CONVERTED = (MODEL_TYPE, "quantization_config", "transformers_weights")


@dataclass(frozen=True)
class StoredPiece:
    """Rows of a table in one tensor of a file.

    Attributes:
        shard: The file of weights.
        name: The name of the tensor.
        num_rows: How many rows.
    """

    shard: str
    name: str
    num_rows: int


@dataclass(frozen=True)
class StoredTable:
    """Where a checkpoint has a table.

    Attributes:
        path: The path of its module.
        prefix: What the names of the tensors that replace it start with.
        pieces: Its rows; several pieces of those that transformers joins when it loads them, as of n-gram tables.
    """

    path: str
    prefix: str
    pieces: tuple[StoredPiece, ...]

    def shard_of(self, name: str) -> str:
        """The file that a tensor of those that replace the table goes to."""
        return next((piece.shard for piece in self.pieces if piece.name == name), self.pieces[0].shard)


@dataclass(frozen=True)
class StoredTables:
    """Where a checkpoint has the tables that are to be compressed.

    Attributes:
        model: The checkpoint's model, on the meta device.
        folder: The checkpoint's folder.
        shards: All its files of weights.
        tables: Where each table is.
    """

    model: PreTrainedModel
    folder: Path
    shards: tuple[str, ...]
    tables: tuple[StoredTable, ...]

    @classmethod
    def find(cls, folder: Path, names: tuple[str, ...] | None = None) -> StoredTables | None:
        """Finds tables; None where only the loaded model tells where they are.

        That is so where the weights are not safetensors, are quantised, are to be cast or renamed while they load, or
        hold tied tensors more than once.

        Args:
            folder: A checkpoint's folder.
            names: The names of the tables, as [`hf_dirembed.compress`] takes them; by default all.

        Raises:
            CheckpointError: If its index of shards is malformed, or transformers cannot read its config.
            ModelError: If the model has no table that can be compressed.
            TableError: If a table is stored in integers, which loading would take for its floats.
        """
        with as_unreadable_error(folder):
            config = AutoConfig.from_pretrained(folder)
            shards = _shards(folder)
            converted = any(getattr(config, name, None) is not None for name in _CONVERTED)
            if sys.byteorder != "little" or not shards or converted:
                return None
            model = model_on_meta(model_class(config), config)
        files = {shard: StoredFile.read(folder / shard) for shard in shards}
        chosen = choose_tables(model, names)
        found = [_find_table(model, table, files) for table in chosen]
        tables = tuple(table for table in found if table is not None)
        known = len(tables) == len(found) and (
            not any(is_head(model, table.name) for table in chosen) or _read_head_norm(model, files)
        )
        return cls(model, folder, shards, tables) if known else None

    def rows(self) -> dict[str, RowSource]:
        """The rows of each table, by its path."""
        found: dict[str, RowSource] = {}
        for table in self.tables:
            pieces = [StoredFile.read(self.folder / piece.shard).rows(piece.name) for piece in table.pieces]
            found[table.path] = pieces[0] if len(pieces) == 1 else JoinedRows(pieces)
        return found

    def compress(self, target: Path, tokenizer: PreTrainedTokenizerBase | None, request: CompressionRequest) -> None:
        """Writes the compressed checkpoint: new codes and config, everything else as it was.

        Args:
            target: A folder.
            tokenizer: Tells which tokens are frequent.
            request: What was asked for, but calibration on text, for which the model must run.

        Raises:
            DirEmbedError: As [`hf_dirembed.compress`] does.
        """
        with tempfile.TemporaryDirectory(dir=target, prefix=".") as folder:
            files = TableFiles(self.rows(), Path(folder))
            model = compress_model(self.model, tokenizer, request, files)
            if model.can_generate() and (self.folder / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            large = self._set_aside(model, files)
            self._write_shards([self._write_codes(model, target, Path(folder)), *large], target)

    def _set_aside(self, model: PreTrainedModel, files: TableFiles) -> list[StoredFile]:
        """Takes codes that are in files of their own out of a model, and says what these are in the checkpoint."""
        found = []
        for table in self.tables:
            module = table_at(model, table.path)

            in_files: dict[str, Path] = {}
            for prefix, matrix in module.matrices():
                for name in _BY_ROW:
                    path = files.codes(f"{table.path}.{prefix}".rstrip("."), name)
                    if path.is_file():
                        in_files[prefix + name] = path
                        found.append(_codes_in_file(path, getattr(matrix, name), table, prefix + name))

            # once their checksum is taken, the model need not hold these codes
            if in_files:
                checked = checksum_of_bytes(_bytes_of_codes(checked_codes(module), in_files))
                module.record = replace(module.record, checksum=checked)
                for prefix, matrix in module.matrices():
                    for name in _BY_ROW:
                        if prefix + name in in_files:
                            emptied = getattr(matrix, name).detach().to("meta")
                            setattr(matrix, name, Parameter(emptied, requires_grad=False))

        return found

    def _write_codes(self, model: PreTrainedModel, target: Path, folder: Path) -> StoredFile:
        """Saves config and codes; the codes into a file of their own, which is set aside, in another folder."""
        state: dict[str, Tensor] = {}
        for table in self.tables:
            module = table_at(model, table.path)
            tensors = module.code_tensors()
            for prefix, matrix in module.matrices():
                tensors[f"{prefix}decoder_weight"] = matrix.stored_decoder()
            state |= {table.prefix + name: tensor for name, tensor in tensors.items() if not tensor.is_meta}

        model.save_pretrained(target, state_dict=state, max_shard_size=10**15)
        written = StoredFile.read((target / SAFE_WEIGHTS_NAME).rename(folder / SAFE_WEIGHTS_NAME))

        for table in self.tables:
            if not any(name.startswith(table.prefix) for name in written.tensors):
                names = ", ".join(sorted(written.tensors))
                raise CheckpointError(
                    f"{table.prefix}weight is saved under another name, one of {names:.500}: load the model and "
                    "compress that"
                )

        return written

    def _write_shards(self, written: list[StoredFile], target: Path) -> None:
        """Puts the codes of each table where the table was; what else there is in its shard stays."""
        places: dict[str, str] = {}
        for file in written:
            for name in file.tensors:
                table = max((each for each in self.tables if name.startswith(each.prefix)), key=_length_of_prefix)
                places[name] = table.shard_of(name)

        gone = {piece.name for table in self.tables for piece in table.pieces}
        changed = {piece.shard for table in self.tables for piece in table.pieces}
        for shard in self.shards:
            if shard not in changed:
                shutil.copyfile(self.folder / shard, target / shard)
                continue
            dense = StoredFile.read(self.folder / shard)
            parts = [(dense, [name for name in dense.tensors if name not in gone])]
            parts += [(file, [name for name in file.tensors if places[name] == shard]) for file in written]
            write_merged(target / shard, parts, dense.metadata)

        if self.shards != (SAFE_WEIGHTS_NAME,):
            self._write_index(target, written, places)

    def _write_index(self, target: Path, written: list[StoredFile], places: dict[str, str]) -> None:
        index = json.loads((self.folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        gone = {piece.name: piece.shard for table in self.tables for piece in table.pieces}
        kept = {name: shard for name, shard in index["weight_map"].items() if name not in gone}
        index["weight_map"] = {**kept, **places}
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            dense = sum(StoredFile.read(self.folder / shard).num_bytes(name) for name, shard in gone.items())
            metadata["total_size"] += sum(file.num_bytes(name) for file in written for name in file.tensors) - dense
            metadata.pop("total_parameters", None)
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _length_of_prefix(table: StoredTable) -> int:
    return len(table.prefix)


def _codes_in_file(path: Path, codes: Tensor, table: StoredTable, name: str) -> StoredFile:
    """What a file of nothing but a tensor of codes holds, by the names that they have in the checkpoint."""
    num_rows, *width = codes.shape
    sizes = {table.prefix + name: num_rows}
    if len(table.pieces) > 1 and name == "weight":
        sizes = {piece.name: piece.num_rows for piece in table.pieces}
    tensors, start = {}, 0
    for each, rows in sizes.items():
        stop = start + rows * prod(width)
        tensors[each] = {"dtype": "U8", "shape": [rows, *width], "data_offsets": [start, stop]}
        start = stop
    return StoredFile(path, None, tensors, 0)


def _bytes_of_codes(codes: dict[str, Tensor], in_files: dict[str, Path]) -> dict[str, Iterable[Any]]:
    """The bytes of codes, by name; codes that are in files are read piece by piece."""
    found: dict[str, Iterable[Any]] = {
        name: [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data]
        for name, tensor in codes.items()
        if name not in in_files
    }
    return found | {name: _pieces_of(path) for name, path in in_files.items()}


def _pieces_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(COPY_BYTES):
            yield piece


def _shards(folder: Path) -> tuple[str, ...]:
    """A checkpoint's files of weights; none if they are not safetensors."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # what transformers takes first
        return (SAFE_WEIGHTS_NAME,)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    return tuple(sorted(shards_of(index))) if index.is_file() else ()


def _find_table(model: PreTrainedModel, table: VocabularyTable, files: dict[str, StoredFile]) -> StoredTable | None:
    """Where a table is; None if it is there more than once, not at all, or in another dtype or shape than loaded."""
    names = {f"{name}.weight" for name in tied_modules(model, table.name)}
    found = [(shard, name) for shard, file in files.items() for name in file.tensors if name in names]
    if not found and table.kind == "n-gram":
        found = _find_pieces(table.name, files)
        prefix = f"{table.name}."
    elif len(found) != 1 or found[0][1] in model.all_tied_weights_keys:
        return None
    else:
        prefix = found[0][1].removesuffix("weight")

    weight, pieces = model.get_parameter(f"{table.name}.weight"), []
    for shard, name in found:
        stored, dtype = files[shard].tensors[name], files[shard].dtype(name)
        if dtype is None:
            raise TableError(f"{name} of {files[shard].path.parent} is quantised: give the unquantised checkpoint")
        if dtype != weight.dtype or stored["shape"][1:] != [weight.shape[1]]:
            return None
        pieces.append(StoredPiece(shard, name, stored["shape"][0]))
    fits = bool(pieces) and sum(piece.num_rows for piece in pieces) == len(weight)
    return StoredTable(table.name, prefix, tuple(pieces)) if fits else None


def _read_head_norm(model: PreTrainedModel, files: dict[str, StoredFile]) -> bool:
    """Gives a model on the meta device the weights of the norm before its head; False where these are not there."""
    path = norm_before_head(model)
    if path is None:
        return True
    norm = model.get_submodule(path)
    for name, parameter in list(norm.named_parameters()):
        found = [file for file in files.values() if f"{path}.{name}" in file.tensors]
        if len(found) != 1:
            return False
        with safe_open(found[0].path, "pt") as file:
            stored = file.get_tensor(f"{path}.{name}")
        if stored.shape != parameter.shape:
            return False
        setattr(norm, name, Parameter(stored.to(parameter.dtype), requires_grad=False))
    return True


def _find_pieces(path: str, files: dict[str, StoredFile]) -> list[tuple[str, str]]:
    """The file and name of each tensor of a table that is stored in several, in the order of the rows."""
    names = {name: shard for shard, file in files.items() for name in file.tensors}
    numbered = (f"{path}.shard_{number}.weight" for number in count())
    return [(names[name], name) for name in takewhile(names.__contains__, numbered)]
