"""What vLLM runs in the place of a dense table: one built of a checkpoint's tensors, whole or a shard of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...remote.checks_dirembed import AGAIN, check_table
from ...remote.codes_dirembed import (
    CheckpointError,
    CompressionSpec,
    Layout,
    ModelError,
    TableLayout,
    TableRecord,
    checksum,
)
from ...remote.matrix_dirembed import DECODER_TENSORS
from ...remote.modules_dirembed import CompressedLinear
from .names import check_tensors
from .operators import read_rows_unseen
from .shards import rows_between


class ServedMatrix(CompressedLinear):
    """A compressed matrix that is a lookup and a head, and whose packed rows compilers read by an operator."""

    def latents_of(self, ids: Tensor) -> Tensor:
        """The latents of rows, (..., rank); see [`CompressedMatrix.latents_of`]."""
        if self.layout.packed and torch.compiler.is_compiling():
            return self.scaled(read_rows_unseen(self.packed_rows(), ids))
        return super().latents_of(ids)

    def logits(self, states: Tensor) -> Tensor:
        """The products with all rows: (..., dim) states to (..., num_rows)."""
        product: Tensor = self(states)
        return product


class ServedBlocks(nn.Module):
    """A compressed table of several blocks of columns, each a matrix of its own.

    Args:
        blocks: The blocks, in the order of their columns.
    """

    def __init__(self, blocks: list[ServedMatrix]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        dims = torch.tensor([block.dim for block in blocks], dtype=torch.int32, device=blocks[0].weight.device)
        self.weight = nn.Parameter(dims, requires_grad=False)

    def decode(self, ids: Tensor) -> Tensor:
        """Rows of the table: (...,) row numbers to (..., dim)."""
        return torch.cat([block.decode(ids) for block in self.blocks], dim=-1)  # type: ignore[operator]

    def logits(self, states: Tensor) -> Tensor:
        """Refuses to be a head.

        Raises:
            ModelError: Always: tables of blocks are per-layer lookups, which no model has for a head.
        """
        raise ModelError("this table is compressed in blocks of columns, and vLLM uses it as a head: expand the model")


ServedTable = ServedMatrix | ServedBlocks


def build_table(
    path: str,
    layout: Layout,
    record: TableRecord,
    tensors: Mapping[str, Tensor],
    *,
    shape: tuple[int, int],
    rows: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> ServedTable:
    """Builds what is run in the place of a dense table, or of a shard of its rows.

    Args:
        path: The path of the table, for messages.
        layout: The layout that the config states.
        record: How the table was made, with its checksum.
        tensors: The tensors of the whole table, by name.
        shape: The rows and columns of the table in vLLM's model.
        rows: The first row of the shard, and the row behind its last. A shard without rows gets one that is not used.
        dtype: The dtype of the rows.
        device: Where the table is to be.

    Raises:
        CheckpointError: If a tensor is missing, or is not what the layout or the checksum says, by its name.
        SpecError: If the layout does not fit the table.
    """
    check_tensors(path, layout, tensors, *shape)
    _check_checksum(path, layout, record, tensors)
    first = min(rows[0], shape[0] - 1)
    if (first, rows[1]) != (0, shape[0]):
        layout, tensors = rows_between(layout, tensors, first, max(rows[1], first + 1))

    if isinstance(layout, TableLayout):
        return _matrix(path, layout, tensors, dtype, device)
    blocks = []
    for prefix, _, block in layout.named_blocks():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        blocks.append(_matrix(f"{path}.{prefix[:-1]}", block, own, dtype, device))
    return ServedBlocks(blocks)


def _matrix(
    path: str, layout: TableLayout, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> ServedMatrix:
    num_rows, dim = len(tensors["weight"]), tensors["decoder_weight"].shape[1]
    matrix = ServedMatrix(dim, num_rows, layout, dtype=dtype, device="meta").to_empty(device=device)
    matrix.load_state_dict(dict(tensors))
    matrix.requires_grad_(False)
    try:
        check_table(matrix)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return matrix


def _check_checksum(path: str, layout: Layout, record: TableRecord, tensors: Mapping[str, Tensor]) -> None:
    """Refuses codes that are not those that the record tells of; float codes of another dtype are not compared."""
    as_stated = all(
        each.packed or str(tensors[f"{place}.weight".removeprefix(f"{path}.")].dtype) == f"torch.{each.codes}"
        for place, each in CompressionSpec({path: layout}).matrices()
    )
    if record.checksum is None or not as_stated:
        return
    beside = (*DECODER_TENSORS, "outlier_weight")
    found = checksum({name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in beside})
    if found != record.checksum:
        raise CheckpointError(
            f"the codes of {path} have the checksum {found}, the config says {record.checksum}: something has changed "
            f"the file since it was saved: {AGAIN}"
        )


def fitted(logits: Tensor, width: int) -> Tensor:
    """Logits with as many columns as vLLM has rows in a shard, which is padded; what it pads is cut off again.

    Example:
        >>> fitted(torch.ones(1, 2), 3), fitted(torch.ones(1, 2), 1)
        (tensor([[1., 1., 0.]]), tensor([[1.]]))
    """
    missing = width - logits.shape[-1]
    return logits if not missing else F.pad(logits, (0, missing))
