"""What stands for a table on disk: the validated spec of its layout, and the errors of everything that reads it.

This file travels with every compressed model, so it imports nothing of the package.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any


FORMAT = 1
FLOAT_CODES = ("float32", "float16", "bfloat16")
DECODERS = (*FLOAT_CODES, "float8_e4m3fn")
PACKED_CODES = "packed"
BIT_WIDTHS = (8, 4, 2, 1)  # the order of a packed row; powers of two, so that no latent straddles two bytes
STATE_BITS = 8  # of the trellis that latents of fewer bits are read through
CODEBOOK_SHAPE = (len(BIT_WIDTHS) - 1, 1 << STATE_BITS)
OCTAVE = 8  # steps of a refinement come in eighths of a power of two
NO_STEP = -128  # the exponent of a step of 0
MAX_RANK = 65_536
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


class BudgetError(DirEmbedError):
    """The asked budget (bits, ratio or rank) or a method's setting cannot be met."""


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
    """A second layer of packed codes, which only some rows have: those of frequent tokens.

    It makes latents of the first layer finer, or has the bits of latents that the first layer has none for.

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
class CompressionSpec:
    """How a compressed table is laid out; what `config.json` holds under `dirembed`.

    Every field is checked when the spec is made, before anything is allocated from it.

    Attributes:
        method: What found the codes: `svd`, `autoencoder`, `direction` or `transform`. Loading does not depend on it.
        rank: The number of latents, r: rows of the decoder.
        codes: The code matrix: `float32`, `float16` or `bfloat16` latents of shape (V, r), or `packed` integers of
            shape (V, bytes per row) and dtype uint8.
        decoder: Dtype of the decoder, never wider than the model's.
        bias: Whether the decoder is affine. Over packed codes it is.
        bit_allocation: For packed codes, how many of the leading latents have 8, 4, 2 and 1 bits in every row.
        refinement: For packed codes, a second layer that only some rows have.
        outliers: Over packed codes, how many rows are kept as they are, whatever their codes stand for: those that the
            codes would lose.
        zero_row: The row that is exactly zero, whatever its codes stand for: that of the padding token, where it was
            zero in the table.
        settings: What the codes were made with (budget, seed, versions): for people, never read by the code.
        figures: What came of it (dense bytes, mean cosine): shown by `hf-dirembed inspect`.
        format: The version of this layout.

    Raises:
        SpecError: If a field is of the wrong type or out of range.

    Example:
        >>> spec = CompressionSpec(
        ...     method="transform", rank=12, codes="packed", decoder="float16", bias=True, bit_allocation=(0, 2, 2, 8)
        ... )
        >>> spec.code_width
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
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if type(self.format) is not int or self.format != FORMAT:
            raise SpecError(f"dirembed format {self.format!r} is not {FORMAT}: update hf_dirembed")
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
            self._check_layers()
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
        for name in ("settings", "figures"):
            if not isinstance(getattr(self, name), dict):
                raise SpecError(f"dirembed {name} {getattr(self, name)!r} is not an object: compress the model again")

    def _check_layers(self) -> None:
        """Every latent has bits in one of the layers, and none has more than one code in each."""
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

    def figure(self, name: str) -> Any:
        """One of `figures`, if it is there and a finite number."""
        value = self.figures.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return value if number else None

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
            SpecError: If the code matrix is as wide as the table, or the layers' ranks, refined rows, outliers or the
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
    def from_dict(cls, values: Any) -> CompressionSpec:
        """Reads a spec from its JSON form.

        Raises:
            SpecError: If `values` is no object, has unknown or missing keys, or holds a bad value.
        """
        values = _fields_of(cls, values, {"format"})
        if isinstance(values.get("refinement"), dict):
            values["refinement"] = Refinement(**_fields_of(Refinement, values["refinement"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what `config.dirembed` holds. Fields that do not apply are left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        for layer in (values, values.get("refinement", {})):
            if "bit_allocation" in layer:
                layer["bit_allocation"] = list(layer["bit_allocation"])
        return values


def _fields_of(cls: type, values: Any, required: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """The arguments of a spec's class out of a JSON object."""
    if not isinstance(values, dict):
        raise SpecError(f"the config's dirembed entry is no object but {values!r}: compress the model again")
    known = {f.name: f for f in fields(cls)}
    required = required | {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    unknown, missing = sorted(set(values) - set(known), key=str), sorted(required - set(values))
    if unknown or missing:
        raise SpecError(
            f"the config's dirembed object has unknown keys {unknown} and lacks {missing}: "
            "update hf_dirembed, or compress the model again"
        )
    counts = values.get("bit_allocation")
    return {**values, "bit_allocation": tuple(counts)} if isinstance(counts, list) else dict(values)
