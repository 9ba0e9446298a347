"""What a checkpoint must be to be loaded: its files, their headers, their keys, the values of its codes.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from .codes_dirembed import (
    CODE_TENSORS,
    CheckpointError,
    CompressionSpec,
    DirEmbedError,
    UnreadableCheckpointError,
    checksum,
    first_line,
)
from .guarded_dirembed import guard, plain
from .matrix_dirembed import CompressedMatrix
from .modules_dirembed import CompressedBlocks, CompressedTable
from .tables_dirembed import compressed_tables, table_at


logger = logging.get_logger(__name__)

AGAIN = "save or download the compressed model again"


@contextmanager
def as_checkpoint_error(name: Any) -> Iterator[None]:
    """Turns what reading a missing or damaged file raises into this package's errors."""
    try:
        yield
    except DirEmbedError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{name} holds no intact safetensors ({first_line(error)}): {AGAIN}") from error
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{name} does not load from safetensors ({first_line(error)}): {AGAIN}"
        ) from error


def check_index(folder: Path) -> None:
    """Refuses a malformed index of shards in a local folder, if there is one.

    Raises:
        CheckpointError: If it is no JSON, lacks its map, or points outside of the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        shards_of(index)


def shards_of(index: Path) -> set[str]:
    """The names of the shards that an index file lists.

    Raises:
        CheckpointError: If it is no JSON, lacks its map, or points outside of its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
        outside = sorted(shard for shard in shards if Path(shard).name != shard)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({first_line(error)}): {AGAIN}") from error
    if outside:
        raise CheckpointError(f"{index} points outside of its folder, to {outside[0]!r}: {AGAIN}")
    return shards


def check_stored_dtypes(spec: CompressionSpec, dtypes: Mapping[str, str]) -> None:
    """Refuses integers for floats and floats for integers, which transformers would cast, and what it would leave out.

    Args:
        spec: What the config states.
        dtypes: The dtype of every tensor of the checkpoint, by its name, as safetensors calls them.

    Raises:
        CheckpointError: If a tensor of a compressed table is of another kind than its layout says, or not part of it.
    """
    matrices, matched = dict(spec.matrices()), set()
    for name in dtypes:
        prefix = name.removesuffix(".decoder_weight")
        if prefix == name or f"{prefix}.weight" not in dtypes:
            continue

        # a file may have more of a table's path than the config, or less
        stated = [path for path in matrices if f".{path}".endswith(f".{prefix}") or f".{prefix}".endswith(f".{path}")]
        if not stated and len(matrices) > 1:
            continue  # under a name that only the architecture's conversion of checkpoints knows
        layout = matrices[max(stated, key=len)] if stated else next(iter(matrices.values()))

        matched.add(max(stated, key=len) if stated else prefix)
        parts = layout.stored_shapes(1, 1)
        for tensor in CODE_TENSORS:
            found, expected = dtypes.get(f"{prefix}.{tensor}"), layout.stored_dtypes(tensor)
            if found is not None and tensor not in parts:
                raise CheckpointError(f"{prefix}.{tensor} is not part of the layout that the config states: {AGAIN}")
            if found is not None and found not in expected:
                raise CheckpointError(f"{prefix}.{tensor} is of dtype {found}, not {' or '.join(expected)}: {AGAIN}")

    held = [name for name in dtypes if name.endswith(".decoder_weight")]
    if held and (lacking := sorted(matrices.keys() - matched)[: len(matrices) - len(held)]):
        raise CheckpointError(
            f"the config says that {', '.join(lacking)} is compressed, of which the checkpoint has no codes: {AGAIN}"
        )


def check_files(spec: CompressionSpec, files: Iterable[str]) -> None:
    """Checks the headers of the files that are about to be loaded.

    Raises:
        CheckpointError: If a tensor of a compressed table is of another kind than its layout says.
    """
    dtypes: dict[str, str] = {}
    for path in files:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
    check_stored_dtypes(spec, dtypes)


def check_keys(model: PreTrainedModel, info: Any, ignore_mismatched: bool) -> None:
    """Refuses a checkpoint that lacks tensors, before room is made for them.

    Args:
        model: What the tensors were loaded into; the missing ones are still on the meta device.
        info: What transformers found, with `missing_keys`, `mismatched_keys` and `conversion_errors`.
        ignore_mismatched: Whether tensors of the wrong shape may stay random, as long as they are not the table's.

    Raises:
        CheckpointError: If a tensor of the compressed table is missing, any has the wrong shape or could not be
            quantised or converted otherwise, or most of the model is missing.
    """
    for key, report in info.conversion_errors.items():  # a traceback, what it ends with, what was converted
        reason = report.strip().splitlines()[-2:][0]
        raise CheckpointError(f"{key} could not be converted: {reason}: change the quantization_config, or {AGAIN}")

    modules = model.named_modules(remove_duplicate=False)
    compressed = {name for name, module in modules if isinstance(module, (CompressedMatrix, CompressedBlocks))}

    def of_table(key: str) -> bool:
        module, _, tensor = key.rpartition(".")
        return module in compressed and tensor != "bias"

    unexpected = set(info.unexpected_keys)  # a decoder among them is of codes where this model has a dense table
    tied = set(model.all_tied_weights_keys)  # they come with what they are tied to
    missing = set(info.missing_keys) - tied
    lacking = sorted(filter(of_table, missing))
    if lacking:
        raise CheckpointError(f"the checkpoint lacks {lacking}: {AGAIN}")

    mismatched = sorted(
        f"{key} is {list(found)}, not {list(expected)}"
        for key, found, expected in info.mismatched_keys
        if of_table(key) or not ignore_mismatched or f"{key.removesuffix('weight')}decoder_weight" in unexpected
    )
    if mismatched:
        raise CheckpointError(
            f"the checkpoint does not fit its config: {'; '.join(mismatched)}: leave out what from_pretrained was "
            "told of the config (once it is loaded, resize_token_embeddings changes the vocabulary), or download the "
            "compressed model again"
        )

    held = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name not in tied}
    if 2 * sum(held[name] for name in missing & held.keys()) > sum(held.values()):
        raise CheckpointError(f"the checkpoint lacks most of the model that its config describes: {AGAIN}")


def checked_codes(table: CompressedTable) -> dict[str, Tensor]:
    """The codes that the checksum is taken of: outliers are none, which have the dtype that the model is loaded in."""
    return {name: plain(tensor) for name, tensor in table.codes().items() if not name.endswith("outlier_weight")}


def check_checksum(table: CompressedTable, path: str) -> None:
    """Refuses codes that are not those that the record tells of; float codes that were cast are not compared.

    Raises:
        CheckpointError: If something has changed them.
    """
    codes, stated = checked_codes(table), table.record.checksum
    if stated is None or any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in codes.values()):
        return
    layouts = [(matrix.layout, str(matrix.weight.dtype)) for _, matrix in table.matrices()]
    if any(not layout.packed and dtype != f"torch.{layout.codes}" for layout, dtype in layouts):
        return
    if (found := checksum(codes)) != stated:
        raise CheckpointError(
            f"the codes of {path} have the checksum {found}, the config says {stated}: something has changed the file "
            f"since it was saved: {AGAIN}"
        )


def decoder_checksum(table: CompressedTable) -> str | None:
    """The checksum of a table's decoders as files have them; None where they are not in memory."""
    decoders = {f"{prefix}decoder_weight": matrix.stored_decoder() for prefix, matrix in table.matrices()}
    known = not any(each.is_meta or hasattr(each, "device_mesh") for each in decoders.values())
    return checksum(decoders) if known else None


def warn_of_decoder(table: CompressedTable, path: str) -> None:
    """Warns of a decoder that is not the one that was saved beside the codes: training may have changed it."""
    for _, matrix in table.matrices():
        held, stored = matrix.dtype, getattr(torch, matrix.layout.decoder)
        if held != stored and held.itemsize <= stored.itemsize:
            return  # it was rounded when it was loaded
    stated, found = table.record.decoder_checksum, decoder_checksum(table)
    if stated is not None and found is not None and found != stated:
        logger.warning(
            f"the decoder of {path} is not the one that was saved beside its codes: that is right if training wrote "
            "the file without its config (save_pretrained of the model writes both); if it did not, a file of another "
            f"model is among those that were loaded: {AGAIN}"
        )


def check_table(matrix: CompressedMatrix) -> None:
    """Refuses values that no compressed table has.

    Raises:
        CheckpointError: If a float is not finite, if the outliers are not distinct rows in ascending order, or if
            packed codes do not fit their layout, as [`CompressedMatrix.check_codes`] says.
    """
    for name, tensor in matrix.code_tensors().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(f"{name} of the compressed table holds a NaN or an infinity: {AGAIN}")

    matrix.check_codes()
    if matrix.outlier_rows_weight is None or matrix.outlier_rows_weight.is_meta:
        return
    rows = plain(matrix.outlier_rows_weight)
    if int(rows[0]) < 0 or int(rows[-1]) >= len(matrix.weight) or not (rows[1:] > rows[:-1]).all():
        raise CheckpointError(
            f"outlier_rows_weight does not name rows of {len(matrix.weight)} in ascending order: {AGAIN}"
        )


def finish_loading(model: PreTrainedModel) -> None:
    """Brings the compressed modules of a model that was just loaded into the state that they are in when made."""
    for module in model.modules():
        if isinstance(module, CompressedMatrix):
            module.align()
            for tensor in module.codes().values():  # transformers makes a parameter that learns of every float tensor
                tensor.requires_grad_(False)
                guard(tensor)
    for path in compressed_tables(model):
        table_at(model, path).seal_codes()
        for _, matrix in table_at(model, path).matrices():
            matrix.mark_as_one()
