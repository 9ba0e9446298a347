"""What a run has found so far, in its folder: written after each row, and gone on with after a stop."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_dirembed.checkpoints.atomic import save_bytes, save_state
from hf_dirembed.errors import CheckpointError

from .noise import Comparison
from .plots import draw
from .report import ModelReport, Report
from .running import Point


REPORT, ITEMS = "report.json", "items.safetensors"


class Record:
    """A folder with a report.

    Args:
        folder: Made when there is something to keep. A report in it is gone on with if it is of the same settings;
            rows in which something failed are measured anew.
        report: An empty one, with the command and its settings.
        resume: Whether the folder may exist.

    Attributes:
        folder: As given.
        report: What there is.

    Raises:
        CheckpointError: If the folder exists and is not to be gone on with, or holds something else.
    """

    def __init__(self, folder: Path, report: Report, *, resume: bool) -> None:
        self.folder, self.report = folder, report
        self._start = time.perf_counter()
        if not folder.exists() or [*folder.glob("*")] == [folder / ITEMS]:  # stopped before the report
            return
        if not resume:
            begun = (folder / REPORT).exists()
            mend = "go on with it by --resume" if begun else "remove it"
            raise CheckpointError(f"{folder} exists already: {mend}, or name another folder")
        before = read(folder)
        _check_same(folder, before, report)
        self.report.models, self.report.scaling = before.models, before.scaling
        self.report.versions |= before.versions
        self._start -= before.seconds

    def save(self) -> None:
        """Writes all figures there are, and their items; readers see the old files or the new ones.

        Raises:
            CheckpointError: If they cannot be written.
        """
        self.report.seconds = time.perf_counter() - self._start
        self.make_folder()
        if items := _tensors(self.report):
            save_state(self.folder / ITEMS, items, {})
        save_bytes(self.folder / REPORT, (json.dumps(_figures(self.report), indent=1) + "\n").encode())

    def finish(self, suffix: str) -> None:
        """Writes the report for people and its plots too."""
        self.save()
        save_bytes(self.folder / "report.md", self.report.to_markdown().encode())
        for name, content in draw(self.report, suffix).items():
            save_bytes(self.folder / name, content)

    def make_folder(self) -> None:
        """Makes it, unless it is there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be made ({error.strerror}): name another folder") from error

    @property
    def kept(self) -> str:
        """What a stop leaves, in words."""
        if not (self.folder / REPORT).exists():
            return "nothing was measured"
        return f"{self.report.num_rows} rows are kept in {self.folder}: the same command with --resume goes on"


def read(folder: Path) -> Report:
    """What `save` wrote, without the rows in which something failed.

    Raises:
        CheckpointError: If it is not there, or not whole.
    """
    try:
        values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        items = load_file(folder / ITEMS) if values["models"] else {}
        return Report(
            **{
                **values,
                "models": [_model(each, items) for each in values["models"]],
                "scaling": [_point(each) for each in values["scaling"] if not each["failures"]],
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no report to go on with ({error!r:.120}): name another folder"
        ) from error


def _check_same(folder: Path, before: Report, now: Report) -> None:
    """Refuses to mix figures of different settings or versions."""
    told = json.loads(json.dumps(now.settings))
    there = {**before.settings, **before.versions, **before.machine}
    wanted = {**told, **now.versions, **now.machine}
    for name in there.keys() & wanted.keys():
        if there[name] != wanted[name]:
            raise CheckpointError(
                f"{folder} was begun with {name} {there[name]}, and this is {wanted[name]}: "
                "give the same, or name another folder"
            )


def _figures(report: Report) -> dict[str, Any]:
    """For JSON: all but the items, which are many."""
    values = asdict(report)
    for model in values["models"]:
        del model["base"]
        for point in model["points"]:
            del point["items"]
    for point in values["scaling"]:
        del point["items"]
    return values


def _tensors(report: Report) -> dict[str, Tensor]:
    found = {}
    for model in report.models:
        for prefix, items in _items(model):
            for file, numbers in items.items():
                found[f"{prefix}/{file}"] = torch.tensor(list(numbers), dtype=torch.float64)
    return found


def _items(model: ModelReport) -> list[tuple[str, dict[str, Any]]]:
    """What there is of each point, and of all alike, with what their names start with."""
    of_points = [(f"{model.name}/{point.method}/{point.asked_bits}", point.items) for point in model.points]
    return [(f"{model.name}/base", model.base), *of_points]


def _model(values: dict[str, Any], items: dict[str, Tensor]) -> ModelReport:
    points = [_point(each) for each in values["points"] if not each["failures"]]
    comparisons = [_comparison(each) for each in values["comparisons"]]
    model = ModelReport(
        **{**values, "shape": tuple(values["shape"]), "points": points, "comparisons": comparisons, "base": {}}
    )
    for prefix, found in _items(model):
        found |= {file: items[f"{prefix}/{file}"].tolist() for file in model.dense}
    return model


def _point(values: dict[str, Any]) -> Point:
    return Point(**{each.name: values[each.name] for each in fields(Point) if each.name != "items"})


def _comparison(values: dict[str, Any]) -> Comparison:
    interval = values["interval"]
    return Comparison(**{**values, "interval": None if interval is None else tuple(interval)})
