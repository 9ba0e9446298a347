"""The pictures of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from .measure import LOOKUP
from .noise import SIMILARITY_ERROR
from .registry import METHODS
from .report import ModelReport, Report
from .running import Point


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour and marker for each line, the same in all pictures; ours are full, those of others are hollow.
STYLES: dict[str, tuple[str, str]] = {
    "transform": ("#1f6fb4", "o"),
    "direction": ("#2a9d8f", "s"),
    "svd": ("#8ab17d", "D"),
    "sklearn-svd": ("#b08968", "D"),
    "tltorch-tt": ("#7a8793", "v"),
    "torchao": ("#e08a1e", "^"),
    "bitsandbytes": ("#c8453c", "P"),
    "dense": ("#444444", "x"),
}
LINEAR = {False: 0.1, True: 1.0}  # below it the axis of losses is linear: points of Spearman, per cent of perplexity
TOKENS = " x ".join(map(str, LOOKUP))
TICKS = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 16, 32)


def draw(report: Report, suffix: str = "svg") -> dict[str, bytes]:
    """Draws all pictures of a report for which there is something to draw.

    Returns:
        The files' contents, by name.
    """
    files = {}
    for model in report.models:
        if not any(point.quality for point in model.points if point.method != "dense"):
            continue
        name = f"quality-{re.sub(r'[^A-Za-z0-9.-]', '_', model.name)}.{suffix}"
        files[name] = _rendered(_quality(model), suffix)
    if any("fit_s" in point.measured for point in report.scaling):
        files[f"scaling.{suffix}"] = _rendered(_scaling(report), suffix)
    return files


def _figure(columns: int, rows: int = 1) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 1.9, 3.8 * rows + 0.3), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _rendered(figure: Any, suffix: str) -> bytes:
    import matplotlib

    content = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "peers", "svg.fonttype": "none"}):  # the same bytes again
        figure.savefig(content, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return content.getvalue()


def _quality(model: ModelReport) -> Any:
    panels = list(_panels(model))
    figure, all_axes = _figure(len(panels))
    points = [point for point in model.points if point.method != "dense"]
    for axes, (title, unit, value) in zip(all_axes, panels, strict=True):
        _lines(axes, points, lambda point: point.bits, value)
        axes.axhline(0, color=STYLES["dense"][0], lw=0.8, ls=":")
        _scale(axes, linear=LINEAR[model.lower_is_better])
        axes.set_title(title, fontsize=10)
        _label(axes, "bits per weight", unit)
    _legend(figure, all_axes)
    figure.suptitle(f"{model.name}: lower and further left is better", fontsize=12)
    return figure


Panel = tuple[str, str, Callable[[Point], "float | None"]]  # title, unit, and what is shown of a point


def _panels(model: ModelReport) -> Iterator[Panel]:
    """What a model loses on each file, and how far its similarities move."""
    for name in model.dense:

        def loss(point: Point, name: str = name) -> float | None:
            found = point.quality.get(name)
            return None if found is None else 100 * (found - 1) if model.lower_is_better else -found

        yield name, "perplexity above dense, %" if model.lower_is_better else "Spearman x 100 lost", loss
        if model.has_similarities:
            yield name, SIMILARITY_ERROR, partial(model.similarity_error, file=name)


def _scale(axes: Axes, linear: float) -> None:
    """Logarithmic axes with round numbers at their ticks; losses near zero and gains are on a linear part."""
    (left, right), (low, high) = (axes.dataLim.intervalx, axes.dataLim.intervaly)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left / 1.2, right * 1.2)
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_ylim(1.5 * min(low, -linear), 2 * max(high, linear))
    ticks = [tick for tick in TICKS if left / 1.2 <= tick <= right * 1.2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    bottom, top = axes.get_ylim()
    powers = [linear * 10**exponent for exponent in range(8)]
    losses = [tick for tick in (*(-power for power in powers), 0, *powers) if bottom <= tick <= top]
    axes.set_yticks(losses, [f"{tick:,g}" for tick in losses])
    axes.minorticks_off()


def _scaling(report: Report) -> Any:
    figure, panels = _figure(2, 2)
    batch = next((min(point.measured["head"], key=int) for point in report.scaling if point.measured.get("head")), "")
    shown: list[Panel] = [
        ("fitting", "seconds", lambda point: None if point.method == "dense" else point.measured.get("fit_s")),
        ("loading", "milliseconds", lambda point: point.measured.get("load", {}).get("ms")),
        (f"lookup of {TOKENS} tokens", "milliseconds", lambda point: point.measured.get("lookup", {}).get("ms")),
        (
            f"head, {batch} state{'s' if batch != '1' else ''}",
            "milliseconds",
            lambda point: (point.measured.get("head") or {}).get(batch, {}).get("ms"),
        ),
    ]
    for axes, (title, unit, value) in zip(panels, shown, strict=True):
        _lines(axes, report.scaling, lambda point: point.rows, value)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        _label(axes, "rows of the table", unit)
    _legend(figure, panels)
    figure.suptitle(f"Time against vocabulary size, {report.scaling_dim} columns", fontsize=12)
    return figure


def _lines(
    axes: Axes, points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point], float | None]
) -> None:
    """One line for each method with a budget; the fixed methods of a package are points of one line in quality."""
    by_rows = len({point.rows for point in points}) > 1
    groups: dict[str, list[Point]] = {}
    seen: list[str] = []
    for point in points:
        groups.setdefault(point.method if by_rows else METHODS[point.method].family, []).append(point)
    for name, group in groups.items():
        found = [(x(point), value) for point in group if (value := y(point)) is not None and math.isfinite(value)]
        if not found:
            continue
        family = METHODS[group[0].method].family
        color, marker = STYLES[family]
        if by_rows:  # the methods of a package share a colour, but no marker
            marker = (marker, *"v<>")[seen.count(family) % 4]
            seen.append(family)
        ours = METHODS[group[0].method].package in ("hf_dirembed", "torch")
        axes.plot(
            *zip(*sorted(found), strict=True),
            color=color,
            marker=marker,
            ms=5.5,
            lw=2.2 if name == "transform" else 1.3,
            ls="-" if ours else "--",
            markerfacecolor=color if ours else "white",
            label=name,
        )


def _legend(figure: Any, panels: Sequence[Axes]) -> None:
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
