"""What stands for a table on disk: the validated layout of its codes, and the errors of everything that reads it.

This file travels with every compressed model, so it imports nothing of the package.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor


P = ParamSpec("P")
R = TypeVar("R")
FORMAT = 2
FLOAT_CODES = ("float32", "float16", "bfloat16")
STORED_CODES = (*FLOAT_CODES, "float64")  # the last of models that were cast to it
DECODERS = (*STORED_CODES, "float8_e4m3fn")
PACKED_CODES = "packed"
BIT_WIDTHS = (4, 3, 2, 1)  # the order of a packed row
STATE_BITS = 8  # of the trellis that codes are read through
CODEBOOK_SHAPE = (len(BIT_WIDTHS), 1 << STATE_BITS)
CODEBOOKS = ("own", "gaussian")
OCTAVE = 8  # steps of codes come in eighths of a power of two
MAX_RANK = 32_767  # more than any model's dimension
MAX_CLASSES = 4  # of rows: two bits tell them apart
CLASS_BITS = 2
CLASS_BLOCK = 64  # rows; how many of each class come before a block is stored
QUARTER = 4  # scales of rows come in quarters of a power of two
SCALE_BIAS = 32  # the exponent of a scale of 1
MAX_BLOCKS = 1_024
CODE_TENSORS = (
    "weight",
    "codebook_weight",
    "decoder_weight",
    "exponent_weight",
    "decoder_bias_weight",
    "latents_weight",
    "steps_weight",
    "row_weight",
    "class_counts_weight",
    "further_weight",
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
    """Bytes of a packed row, whose codes are a stream of bits.

    Example:
        >>> code_bytes((1, 0, 2, 9))
        3
    """
    return math.ceil(sum(count * width for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True)) / 8)


def _check_bit_allocation(counts: Any) -> None:
    if (
        not isinstance(counts, tuple)
        or len(counts) != len(BIT_WIDTHS)
        or any(type(count) is not int or count < 0 for count in counts)
        or not 1 <= sum(counts) <= 2 * MAX_RANK
    ):
        raise SpecError(
            f"dirembed bit_allocation {counts!r:.200} is not {len(BIT_WIDTHS)} counts of codes "
            f"(of {', '.join(map(str, BIT_WIDTHS))} bits) that sum to 1 to {2 * MAX_RANK}: compress the model again"
        )


def _check_rank(rank: Any) -> None:
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise SpecError(f"dirembed rank {rank!r} is not a whole number from 1 to {MAX_RANK}: compress the model again")


@dataclass(frozen=True)
class RowClass:
    """Rows that have the same bits: the more a row counts, the more bits its class has.

    Attributes:
        bit_allocation: How many codes of a row have 4, 3, 2 and 1 bits.
        rows: How many rows are of this class; None for the first class, which has all that no other has.

    Raises:
        SpecError: If a field is of the wrong type or out of range.

    Source: Chen & Smith 1977, "Adaptive coding of monochrome and color images": blocks are sorted into classes, each
        with an allocation of its own.
    """

    bit_allocation: tuple[int, ...]
    rows: int | None = None

    def __post_init__(self) -> None:
        _check_bit_allocation(self.bit_allocation)
        if self.rows is not None and (type(self.rows) is not int or self.rows < 0):
            raise SpecError(f"dirembed rows {self.rows!r:.200} of a class are no whole number: compress again")

    @property
    def num_codes(self) -> int:
        """The number of codes of a row."""
        return sum(self.bit_allocation)

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return code_bytes(self.bit_allocation)


def further_offsets(classes: tuple[RowClass, ...]) -> tuple[int, ...]:
    """Where the rows of each class begin in the bytes that rows of the first class do not have, and where these end.

    Args:
        classes: Of a table, the first with the fewest bytes.

    Example:
        >>> further_offsets((RowClass((0, 0, 4, 8)), RowClass((2, 2, 4, 4), rows=100), RowClass((9, 0, 0, 0), rows=1)))
        (0, 0, 200, 203)
    """
    offsets = [0]
    for each in classes:
        offsets.append(offsets[-1] + (each.rows or 0) * (each.num_bytes - classes[0].num_bytes))
    return tuple(offsets)


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
        classes: For packed codes, the classes of the rows. Rows of the first have the fewest bytes.
        codebook: For packed codes, `own` or `gaussian`: whether the table has its own, or the one that small tables
            share.
        outliers: Over packed codes, how many rows are kept as they are, whatever their codes stand for: those that the
            codes would lose.
        zero_row: The row that is exactly zero, whatever its codes stand for: that of the padding token, where it was
            zero in the table.

    Raises:
        SpecError: If a field is of the wrong type or out of range.

    Example:
        >>> layout = TableLayout(
        ...     method="transform", rank=12, codes="packed", decoder="float16", bias=True, codebook="own",
        ...     classes=(RowClass((0, 0, 4, 8)), RowClass((2, 2, 4, 4), rows=100)),
        ... )  # fmt: skip
        >>> layout.code_width, layout.further_bytes
        (2, 200)
    """

    method: str
    rank: int
    codes: str
    decoder: str
    bias: bool = False
    classes: tuple[RowClass, ...] = ()
    codebook: str | None = None
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
            if not self.bias:
                raise SpecError("dirembed packed codes come with a bias: compress the model again")
            self._check_classes()
            if self.codebook not in CODEBOOKS:
                known = ", ".join(CODEBOOKS)
                raise SpecError(f"dirembed codebook {self.codebook!r:.200} is not one of {known}: compress again")
        elif self.codes not in STORED_CODES:
            known = ", ".join((*STORED_CODES, PACKED_CODES))
            raise SpecError(f"dirembed codes {self.codes!r} are not one of {known}: compress the model again")
        elif self.classes or self.codebook is not None or self.outliers is not None:
            raise SpecError("dirembed classes, codebook and outliers go with packed codes only: compress again")

        if self.outliers is not None and (type(self.outliers) is not int or self.outliers < 1):
            raise SpecError(f"dirembed outliers {self.outliers!r} is not a positive whole number: compress again")
        if self.zero_row is not None and (type(self.zero_row) is not int or self.zero_row < 0):
            raise SpecError(f"dirembed zero_row {self.zero_row!r} is no row's number: compress the model again")

    def _check_classes(self) -> None:
        """The first class has the rows that are left, and the fewest bytes."""
        if (
            not isinstance(self.classes, tuple)
            or not 1 <= len(self.classes) <= MAX_CLASSES
            or not all(isinstance(each, RowClass) for each in self.classes)
        ):
            raise SpecError(f"dirembed classes {self.classes!r:.200} are not 1 to {MAX_CLASSES}: compress again")
        first, *further = self.classes
        if first.rows is not None or any(each.rows is None for each in further):
            raise SpecError("dirembed classes but the first say how many rows they have: compress the model again")
        if any(each.num_bytes < first.num_bytes for each in further):
            raise SpecError("rows of the first dirembed class have the fewest bytes: compress the model again")

    @property
    def packed(self) -> bool:
        """Whether the codes are packed integers."""
        return self.codes == PACKED_CODES

    @property
    def code_width(self) -> int:
        """Columns of the code matrix: latents for float codes, bytes for packed ones."""
        return self.classes[0].num_bytes if self.classes else self.rank

    @property
    def further_bytes(self) -> int:
        """Bytes of all rows beyond the code matrix's, which rows of the first class do not have."""
        return self.further_offsets[-1] if self.classes else 0

    @property
    def further_offsets(self) -> tuple[int, ...]:
        """Where each class begins in the further bytes, and where these end, as [`further_offsets`] has it."""
        return further_offsets(self.classes)

    @property
    def num_codes(self) -> int:
        """Codes of a row, summed over the classes."""
        return sum(each.num_codes for each in self.classes)

    def stored_shapes(self, num_rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of those of `CODE_TENSORS` that a (num_rows, dim) table has."""
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (num_rows, self.code_width),
            "decoder_weight": (self.rank, dim),
        }

        if self.packed:
            if self.codebook == "own":
                shapes["codebook_weight"] = CODEBOOK_SHAPE
            shapes["exponent_weight"] = (self.rank,)
            shapes["latents_weight"] = shapes["steps_weight"] = (self.num_codes,)
            shapes["row_weight"] = (num_rows,)
        if self.bias:
            shapes["decoder_bias_weight"] = (dim,)

        if len(self.classes) > 1:
            shapes["class_counts_weight"] = (math.ceil(num_rows / CLASS_BLOCK), len(self.classes) - 1)
            shapes["further_weight"] = (self.further_bytes,)
        if self.outliers is not None:
            shapes["outlier_weight"] = (self.outliers, dim)
            shapes["outlier_rows_weight"] = (self.outliers,)

        return shapes

    def stored_dtypes(self, tensor: str) -> tuple[str, ...]:
        """The dtypes that one of `CODE_TENSORS` may have in a file, as safetensors calls them."""
        if tensor in ("latents_weight", "class_counts_weight", "outlier_rows_weight"):
            return ("I32",)
        if tensor in ("codebook_weight", "exponent_weight", "steps_weight"):
            return ("I8",)
        packed = tensor in ("row_weight", "further_weight") or (tensor == "weight" and self.packed)
        floats = ("F16", "BF16", "F32", "F64")
        if tensor == "decoder_weight":
            return ("F8_E4M3", *floats)
        return ("U8",) if packed else floats

    def check_table(self, num_rows: int, dim: int) -> None:
        """Refuses a layout that does not fit a table, or that a stock class would take for the table itself.

        Raises:
            SpecError: If the code matrix is as wide as the table, or latents, rows of classes, outliers or the zero
                row exceed it.
        """
        rows = [sum(each.rows or 0 for each in self.classes), self.outliers or 1, 1 + (self.zero_row or 0)]
        if self.rank > dim or max(rows) > num_rows:
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
        if "classes" in values:
            classes = values["classes"]
            if not isinstance(classes, list) or len(classes) > MAX_CLASSES:
                raise SpecError(f"dirembed classes {classes!r:.200} are no list of classes: compress the model again")
            values["classes"] = tuple(RowClass(**_fields_of(RowClass, each)) for each in classes)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. Fields that do not apply are left out."""
        values = {name: value for name, value in vars(self).items() if value is not None and name != "classes"}
        if self.classes:
            values["classes"] = [
                {name: value for name, value in vars(each).items() if value is not None} for each in self.classes
            ]
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
    """How a table was made, and what came of it: for people; loading depends on none of it but the checksums.

    Attributes:
        settings: What the codes were made with (budget, seed, versions).
        quality: What came of it (dense bytes, mean cosine): shown by `hf-dirembed inspect`.
        checksum: The checksum of the codes, as [`checksum`] gives it; None where nobody has taken it.
        decoder_checksum: The same of the decoder, or of those of all blocks, in the dtype that files have it in.

    Raises:
        SpecError: If a field is of the wrong type.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    checksum: str | None = None
    decoder_checksum: str | None = None

    def __post_init__(self) -> None:
        for name in ("settings", "quality"):
            if not isinstance(getattr(self, name), dict):
                raise SpecError(f"dirembed {name} {getattr(self, name)!r:.200} is no object: compress the model again")
        for name in ("checksum", "decoder_checksum"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise SpecError(f"dirembed {name} {getattr(self, name)!r:.200} is no text: compress the model again")

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


def with_known_options(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function name the option that was meant, where it is called with one that it does not have.

    Raises:
        OptionError: If the arguments of a call are not those of the function.

    Example:
        >>> with_known_options(lambda *, bits: bits)(bit=4)
        Traceback (most recent call last):
        ...
        hf_dirembed...OptionError: <lambda>() has no option 'bit': did you mean 'bits'?
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        signature = inspect.signature(function)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise OptionError(
                _what_is_meant(function.__qualname__.removesuffix(".__init__"), signature, kwargs, error)
            ) from None
        return function(*args, **kwargs)

    return checked


def _what_is_meant(name: str, signature: inspect.Signature, given: Mapping[str, Any], error: TypeError) -> str:
    options = [each for each in signature.parameters if each not in ("self", "cls")]
    strange = [each for each in given if each not in signature.parameters]
    if not strange:
        return f"{name}{signature} is not called so ({error}): name its options"
    near = difflib.get_close_matches(strange[0], options, 1, 0.5)
    mend = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(options)}"
    return f"{name}() has no option {strange[0]!r}: {mend}"


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
