"""Transform coding: a subspace's latents in few bits each, and a decoder fitted to what the bits can say.

Every row gets the same bits of the leading latents; what is left of the rows of frequent tokens gets a second stage
(successive refinement). Decoder and codes are then fitted to each other in turn. Outliers are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ...errors import BudgetError, OptionError, TableError
from ...remote.codes_dirembed import CODEBOOK_SHAPE, PACKED_CODES, Refinement, TableLayout
from ..coded import CodedTable
from ..distortion import TEMPERING, Measure
from ..row_weights import RowWeights, Sample
from ..subspace import eigenbasis, exact_chunks, second_moment
from ..table import Table
from .codec import Codec
from .decoder import DecoderStorage
from .outliers import RESERVED_SHARE, count_outliers, outlier_bytes
from .plan import ROW_NUMBER_ITEMSIZE, ByteBudget, StagePlan, plan_stages
from .quantisation import QUANTISER_SAMPLE, BitAllocator, Quantisers
from .refinement import plan_refinement


DECODER_DTYPES = (torch.float16, torch.float8_e4m3fn)  # the narrower one leaves more room for codes
_ROUNDING_LEFT = 0.4  # of a decoder's rounding, once the codes are fitted to the rounded decoder
_LENGTHS = 1e-15, 1e17  # of rows, whose squares and importance are held in float32


@dataclass(frozen=True)
class TransformSettings:
    """How `transform` fits.

    Attributes:
        tempering: The exponent of the token weights. Below 1 it trusts them less: rare tokens matter more than a word
            list says.
        sample_rows: Rows that the first decoder is fitted to.
        passes: How often all rows are coded anew, each time for the decoder of the time before. A second time lowers
            the error by another 1 to 3 %, and takes about half as long as all the rest.
        seed: The seed that the sample is drawn with.
        large_rows: If a table has more rows than this, all of which count alike, bits, codebooks and decoder are
            fitted to some of the rows, and all others are then coded in one pass over them.
        fitted_rows: How many rows of a larger table these are fitted to.

    Raises:
        OptionError: If a setting is out of its range.
    """

    tempering: float = TEMPERING
    sample_rows: int = 8_000
    passes: int = 1
    seed: int = 0
    large_rows: int = 1 << 20
    fitted_rows: int = 1 << 16

    def __post_init__(self) -> None:
        if not isinstance(self.tempering, (int, float)) or not 0 <= self.tempering <= 4:
            raise OptionError(f"transform setting tempering={self.tempering!r}: give a number from 0 to 4")
        least_of = {"sample_rows": 1, "passes": 1, "seed": 0, "large_rows": 1, "fitted_rows": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"transform setting {name}={value!r}: give an integer of at least {least}")


def transform(
    table: Table,
    max_bytes: int,
    *,
    dtype: torch.dtype,
    measure: Measure | None = None,
    settings: TransformSettings | None = None,
) -> CodedTable:
    """Codes a table within a number of bytes.

    It minimises what a measure says that errors cost. Rows that the codes would lose are kept as they are, as far as
    the bytes go; of rows that are far longer than most, `RowWeights.long_rows`, and have to be coded all the same,
    the length is cut down to one that the shared levels reach.

    Args:
        table: The (num_rows, dim) table.
        max_bytes: The most bytes for all tensors that replace it. A second stage fills them to within one row of it.
        dtype: The dtype of the table, and so of the decoder's bias.
        measure: How errors are measured; by default relative to the rows' lengths, with the settings' tempering.
        settings: How to fit; by default as `TransformSettings` says.

    Raises:
        BudgetError: If the bytes do not hold any code of the table.
        OptionError: If weights or Hessian are malformed.
        TableError: If the table holds a NaN or an infinity, or rows too long or short for their squares.

    Source: transform coding with bits by reverse water-filling (Cover & Thomas, Elements of Information Theory,
    ch. 10); refitting and requantising in turn are the two steps of Lloyd's algorithm.

    Example:
        >>> rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, 64)
        >>> coded = transform(Table(rows), max_bytes=2000 * 16, dtype=rows.dtype)
        >>> sum(tensor.nbytes for tensor in coded.tensors.values()) <= 2000 * 16
        True
    """
    settings = settings or TransformSettings()
    measure = measure or Measure(tempering=settings.tempering)
    factor = measure.factor(table)
    rooms, least = byte_budgets_of(table, max_bytes, dtype, factor)
    room = rooms[0].num_bytes

    # the rows in the metric, those that are far too long cut down
    rows = table if factor is None else table.in_metric(factor)
    importance = measure.importance(rows)
    cut = importance.long_rows
    if cut.any():
        rows = rows.no_longer_than(importance.longest)
        importance = measure.importance(rows)
    check_lengths(rows, importance)

    # bits, codebooks and decoder, with some room reserved for outliers
    row_bytes = outlier_bytes(table.dim, dtype)
    reserved = min(row_bytes * int(cut.sum()), int(RESERVED_SHARE * max_bytes), room - least)
    planned = [replace(each, num_bytes=room - reserved) for each in rooms]
    sample = Sample.draw(rows, importance, settings.sample_rows, settings.seed)
    codec, refined = _plan(rows, importance, sample, planned)
    codec.train(sample, refined[sample.numbers])
    packed, errors = codec.encode_table(rows, importance.omega, refined)
    errors = importance.omega * errors

    # which rows are kept as they are, and codes and decoder fitted to the others
    storing = ByteBudget(room, table.num_rows, table.dim, codec.storage)
    outliers, refined = _keep_outliers(errors, cut, refined, importance, codec, storing, row_bytes)
    packed, omega = packed.refining(refined), importance.omega.masked_fill(outliers, 0)
    for _ in range(settings.passes):
        decoder = codec.improve_table(rows, omega, packed)

    tensors = packed.tensors(decoder)
    bias = codec.bias if factor is None else codec.bias @ torch.linalg.inv(factor).to(codec.bias)
    tensors["decoder_bias_weight"] = bias.to(dtype)
    if outliers.any():
        tensors["outlier_weight"] = torch.cat([chunk[outliers[part]].to(dtype) for part, chunk in table.chunks()])
        tensors["outlier_rows_weight"] = outliers.nonzero().squeeze(1).to(torch.int32)
    layout = layout_of(codec, int(refined.sum()), int(outliers.sum()))
    return CodedTable(layout, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def fixed_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes that do not depend on the codes: of the decoder's bias and of the codebook."""
    return dim * dtype.itemsize + prod(CODEBOOK_SHAPE)


def code_bytes(num_rows: int, dim: int, *, latents: int, bits: int) -> int:
    """Bytes of some latents of every row in so many bits each, and of their decoder where it is stored narrowly."""
    decoder = min(DecoderStorage(each, None).num_bytes(latents, dim) for each in DECODER_DTYPES)
    return num_rows * latents * bits // 8 + decoder


def byte_budgets_of(
    table: Table, max_bytes: int, dtype: torch.dtype, factor: Tensor | None
) -> tuple[list[ByteBudget], int]:
    """The bytes for codes and decoder, for each dtype that the decoder may be stored in, and the fewest that do.

    Args:
        table: The (num_rows, dim) table.
        max_bytes: The most bytes for all tensors that replace it.
        dtype: The dtype of the decoder's bias.
        factor: The factor of the metric; None for the identity.

    Raises:
        BudgetError: If the bytes do not hold any code of the table.
    """
    room = max_bytes - fixed_bytes(table.dim, dtype)
    rooms = [ByteBudget(room, table.num_rows, table.dim, DecoderStorage(each, factor)) for each in DECODER_DTYPES]
    least = code_bytes(table.num_rows, table.dim, latents=1, bits=8)  # one byte a row, for its strongest latent
    if room < least:
        enough = 8.2 * (least + max_bytes - room) / (table.num_rows * table.dim)
        raise BudgetError(
            f"{max_bytes} bytes do not hold the codes of a {table.num_rows} x {table.dim} table and their decoder: "
            f"ask for at least bits={enough:.3g}"
        )
    return rooms, least


def layout_of(codec: Codec, refined_rows: int, outliers: int) -> TableLayout:
    """The layout of a codec's codes, with so many rows of a second stage, and so many that are kept as they are."""
    refinement = None
    if codec.refinement is not None:
        refinement = Refinement(refined_rows, codec.refinement.allocation.counts)
    return TableLayout(
        method="transform",
        rank=len(codec.decoder),
        codes=PACKED_CODES,
        decoder=str(codec.storage.dtype).removeprefix("torch."),
        bias=True,
        bit_allocation=codec.base.counts,
        refinement=refinement,
        outliers=outliers or None,
    )


def check_lengths(rows: Table, importance: RowWeights) -> None:
    """Refuses a table whose rows are too long or too short for their squares.

    Raises:
        TableError: If it is such a one.
    """
    if importance.norms.any():
        fits = _LENGTHS[0] <= importance.longest <= _LENGTHS[1]
    else:
        fits = not any(chunk.any() for _, chunk in rows.chunks())  # nothing but zeros
    if not fits:
        longest = max(float(chunk.norm(dim=1).max()) for _, chunk in exact_chunks(rows))
        raise TableError(
            f"rows of the embedding table are up to {longest:.0e} long, where squares leave float32: "
            "scale the table to lengths near 1"
        )


def _plan(rows: Table, importance: RowWeights, sample: Sample, rooms: list[ByteBudget]) -> tuple[Codec, Tensor]:
    """Chooses subspace, bits, storage and refined rows: the quantisers as a codec, and which rows are refined."""
    mean, variances, basis = principal_axes(rows, importance)
    centred = sample.rows - mean
    quantisers = Quantisers.fit((centred @ basis)[sample.resample(centred, QUANTISER_SAMPLE)], variances)
    allocator = BitAllocator(quantisers.errors)
    order = importance.order

    plans: list[tuple[StagePlan, ByteBudget]] = []
    for room in rooms:
        rounding = decoder_rounding(room.storage, variances, basis)
        if plan := plan_stages(allocator, importance.share[order], room, rounding):
            plans.append((plan, room))
    if not plans:
        raise no_plan(rooms[0])
    stages, room = min(plans, key=lambda each: each[0].error)

    codec = Codec.from_quantisers(stages.base, quantisers, basis, mean, room.storage)
    if stages.refinement_bytes:
        return _refine(codec, stages, room, importance, sample, quantisers, basis)
    return codec, torch.zeros(rows.num_rows, dtype=torch.bool, device=rows.device)


def no_plan(room: ByteBudget) -> BudgetError:
    """The error to raise where no allocation fits."""
    return BudgetError(
        f"a {room.num_rows} x {room.dim} table has no packed codes of {room.num_bytes} bytes: ask for other bits"
    )


def decoder_rounding(storage: DecoderStorage, variances: Tensor, basis: Tensor) -> Tensor:
    """(dim,) the error that storing the decoder adds, of each latent, estimated with the basis for the decoder."""
    stored = storage.in_metric(storage.round(basis.T))
    return _ROUNDING_LEFT * variances.clamp_min(0) * (stored - basis.T).square().sum(dim=1)


def _refine(
    codec: Codec,
    stages: StagePlan,
    room: ByteBudget,
    importance: RowWeights,
    sample: Sample,
    quantisers: Quantisers,
    basis: Tensor,
) -> tuple[Codec, Tensor]:
    """Adds a second stage, for as many of the rows, the most important first, as there is room for."""
    order = importance.order
    nothing = torch.zeros(room.num_rows, dtype=torch.bool, device=order.device)
    left = room.left_by_both(codec.base, room.dim, room.dim - codec.base.rank)
    roughly = nothing.index_fill(0, order[: room.refinable_rows(left, stages.refinement_bytes) or 1], True)
    chosen = roughly[sample.numbers]
    if not chosen.any():  # too few rows to learn a second stage from
        return codec, nothing
    heavy = Sample(sample.numbers[chosen], sample.rows[chosen], sample.omega[chosen])
    plan = plan_refinement(codec, quantisers, basis, heavy, importance.share[order], room, stages.refinement_bytes)
    if plan is None:
        return codec, nothing
    return codec.refined_by(plan.stage, plan.further), nothing.index_fill(0, order[: plan.rows], True)


def _keep_outliers(
    errors: Tensor,
    cut: Tensor,
    refined: Tensor,
    importance: RowWeights,
    codec: Codec,
    room: ByteBudget,
    row_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Which rows are kept as they are, those that are cut off first, and which rows are still refined.

    Kept rows take the bytes that are left, and those of the least important refined rows.
    """
    number = int(cut.sum()) + count_outliers(errors[~cut], room.dim, row_bytes)
    worst = errors.masked_fill(cut, torch.inf).argsort(descending=True, stable=True)
    outliers, left = torch.zeros_like(refined), room.left_by(codec.base)

    if codec.refinement is None:
        outliers[worst[: min(number, left // row_bytes)]] = True
        return outliers, refined

    further = codec.refinement.allocation
    refined_bytes = further.num_bytes + ROW_NUMBER_ITEMSIZE
    left = room.left_by_both(codec.base, further.rank, len(codec.decoder) - codec.base.rank)
    number = min(number, (left - refined_bytes) // row_bytes)  # one refined row stays in any case
    outliers[worst[:number]] = True

    order = importance.order[(refined & ~outliers)[importance.order]][: (left - number * row_bytes) // refined_bytes]
    if not len(order):
        return torch.zeros_like(outliers), refined
    return outliers, torch.zeros_like(refined).index_fill(0, order, True)


def principal_axes(rows: Table, importance: RowWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean, (dim,), and the eigenvalues, (dim,), and -vectors of the weighted covariance, float32."""
    moment = second_moment(rows, importance.omega)
    omega = importance.omega.to(moment)
    total = omega.sum()
    mean = sum((omega[part] @ chunk.to(moment) for part, chunk in rows.chunks()), moment.new_zeros(rows.dim)) / total
    variances, basis = eigenbasis(moment / total - torch.outer(mean, mean))
    return mean.to(rows.device).float(), variances.to(rows.device).float(), basis.to(rows.device).float()
