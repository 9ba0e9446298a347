"""What stands for a table on disk: the errors, the validated layout, and the bits of packed codes.

A row's latents of 8 bits are plain integers. Those of 4, 2 and 1 bits are trellis coded: the symbols of a section are
read as one stream, and a latent is looked up by the last 8 bits of it, so that few bits of its own choose among 256
levels (trellis-coded quantisation, Marcellin & Fischer 1990, over the bitshift trellis of Tseng et al. 2024, "QTIP").

This file travels with every compressed model, so it imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


HALF = 0.5  # what a mid-rise quantiser's integer stands for is half a step above it


def pack(symbols: Tensor, bit_allocation: tuple[int, ...]) -> Tensor:
    """Packs symbols into bytes, the widest latents first.

    A section of n latents of w bits takes m = ⌈n·w/8⌉ bytes; latent s·m + k of the section sits in byte k at bit s·w,
    so that unpacking works on whole contiguous sections.

    Args:
        symbols: (n, rank) uint8; that of a latent of w bits is below 2^w.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Returns:
        (n, bytes per row) uint8.

    Raises:
        TableError: If a symbol does not fit into its bits.

    Example:
        >>> packed = pack(torch.tensor([[255, 3, 1, 1, 0]], dtype=torch.uint8), (1, 0, 2, 2))
        >>> packed.tolist(), [section.tolist() for _, section in sections(packed, (1, 0, 2, 2))]
        ([[255, 7, 1]], [[[255]], [[3, 1]], [[1, 0]]])
    """
    packed, first = [], 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        section, first = symbols[:, first : first + count], first + count
        per_byte = 8 // width
        num_bytes = math.ceil(count / per_byte)
        if section.numel() and (largest := int(section.max())) >> width:
            raise TableError(f"symbol {largest} does not fit into {width} bits: quantise the codes again")
        planes = F.pad(section, (0, num_bytes * per_byte - count)).view(len(symbols), per_byte, num_bytes)
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=symbols.device).view(1, per_byte, 1) * width
        packed.append((planes << shifts).sum(dim=1, dtype=torch.uint8))
    return torch.cat(packed, dim=1)


def sections(packed: Tensor, bit_allocation: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The symbols of packed rows, width by width, by plain operations that compilers and exporters know.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.

    Yields:
        The width, and (..., count) int32 symbols, for each width that has any.
    """
    first = 0
    for count, width in zip(bit_allocation, BIT_WIDTHS, strict=True):
        num_bytes = math.ceil(count * width / 8)
        section, first = packed[..., first : first + num_bytes], first + num_bytes
        if width < 8 and count:
            # In 32 bits, as exporters to ONNX have no shifts of bytes.
            wide, mask = section.int(), (1 << width) - 1
            planes = [(wide >> shift) & mask for shift in range(0, 8, width)]
            section = torch.cat(planes, dim=-1)[..., :count]
        if count:
            yield width, section.int()


def trellis_states(symbols: Tensor, width: int) -> Tensor:
    """The state of each latent: its own symbol in the low bits, those of the latents behind it above.

    The stream runs from the weakest latent to the strongest, as its first symbols have least to choose from.

    Args:
        symbols: (..., count) integers, each below 2^width.
        width: Bits of a symbol.

    Returns:
        (..., count) int32, below 256.

    Example:
        >>> trellis_states(torch.tensor([1, 2, 3], dtype=torch.uint8), width=2).tolist()
        [57, 14, 3]
    """
    states, known = symbols.int(), 1
    while known * width < STATE_BITS:  # doubles how many symbols each state knows
        behind = F.pad(states[..., known:], (0, min(known, states.shape[-1])))
        states = states | (behind << (known * width))
        known *= 2
    return states


def unpack(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor) -> Tensor:
    """The latents of packed rows, less ½.

    Args:
        packed: (..., bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, the levels of the trellis's states at 4, 2 and 1 bits, less ½.

    Returns:
        (..., rank) int8.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack(torch.tensor([[200, 0b10]], dtype=torch.uint8), (1, 0, 0, 2), codebook).tolist()
        [[72, -126, -127]]
    """
    latents = []
    for width, symbols in sections(packed, bit_allocation):
        if width == 8:
            latents.append((symbols - 128).to(torch.int8))
        else:
            latents.append(codebook[BIT_WIDTHS.index(width) - 1][trellis_states(symbols, width).long()])
    return torch.cat(latents, dim=-1)


def unpack_levels(packed: Tensor, bit_allocation: tuple[int, ...], codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The half-integers that packed rows stand for, (..., rank): [`unpack`] and ½.

    Example:
        >>> codebook = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
        >>> unpack_levels(torch.tensor([[200]], dtype=torch.uint8), (1, 0, 0, 0), codebook, torch.float32).tolist()
        [[72.5]]
    """
    return unpack(packed, bit_allocation, codebook).to(dtype) + HALF


def refinement_steps(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What a second layer's half-integers are multiplied by to be in the first layer's unit.

    Args:
        exponents: (rank,) int8, in eighths of a power of two; -128 for a step of 0.
        dtype: Of the steps.

    Example:
        >>> refinement_steps(torch.tensor([0, -8, 4, -128], dtype=torch.int8), torch.float64)[[0, 1, 3]].tolist()
        [1.0, 0.5, 0.0]
    """
    wide = exponents.to(torch.promote_types(dtype, torch.float32))
    return torch.exp2(wide / OCTAVE).masked_fill(exponents == NO_STEP, 0).to(dtype)


class PackedCodes(NamedTuple):
    """Packed rows with all that it takes to read them.

    Attributes:
        packed: (V, bytes per row) uint8.
        bit_allocation: How many latents have 8, 4, 2 and 1 bits.
        codebook: (3, 256) int8, as [`unpack`] takes it.
    """

    packed: Tensor
    bit_allocation: tuple[int, ...]
    codebook: Tensor

    @property
    def rank(self) -> int:
        """Latents of a row."""
        return sum(self.bit_allocation)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """The latents of rows, less ½: (n, rank) int8."""
        return unpack(self.packed[rows], self.bit_allocation, self.codebook)

    def check(self, rank: int) -> None:
        """Refuses tensors that are not what the allocation makes them.

        Raises:
            TableError: If shapes or dtypes do not fit each other or the rank.
        """
        packed, codebook = self.packed, self.codebook
        if (
            (packed.dtype, packed.shape[1:]) != (torch.uint8, (code_bytes(self.bit_allocation),))
            or (codebook.dtype, codebook.shape) != (torch.int8, CODEBOOK_SHAPE)
            or self.rank != rank
        ):
            raise TableError(
                f"codes {packed.dtype} {tuple(packed.shape)} of bit allocation {self.bit_allocation} and codebook "
                f"{codebook.dtype} {tuple(codebook.shape)} do not fit rank {rank}: pass those of one module"
            )
