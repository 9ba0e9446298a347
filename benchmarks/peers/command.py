"""The command: `python -m benchmarks.peers MODEL ... --out DIR`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import transformers

from hf_dirembed.calibration.text import CALIBRATION_TOKENS
from hf_dirembed.cli.picture import require_matplotlib
from hf_dirembed.errors import DirEmbedError
from hf_dirembed.evaluation.results import portable_arguments

from .processes import run_process
from .record import Record
from .registry import METHODS
from .report import ModelReport, Report, compare
from .running import Settings, measure_scaling, measure_subject, missing
from .static import StaticJob, measure_static, missing_packages
from .subjects import Data, Encoder, Subject, load_subject


STATIC = "model2vec"
NO_FIGURE_DEPENDS_ON = ("out", "resume", "timeout", "plots")


@dataclass
class Run:
    """What a command was told, and what it has found when it is stopped."""

    arguments: list[str]
    record: Record | None = None


class Numbers(click.ParamType):
    """Positive numbers with commas between them."""

    name = "NUMBERS"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Of a string, or what the default is."""
        try:
            found = tuple(map(self.kind, value.split(",")))
        except ValueError:
            found = ()
        if not found or not all(0 < each < float("inf") for each in found):
            self.fail(f"{value!r} are no positive numbers: give some like 4,2", param, ctx)
        return found


class Names(click.ParamType):
    """Names of methods with commas between them."""

    name = "NAMES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Of a string, or what the default is."""
        known = [*METHODS, STATIC]
        if unknown := [name for name in value.split(",") if name not in known]:
            self.fail(f"{unknown[0]!r} is no method: choose among {', '.join(known)}", param, ctx)
        return tuple(value.split(","))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for report.json, .md and plots.")
@click.option("--resume", is_flag=True, help="Go on with what a stopped run of the same settings left in --out.")
@click.option("--pairs", multiple=True, metavar="FILE_OR_DATASET", help="STS pairs, for encoders; repeatable.")
@click.option("--text", multiple=True, metavar="FILE_OR_DATASET", help="Held-out text, for causal LMs; repeatable.")
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Text that transform is calibrated on, for causal LMs.",
)
@click.option("--calibration-tokens", type=click.IntRange(min=1), default=CALIBRATION_TOKENS, show_default=True)
@click.option("--languages", help="Of the text that the models are for, like en,de.  [default: their cards']")
@click.option("--prefix", default="", help="Put before each sentence of a pair.")
@click.option("--limit", type=click.IntRange(min=1), help="Pairs or tokens of each file, at most.")
@click.option("--bits", type=Numbers(float), default="4.5,2.75,1", show_default=True, help="Budgets, bits per weight.")
@click.option("--methods", type=Names(), help="Some of those below, with commas between them.  [default: all]")
@click.option("--rows", type=Numbers(int), help="Also synthetic tables of so many rows, like 10000,1000000.")
@click.option("--dim", type=click.IntRange(min=2), default=128, show_default=True, help="Columns of synthetic tables.")
@click.option("--scaling-bits", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True)
@click.option("--batches", type=Numbers(int), default="1,8,128", show_default=True, help="States at a head.")
@click.option("--repeats", type=click.IntRange(min=3), default=20, show_default=True, help="Of each timing.")
@click.option("--timeout", type=float, default=1800, show_default=True, help="Seconds for one measurement.")
@click.option("--plots", type=click.Choice(["svg", "png"]), default="svg", show_default=True)
@click.pass_obj
def command(run: Run, models: tuple[str, ...], out: Path, resume: bool, **options: Any) -> None:
    """Measure table methods, ours and those of other packages, on the tables of MODELs.

    MODEL is a folder or a Hub id: an encoder is measured by --pairs, a causal language model by --text. Each
    measurement of time and memory has a process of its own. --out is written after each.
    """
    if not models and options["rows"] is None:
        raise click.UsageError("name a MODEL, or give --rows")
    require_matplotlib()
    record = run.record = Record(out, begin_report(run.arguments, models, options), resume=resume)
    report = record.report
    languages = tuple(options["languages"].split(",")) if options["languages"] else ()
    shared = {name: options[name] for name in ("pairs", "text", "calibrate", "calibration_tokens", "prefix", "limit")}
    data = Data(**shared, languages=languages)
    names = options["methods"] or (*METHODS, STATIC)
    settings = Settings(
        [name for name in METHODS if name in names],  # ours come first
        options["bits"],
        options["timeout"],
        options["repeats"],
        options["batches"],
        progress=lambda line: click.echo(line, err=True),
    )
    if report.num_rows:
        settings.progress(f"{report.num_rows} rows are there already")
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = Path(temporary)
        for model in models:
            measure_model(model, data, settings, work, record, with_static=STATIC in names)
        scaling = Settings(**{**vars(settings), "bits": (options["scaling_bits"],)})
        measure_scaling(options["rows"] or (), options["dim"], scaling, work, report.scaling, record.save)
    record.finish(options["plots"])
    click.echo(report.to_markdown())


def begin_report(arguments: Sequence[str], models: Sequence[str], options: dict[str, Any]) -> Report:
    """An empty report of these settings, without what lies above files."""
    told = [each for each in arguments if each != "--resume"]
    line = shlex.join(["python", "-m", "benchmarks.peers", *portable_arguments(told)])
    settings = {name: portable(value) for name, value in options.items() if name not in NO_FIGURE_DEPENDS_ON}
    return Report(line, {"MODEL": portable(models), **settings}, options["dim"])


def portable(value: Any) -> Any:
    """A setting, local paths cut to their last part.

    Example:
        >>> portable(("/home/me/pairs.csv", 4.5))
        ['pairs.csv', 4.5]
    """
    if isinstance(value, (tuple, list)):
        return [portable(each) for each in value]
    return portable_arguments([value])[0] if isinstance(value, str) else value


def measure_model(name: str, data: Data, settings: Settings, work: Path, record: Record, *, with_static: bool) -> None:
    """All measurements of a model that are not there yet."""
    models = record.report.models
    model = next((each for each in models if each.name == Path(name).name), None)
    if model is not None and not _lacking(model, settings, with_static):
        return
    settings.progress(f"{name}: the dense model")
    subject = load_subject(name, data)
    if model is None:
        model = begin_model(subject)
        models.append(model)
    record.save()
    state = record.folder / f"calibration-{subject.name}.safetensors"
    settings.progress(f"{name}: token weights" + (f", calibration on {data.calibrate}" if data.calibrate else ""))
    measure_subject(subject, subject.table(state), settings, work, model.points, record.save)
    if with_static and isinstance(subject, Encoder) and _lacks_static(model):
        model.static = distil(subject, settings, work)
    model.comparisons = compare(model)
    record.save()
    state.unlink(missing_ok=True)


def begin_model(subject: Subject) -> ModelReport:
    """A model as it is."""
    return ModelReport(
        subject.name,
        subject.measure,
        subject.change,
        subject.lower_is_better,
        subject.shape,
        subject.tied,
        subject.dense,
        base=subject.base,
    )


def _lacking(model: ModelReport, settings: Settings, with_static: bool) -> bool:
    """Whether there is something to measure."""
    asked = [(method.name, bits, model.shape[0]) for method, bits in settings.budgets()]
    static = with_static and model.measure == Encoder.measure and _lacks_static(model)
    return bool(missing(asked, model.points)) or static


def _lacks_static(model: ModelReport) -> bool:
    return not model.static or "failure" in model.static


def distil(subject: Subject, settings: Settings, work: Path) -> dict[str, Any]:
    """model2vec's static model of an encoder, or why there is none."""
    if missing := missing_packages():
        return {"failure": missing}
    settings.progress(f"{STATIC}: distilling")
    data, folder = subject.data, subject.folder.resolve()
    job = StaticJob(str(folder), str(work / STATIC), tuple(data.pairs), data.prefix, data.limit, settings.repeats)
    found, failure = run_process(measure_static, job.to_json(), work, settings.timeout)
    return {"failure": failure} if failure else found


def main(arguments: list[str]) -> int:
    """Runs the command: a user's mistake ends in one line on stderr and 2, Ctrl-C in one and 130."""
    run = Run(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        command.main(arguments, prog_name="python -m benchmarks.peers", standalone_mode=False, obj=run)
    except (click.ClickException, DirEmbedError) as error:
        line = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"peers: {line}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"peers: interrupted; {run.record.kept if run.record else 'nothing was measured'}", err=True)
        return 130
    return 0
