"""The command `hf-dirembed evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..checkpoints.loading import is_compressed
from ..evaluation.results import RESULTS_NAME, Result, portable_arguments, save_result
from ..evaluation.tasks import TASKS, evaluate


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all tasks, each once; what is not given is left to the task."""
    options = {option.name: option for task in TASKS.values() for option in task.options}
    for option in reversed(options.values()):
        takers = [task.name for task in TASKS.values() if option in task.options]
        tasks = "" if len(takers) == len(TASKS) else f"  [{', '.join(takers)}]"
        command = click.option(flag(option.name), option.name, type=option.type, metavar="", help=option.help + tasks)(
            command
        )
    return command


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


@click.command(
    name="evaluate",
    short_help="Measure a model, beside the dense one if you like.",
    help="Evaluate MODEL, a folder or a Hub id, dense or compressed, on a task:\n\n\b\n"
    + "\n".join(f"{task.name:<15} {task.help}" for task in TASKS.values()),
)
@click.argument("model")
@click.option("--task", required=True, metavar="TASK", help="What to measure, see above.")
@click.option("--data", required=True, metavar="FILE_OR_DATASET", help="A file, or the id of a dataset on the Hub.")
@click.option("--reference", metavar="BASE", help="Compare with this model, a folder or a Hub id.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--save/--no-save", default=True, help=f"Keep the result in {RESULTS_NAME} in a compressed model's folder."
)
@task_options
def evaluate_command(
    model: str, task: str, data: str, reference: str | None, as_json: bool, save: bool, **options: Any
) -> None:
    """Evaluates a model, and keeps the result; its help is made of the tasks' (see above)."""
    given = {name: value for name, value in options.items() if value is not None}
    result = evaluate(task, model, data, reference, **given)
    result = replace(result, arguments=_arguments(model, task=task, data=data, reference=reference, **given))
    if as_json:
        click.echo(json.dumps({"model": model, **result.to_dict(), "difference": result.difference}))
    else:
        print_result(
            result, *("compressed" if is_compressed(each) else "dense" for each in (model, reference) if each)
        )
    if save and Path(model).is_dir() and is_compressed(model):
        save_result(model, result)
        click.echo(f"kept in {Path(model) / RESULTS_NAME}", err=True)


def _arguments(model: str, **options: Any) -> tuple[str, ...]:
    """The command's arguments, to be published with the result."""
    arguments = ["evaluate", model]
    for name, value in options.items():
        if value is not None:
            arguments += [flag(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return portable_arguments(arguments)


def print_result(result: Result, model: str, reference: str | None = None) -> None:
    """Prints figures as a table for people.

    Args:
        result: What was measured.
        model: What heads the model's column.
        reference: What heads the reference's.
    """
    trained = f", fine-tuned on {result.training}" if result.training else ""
    click.echo(f"{result.task} on {result.dataset}{trained}\n")

    rows = [["", model]]
    rows += [[name, _figure(value, result.deviations.get(name))] for name, value in result.metrics.items()]

    # The reference's figures go before the model's, the difference after them.
    if result.reference is not None:
        if reference == model:
            reference = "reference"
        theirs = result.reference
        columns = [(reference or "reference", "difference")]
        columns += [
            (
                _figure(theirs.metrics.get(name), theirs.deviations.get(name)),
                _figure(result.difference[name], sign="+"),
            )
            for name in result.metrics
        ]
        rows = [[row[0], dense, row[1], difference] for row, (dense, difference) in zip(rows, columns, strict=True)]

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *figures in rows:
        cells = (f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True))
        click.echo("   ".join([f"{label:<{widths[0]}}", *cells]).rstrip())

    for name, value in result.agreement.items():
        click.echo(f"\n{name} between the outputs of both: {_figure(value)}")
    click.echo("\n" + ", ".join(f"{name} {_setting(value)}" for name, value in result.settings.items()))


def _figure(value: float | None, deviation: float | None = None, sign: str = "-") -> str:
    if value is None:
        return "not finite"
    return f"{value:{sign},.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _setting(value: Any) -> str:
    return (
        ",".join(map(str, value)) if isinstance(value, (list, tuple)) else repr(value) if value == "" else str(value)
    )
