"""What stands for a table on disk: the validated layout of its codes, and the errors of everything that reads it.

This file travels with every compressed model, so it imports nothing of the package.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor


FORMAT = 2
FLOAT_CODES = ("float32", "float16", "bfloat16")
DECODERS = (*FLOAT_CODES, "float8_e4m3fn")
PACKED_CODES = "packed"
BIT_WIDTHS = (8, 4, 2, 1)  # the order of a packed row; powers of two, so that no latent straddles two bytes
STATE_BITS = 8  # of the trellis that latents of fewer bits are read through
CODEBOOK_SHAPE = (len(BIT_WIDTHS) - 1, 1 << STATE_BITS)
OCTAVE = 8  # steps of a refinement come in eighths of a power of two
NO_STEP = -128  # the exponent of a step of 0
MAX_RANK = 65_536
MAX_BLOCKS = 1_024
CODE_TENSORS = (
    "weight",
    "codebook_weight",
    "decoder_weight",
    "exponent_weight",
    "decoder_bias_weight",
    "refinement_weight",
    "refined_rows_weight",
    "refined_latents_weight",
    "refinement_exponent_weight",
    "outlier_weight",
    "outlier_rows_weight",
)


class DirEmbedError(ValueError):
    """Base of every error that hf_dirembed raises on bad input; each message names the mend."""


class SpecError(DirEmbedError):
    """The `dirembed` object of a config is missing, malformed, or does not fit the model."""


class CheckpointError(DirEmbedError):
    """A checkpoint's tensors do not fit its config."""


class UnreadableCheckpointError(CheckpointError, OSError):
    """A checkpoint's file is missing or cannot be read; an OSError too, as transformers raises there."""


class ModelError(DirEmbedError):
    """The model cannot be compressed or expanded: it has no token embedding, or is compressed already."""


class TableError(DirEmbedError):
    """The embedding table cannot be compressed: wrong shape, NaN or infinity."""


class OptionError(DirEmbedError):
    """An option is unknown, out of its range, or does not go with another."""


class BudgetError(OptionError):
    """The budget that was asked for (bits, ratio or rank) cannot be met."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def code_bytes(bit_allocation: tuple[int, ...]) -> int:
    """Bytes of a packed row: the latents of each width start at a byte of their own.

    Example:
        >>> code_bytes((1, 0, 2, 8))
        3
    """
    return sum(math.ceil(count * width / 8) for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True))


def _check_bit_allocation(counts: Any) -> None:
    if (
        not isinstance(counts, tuple)
        or len(counts) != len(BIT_WIDTHS)
        or any(type(count) is not int or count < 0 for count in counts)
        or not 1 <= sum(counts) <= MAX_RANK
    ):
        raise SpecError(
            f"dirembed bit_allocation {counts!r} is not {len(BIT_WIDTHS)} counts of latents "
            f"(of {', '.join(map(str, BIT_WIDTHS))} bits) that sum to 1 to {MAX_RANK}: compress the model again"
        )


def _check_rank(rank: Any) -> None:
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise SpecError(f"dirembed rank {rank!r} is not a whole number from 1 to {MAX_RANK}: compress the model again")


@dataclass(frozen=True)
class Refinement:
    """A second stage of packed codes, which only some rows have: those of frequent tokens.

    It makes latents of the first stage finer, or has the bits of latents that the first stage has none for.

    Attributes:
        rows: How many rows have it.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits of it.

    Raises:
        SpecError: If a field is of the wrong type or out of range.
    """

    rows: int
    bit_allocation: tuple[int, ...]

    def __post_init__(self) -> None:
        if type(self.rows) is not int or self.rows < 1:
            raise SpecError(f"dirembed refinement rows {self.rows!r} is not a positive whole number: compress again")
        _check_bit_allocation(self.bit_allocation)

    @property
    def rank(self) -> int:
        """The number of latents that it makes finer."""
        return sum(self.bit_allocation)

    @property
    def code_width(self) -> int:
        """Bytes of a packed row."""
        return code_bytes(self.bit_allocation)


@dataclass(frozen=True)
class TableLayout:
    """How one compressed table is laid out.

    Every field is checked when the layout is made, before anything is allocated from it.

    Attributes:
        method: What found the codes: `svd`, `autoencoder`, `direction` or `transform`. Loading does not depend on it.
        rank: The number of latents, r: rows of the decoder.
        codes: The code matrix: `float32`, `float16` or `bfloat16` latents of shape (V, r), or `packed` integers of
            shape (V, bytes per row) and dtype uint8.
        decoder: Dtype of the decoder, never wider than the model's.
        bias: Whether the decoder is affine. Over packed codes it is.
        bit_allocation: For packed codes, how many of the leading latents have 8, 4, 2 and 1 bits in every row.
        refinement: For packed codes, a second stage that only some rows have.
        outliers: Over packed codes, how many rows are kept as they are, whatever their codes stand for: those that the
            codes would lose.
        zero_row: The row that is exactly zero, whatever its codes stand for: that of the padding token, where it was
            zero in the table.

    Raises:
        SpecError: If a field is of the wrong type or out of range.

    Example:
        >>> layout = TableLayout(
        ...     method="transform", rank=12, codes="packed", decoder="float16", bias=True, bit_allocation=(0, 2, 2, 8)
        ... )
        >>> layout.code_width
        3
    """

    method: str
    rank: int
    codes: str
    decoder: str
    bias: bool = False
    bit_allocation: tuple[int, ...] | None = None
    refinement: Refinement | None = None
    outliers: int | None = None
    zero_row: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method.isidentifier() or len(self.method) > 64:
            raise SpecError(f"dirembed method {self.method!r} is not a method's name: compress the model again")
        _check_rank(self.rank)
        if type(self.bias) is not bool:
            raise SpecError(f"dirembed bias {self.bias!r} is not true or false: compress the model again")
        if self.decoder not in DECODERS:
            known = ", ".join(DECODERS)
            raise SpecError(f"dirembed decoder {self.decoder!r} is not one of {known}: compress the model again")

        if self.codes == PACKED_CODES:
            _check_bit_allocation(self.bit_allocation)
            if not self.bias:
                raise SpecError("dirembed packed codes come with a bias: compress the model again")
            self._check_stages()
        elif self.codes not in FLOAT_CODES:
            known = ", ".join((*FLOAT_CODES, PACKED_CODES))
            raise SpecError(f"dirembed codes {self.codes!r} are not one of {known}: compress the model again")
        elif (self.bit_allocation, self.refinement, self.outliers) != (None, None, None):
            raise SpecError(
                "dirembed bit_allocation, refinement and outliers go with packed codes only: compress again"
            )

        if not isinstance(self.refinement, (Refinement, type(None))):
            raise SpecError(f"dirembed refinement {self.refinement!r} is not an object: compress the model again")
        if self.outliers is not None and (type(self.outliers) is not int or self.outliers < 1):
            raise SpecError(f"dirembed outliers {self.outliers!r} is not a positive whole number: compress again")
        if self.zero_row is not None and (type(self.zero_row) is not int or self.zero_row < 0):
            raise SpecError(f"dirembed zero_row {self.zero_row!r} is no row's number: compress the model again")

    def _check_stages(self) -> None:
        """Every latent has bits in one of the stages, and none has more than one code in each."""
        further = self.refinement.rank if isinstance(self.refinement, Refinement) else 0
        if max(self.base_rank, further) > self.rank or self.base_rank + further < self.rank:
            raise SpecError(
                f"dirembed rank {self.rank} is not what a bit_allocation to {self.base_rank} latents and a refinement "
                f"of {further} come to: compress the model again"
            )

    @property
    def base_rank(self) -> int:
        """The number of latents that every row has."""
        return self.rank if self.bit_allocation is None else sum(self.bit_allocation)

    @property
    def code_width(self) -> int:
        """Columns of the code matrix: latents for float codes, bytes for packed ones."""
        return self.rank if self.bit_allocation is None else code_bytes(self.bit_allocation)

    def stored_shapes(self, num_rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of those of `CODE_TENSORS` that a (num_rows, dim) table has."""
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (num_rows, self.code_width),
            "decoder_weight": (self.rank, dim),
        }

        if self.codes == PACKED_CODES:
            shapes["codebook_weight"] = CODEBOOK_SHAPE
            shapes["exponent_weight"] = (self.rank,)
        if self.bias:
            shapes["decoder_bias_weight"] = (dim,)

        if self.refinement is not None:
            shapes["refinement_weight"] = (self.refinement.rows, self.refinement.code_width)
            shapes["refined_rows_weight"] = (self.refinement.rows,)
            shapes["refined_latents_weight"] = shapes["refinement_exponent_weight"] = (self.refinement.rank,)
        if self.outliers is not None:
            shapes["outlier_weight"] = (self.outliers, dim)
            shapes["outlier_rows_weight"] = (self.outliers,)

        return shapes

    def stored_dtypes(self, tensor: str) -> tuple[str, ...]:
        """The dtypes that one of `CODE_TENSORS` may have in a file, as safetensors calls them."""
        if tensor in ("refined_rows_weight", "refined_latents_weight", "outlier_rows_weight"):
            return ("I32",)
        if tensor in ("codebook_weight", "exponent_weight", "refinement_exponent_weight"):
            return ("I8",)
        packed = tensor == "refinement_weight" or (tensor == "weight" and self.codes == PACKED_CODES)
        floats = ("F16", "BF16", "F32", "F64")
        if tensor == "decoder_weight":
            return ("F8_E4M3", *floats)
        return ("U8",) if packed else floats

    def check_table(self, num_rows: int, dim: int) -> None:
        """Refuses a layout that does not fit a table, or that a stock class would take for the table itself.

        Raises:
            SpecError: If the code matrix is as wide as the table, or the stages' ranks, refined rows, outliers or the
                zero row exceed it.
        """
        ranks = [self.base_rank, self.refinement.rank if self.refinement else 1]
        rows = [self.refinement.rows if self.refinement else 1, self.outliers or 1, 1 + (self.zero_row or 0)]
        if max(ranks) > dim or max(rows) > num_rows:
            raise SpecError(f"the dirembed layout exceeds a table of {num_rows} x {dim}: compress the model again")
        if self.code_width == dim:
            raise SpecError(
                f"the code matrix is {dim} columns wide, as wide as the table: a stock class would load it as one; "
                "compress the model again with another budget"
            )

    @classmethod
    def from_dict(cls, values: Any) -> TableLayout:
        """Reads a layout from its JSON form.

        Raises:
            SpecError: If `values` is no object, has unknown or missing keys, or holds a bad value.
        """
        values = _fields_of(cls, values)
        if isinstance(values.get("refinement"), dict):
            values["refinement"] = Refinement(**_fields_of(Refinement, values["refinement"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. Fields that do not apply are left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        for stage in (values, values.get("refinement", {})):
            if "bit_allocation" in stage:
                stage["bit_allocation"] = list(stage["bit_allocation"])
        return values


@dataclass(frozen=True)
class BlocksLayout:
    """How a table of several blocks of columns is laid out, each coded by itself: per-layer tables are such.

    Attributes:
        dims: The columns of each block.
        blocks: The layout of each.

    Raises:
        SpecError: If there are not as many of both, or they are of the wrong type or out of range.
    """

    dims: tuple[int, ...]
    blocks: tuple[TableLayout, ...]

    def __post_init__(self) -> None:
        whole = all(type(dim) is int and dim >= 1 for dim in self.dims)
        if not whole or len(self.dims) != len(self.blocks) or not 1 <= len(self.blocks) <= MAX_BLOCKS:
            raise SpecError(
                f"dirembed dims {list(self.dims)!r:.200} are not the columns of {len(self.blocks)} blocks, 1 to "
                f"{MAX_BLOCKS} of them: compress the model again"
            )

    @property
    def method(self) -> str:
        """What found the codes of all blocks."""
        return self.blocks[0].method

    def stored_shapes(self, num_rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a (num_rows, dim) table, by name."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (len(self.blocks),)}
        for prefix, block_dim, block in self.named_blocks():
            found = block.stored_shapes(num_rows, block_dim)
            shapes |= {prefix + name: shape for name, shape in found.items()}
        return shapes

    def stored_dtypes(self, tensor: str) -> tuple[str, ...]:
        """The dtypes that one of the tensors may have in a file, as safetensors calls them."""
        if tensor == "weight":
            return ("I32",)
        prefix, _, name = tensor.rpartition(".")
        return self.blocks[int(prefix.rpartition(".")[2])].stored_dtypes(name)

    def named_blocks(self) -> Iterator[tuple[str, int, TableLayout]]:
        """What the names of each block's tensors start with, its columns, and its layout."""
        for number, (dim, block) in enumerate(zip(self.dims, self.blocks, strict=True)):
            yield f"blocks.{number}.", dim, block

    def check_table(self, num_rows: int, dim: int) -> None:
        """Refuses a layout that does not fit a table.

        Raises:
            SpecError: If the blocks have other columns than the table, or one of them does not fit.
        """
        if sum(self.dims) != dim:
            raise SpecError(
                f"the dirembed blocks have {sum(self.dims)} columns, the table {dim}: compress the model again"
            )
        for _, block_dim, block in self.named_blocks():
            block.check_table(num_rows, block_dim)

    @classmethod
    def from_dict(cls, values: Any) -> BlocksLayout:
        """Reads a layout from its JSON form.

        Raises:
            SpecError: If `values` is no object, has unknown or missing keys, or holds a bad value.
        """
        values = _fields_of(cls, values)
        dims, blocks = values["dims"], values["blocks"]
        if not isinstance(dims, list) or not isinstance(blocks, list) or len(blocks) > MAX_BLOCKS:
            raise SpecError("dirembed dims and blocks are no lists: compress the model again")
        return cls(tuple(dims), tuple(TableLayout.from_dict(block) for block in blocks))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"dims": list(self.dims), "blocks": [block.to_dict() for block in self.blocks]}


Layout: TypeAlias = TableLayout | BlocksLayout


@dataclass(frozen=True)
class TableRecord:
    """How a table was made, and what came of it: for people; loading depends on none of it but the checksum.

    Attributes:
        settings: What the codes were made with (budget, seed, versions).
        quality: What came of it (dense bytes, mean cosine): shown by `hf-dirembed inspect`.
        checksum: The checksum of the codes, as [`checksum`] gives it; None where nobody has taken it.

    Raises:
        SpecError: If a field is of the wrong type.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    checksum: str | None = None

    def __post_init__(self) -> None:
        for name in ("settings", "quality"):
            if not isinstance(getattr(self, name), dict):
                raise SpecError(f"dirembed {name} {getattr(self, name)!r:.200} is no object: compress the model again")
        if not isinstance(self.checksum, (str, type(None))):
            raise SpecError(f"dirembed checksum {self.checksum!r:.200} is no text: compress the model again")

    def figure(self, name: str) -> Any:
        """One of the figures of `quality`, if it is there and a finite number."""
        value = self.quality.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return value if number else None

    @classmethod
    def from_dict(cls, values: Any) -> TableRecord:
        """Reads a record from its JSON form.

        Raises:
            SpecError: If `values` is no object, has unknown keys, or holds a bad value.
        """
        return cls(**_fields_of(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; what is empty is left out."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class CompressionSpec:
    """What is compressed in a model, and how: what `config.json` holds under `dirembed`.

    Attributes:
        tables: The layout of each compressed table, by the path of its module; modules that are tied to one another
            are named once.
        records: How each was made, by the same paths.

    Raises:
        SpecError: If a field is of the wrong type, or no table is compressed.

    Example:
        >>> layout = {"method": "svd", "rank": 8, "codes": "float16", "decoder": "float32"}
        >>> spec = CompressionSpec.from_dict({"format": 2, "tables": {"embed_tokens": layout}})
        >>> spec.tables["embed_tokens"].rank
        8
    """

    tables: dict[str, Layout]
    records: dict[str, TableRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tables:
            raise SpecError("the config's dirembed object names no table: compress the model again")

    def matrices(self) -> Iterator[tuple[str, TableLayout]]:
        """The path of every compressed matrix, a table or a block of one, with its layout."""
        for path, layout in self.tables.items():
            if isinstance(layout, TableLayout):
                yield path, layout
            else:
                yield from ((f"{path}.{prefix[:-1]}", block) for prefix, _, block in layout.named_blocks())

    def record(self, path: str) -> TableRecord:
        """How a table was made; an empty record where nobody has written one."""
        return self.records.get(path, TableRecord())

    @classmethod
    def from_dict(cls, values: Any) -> CompressionSpec:
        """Reads a spec from its JSON form.

        Raises:
            SpecError: If `values` is no object, is of another format, has unknown or missing keys, or holds a bad
                value.
        """
        _require_object(values, "")
        version = values.get("format")
        if type(version) is int and version == 1:
            raise SpecError(
                "the model was compressed in format 1, which was never published: compress it again from the original"
            )
        if type(version) is not int or version != FORMAT:
            raise SpecError(f"dirembed format {version!r:.200} is not {FORMAT}: update hf_dirembed")

        _check_keys({name: value for name, value in values.items() if name != "record"}, {"format", "tables"})
        tables, record = values["tables"], values.get("record", {})
        _require_object(tables, " tables")
        _require_object(record, " record")
        records = record.get("tables", {})
        _require_object(records, " record of tables")

        return cls(
            {path: _layout_of(layout) for path, layout in tables.items()},
            {path: TableRecord.from_dict(each) for path, each in records.items() if path in tables},
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what `config.dirembed` holds."""
        return {
            "format": FORMAT,
            "tables": {path: layout.to_dict() for path, layout in self.tables.items()},
            "record": {"tables": {path: record.to_dict() for path, record in self.records.items()}},
        }


def _layout_of(values: Any) -> Layout:
    blocks = isinstance(values, dict) and "blocks" in values
    return BlocksLayout.from_dict(values) if blocks else TableLayout.from_dict(values)


def _require_object(values: Any, name: str) -> None:
    if not isinstance(values, dict):
        raise SpecError(
            f"the config's dirembed{name} entry is no object but {values!r:.200}: compress the model again"
        )


def _check_keys(values: Any, required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    _require_object(values, "")
    unknown, missing = sorted(set(values) - required - optional, key=str), sorted(required - set(values))
    if unknown or missing:
        raise SpecError(
            f"the config's dirembed object has unknown keys {unknown!r:.200} and lacks {missing}: "
            "update hf_dirembed, or compress the model again"
        )


def _fields_of(cls: type, values: Any) -> dict[str, Any]:
    """The arguments of a class out of a JSON object."""
    known = {f.name: f for f in fields(cls)}
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    _check_keys(values, required, known.keys() - required)
    counts = values.get("bit_allocation")
    return {**values, "bit_allocation": tuple(counts)} if isinstance(counts, list) else dict(values)


def checksum(codes: Mapping[str, Tensor]) -> str:
    """A checksum of codes: CRC-32 of the names and the bytes of tensors, in the order of their names.

    Example:
        >>> codes = {"weight": torch.tensor([[1, 2]], dtype=torch.uint8)}
        >>> checksum(codes) == checksum({"weight": codes["weight"].clone()}), checksum(codes)
        (True, 'crc32:44af9e60')
    """
    return checksum_of_bytes({name: map(_bytes_of, [tensor]) for name, tensor in codes.items()})  # one at a time


def checksum_of_bytes(codes: Mapping[str, Iterable[Any]]) -> str:
    """The [`checksum`] of codes that are not in memory all at once: the bytes of each come in pieces.

    Example:
        >>> checksum_of_bytes({"weight": [bytes([1]), bytes([2])]})
        'crc32:44af9e60'
    """
    value = 0
    for name, pieces in sorted(codes.items()):
        value = zlib.crc32(name.encode(), value)
        for piece in pieces:
            value = zlib.crc32(piece, value)
    return f"crc32:{value:08x}"


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
