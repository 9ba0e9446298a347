"""What vocabulary tables a checkpoint has, compressed and not, read from config and headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from transformers import AutoConfig
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError
from ..remote.checks_dirembed import check_stored_dtypes, shards_of
from ..remote.codes_dirembed import BlocksLayout, CompressionSpec, Layout, TableLayout, TableRecord
from ..remote.configuration_dirembed import read_spec
from ..tables import VocabularyTable, find_tables
from .loading import as_unreadable_error, model_class, model_on_meta, read_compressed_config, resolve_checkpoint
from .safetensors_io import StoredFile


_PIECE = re.compile(r"(.+\.)shard_\d+\.weight")
_FIGURES = ("mean_cosine", "token_cosine", "shortened_cosine", "distortion", "bound_bits")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """How many bytes the tensor takes in the file."""
        return prod(self.shape) * str_to_torch_dtype[self.dtype].itemsize


@dataclass(frozen=True)
class ClassSummary:
    """Rows of a table whose codes have the same bits.

    Attributes:
        rows: How many there are.
        bits_per_weight: What their codes take, in bits per weight.
    """

    rows: int
    bits_per_weight: float

    @classmethod
    def of(cls, layout: TableLayout, num_rows: int, dim: int) -> tuple[ClassSummary, ...]:
        """The classes of a (num_rows, dim) table, from the fewest bits on; none where its codes are floats.

        Example:
            >>> from hf_dirembed.remote.codes_dirembed import RowClass
            >>> classes = RowClass((0, 0, 0, 16)), RowClass((0, 0, 16, 0), rows=30)
            >>> layout = TableLayout("transform", 16, "packed", "float16", True, classes, codebook="own")
            >>> ClassSummary.of(layout, 100, 32)
            (ClassSummary(rows=70, bits_per_weight=0.5), ClassSummary(rows=30, bits_per_weight=1.0))
        """
        others = sum(each.rows or 0 for each in layout.classes)
        found = (
            cls(num_rows - others if each.rows is None else each.rows, 8 * each.num_bytes / dim)
            for each in layout.classes
        )
        return tuple(sorted(found, key=lambda each: each.bits_per_weight))


@dataclass(frozen=True)
class TableSummary:
    """What stands in a checkpoint in place of one table.

    Attributes:
        name: The path of its module.
        kind: What it is to the model, as `VocabularyTable` has it.
        method: What found the codes.
        num_embeddings: V.
        embedding_dim: d.
        blocks: Blocks of columns that are coded by themselves: more than 1 of a per-layer table.
        rank: Latents of a row, of all blocks.
        classes: For packed codes of one block, how many rows have how many bits.
        outliers: Rows that are kept as they are.
        codes: `packed`, or the dtype of the latents.
        bits_per_weight: 8 x `bytes` / (V x d).
        ratio: `dense_bytes` / `bytes`.
        bytes: The size of all tensors that replace the table.
        code_bytes: How much of it is codes, outliers and the numbers of such rows.
        decoder_bytes: How much of it is the decoder and its bias.
        dense_bytes: The size of the table, as the source checkpoint stored it.
        mean_cosine: The mean cosine between rows and what replaces them; None where the checkpoint does not say.
        token_cosine: The same mean, each row weighed by how often its token is expected.
        shortened_rows: How many rows are far longer than most, and had to be coded all the same: only their direction.
        shortened_cosine: The mean cosine of these; None where there are none.
        distortion: The share of the table's weighted variance that is lost, in the measure that `transform` minimises.
        bound_bits: Bits per weight in which a Gaussian table of the same weighted spectrum could be coded with that
            distortion (reverse water-filling); `bits_per_weight` less this is the distance to the bound.
    """

    name: str
    kind: str
    method: str
    num_embeddings: int
    embedding_dim: int
    blocks: int
    rank: int
    classes: tuple[ClassSummary, ...]
    outliers: int
    codes: str
    bits_per_weight: float
    ratio: float
    bytes: int
    code_bytes: int
    decoder_bytes: int
    dense_bytes: int
    mean_cosine: float | None
    token_cosine: float | None
    shortened_rows: int
    shortened_cosine: float | None
    distortion: float | None
    bound_bits: float | None

    @classmethod
    def of(
        cls,
        name: str,
        kinds: Sequence[str],
        layout: Layout,
        record: TableRecord,
        shape: tuple[int, int],
        sizes: dict[str, int],
    ) -> TableSummary:
        """Sums up a table.

        Args:
            name: The path of its module.
            kinds: What it is to the model, and then what is tied to it.
            layout: Its layout.
            record: How it was made.
            shape: V and d.
            sizes: The bytes of each of its tensors, by name.
        """
        num_rows, dim = shape
        blocks = layout.blocks if isinstance(layout, BlocksLayout) else (layout,)
        num_bytes = sum(sizes.values())
        decoder_bytes = sum(size for tensor, size in sizes.items() if "decoder_" in tensor)
        dense_bytes = int(record.figure("dense_bytes") or num_rows * dim * 4)

        return cls(
            name=name,
            kind=kinds[0],
            method=layout.method,
            num_embeddings=num_rows,
            embedding_dim=dim,
            blocks=len(blocks),
            rank=sum(block.rank for block in blocks),
            classes=ClassSummary.of(blocks[0], num_rows, dim) if len(blocks) == 1 else (),
            outliers=sum(block.outliers or 0 for block in blocks),
            codes=blocks[0].codes,
            bits_per_weight=8 * num_bytes / (num_rows * dim),
            ratio=dense_bytes / num_bytes,
            bytes=num_bytes,
            code_bytes=num_bytes - decoder_bytes,
            decoder_bytes=decoder_bytes,
            dense_bytes=dense_bytes,
            shortened_rows=int(record.figure("shortened_rows") or 0),
            **{figure: record.figure(figure) for figure in _FIGURES},
        )


@dataclass(frozen=True)
class CheckpointSummary:
    """The vocabulary tables of a checkpoint.

    Attributes:
        base_model_type: The architecture, like `bert`.
        tables: What stands in place of each compressed table.
        dense_tables: Those that are as they were: tied heads, which take nothing, among them.
        bytes: The size of all that replaces the compressed tables.
        dense_bytes: The size of these tables, as the source checkpoint stored them.
        ratio: `dense_bytes` / `bytes`.
        bits_per_weight: 8 x `bytes` / the weights of these tables.
        model_bytes: The size of all tensors of the checkpoint.
        dense_model_bytes: The same with these tables as the source checkpoint stored them.
    """

    base_model_type: str
    tables: tuple[TableSummary, ...]
    dense_tables: tuple[VocabularyTable, ...]
    bytes: int
    dense_bytes: int
    ratio: float
    bits_per_weight: float
    model_bytes: int
    dense_model_bytes: int


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSummary:
    """Reads what a checkpoint has for vocabulary tables, from its config and its tensors' headers alone.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or one whose tensors do not fit its config.
        SpecError: If its `dirembed` object is malformed.
    """
    folder = resolve_checkpoint(folder)
    with as_unreadable_error(folder):
        config = AutoConfig.from_pretrained(folder)
        values = read_compressed_config(folder)
        spec = None if values is None else read_spec(values)[1]
        found = find_tables(model_on_meta(model_class(config), config))
        tensors = _read_headers(folder)
        tables = () if spec is None else tuple(_summaries(folder, spec, found, tensors))

    num_bytes, dense_bytes = sum(table.bytes for table in tables), sum(table.dense_bytes for table in tables)
    num_weights = sum(table.num_embeddings * table.embedding_dim for table in tables)
    model_bytes = sum(tensor.num_bytes for tensor in tensors.values())

    return CheckpointSummary(
        base_model_type=config.model_type,
        tables=tables,
        dense_tables=tuple(table for table in found if not table.compressed or table.tied_to is not None),
        bytes=num_bytes,
        dense_bytes=dense_bytes,
        ratio=dense_bytes / num_bytes if num_bytes else 1.0,
        bits_per_weight=8 * num_bytes / num_weights if num_weights else 0.0,
        model_bytes=model_bytes,
        dense_model_bytes=model_bytes - num_bytes + dense_bytes,
    )


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """What the headers of a checkpoint's shards say of every tensor; nothing else is read."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    tensors = {}
    for shard in sorted(shards_of(index) if index.is_file() else {SAFE_WEIGHTS_NAME}):
        for name, tensor in StoredFile.read(folder / shard).tensors.items():
            tensors[name] = StoredTensor(tuple(tensor["shape"]), tensor["dtype"])
    return _join_pieces(tensors)


def _join_pieces(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Codes that are stored in several tensors, as of n-gram tables, as the one that loading makes of them."""
    joined: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if (piece := _PIECE.fullmatch(name)) and f"{piece[1]}decoder_weight" in tensors:
            name = f"{piece[1]}weight"
            if name in joined:
                rows = joined[name].shape[0] + tensor.shape[0]
                tensor = StoredTensor((rows, *tensor.shape[1:]), tensor.dtype)
        joined[name] = tensor
    return joined


def _summaries(
    folder: Path, spec: CompressionSpec, found: list[VocabularyTable], tensors: dict[str, StoredTensor]
) -> Iterator[TableSummary]:
    """What stands in place of each table that a spec names, in the order of those that were found in the model."""
    order = {table.name: number for number, table in enumerate(found)}
    check_stored_dtypes(spec, {name: tensor.dtype for name, tensor in tensors.items()})
    for path in sorted(spec.tables, key=lambda path: order.get(path, len(order))):
        layout, stored = spec.tables[path], _tensors_of(path, spec.tables[path], tensors)
        if stored is None:
            raise CheckpointError(
                f"no tensors of {folder} are those of the compressed {path}: save or download the model again"
            )
        num_rows, dim, sizes = stored
        layout.check_table(num_rows, dim)
        kinds = [table.kind for table in found if path in (table.name, table.tied_to)]
        yield TableSummary.of(path, kinds or ["lookup"], layout, spec.record(path), (num_rows, dim), sizes)


def _tensors_of(path: str, layout: Layout, tensors: dict[str, StoredTensor]) -> tuple[int, int, dict[str, int]] | None:
    """V, d, and the bytes of each tensor that replaces a table; None if there is none that fits its layout.

    Files may have it under another prefix than the module's, as the architecture's conversion of checkpoints says.
    """
    block = "blocks.0." if isinstance(layout, BlocksLayout) else ""
    suffix = f"{block}decoder_weight"

    # The module's own name comes first, then names that it ends with.
    prefixes = [name.removesuffix(suffix) for name in tensors if name.endswith(f".{suffix}")]
    prefixes.sort(key=lambda prefix: (prefix != f"{path}.", not path.endswith(prefix.rpartition(".")[0])))

    for prefix in prefixes:
        codes, decoder = tensors.get(f"{prefix}{block}weight"), tensors[prefix + suffix]
        if codes is None or len(codes.shape) != 2 or len(decoder.shape) != 2:
            continue

        num_rows = codes.shape[0]
        dim = sum(layout.dims) if isinstance(layout, BlocksLayout) else decoder.shape[1]
        shapes = layout.stored_shapes(num_rows, dim)
        found = {name: tensors[prefix + name] for name in shapes if prefix + name in tensors}
        if shapes == {name: stored.shape for name, stored in found.items()}:
            return num_rows, dim, {name: stored.num_bytes for name, stored in found.items()}
    return None
