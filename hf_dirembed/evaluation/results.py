"""What evaluations found, kept beside the compressed model: one file, which a model card can be made of."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import staged_file
from ..errors import EvaluationError
from .data import DatasetSource


RESULTS_NAME = "dirembed_results.json"
RESULTS_FORMAT = 1
PACKAGES = ("hf_dirembed", "torch", "transformers", "datasets", "scikit-learn", "scipy", "torchmetrics")


@dataclass(frozen=True)
class ReferenceResult:
    """The same figures of the model that a model was compared with, taken in the same run.

    Attributes:
        model: The reference's Hub id, or the name of its folder.
        metrics: Its figures, under the same names.
        deviations: Their standard deviations over seeds; empty for what is not trained.
    """

    model: str
    metrics: dict[str, float | None]
    deviations: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One evaluation of one model.

    Attributes:
        task: The task's name, as in `hf-dirembed evaluate --task`.
        dataset: What the model was evaluated on.
        metrics: The figures by name, as the metric's library gives them (accuracies and correlations up to 1, EM and
            F1 of SQuAD up to 100); means over the seeds for what is trained. None where a figure is not finite.
        settings: How the figures were taken.
        training: What the model was fine-tuned on, for tasks that do.
        deviations: The figures' standard deviations over seeds; empty for what is not trained or has one seed.
        reference: The figures of the model it was compared with.
        agreement: How alike the outputs of the two models are, for tasks that say so.
        versions: Which versions of Python and of the packages took part.
        arguments: The command's arguments, local paths cut to their last part; empty outside the command line.
        date: When it was taken, ISO 8601 in UTC.
    """

    task: str
    dataset: DatasetSource
    metrics: dict[str, float | None]
    settings: dict[str, Any] = field(default_factory=dict)
    training: DatasetSource | None = None
    deviations: dict[str, float | None] = field(default_factory=dict)
    reference: ReferenceResult | None = None
    agreement: dict[str, float | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    arguments: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """What makes two results the same measurement: task, data and settings. The later one replaces the earlier."""
        return json.dumps([self.task, asdict(self.dataset), self.settings], sort_keys=True)

    @property
    def difference(self) -> dict[str, float | None]:
        """The model's metrics minus the reference's, by name; None where not finite, empty without a reference."""
        if self.reference is None:
            return {}
        theirs = self.reference.metrics
        differences = {
            name: ours - expected
            for name, ours in self.metrics.items()
            if ours is not None and (expected := theirs.get(name)) is not None
        }
        return _finite({name: differences.get(name) for name in self.metrics})

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it; figures that are not finite become None.

        Example:
            >>> result = Result("sts", DatasetSource("pairs.csv"), {"spearman": math.nan})
            >>> result.to_dict()["metrics"]
            {'spearman': None}
        """
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """The reverse of [`to_dict`].

        Raises:
            TypeError: If keys are missing or unknown.

        Example:
            >>> result = Result("sts", DatasetSource("pairs.csv"), {"spearman": 0.5})
            >>> Result.from_dict(result.to_dict()) == result
            True
        """
        reference, training = values.get("reference"), values.get("training")
        return cls(
            **{
                **values,
                "dataset": DatasetSource(**values.get("dataset", {})),
                "training": None if training is None else DatasetSource(**training),
                "reference": None if reference is None else ReferenceResult(**reference),
                "arguments": tuple(values.get("arguments", ())),
            }
        )


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that figures depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def load_results(folder: str | os.PathLike[str]) -> list[Result]:
    """The results that are kept beside a model, in the order in which they were first taken.

    Args:
        folder: The model's folder.

    Returns:
        An empty list where there are none.

    Raises:
        EvaluationError: If the file is there but cannot be read, or was written by a newer version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_result(folder, Result("sts", DatasetSource("pairs.csv"), {"spearman": 0.5}))
        ...     [result.metrics for result in load_results(folder)]
        [{'spearman': 0.5}]
    """
    file = Path(folder) / RESULTS_NAME
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != RESULTS_FORMAT:
            raise EvaluationError(f"{file} is of format {content['format']!r:.40}: update hf_dirembed to read it")
        return [Result.from_dict(values) for values in content["results"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{file} holds no results ({error!r:.120}): remove it, and evaluate again") from error


def save_result(folder: str | os.PathLike[str], result: Result) -> None:
    """Adds a result to those beside a model, in place of an earlier one of the same task, data and settings.

    Readers see the old file or the new one, never a part of it.

    Args:
        folder: The model's folder.
        result: What was found.

    Raises:
        EvaluationError: If the file cannot be written, or the one that is there cannot be read.
    """
    merged = {each.key: each for each in load_results(folder)}
    merged[result.key] = result
    content = {"format": RESULTS_FORMAT, "results": [each.to_dict() for each in merged.values()]}
    file, text = Path(folder) / RESULTS_NAME, json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        with staged_file(file) as sibling:
            sibling.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be written ({error.strerror}): make room, or check its permissions"
        ) from error


def portable_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments of a command with local paths cut to their last part: the file is published with the model.

    Example:
        >>> portable_arguments(["evaluate", "me/model", "--data", "/home/me/pairs.csv", "--limit", "5"])
        ('evaluate', 'me/model', '--data', 'pairs.csv', '--limit', '5')
    """
    return tuple(Path(each).name if os.path.isabs(each) or os.path.exists(each) else each for each in arguments)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
