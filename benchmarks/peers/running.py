"""Runs the measurements, each in a process of its own, and gathers what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .measure import Job, measure
from .methods import Dense, Method, Table
from .processes import run_process
from .registry import METHODS
from .subjects import Subject


Progress = Callable[[str], None]
PointKey = tuple[str, "float | None", int]  # method, budget, rows


@dataclass
class Point:
    """One method at one budget.

    Attributes:
        method: Its name.
        asked_bits: The budget; None for a method without.
        rows: V.
        measured: What the processes found; see `measure`.
        quality: How the model's figures change on each file.
        items: What they are made of on each file, a number for each pair or window; see `Subject`.
        failures: Why a measurement has no result, by its kind.
    """

    method: str
    asked_bits: float | None
    rows: int
    measured: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    items: dict[str, Sequence[float]] = field(default_factory=dict)

    @property
    def key(self) -> PointKey:
        """What it is of; there is one of a kind."""
        return self.method, self.asked_bits, self.rows

    @property
    def bits(self) -> float:
        """Bits per weight, packed; NaN where fitting failed."""
        return self.measured.get("bits", float("nan"))


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        methods: Their names.
        bits: The budgets.
        timeout: Seconds after which one measurement is given up.
        repeats: Of each timing.
        batches: Of states, for heads.
        progress: Is told what begins.
    """

    methods: Sequence[str]
    bits: Sequence[float]
    timeout: float
    repeats: int
    batches: tuple[int, ...]
    progress: Progress

    def budgets(self) -> Iterator[tuple[Method, float | None]]:
        """Every method at each of its budgets, the dense table first."""
        for name in dict.fromkeys(["dense", *self.methods]):
            method = METHODS[name]
            for bits in self.bits if method.has_budget else (None,):
                yield method, bits


class Bench:
    """Measures methods on one table."""

    def __init__(self, table: Table, settings: Settings, work: Path) -> None:
        self.settings, self.work = settings, work
        self.num_rows = len(table.rows)
        table.save(work / "table.safetensors")
        Dense().fit(table, None).save(work / "dense.safetensors")

    def measure(self, method: Method, bits: float | None, *, with_head: bool, keep_rows: bool) -> Point:
        """All measurements of one method at one budget; what cannot be measured leaves its reason."""
        point = Point(method.name, bits, self.num_rows)
        if not method.is_installed:
            point.failures["fit"] = f"needs {method.package}: pip install 'hf_dirembed[benchmarks]'"
            return point
        kinds = ["fit", "lookup", *(["head"] if with_head else [])]
        for kind in kinds:
            budget = f", {bits:g} bits" if bits else ""
            self.settings.progress(f"{method.name}{budget}, {self.num_rows:,} rows: {kind}")
            job = Job(
                kind,
                method.name,
                table=str(self.work / "table.safetensors"),
                stored=str(self.work / "stored.safetensors"),
                bits=bits,
                rows=str(self.work / "rows.safetensors") if keep_rows else None,
                dense=str(self.work / "dense.safetensors"),
                batches=self.settings.batches,
                repeats=self.settings.repeats,
            )
            found, failure = run_process(measure, job.to_json(), self.work, self.settings.timeout)
            point.measured |= found
            if failure:
                point.failures[kind] = failure
                if kind == "fit":
                    break
        return point

    def rows(self) -> torch.Tensor:
        """Those of the last fit."""
        return Table.load(self.work / "rows.safetensors").rows


def measure_subject(
    subject: Subject, table: Table, settings: Settings, work: Path, points: list[Point], save: Callable[[], None]
) -> None:
    """All methods on a model's table.

    Args:
        subject: The model.
        table: Its table.
        settings: How to measure.
        work: A folder for what is written meanwhile.
        points: Those that are there already; the others are added.
        save: Called after each that is added.
    """
    bench = Bench(table, settings, work)
    asked = [(method.name, bits, bench.num_rows) for method, bits in settings.budgets()]
    for name, bits, _ in missing(asked, points):
        point = bench.measure(METHODS[name], bits, with_head=subject.tied, keep_rows=True)
        if "fit" not in point.failures:
            point.quality, point.items = subject.quality(bench.rows())
        points.append(point)
        points.sort(key=lambda each: asked.index(each.key))
        save()


def measure_scaling(
    sizes: Sequence[int],
    dim: int,
    settings: Settings,
    work: Path,
    points: list[Point],
    save: Callable[[], None],
) -> None:
    """Synthetic tables of so many rows, with a head; a method that fails elsewhere is not tried at the next size.

    The other arguments are those of `measure_subject`.
    """
    given_up: set[tuple[str, float | None]] = set()
    for rows in sorted(set(sizes)):
        asked = [(method.name, bits, rows) for method, bits in settings.budgets()]
        lacking = [each for each in missing(asked, points) if each[:2] not in given_up]
        bench = Bench(synthetic_table(rows, dim), settings, work) if lacking else None
        for name, bits, _ in lacking:
            assert bench is not None
            point = bench.measure(METHODS[name], bits, with_head=True, keep_rows=False)
            if point.failures.keys() - {"head"}:
                given_up.add((name, bits))
            points.append(point)
            save()


def missing(asked: Iterable[PointKey], points: Iterable[Point]) -> list[PointKey]:
    """What is asked for and not there."""
    there = {point.key for point in points}
    return [key for key in asked if key not in there]


def synthetic_table(rows: int, dim: int, seed: int = 0) -> Table:
    """A float32 table whose k-th principal axis has a deviation of k^-½, with Zipf weights.

    Example:
        >>> synthetic_table(500, 16).rows.shape
        torch.Size([500, 16])
    """
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    scale = torch.arange(1, dim + 1).rsqrt()
    weights = 1 / (torch.arange(rows, dtype=torch.float64) + 50)
    return Table(torch.randn(rows, dim, generator=generator) * scale @ axes, weights / weights.sum())
