"""What was found, as JSON and as Markdown."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_dirembed.evaluation import similarity_error

from .noise import COMPARED, FIGURES, LEVEL, RESAMPLES, SIMILARITY_ERROR, Comparison, difference
from .registry import METHODS
from .running import Point


PACKAGES = (
    "hf_dirembed", "torch", "transformers", "torchao", "bitsandbytes", "scikit-learn", "tensorly-torch", "model2vec",
)  # fmt: skip
OURS = "transform"  # what the methods of others are held against


@dataclass
class ModelReport:
    """Of one model.

    Attributes:
        name: The model's.
        measure: What its figures are.
        change: How those of the methods are stated.
        lower_is_better: Of the figures.
        shape: Of its table.
        tied: Whether its head is the same table.
        dense: Its figures as it is, on each file.
        points: Every method at every budget.
        static: What `static.distill` found, or why there is nothing; empty for a language model.
        base: What stays the same on each file; see `Subject`.
        comparisons: What `compare` finds when all points are there.
    """

    name: str
    measure: str
    change: str
    lower_is_better: bool
    shape: tuple[int, int]
    tied: bool
    dense: dict[str, float]
    points: list[Point] = field(default_factory=list)
    static: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Sequence[float]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def dense_point(self) -> Point | None:
        """The dense table itself, if it could be measured."""
        return next((point for point in self.points if point.method == "dense" and _fitted(point)), None)

    @property
    def has_similarities(self) -> bool:
        """Whether its items are the cosines of pairs, as an encoder's are."""
        return SIMILARITY_ERROR in COMPARED[self.measure]

    def similarity_error(self, point: Point, file: str) -> float | None:
        """How far the cosines of pairs are from the dense model's; None where either is missing."""
        dense = self.dense_point.items if self.dense_point else {}
        if not self.has_similarities or file not in dense or file not in point.items:
            return None
        return float(similarity_error(point.items[file], dense[file]))


@dataclass
class Report:
    """Of one run.

    Attributes:
        command: As it was typed.
        settings: What it was told that figures depend on.
        scaling_dim: Columns of synthetic tables.
        models: Each model's.
        scaling: Points on synthetic tables.
        seconds: How long it took.
        machine: Where it ran.
        versions: Of the packages that are there.
    """

    command: str
    settings: dict[str, Any]
    scaling_dim: int
    models: list[ModelReport] = field(default_factory=list)
    scaling: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def num_rows(self) -> int:
        """How many rows its tables have."""
        return len(self.scaling) + sum(len(model.points) for model in self.models)

    def to_markdown(self) -> str:
        """For people."""
        where = ", ".join(f"{name} {value}" for name, value in (self.machine | self.versions).items())
        parts = [f"`{self.command}`", f"{self.seconds / 60:.0f} minutes; {where}."]
        for model in self.models:
            parts += [f"## {model.name}", *_model_parts(model)]
        if self.scaling:
            parts += [f"## Synthetic tables of {self.scaling_dim} columns", *_scaling_parts(self.scaling)]
        return "\n\n".join(parts) + "\n"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "system": platform.system(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(table(["method", "bits"], [["svd", "2"]]))
        | method | bits |
        | --- | --- |
        | svd | 2 |
    """
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _model_parts(model: ModelReport) -> list[str]:
    files = ", ".join(f"{name} {value:.3f}" for name, value in model.dense.items())
    rows, dim = model.shape
    intro = (
        f"{rows:,} x {dim:,} table{', tied head' if model.tied else ''}. {model.measure} of the dense model: {files}; "
        f"below it is the {model.change}. Times over those of the dense table, measured in turns in the same "
        "process; memory above that of the process before."
    )
    form = "{:.4f}x" if model.lower_is_better else "{:+.3f}"
    if model.has_similarities:
        intro += " Error: root mean square x 100 of what the pairs' cosines differ by from the dense model's."
    header = [column for name in model.dense for column in (name, *(["error"] if model.has_similarities else []))]

    def cells(point: Point) -> list[str]:
        quality = []
        for name in model.dense:
            quality.append(form.format(point.quality[name]) if name in point.quality else "")
            if model.has_similarities:
                error = model.similarity_error(point, name)
                quality.append("" if error is None else f"{error:.3f}")
        return [point.method, f"{point.bits:.3f}", f"{point.measured['file_bytes'] / 1e6:.2f}", *quality]

    fitted = [point for point in model.points if _fitted(point)]
    parts = [intro, _measured(["method", "bits", "file, MB", *header], cells, fitted, _ratio)]
    if model.dense_point is not None:
        parts.append(_dense_times(model.dense_point))
    parts += [_bullets(failures(model.points)), *comparison_parts(model), *_static_parts(model)]
    return [part for part in parts if part]


def _fitted(point: Point) -> bool:
    return "fit" not in point.failures


def _measured(
    header: Sequence[str],
    cells: Callable[[Point], list[str]],
    points: Sequence[Point],
    time: Callable[[dict[str, float] | None], str],
    unit: str = "",
) -> str:
    """A table of what was measured of each point, after cells of its own under their header."""
    batches = sorted({batch for point in points for batch in point.measured.get("head") or {}}, key=int)
    header = [
        *header, "fit, s", "fit, MB", f"load{unit}", f"lookup{unit}", "lookup, MB",
        *(f"head {batch}{unit}" for batch in batches), *(["head, MB"] if batches else []),
    ]  # fmt: skip
    rows = []
    for point in points:
        found, heads = point.measured, point.measured.get("head") or {}
        rows.append([
            *cells(point), f"{found['fit_s']:.2f}", _megabytes(found["fit_peak_bytes"]), time(found.get("load")),
            time(found.get("lookup")), _megabytes(found.get("lookup_peak_bytes")),
            *(time(heads.get(batch)) for batch in batches),
            *([_megabytes(found.get("head_peak_bytes"))] if batches else []),
        ])  # fmt: skip
    return table(header, rows)


def _ratio(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['ratio']:.2f}x"


def _megabytes(found: int | None) -> str:
    return "" if found is None else f"{found / 1e6:.0f}"


def _dense_times(dense: Point) -> str:
    found = dense.measured
    times = [f"{name} {found[name]['dense_ms']:.2f} ms" for name in ("load", "lookup") if name in found]
    times += [f"head of {batch} states {each['dense_ms']:.2f} ms" for batch, each in (found.get("head") or {}).items()]
    return f"The dense table: {', '.join(times)}."


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def failures(points: Iterable[Point]) -> list[str]:
    """What has no result, and why; each reason once for all budgets of a method."""
    found: dict[str, None] = {}
    for point in points:
        for kind, reason in point.failures.items():
            found[f"{point.method}{'' if kind == 'fit' else f', {kind}'}: {reason}"] = None
        if "head" in point.measured and point.measured["head"] is None:
            found[f"{point.method}, head: its package has none over this table"] = None
    return list(found)


def compare(model: ModelReport) -> list[Comparison]:
    """The methods of other packages against `transform` in as many bits or fewer, the most that are there."""
    ours, others = _ours_and_others(model)
    dense = model.dense_point.items if model.dense_point else {}
    found = []
    for name in model.dense:
        for point in others:
            below = [each for each in ours if each.bits <= point.bits]
            if not below or name not in point.items:
                continue
            best = max(below, key=lambda each: each.bits)
            numbers = point.items[name], best.items[name], dense[name], model.base[name]
            for measure in COMPARED[model.measure]:
                by, interval = difference(measure, *numbers)
                count = len(model.base[name])
                found.append(Comparison(point.method, point.bits, best.bits, measure, name, count, by, interval))
    return found


def _ours_and_others(model: ModelReport) -> tuple[list[Point], list[Point]]:
    evaluated = [point for point in model.points if point.quality]
    ours = [point for point in evaluated if point.method == OURS]
    return ours, [point for point in evaluated if METHODS[point.method].package not in ("hf_dirembed", "torch")]


def comparison_parts(model: ModelReport) -> list[str]:
    """Where other packages are better than `transform`, or as good, and where they are faster."""
    ours, others = _ours_and_others(model)
    if not ours or not others:
        return []
    faster = _bullets([line for what in TIMES if (line := _faster(what, ours, others))])
    if not model.comparisons:
        return [f"No method of another package has as many bits as {OURS} or more.", faster]
    items = "windows of text" if model.lower_is_better else "pairs"
    counts = " and ".join(f"{count:,}" for count in dict.fromkeys(each.items for each in model.comparisons))
    intro = (
        f"Against `{OURS}` in as many bits or fewer: the method's figure less that of `{OURS}`, and the {LEVEL:.0%} "
        f"interval of a paired bootstrap over the {counts} {items} ({RESAMPLES:,} draws), each by itself."
    )
    rows = []
    for each in model.comparisons:
        form = FIGURES[each.measure].form
        rows.append([
            each.method, f"{each.bits:.3f}", f"{each.against:.3f}", each.file, each.measure,
            form.format(each.difference),
            "" if each.interval is None else " to ".join(map(form.format, each.interval)),
            f"**{each.verdict}**" if each.verdict == "better" else each.verdict,
        ])  # fmt: skip
    header = ["method", "bits", f"bits of {OURS}", "on", "by", "difference", f"{LEVEL:.0%} interval", f"than {OURS}"]
    return [intro, table(header, rows), faster]


TIMES = {"fit": "fitting", "load": "loading", "lookup": "lookup"}


def _faster(what: str, ours: Sequence[Point], others: Sequence[Point]) -> str:
    """Which methods of others take less time than any budget of ours."""

    def seconds(point: Point) -> float:
        found = point.measured
        return found.get("fit_s", math.inf) if what == "fit" else found.get(what, {}).get("ratio", math.inf)

    best = min(map(seconds, ours))
    faster = dict.fromkeys(point.method for point in sorted(others, key=seconds) if seconds(point) < best)
    return f"Faster than {OURS} in {TIMES[what]}: {', '.join(faster)}" if faster else ""


def _static_parts(model: ModelReport) -> list[str]:
    found = model.static
    if not found:
        return []
    if "failure" in found:
        return [f"model2vec: {found['failure']}"]
    dense = found["dense_model_bytes"]
    ours = [point for point in model.points if point.method == OURS and _fitted(point)]
    table_bytes = model.dense_point.measured["file_bytes"] if model.dense_point else 0
    sizes = [f"{(dense - table_bytes + p.measured['file_bytes']) / 1e6:.1f} MB at {p.bits:.2g} bits" for p in ours]
    quality = ", ".join(f"{name} {each - model.dense[name]:+.2f}" for name, each in found["quality"].items())
    return [
        f"**model2vec** is another kind of thing: a static model instead of the whole encoder, not of its table. "
        f"{model.measure}, {model.change}: {quality}. Whole model {found['model_bytes'] / 1e6:.1f} MB; the dense "
        f"encoder {dense / 1e6:.1f} MB{f', with {OURS} ' if sizes else ''}{', '.join(sizes)}. Distilled in "
        f"{found['fit_s']:.0f} s; it encodes 32 sentences in {found['encode']['ratio']:.4f} of the encoder's time."
    ]


def _scaling_parts(points: Sequence[Point]) -> list[str]:
    intro = (
        "Float32, a deviation of k^-½ along the k-th axis. In brackets how many times as long as the dense table "
        "takes, measured in turns in the same process; memory above that of the process before."
    )

    def cells(point: Point) -> list[str]:
        return [point.method, f"{point.bits:.2f}", f"{point.rows:,}", f"{point.measured['file_bytes'] / 1e6:.1f}"]

    order = list(dict.fromkeys(point.method for point in points))
    fitted = sorted(filter(_fitted, points), key=lambda point: (order.index(point.method), point.rows))
    shown = _measured(["method", "bits", "rows", "file, MB"], cells, fitted, _milliseconds, ", ms")
    gone = [f"{p.method}, {p.rows:,} rows, {kind}: {reason}" for p in points for kind, reason in p.failures.items()]
    without = [
        f"{p.method}: its package has no head over this table" for p in fitted if p.measured.get("head", 0) is None
    ]
    return [part for part in (intro, shown, _bullets([*gone, *dict.fromkeys(without)])) if part]


def _milliseconds(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['ms']:.2f} ({found['ratio']:.2f}x)"
