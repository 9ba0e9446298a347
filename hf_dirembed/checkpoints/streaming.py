"""Compressing a checkpoint whose model does not fit into memory: only the table is read, chunk by chunk.

The model is built on the meta device, to learn from its class which tensor is the table and what is tied to it. The
table's rows are read from the file as they are needed, the shard that holds the table is written anew from the bytes
of the old one, and all others are copied as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..api import compress
from ..errors import CheckpointError, TableError
from ..remote.configuration_dirembed import MODEL_TYPE
from ..remote.modeling_dirembed import embedding_of, shards_of, tied_modules
from ..remote.modules_dirembed import CompressedMatrix
from .safetensors_io import StoredFile, StoredRows, write_merged


@dataclass(frozen=True)
class StoredTable:
    """Where a checkpoint has its token-embedding table.

    Attributes:
        model: The checkpoint's model, on the meta device.
        folder: The checkpoint's.
        shards: All its files of weights.
        shard: That which holds the table.
        name: The table's in it.
        num_bytes: Of the table.
    """

    model: PreTrainedModel
    folder: Path
    shards: tuple[str, ...]
    shard: str
    name: str
    num_bytes: int

    @classmethod
    def find(cls, folder: Path, config: PreTrainedConfig, model_class: Any) -> StoredTable | None:
        """Finds the table; None where only the loaded model tells what it is.

        That is so where the weights are not safetensors, are quantised, are to be cast or renamed while they load, or
        hold tied tensors more than once.

        Args:
            folder: A checkpoint's.
            config: What its `config.json` says.
            model_class: The class that it is loaded with.

        Raises:
            CheckpointError: If its index of shards is malformed.
            ModelError: If the model has no token embedding.
            TableError: If the table is stored in integers, which loading would take for its floats.
        """
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        whole = (folder / SAFE_WEIGHTS_NAME).is_file()  # what transformers takes first
        shards = (SAFE_WEIGHTS_NAME,) if whole else tuple(sorted(shards_of(index))) if index.is_file() else ()
        special = (MODEL_TYPE, "quantization_config", "transformers_weights")
        if sys.byteorder != "little" or not shards or any(getattr(config, name, None) is not None for name in special):
            return None
        model = _on_meta(model_class, config)
        names = {f"{name}.weight" for name in tied_modules(model)}
        files = {shard: StoredFile.read(folder / shard) for shard in shards}
        found = [(shard, name) for shard, file in files.items() for name in file.tensors if name in names]
        if len(found) != 1 or found[0][1] in model.all_tied_weights_keys:
            return None
        weight = embedding_of(model).weight
        table = cls(model, folder, shards, *found[0], num_bytes=weight.nbytes)
        with table.rows() as rows:
            if rows.dtype is None:
                raise TableError(f"{table.name} of {folder} is quantised: give the unquantised checkpoint")
            fits = rows.dtype == weight.dtype and rows.shape == tuple(weight.shape)
        return table if fits else None

    @contextmanager
    def rows(self) -> Iterator[StoredRows]:
        """The table, while its file is open."""
        stored = StoredFile.read(self.folder / self.shard)
        with open(stored.path, "rb") as file:
            yield StoredRows(stored, self.name, file)

    def compress(self, target: Path, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> None:
        """Writes the compressed checkpoint: new codes and config, everything else as it was.

        Args:
            target: A folder.
            tokenizer: Tells which tokens are frequent.
            **options: Those of [`compress`] but calibration, for which the model must run.

        Raises:
            DirEmbedError: As [`compress`] does.
        """
        model = self._fit(tokenizer, options)
        if model.can_generate() and (self.folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        prefix = self.name.removesuffix("weight")
        embedding = model.get_submodule(prefix.removesuffix("."))
        assert isinstance(embedding, CompressedMatrix)
        codes = {**embedding.code_tensors(), "decoder_weight": embedding.stored_decoder()}
        model.save_pretrained(target, state_dict={f"{prefix}{name}": tensor for name, tensor in codes.items()})
        dense = StoredFile.read(self.folder / self.shard)
        saved = (target / SAFE_WEIGHTS_NAME).rename(target / f".{SAFE_WEIGHTS_NAME}.codes")
        written = StoredFile.read(saved)
        if self.name not in written.tensors:
            names = sorted(written.tensors)
            raise CheckpointError(
                f"{self.name} is saved under another name, one of {names}: load the model and compress that"
            )
        for shard in self.shards:
            if shard != self.shard:
                shutil.copyfile(self.folder / shard, target / shard)
        kept = [name for name in dense.tensors if name != self.name]
        write_merged(target / self.shard, [(dense, kept), (written, written.tensors)], dense.metadata)
        saved.unlink()
        if self.shards != (SAFE_WEIGHTS_NAME,):
            self._write_index(target, {name: written.num_bytes(name) for name in written.tensors})

    def _fit(self, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]) -> PreTrainedModel:
        with self.rows() as rows:
            return compress(self.model, tokenizer, rows=rows, **options)

    def _write_index(self, target: Path, written: dict[str, int]) -> None:
        index = json.loads((self.folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        index["weight_map"] = {**index["weight_map"], **dict.fromkeys(written, self.shard)}
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += sum(written.values()) - self.num_bytes
            metadata.pop("total_parameters", None)
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _on_meta(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    build = getattr(model_class, "from_config", None) or model_class._from_config  # AutoModel's, or a class's own
    with torch.device("meta"):
        return build(config)
