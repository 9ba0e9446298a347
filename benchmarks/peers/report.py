"""What was found, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
    """

    name: str
    measure: str
    change: str
    lower_is_better: bool
    shape: tuple[int, int]
    tied: bool
    dense: dict[str, float]
    points: list[Point]
    static: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Of one run.

    Attributes:
        command: As it was typed.
        seconds: How long it took.
        models: Each model's.
        scaling: Points on synthetic tables.
        scaling_dim: Columns of these.
        machine: Where it ran.
        versions: Of the packages that are there.
    """

    command: str
    seconds: float
    models: list[ModelReport]
    scaling: list[Point]
    scaling_dim: int
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)

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
    heads = sorted({batch for point in model.points for batch in point.measured.get("head") or {}}, key=int)
    header = [
        "method", "bits", "file, MB", *model.dense, "fit, s", "fit, MB", "load", "lookup", "lookup, MB",
        *(f"head {batch}" for batch in heads), *(["head, MB"] if heads else []),
    ]  # fmt: skip
    parts = [intro, table(header, [_row(point, model, heads) for point in model.points if _fitted(point)])]
    dense = next((point for point in model.points if point.method == "dense" and _fitted(point)), None)
    if dense is not None:
        parts.append(_dense_times(dense))
    parts += [_bullets(failures(model.points)), _bullets(wins(model)), *_static_parts(model)]
    return [part for part in parts if part]


def _fitted(point: Point) -> bool:
    return "fit" not in point.failures


def _row(point: Point, model: ModelReport, heads: Sequence[str]) -> list[str]:
    found = point.measured
    form = "{:.4f}x" if model.lower_is_better else "{:+.3f}"
    times = found.get("head") or {}
    return [
        point.method,
        f"{point.bits:.3f}",
        f"{found['file_bytes'] / 1e6:.2f}",
        *(form.format(point.quality[name]) if name in point.quality else "" for name in model.dense),
        f"{found['fit_s']:.2f}",
        _megabytes(found["fit_peak_bytes"]),
        _ratio(found.get("load")),
        _ratio(found.get("lookup")),
        _megabytes(found.get("lookup_peak_bytes")),
        *(_ratio(times.get(batch)) for batch in heads),
        *([_megabytes(found.get("head_peak_bytes"))] if heads else []),
    ]


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


def wins(model: ModelReport) -> list[str]:
    """Where the method of another package is better than `transform` in at least as many bits, in plain words."""
    ours = [point for point in model.points if point.method == OURS and point.quality]
    others = [point for point in model.points if METHODS[point.method].package not in ("hf_dirembed", "torch")]
    lines = []
    for name in model.dense:
        for point in (each for each in others if each.quality):
            below = [each for each in ours if each.bits <= point.bits]
            if not below:
                continue
            sign = 1 if model.lower_is_better else -1
            best = min(below, key=lambda each: sign * each.quality[name])
            if sign * point.quality[name] < sign * best.quality[name]:
                lines.append(
                    f"**{point.method} is better than {OURS} on {name}**: {point.quality[name]:.4g} in "
                    f"{point.bits:.3g} bits against {best.quality[name]:.4g} in {best.bits:.3g} bits"
                )
    if not ours or not others:
        return lines
    if not lines:
        lines.append(f"No method of another package is better than {OURS} of as many bits or fewer")
    return lines + [line for what in TIMES if (line := _faster(what, ours, others))]


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
    table_bytes = next((p.measured["file_bytes"] for p in model.points if p.method == "dense"), 0)
    sizes = [f"{(dense - table_bytes + p.measured['file_bytes']) / 1e6:.1f} MB at {p.bits:.2g} bits" for p in ours]
    quality = ", ".join(f"{name} {each - model.dense[name]:+.2f}" for name, each in found["quality"].items())
    return [
        f"**model2vec** is another kind of thing: a static model instead of the whole encoder, not of its table. "
        f"{model.measure}, {model.change}: {quality}. Whole model {found['model_bytes'] / 1e6:.1f} MB; the dense "
        f"encoder {dense / 1e6:.1f} MB{f', with {OURS} ' if sizes else ''}{', '.join(sizes)}. Distilled in "
        f"{found['fit_s']:.0f} s; it encodes 32 sentences in {found['encode']['ratio']:.4f} of the encoder's time."
    ]


def _scaling_parts(points: Sequence[Point]) -> list[str]:
    header = ["method", "bits", "rows", "fit, s", "fit, MB", "lookup, ms", "over dense"]
    order = list(dict.fromkeys(point.method for point in points))
    rows = []
    for point in sorted(points, key=lambda each: (order.index(each.method), each.rows)):
        found = point.measured
        if not _fitted(point):
            continue
        lookup = found.get("lookup")
        times = ["", ""] if lookup is None else [f"{lookup['ms']:.2f}", _ratio(lookup)]
        fit = [f"{found['fit_s']:.2f}", _megabytes(found["fit_peak_bytes"])]
        rows.append([point.method, f"{point.bits:.2f}", f"{point.rows:,}", *fit, *times])
    gone = [f"{p.method}, {p.rows:,} rows, {kind}: {reason}" for p in points for kind, reason in p.failures.items()]
    return [part for part in (table(header, rows), _bullets(gone)) if part]


def write(report: Report, folder: Path) -> None:
    """Writes both files."""
    (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
