"""Results of evaluations in the forms that a model card has them in: metadata, the Hub's result files, a table."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry


if TYPE_CHECKING:
    from ..evaluation.results import DatasetSource, Result


# The Hub's task of each of ours, with its name and the metric that stands for it on a leaderboard.
TASKS = {
    "sts": ("sentence-similarity", "Semantic textual similarity", "spearman"),
    "perplexity": ("text-generation", "Language modelling", "perplexity"),
    "mlm-perplexity": ("fill-mask", "Masked language modelling", "perplexity"),
    "glue": ("text-classification", "GLUE", "accuracy"),
    "squad": ("question-answering", "Extractive question answering", "f1"),
}
# The Hub's ids of the metrics that are called otherwise there.
METRIC_IDS = {"spearman": "spearmanr", "pearson": "pearsonr"}
METRIC_NAMES = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "f1": "F1",
    "exact_match": "exact match",
    "matthews_correlation": "Matthews correlation",
    "accuracy_mismatched": "accuracy, mismatched",
    "input_only_perplexity": "perplexity, dense head",
}
LIMIT = "limit"  # the setting of a quick look at a part of the data
LEFT_OUT = ("nll", "input_only_nll")  # the logarithm of a figure that is there
_RATIOS = ("perplexity", "input_only_perplexity")  # what is compared by division


@dataclass(frozen=True)
class FigureRow:
    """One line of the card's table of figures, as text."""

    task: str
    data: str
    metric: str
    value: str
    dense: str
    change: str


@dataclass(frozen=True)
class Figures:
    """What was measured of a model.

    Attributes:
        results: The results, as the evaluation kept them beside the model.
    """

    results: tuple[Result, ...] = ()

    @classmethod
    def beside(cls, folder: str | os.PathLike[str]) -> Figures:
        """Reads the figures that are kept in a model's folder.

        Raises:
            EvaluationError: If the file of results is there but cannot be read.
        """
        from ..evaluation.results import load_results  # here, as the evaluations read checkpoints, which have cards

        return cls(tuple(load_results(folder)))

    def for_metadata(self) -> list[EvalResult]:
        """The figures in the form that the metadata's `model-index` has."""
        return [
            EvalResult(
                task_type=TASKS[result.task][0],
                task_name=TASKS[result.task][1],
                dataset_type=_dataset_id(result.dataset),
                dataset_name=str(result.dataset),
                dataset_config=result.dataset.config,
                dataset_split=result.dataset.split,
                dataset_revision=result.dataset.revision,
                dataset_args=_dataset_args(result),
                metric_type=METRIC_IDS.get(name, name),
                metric_name=_metric_name(name),
                metric_value=float(f"{value:.6g}"),
            )
            for result in self.known()
            for name, value in result.metrics.items()
            if value is not None and name not in LEFT_OUT
        ]

    def for_leaderboards(self) -> list[EvalResultEntry]:
        """The figures as `.eval_results/*.yaml` has them: those on whole sets of the Hub, one for each dataset."""
        entries = {}
        for result in self.known():
            name = _main_metric(result)
            if not _is_on_hub(result.dataset) or result.settings.get(LIMIT) is not None or name is None:
                continue

            settings = ", ".join(f"{key}={value}" for key, value in result.settings.items() if value not in (None, ""))
            dense = result.reference.metrics.get(name) if result.reference else None
            notes = [METRIC_NAMES.get(name, name), settings, f"dense model {_number(dense)}" if dense else ""]
            task_id = result.dataset.config or "default"

            entries[result.dataset.name, task_id] = EvalResultEntry(
                dataset_id=result.dataset.name,
                task_id=task_id,
                value=float(f"{result.metrics[name]:.6g}"),
                dataset_revision=result.dataset.revision,
                date=result.date,
                notes="; ".join(note for note in notes if note),
            )

        return list(entries.values())

    def rows(self) -> list[FigureRow]:
        """The figures as lines of the card's table."""
        rows = []
        for result in self.known():
            dense = result.reference.metrics if result.reference else {}
            spread = result.reference.deviations if result.reference else {}

            for name, value in result.metrics.items():
                if name not in LEFT_OUT and value is not None:
                    rows.append(
                        FigureRow(
                            TASKS[result.task][1],
                            str(result.dataset),
                            _metric_name(name),
                            _number(value, result.deviations.get(name)),
                            _number(dense.get(name), spread.get(name)),
                            _change(name, value, dense.get(name)),
                        )
                    )

        return rows

    def commands(self) -> list[str]:
        """The commands that took the figures, in order, each once."""
        commands = (f"hf-dirembed {shlex.join(result.arguments)}" for result in self.known() if result.arguments)
        return list(dict.fromkeys(commands))

    def conditions(self) -> list[str]:
        """How each result was taken, in a line of Markdown."""
        lines = []
        for result in self.known():
            stated = {key: value for key, value in result.settings.items() if value not in (None, "")}
            said = [f"{key.replace('_', ' ')} {_setting(value)}" for key, value in stated.items()]
            said += [f"fine-tuned on {result.training}"] if result.training else []
            said += [f"{name} between the outputs of both models {_number(v)}" for name, v in result.agreement.items()]
            lines.append(f"{TASKS[result.task][1]} on {result.dataset}: {'; '.join(said) or 'defaults'}")
        return lines

    def references(self) -> list[str]:
        """The names of the models that the model was compared with."""
        return list(dict.fromkeys(result.reference.model for result in self.known() if result.reference))

    def unmeasured(self, tasks: tuple[str, ...]) -> list[str]:
        """The names of those of `tasks` that nobody has evaluated the model on."""
        measured = {result.task for result in self.results}
        return [TASKS[task][1] for task in tasks if task not in measured]

    def known(self) -> list[Result]:
        """The results of tasks that this version knows."""
        return [result for result in self.results if result.task in TASKS]


def _is_on_hub(dataset: DatasetSource) -> bool:
    return dataset.sha256 is None and dataset.name != "memory"


def _dataset_id(dataset: DatasetSource) -> str:
    return dataset.name if _is_on_hub(dataset) else PurePosixPath(dataset.name).stem


def _dataset_args(result: Result) -> dict[str, Any] | None:
    """What of a dataset was taken: which file, and how much of it."""
    stated = {"sha256": result.dataset.sha256, LIMIT: result.settings.get(LIMIT)}
    return {name: value for name, value in stated.items() if value is not None} or None


def _main_metric(result: Result) -> str | None:
    candidates = (TASKS[result.task][2], "matthews_correlation", "spearman", "f1")
    return next((name for name in candidates if result.metrics.get(name) is not None), None)


def _metric_name(name: str) -> str:
    return METRIC_NAMES.get(name, name.replace("_", " "))


def _number(value: float | None, deviation: float | None = None) -> str:
    """A number as text: with four digits behind the point if it is at most 1, with two if it is larger."""
    if value is None:
        return ""
    digits = 4 if abs(value) <= 1 else 2
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def _change(name: str, value: float, dense: float | None) -> str:
    if not dense:
        return ""
    return f"{value / dense:.3f}x" if name in _RATIOS else f"{value - dense:+.{4 if abs(dense) <= 1 else 2}f}"


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value!r}" if isinstance(value, str) else str(value)
