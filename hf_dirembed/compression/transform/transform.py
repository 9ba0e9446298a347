"""Transform coding: a subspace's latents in few bits each, and a decoder fitted to what the bits can say.

Rows are sorted into classes by what their errors count, and each class has its own bits for every latent. Decoder and
codes are then fitted to each other in turn. Outliers are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ...errors import BudgetError, OptionError, TableError
from ...progress import Progress
from ...remote.codes_dirembed import CODEBOOK_SHAPE, MAX_CLASSES, PACKED_CODES, RowClass, TableLayout
from ..coded import CodedTable
from ..distortion import TEMPERING, Measure
from ..rate_distortion import RateDistortion
from ..row_weights import RowWeights, Sample
from ..subspace import eigenbasis, exact_chunks, moments
from ..table import Table
from ..work import FittingWork
from .allocation import CODE_ENTRY_BYTES
from .codec import ClassCodes, Codec, storable_scales
from .decoder import DecoderStorage
from .outliers import RESERVED_SHARE, count_outliers, outlier_bytes
from .plan import ByteBudget, Plan, Spectrum, plan_classes
from .quantisation import CODES_OF_BITS, QUANTISER_SAMPLE, Quantisers
from .row_codes import RowCodes
from .trellis import Codebooks


DECODER_DTYPES = (torch.float16, torch.float8_e4m3fn)  # the narrower one leaves more room for codes
_OVER_BOUND = 1.5  # what codes leave over what the rate-distortion bound says, roughly
_ROUNDING_LEFT = 0.4  # of a decoder's rounding, once the codes are fitted to the rounded decoder
_CODEBOOK_SHARE = 0.01
_NEARLY_CONSTANT = 1e-4  # of the largest deviation
_LENGTHS = 1e-15, 1e17  # of rows, whose squares and importance are held in float32


@dataclass(frozen=True)
class TransformSettings:
    """How `transform` fits.

    Attributes:
        tempering: The exponent of the token weights. Below 1 it trusts them less: rare tokens matter more than a word
            list says.
        sample_rows: Rows that the first decoder is fitted to.
        passes: How often all rows are coded anew, each time for the decoder of the time before. `EFFORTS` says what
            more of them give.
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
        least_of = {"sample_rows": 1, "passes": 0, "seed": 0, "large_rows": 1, "fitted_rows": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"transform setting {name}={value!r}: give an integer of at least {least}")


# What fitting may cost: docs/budgets.md says what each costs and gives.
EFFORTS = {
    "fast": TransformSettings(sample_rows=4_000, passes=0),
    "balanced": TransformSettings(),
    "thorough": TransformSettings(sample_rows=20_000, passes=3),
}


def transform(
    table: Table,
    max_bytes: int,
    *,
    dtype: torch.dtype,
    measure: Measure | None = None,
    settings: TransformSettings | None = None,
    progress: Progress | None = None,
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
        progress: Is told what share of the work is done.

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
    progress, work = progress or Progress(), FittingWork.of_rows(table.num_rows, settings.passes)
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

    # classes, bits, codebooks and decoder, with some room reserved for outliers
    row_bytes = outlier_bytes(table.dim, dtype)
    reserved = min(row_bytes * int(cut.sum()), int(RESERVED_SHARE * max_bytes), room - least)
    planned = [replace(each, num_bytes=room - reserved) for each in rooms]
    sample = Sample.draw(rows, importance, settings.sample_rows, settings.seed)
    codec, plan = plan_codec(rows, importance, sample, planned)
    codec.train(sample, plan.row_class[sample.numbers])
    progress.advance(work.planning / work.fitting)
    coding = progress.part(work.coding / work.fitting)
    coded, errors, decoder = RowCodes.encode(codec, rows, importance.omega, plan.row_class, coding)
    errors = importance.omega * errors

    # which rows are kept as they are, and codes and decoder fitted to the others
    storing = ByteBudget(room, table.num_rows, table.dim, codec.storage)
    outliers, row_class = _keep_outliers(errors, cut, plan, importance, storing, row_bytes)
    omega = importance.omega.masked_fill(outliers, 0)
    if not settings.passes:
        coded = coded.moved(rows, row_class)
    for _ in range(settings.passes):
        improving = progress.part(work.improving / work.fitting)
        coded, decoder = coded.improve(rows, omega, row_class, improving)

    tensors = coded.tensors(decoder)
    bias = codec.bias if factor is None else codec.bias @ torch.linalg.inv(factor).to(codec.bias)
    tensors["decoder_bias_weight"] = bias.to(dtype)
    if outliers.any():
        tensors["outlier_weight"] = torch.cat([chunk[outliers[part]].to(dtype) for part, chunk in table.chunks()])
        tensors["outlier_rows_weight"] = outliers.nonzero().squeeze(1).to(torch.int32)
    layout = layout_of(codec, [len(each) for each in coded.packed], int(outliers.sum()))
    return CodedTable(layout, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def fixed_bytes(num_rows: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes that do not depend on the codes: of the decoder's bias, and of the scales of the rows."""
    return dim * dtype.itemsize + num_rows


def has_own_codebook(max_bytes: int) -> bool:
    """Whether a table's bytes are so many that a codebook of its own is worth its share of them."""
    return prod(CODEBOOK_SHAPE) <= _CODEBOOK_SHARE * max_bytes


def code_bytes(num_rows: int, dim: int, *, latents: int, bits: int) -> int:
    """Bytes of some latents of every row in so many bits each, and of their decoder where it is stored narrowly."""
    decoder = min(DecoderStorage(each, None).num_bytes(latents, dim) for each in DECODER_DTYPES)
    entries = CODE_ENTRY_BYTES * latents * len(CODES_OF_BITS[bits])
    return num_rows * latents * bits // 8 + decoder + entries


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
    room = max_bytes - fixed_bytes(table.num_rows, table.dim, dtype)
    if has_own_codebook(max_bytes):
        room -= prod(CODEBOOK_SHAPE)
    rooms = [ByteBudget(room, table.num_rows, table.dim, DecoderStorage(each, factor)) for each in DECODER_DTYPES]
    least = code_bytes(table.num_rows, table.dim, latents=1, bits=8)  # one byte a row, for its strongest latent
    if room < least:
        enough = 8.2 * (least + max_bytes - room) / (table.num_rows * table.dim)
        raise BudgetError(
            f"{max_bytes} bytes do not hold the codes of a {table.num_rows} x {table.dim} table and their decoder: "
            f"ask for at least bits={enough:.3g}"
        )
    return rooms, least


def layout_of(codec: Codec, num_rows: list[int], outliers: int) -> TableLayout:
    """The layout of a codec's codes, with so many rows of each class, and so many that are kept as they are."""
    counts = [each.counts for each in codec.classes]
    further = [RowClass(each, rows) for each, rows in zip(counts[1:], num_rows[1:], strict=True)]
    return TableLayout(
        method="transform",
        rank=codec.rank,
        codes=PACKED_CODES,
        decoder=str(codec.storage.dtype).removeprefix("torch."),
        bias=True,
        classes=(RowClass(counts[0]), *further),
        codebook="own" if codec.codebooks.own else "gaussian",
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


def plan_codec(
    rows: Table, importance: RowWeights, sample: Sample, rooms: list[ByteBudget], *, most_classes: int = MAX_CLASSES
) -> tuple[Codec, Plan]:
    """Chooses subspace, classes, bits and storage: the quantisers as a codec, and the plan.

    Args:
        rows: The table, in the metric.
        importance: What an error of each row counts.
        sample: Rows that stand for all.
        rooms: The bytes for codes and decoder, for each dtype that the decoder may be stored in.
        most_classes: How many classes of rows there may be.

    Raises:
        BudgetError: If no plan fits.
    """
    mean, variances, basis = principal_axes(rows, importance)
    centred = sample.rows - mean
    latents = centred @ basis
    deviations = _without_noise(variances.clamp_min(0).sqrt())
    scales = _usual_scales(latents, deviations, 8 * rooms[0].num_bytes / (rows.num_rows * rows.dim))
    drawn = sample.resample(centred, QUANTISER_SAMPLE)
    own = has_own_codebook(rooms[0].num_bytes)
    codebooks = None if own else Codebooks.gaussian(latents.device)
    quantisers = Quantisers.fit((latents / scales.unsqueeze(1))[drawn], codebooks)
    spectrum = Spectrum(importance, sample, latents, scales, variances, quantisers)

    plans: list[tuple[Plan, ByteBudget]] = []
    for room in rooms:
        rounding = decoder_rounding(room.storage, variances, basis)
        if plan := plan_classes(spectrum, room, rounding, most=most_classes):
            plans.append((plan, room))
    if not plans:
        raise no_plan(rooms[0])
    plan, room = min(plans, key=lambda each: each[0].error)

    # the unit of a latent is its standard deviation over all rows
    units = torch.where(deviations > 0, deviations, 1)[: plan.rank]
    classes = [
        ClassCodes.of(allocation, quantisers, _without_noise(of_class) / units)
        for allocation, of_class in zip(plan.allocations, spectrum.deviations(plan), strict=True)
    ]
    decoder = units.unsqueeze(1) * basis[:, : plan.rank].T
    return Codec(classes, quantisers.codebooks, decoder, mean, room.storage), plan


def _usual_scales(latents: Tensor, deviations: Tensor, bits: float) -> Tensor:
    """The scales of rows, (n,), whose bits are still to be planned: those that about so many bits per weight want."""
    power = deviations.square()
    bound = RateDistortion(power.new_ones(1), power)
    if not bound.variance:
        return latents.new_ones(len(latents))
    coded = power > bound.water_level(bits)
    return storable_scales(latents[:, coded] / deviations[coded], power[coded], _OVER_BOUND * bound.distortion(bits))


def _without_noise(deviations: Tensor) -> Tensor:
    """Deviations of latents, (rank,), those that are rounding noise beside the largest set to 0."""
    return torch.where(deviations > _NEARLY_CONSTANT * deviations.max(), deviations, 0)


def no_plan(room: ByteBudget) -> BudgetError:
    """The error to raise where no allocation fits."""
    return BudgetError(
        f"a {room.num_rows} x {room.dim} table has no packed codes of {room.num_bytes} bytes: ask for other bits"
    )


def decoder_rounding(storage: DecoderStorage, variances: Tensor, basis: Tensor) -> Tensor:
    """(dim,) the error that storing the decoder adds, of each latent, estimated with the basis for the decoder."""
    stored = storage.in_metric(storage.round(basis.T))
    return _ROUNDING_LEFT * variances.clamp_min(0) * (stored - basis.T).square().sum(dim=1)


def _keep_outliers(
    errors: Tensor, cut: Tensor, plan: Plan, importance: RowWeights, room: ByteBudget, row_bytes: int
) -> tuple[Tensor, Tensor]:
    """Which rows are kept as they are, those that are cut off first, and the class of every row.

    Kept rows take the bytes that are left, and the further bytes of the least important rows that have any.
    """
    number = int(cut.sum()) + count_outliers(errors[~cut], room.dim, row_bytes)
    worst = errors.masked_fill(cut, torch.inf).argsort(descending=True, stable=True)
    outliers, row_class = torch.zeros_like(cut), plan.row_class.clone()

    # the bytes that are left, and those that rows have beyond the first class's
    sizes = torch.tensor([each.num_bytes for each in plan.allocations], device=cut.device)
    further = (sizes - sizes[0])[row_class.long()]
    left = room.left_by(plan)
    number = min(number, max(0, left + int(further.sum()) // 2) // row_bytes)
    outliers[worst[:number]] = True

    # outliers need no further bytes themselves; then the least important rows give theirs
    others = importance.order.flip(0)
    given = torch.cat([worst[:number], others[~outliers[others]]])
    given = given[further[given] > 0]
    missing = number * row_bytes - left
    if missing > 0:
        saved = further[given].cumsum(dim=0)
        row_class[given[: int((saved < missing).sum()) + 1]] = 0
    return outliers, row_class


def principal_axes(rows: Table, importance: RowWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean, (dim,), and the eigenvalues, (dim,), and -vectors of the weighted covariance, float32."""
    first, moment = moments(rows, importance.omega)
    total = importance.omega.to(moment).sum()
    mean = first / total
    variances, basis = eigenbasis(moment / total - torch.outer(mean, mean))
    return mean.to(rows.device).float(), variances.to(rows.device).float(), basis.to(rows.device).float()
