"""Transform coding of tables that are larger than the memory: fitted to some rows, then row after row for good.

Where all rows count alike, some tell what all are like. Bits, codebooks and decoder are fitted to these. With them
fixed, the code of a row depends on no other row, so that the others are read once, chunk by chunk, and their codes
leave the memory as they come. What is gathered in that pass (figures, outliers) takes as much memory for a billion
rows as for a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ...errors import TableError
from ...processes import on_every_process
from ...progress import Progress
from ...remote.codes_dirembed import code_bytes
from ...remote.kernels_dirembed import pack_rows
from ..coded import CodedTable
from ..distortion import Measure
from ..quality import DIGITS, NOTHING
from ..rate_distortion import RateDistortion
from ..row_files import FileSink, MakeSink, RowSink
from ..row_weights import RowWeights, Sample
from ..subspace import eigenbasis
from ..table import Table
from ..work import FittingWork
from .codec import Codec
from .decoder import StoredDecoder
from .outliers import RESERVED_SHARE, count_outliers, count_worst, outlier_bytes, worth_keeping
from .packing import pack_symbols
from .plan import ByteBudget, Plan
from .row_codes import RowCodes, code_tensors
from .transform import TransformSettings, byte_budgets_of, check_lengths, layout_of, plan_codec


PARTS = 64  # that the rows are coded in; sums are taken part by part, so that they are the same on many processes
_KEPT_BYTES = 1 << 26  # of rows that may be kept as they are, at most: they are in memory until all others are coded
_LARGEST_HALF = 65_504.0  # of float16
_ENTRY = 0.5  # of the error that a row of the sample is worth keeping with: outliers are above that in any case


def is_large(table: Table, measure: Measure, settings: TransformSettings) -> bool:
    """Whether a table is coded by this module: it has more rows than the settings say, which all count alike."""
    return measure.weights is None and table.num_rows > settings.large_rows


@dataclass(frozen=True)
class CodedRows:
    """What came of coding a large table.

    Attributes:
        coded: Codes, which may still be in a file, and decoder.
        quality: Figures, as `table_quality` has them, and `fitted_rows`, the number of rows that were fitted to.
        fits: Whether a module of the table's dtype computes what the codes stand for: no overflow, no underflow.
    """

    coded: CodedTable
    quality: dict[str, float]
    fits: bool


def code_large(
    table: Table,
    max_bytes: int,
    make_sink: MakeSink,
    *,
    dtype: torch.dtype,
    measure: Measure,
    settings: TransformSettings,
    progress: Progress | None = None,
) -> CodedRows:
    """Codes a table of many rows that all count alike, within a number of bytes.

    It is `transform` with one class of rows, and with all that is fitted fitted to a sample of the rows.

    Args:
        table: The (num_rows, dim) table.
        max_bytes: The most bytes for all tensors that replace it.
        make_sink: Makes the place for a tensor of codes, from its name and shape.
        dtype: The dtype of the table, and so of the decoder's bias.
        measure: How errors are measured, without token weights.
        settings: How to fit.
        progress: Is told what share of the work is done.

    Raises:
        BudgetError: If the bytes do not hold any code of the table.
        OptionError: If the Hessian is malformed.
        TableError: If the table holds a NaN or an infinity, or rows too long or short for their squares.

    Example:
        >>> from hf_dirembed.compression.row_files import memory_sink
        >>> rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, 64)
        >>> settings = TransformSettings(large_rows=4000, fitted_rows=2000)
        >>> made = code_large(
        ...     Table(rows), 5000 * 16, memory_sink, dtype=rows.dtype, measure=Measure(), settings=settings
        ... )
        >>> sum(tensor.nbytes for tensor in made.coded.tensors.values()) <= 5000 * 16
        True
    """
    progress = progress or Progress()
    fitting = FittingWork.of_rows(min(settings.fitted_rows, table.num_rows), settings.passes).total
    fit = Fit.of(table, max_bytes, dtype, measure, settings)
    of_sample = fitting / (fitting + table.num_rows)
    progress.advance(of_sample)
    sinks = {name: make_sink(name, shape) for name, shape in fit.coder.shapes(table.num_rows).items()}
    job = CodeShare(table, fit.coder, sinks, progress.part(1 - of_sample))
    # The memory of other processes is not this one's: only what is written to files is shared.
    in_files = all(isinstance(sink, FileSink) for sink in sinks.values())
    found, *others = on_every_process(job) if in_files else [job(0, 1)]
    for other in others:
        found = found.joined(other, fit.coder.capacity)
    progress.finish()
    return fit.finish({name: sink.tensor() for name, sink in sinks.items()}, found)


@dataclass(frozen=True)
class CodeShare:
    """The share of one process in coding a table.

    Attributes:
        table: The whole table.
        coder: Codes its rows.
        sinks: Where the codes go, by the names of their tensors.
        progress: Is told how much of the table is coded, where all processes are as far as this one; it stays in the
            process that it was made in.
    """

    table: Table
    coder: RowCoder
    sinks: Mapping[str, RowSink]
    progress: Progress = field(default_factory=Progress)

    def __call__(self, process: int, processes: int) -> Found:
        """Codes every so many'th part of the table."""
        parts = range(process, PARTS, processes)
        return code_parts(self.table, self.coder, self.sinks, parts, self.progress)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "progress": Progress()}


def code_parts(
    table: Table,
    coder: RowCoder,
    sinks: Mapping[str, RowSink],
    parts: Sequence[int],
    progress: Progress | None = None,
) -> Found:
    """Codes some of the `PARTS` of a table.

    Args:
        table: The whole table.
        coder: Codes its rows.
        sinks: Where the codes go, by the names of their tensors.
        parts: The numbers of these parts, in ascending order.
        progress: Is told of the share of these parts that is coded.
    """
    progress, of_part = progress or Progress(), 1 / max(len(parts), 1)
    found = Found.nothing()
    for part in parts:
        found.tallies[part] = tally = Tally.zeros(table.dim)
        start, stop = (number * table.num_rows // PARTS for number in (part, part + 1))
        for first, chunk in _read_ahead(table, start, stop):
            coded = coder.code(chunk, first)
            for name, sink in sinks.items():
                sink.put(first, coded.codes[name])
            tally.count(coded)
            found.worst = found.worst.joined(coded.candidates(coder.entry, first), coder.capacity)
            progress.advance(of_part * len(chunk) / (stop - start))
    return found


def _read_ahead(table: Table, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """The chunks of some rows, with the number of the first row of each; one is read while another is worked on."""
    chunks = table.chunks(start, stop)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = reader.submit(next, chunks, None)
            yield chunk[0].start, chunk[1]


def draw_rows(table: Table, number: int, seed: int) -> Tensor:
    """Some rows of a table, one from each of as many equal parts of it, (number, dim), in the table's dtype.

    Raises:
        TableError: If one holds a NaN or an infinity, or the square of its length exceeds float32.

    Example:
        >>> draw_rows(Table(torch.arange(8.0).view(8, 1)), 4, seed=0).flatten().tolist()
        [1.0, 3.0, 4.0, 7.0]
    """
    number = min(number, table.num_rows)
    bounds = torch.arange(number + 1) * table.num_rows // number
    drawn = torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = bounds[:-1] + (drawn * bounds.diff()).long()
    found = torch.cat([table.rows[slice(row, row + 1)].detach() for row in rows.tolist()])
    for chunk, numbers in zip(found.split(table.chunk_rows), rows.split(table.chunk_rows), strict=True):
        check_rows(chunk.float(), numbers)
    return found


def check_rows(rows: Tensor, numbers: Tensor) -> None:
    """Refuses rows, (n, dim) float32, that cannot be measured.

    Raises:
        TableError: If one holds a NaN or an infinity, or the square of its length exceeds float32; with its number.
    """
    bad = ~rows.norm(dim=1).isfinite()
    if bad.any():
        finite = rows[bad][0].isfinite().all()
        what = "is too long to measure: scale the table down"
        if not finite:
            what = "holds a NaN or an infinity: mend the checkpoint"
        raise TableError(f"row {int(numbers[bad.to(numbers.device)][0])} of the embedding table {what}")


@dataclass(frozen=True)
class RowCoder:
    """Codes rows one by one, for a decoder that stays as it is.

    Attributes:
        codec: The codec, with the decoder as it is stored.
        stored: The decoder.
        bias: (dim,) as it is stored.
        factor: The factor of the metric, (dim, dim) float32; None for the identity.
        longest: The length that longer rows are cut down to, in the metric.
        shortest: Errors of shorter rows count as if they were that long; None where errors do not count relative to
            the rows' lengths.
        origin: (dim,) the mean of the sample, in the metric: about which moments are taken, as little cancels there.
        entry: Rows with smaller errors are no outliers.
        capacity: How many rows may be kept as they are, at most.
    """

    codec: Codec
    stored: StoredDecoder
    bias: Tensor
    factor: Tensor | None
    longest: float
    shortest: float | None
    origin: Tensor
    entry: float
    capacity: int

    def omega(self, norms: Tensor) -> Tensor:
        """What errors of rows of some lengths, (n,) in the metric, count, (n,) float64."""
        return row_omega(norms, self.shortest)

    def code(self, chunk: Tensor, first: int) -> Coded:
        """Codes rows of a table, (n, dim) float32, of which the first has the number `first`.

        Raises:
            TableError: If the square of a row's length exceeds float32.
        """
        rows = self.in_metric(chunk)
        check_rows(rows, torch.arange(first, first + len(rows)))
        norms = rows.norm(dim=1)
        cut = norms > self.longest
        shortened = rows * (self.longest / norms).clamp(max=1).unsqueeze(1) if cut.any() else rows
        coded = self.codec.encode(shortened, 0)

        approximated = self.codec.latents(coded, 0) @ self.stored.float() + self.bias.float()
        errors = self.in_metric(chunk - approximated).square().sum(dim=1).double()
        omega = self.omega(norms)
        lengths = chunk.norm(dim=1).double()
        products = lengths * approximated.norm(dim=1).double()
        cosines = torch.where(products > 0, (chunk * approximated).sum(dim=1).double() / products, 0)

        return Coded(
            {
                "weight": pack_symbols(coded.symbols, self.codec.classes[0].counts),
                "row_weight": pack_rows(torch.zeros_like(coded.scales), coded.scales),
            },
            omega,
            (rows - self.origin) * omega.sqrt().to(rows).unsqueeze(1),
            omega * errors,
            cosines,
            lengths > 0,
            cut,
            float(approximated.abs().max()),
        )

    def shapes(self, num_rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that have the codes of so many rows, by name."""
        return {"weight": (num_rows, code_bytes(self.codec.classes[0].counts)), "row_weight": (num_rows,)}

    def in_metric(self, rows: Tensor) -> Tensor:
        """Rows, or errors of them, in the metric."""
        return rows if self.factor is None else rows @ self.factor


def row_omega(norms: Tensor, shortest: float | None) -> Tensor:
    """ω of rows of some lengths, (n,) float64, as `RowWeights` has it but for a factor; see `RowCoder.shortest`."""
    norms = norms.double()
    omega = torch.ones_like(norms) if shortest is None else norms.clamp_min(shortest).square().reciprocal()
    return torch.where(norms > 0, omega, 0)


@dataclass(frozen=True)
class Coded:
    """Some rows, coded.

    Attributes:
        codes: Their codes, (n, bytes) uint8, and their scales, (n,) uint8, as they are stored, by name.
        omega: (n,) float64, what an error of each counts.
        centred: (n, dim) the rows in the metric, less the origin, times the root of omega.
        errors: (n,) float64, what the codes leave of each, times omega.
        cosines: (n,) float64, the cosine between each row and what its codes stand for.
        directed: (n,) which rows have a direction.
        cut: (n,) which rows are too long for the codes.
        largest: The largest magnitude of what the codes stand for.
    """

    codes: dict[str, Tensor]
    omega: Tensor
    centred: Tensor
    errors: Tensor
    cosines: Tensor
    directed: Tensor
    cut: Tensor
    largest: float

    def candidates(self, entry: float, first: int) -> Worst:
        """The rows that may be outliers; `first` is the number of the first row of these."""
        chosen = (self.cut | (self.errors > entry)).nonzero().squeeze(1)
        return Worst(self.cut[chosen], self.errors[chosen], self.cosines[chosen], first + chosen)


@dataclass(frozen=True)
class Worst:
    """Rows that may be kept as they are.

    Attributes:
        cut: (n,) which are too long for the codes.
        errors: (n,) float64, what the codes leave of each.
        cosines: (n,) float64, the cosine between each row and what its codes stand for.
        numbers: (n,) int64, the numbers of the rows.
    """

    cut: Tensor
    errors: Tensor
    cosines: Tensor
    numbers: Tensor

    @classmethod
    def nothing(cls) -> Worst:
        """A collection without rows."""
        none = torch.zeros(0, dtype=torch.float64)
        return cls(none.bool(), none, none, none.long())

    def joined(self, other: Worst, capacity: int) -> Worst:
        """These rows and those of another collection; once they are many, only the worst `capacity` of them."""
        every = Worst(
            *(torch.cat([getattr(self, each.name), getattr(other, each.name).cpu()]) for each in fields(Worst))
        )
        return every if len(every.numbers) <= 2 * capacity else every.best(capacity)

    def best(self, number: int) -> Worst:
        """The first `number` of the rows: those that are cut off, then the others, of each kind the worst first."""
        order = self.numbers.argsort()
        order = order[self.errors[order].argsort(descending=True, stable=True)]
        order = order[self.cut[order].byte().argsort(descending=True, stable=True)][:number]
        return Worst(*(getattr(self, each.name)[order] for each in fields(Worst)))


@dataclass
class Tally:
    """Sums over coded rows, from which the figures are made.

    Attributes:
        weight: Σ ω.
        first: (dim,) float64, Σ ω (y - origin).
        second: (dim, dim) float64, Σ ω (y - origin)ᵀ(y - origin).
        lost: Σ ω ‖y - ŷ‖².
        lost_by_cut: Σ ω ‖y - ŷ‖² over the rows that are cut off.
        directed: How many rows have a direction.
        cosines: The sum of the cosines of these.
        cut: How many rows are cut off.
        cut_cosines: The sum of the cosines of these.
        largest: The largest magnitude of what codes stand for.
    """

    weight: float
    first: Tensor
    second: Tensor
    lost: float = 0.0
    lost_by_cut: float = 0.0
    directed: int = 0
    cosines: float = 0.0
    cut: int = 0
    cut_cosines: float = 0.0
    largest: float = 0.0

    @classmethod
    def zeros(cls, dim: int) -> Tally:
        """The sums over no rows."""
        return cls(0.0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    def count(self, coded: Coded) -> None:
        """Adds coded rows to the sums."""
        self.weight += float(coded.omega.sum())
        self.first += (coded.omega.sqrt().to(coded.centred) @ coded.centred).cpu().double()
        self.second += (coded.centred.T @ coded.centred).cpu().double()
        self.lost += float(coded.errors.sum())
        self.lost_by_cut += float(coded.errors[coded.cut].sum())
        self.directed += int(coded.directed.sum())
        self.cosines += float(coded.cosines[coded.directed].sum())
        self.cut += int(coded.cut.sum())
        self.cut_cosines += float(coded.cosines[coded.cut].sum())
        self.largest = max(self.largest, coded.largest)

    def __add__(self, other: Tally) -> Tally:
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Tally)}
        return Tally(**{**sums, "largest": max(self.largest, other.largest)})

    def variances(self) -> Tensor:
        """(dim,) float64, descending: the weighted squares along the principal axes, about the mean."""
        second = (self.second + self.second.T) / 2
        return eigenbasis(second - torch.outer(self.first, self.first) / max(self.weight, 1e-300))[0].clamp_min(0)


@dataclass
class Found:
    """What was found while parts of a table were coded.

    Attributes:
        worst: The rows that may be kept as they are.
        tallies: The sums over each part, by its number.
    """

    worst: Worst
    tallies: dict[int, Tally] = field(default_factory=dict)

    @classmethod
    def nothing(cls) -> Found:
        """What is found before any part is coded: nothing."""
        return cls(Worst.nothing())

    def joined(self, other: Found, capacity: int) -> Found:
        """What was found in the parts of both."""
        return Found(self.worst.joined(other.worst, capacity), self.tallies | other.tallies)

    def tally(self) -> Tally:
        """The sums over all parts, added in the order of their numbers."""
        first, *others = (self.tallies[part] for part in sorted(self.tallies))
        return sum(others, first)


@dataclass(frozen=True)
class Fit:
    """What a sample says of all rows of a table.

    Attributes:
        table: The table.
        coder: Codes its rows.
        dtype: The dtype of the table.
        shares: (n,) float64, how far each row of the sample is from the mean, squared, times ω.
        sample: The codes of the sample, as `Coded` has them.
        left: The bytes that codes and decoder of all rows leave.
    """

    table: Table
    coder: RowCoder
    dtype: torch.dtype
    shares: Tensor
    sample: dict[str, Tensor]
    left: int

    @classmethod
    def of(
        cls, table: Table, max_bytes: int, dtype: torch.dtype, measure: Measure, settings: TransformSettings
    ) -> Fit:
        """Fits to some rows of a table; the arguments are those of `code_large`."""
        factor = measure.factor(table)
        rooms, least = byte_budgets_of(table, max_bytes, dtype, factor)
        drawn = Table(draw_rows(table, settings.fitted_rows, settings.seed), device=table.device)
        rows = drawn if factor is None else drawn.in_metric(factor)
        importance = measure.importance(rows)
        longest, cut = importance.longest, importance.long_rows
        if cut.any():
            rows = rows.no_longer_than(longest)
            importance = measure.importance(rows)
        check_lengths(rows, importance)

        room, row_bytes = rooms[0].num_bytes, outlier_bytes(table.dim, dtype)
        expected = ceil(table.num_rows * int(cut.sum()) / drawn.num_rows)
        reserved = min(row_bytes * expected, int(RESERVED_SHARE * max_bytes), room - least, _KEPT_BYTES)
        sample = Sample.draw(rows, importance, settings.sample_rows, settings.seed)
        codec, plan = _plan(rows, importance, sample, [replace(each, num_bytes=room - reserved) for each in rooms])
        origin = codec.bias
        shortest = importance.shortest if measure.relative else None
        stored, entry = _fit_decoder(codec, rows, row_omega(importance.norms, shortest), row_bytes, settings.passes)

        bias = codec.bias if factor is None else codec.bias @ torch.linalg.inv(factor).to(codec.bias)
        narrow = None if factor is None else factor.float()
        coder = RowCoder(
            codec, stored, bias.to(dtype), narrow, longest, shortest, origin, entry, _KEPT_BYTES // row_bytes
        )  # fmt: skip
        coded = [coder.code(chunk, part.start) for part, chunk in drawn.chunks()]
        shares = torch.cat([each.centred.square().sum(dim=1).double() for each in coded]).cpu()
        sampled = {name: torch.cat([each.codes[name] for each in coded]).cpu() for name in coded[0].codes}
        left = ByteBudget(room, table.num_rows, table.dim, codec.storage).left_by(plan)
        return cls(table, coder, dtype, shares, sampled, left)

    def finish(self, codes: dict[str, Tensor], found: Found) -> CodedRows:
        """The compressed table and its figures, once all rows are coded.

        Args:
            codes: Of all rows, as `Coded` has them.
            found: What was found in all parts.
        """
        tally, worst = found.tally(), found.worst.best(self.coder.capacity)
        kept = worst.best(self._count_kept(tally, worst))
        tensors = self._tensors() | codes
        if number := len(kept.numbers):
            rows = kept.numbers.sort().values
            each = [self.table.rows[slice(row, row + 1)].detach().cpu() for row in rows.tolist()]
            tensors |= {"outlier_weight": torch.cat(each).to(self.dtype), "outlier_rows_weight": rows.to(torch.int32)}
        coded = CodedTable(layout_of(self.coder.codec, [self.table.num_rows], number), tensors)
        sample = CodedTable(layout_of(self.coder.codec, [len(self.shares)], 0), self._tensors() | self.sample)
        fits = sample.fits(self.dtype) and (self.dtype != torch.float16 or tally.largest <= _LARGEST_HALF)
        return CodedRows(coded, self._quality(tally, kept), fits)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors but the codes and the outliers."""
        tensors = code_tensors(self.coder.codec, self.coder.stored) | {"decoder_bias_weight": self.coder.bias}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _count_kept(self, tally: Tally, worst: Worst) -> int:
        """How many of the worst rows are kept: those that are cut off, and those that are worth their bytes."""
        row_bytes = outlier_bytes(self.table.dim, self.dtype)
        others = worst.errors[~worst.cut]
        share = worth_keeping(max(self.table.num_rows - tally.cut, 1), self.table.dim, row_bytes)
        wanted = tally.cut + count_worst(others, tally.lost - tally.lost_by_cut, share)
        return min(wanted, self.left // row_bytes, len(worst.numbers))

    def _quality(self, tally: Tally, kept: Worst) -> dict[str, float]:
        """The figures that `table_quality` gives; rows that are kept as they are lose nothing."""
        cosines = tally.cosines + float((1 - kept.cosines).sum())
        figures: dict[str, float] = {"mean_cosine": cosines / tally.directed if tally.directed else 1.0}
        if shortened := tally.cut - int(kept.cut.sum()):
            figures["shortened_rows"] = shortened
            figures["shortened_cosine"] = (tally.cut_cosines - float(kept.cosines[kept.cut].sum())) / shortened
        variances, lost = tally.variances(), tally.lost - float(kept.errors.sum())
        total = float(variances.sum())
        if total > NOTHING * tally.directed:
            figures["distortion"] = lost / total
            figures["bound_bits"] = RateDistortion(self.shares / self.shares.sum(), variances).rate(lost)
        return {name: round(value, DIGITS) for name, value in figures.items()} | {"fitted_rows": len(self.shares)}


def _plan(rows: Table, importance: RowWeights, sample: Sample, rooms: list[ByteBudget]) -> tuple[Codec, Plan]:
    """Chooses subspace, bits and storage for one class, and fits a decoder to some of the rows of a sample."""
    codec, plan = plan_codec(rows, importance, sample, rooms, most_classes=1)
    codec.train(sample, torch.zeros(len(sample.numbers), dtype=torch.uint8, device=rows.device))
    return codec, plan


def _fit_decoder(codec: Codec, rows: Table, omega: Tensor, row_bytes: int, passes: int) -> tuple[StoredDecoder, float]:
    """Fits decoder and codes of a sample to one another, as `transform` does.

    Returns:
        The decoder, and the error, times ω, that no row below is an outlier with.
    """
    one_class = torch.zeros(rows.num_rows, dtype=torch.uint8, device=rows.device)
    coded, errors, stored = RowCodes.encode(codec, rows, omega, one_class)
    errors = omega * errors
    outliers = errors.argsort(descending=True, stable=True)[: count_outliers(errors, rows.dim, row_bytes)]
    usual = omega.index_fill(0, outliers, 0)
    for _ in range(passes):
        coded, stored = coded.improve(rows, usual, one_class)
    worth = worth_keeping(rows.num_rows, rows.dim, row_bytes)
    return stored, _ENTRY * worth * float(errors.sum() - errors[outliers].sum())
