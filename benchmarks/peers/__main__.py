"""The command: `python -m benchmarks.peers MODEL ... --out DIR`."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import transformers

from hf_dirembed.evaluation.results import portable_arguments
from hf_dirembed.layout_dirembed import DirEmbedError
from hf_dirembed.picture import require_matplotlib
from hf_dirembed.staging import staged_folder

from .plots import draw
from .registry import METHODS
from .report import ModelReport, Report, write
from .running import SIZES, Settings, measure_scaling, measure_subject, run_process
from .static import StaticJob, measure_static, missing_packages
from .subjects import Data, Encoder, Subject, load_subject


STATIC = "model2vec"


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
@click.option("--pairs", multiple=True, metavar="FILE_OR_DATASET", help="STS pairs, for encoders; repeatable.")
@click.option("--text", multiple=True, metavar="FILE_OR_DATASET", help="Held-out text, for causal LMs; repeatable.")
@click.option("--calibrate", metavar="FILE", help="Text that transform is calibrated on, for causal LMs.")
@click.option("--calibration-tokens", type=click.IntRange(min=1), default=32_768, show_default=True)
@click.option("--languages", help="Of the text that the models are for, like en,de.  [default: their cards']")
@click.option("--prefix", default="", help="Put before each sentence of a pair.")
@click.option("--limit", type=click.IntRange(min=1), help="Pairs or tokens of each file, at most.")
@click.option("--bits", type=Numbers(float), default="4.5,2.75,1", show_default=True, help="Budgets, bits per weight.")
@click.option("--methods", type=Names(), help="Some of those below, with commas between them.  [default: all]")
@click.option("--rows", type=click.IntRange(min=SIZES[0]), help=f"Also synthetic tables, up to {SIZES[-1]:,} rows.")
@click.option("--dim", type=click.IntRange(min=2), default=128, show_default=True, help="Columns of synthetic tables.")
@click.option("--scaling-bits", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True)
@click.option("--batches", type=Numbers(int), default="1,8,128", show_default=True, help="States at a head.")
@click.option("--repeats", type=click.IntRange(min=3), default=20, show_default=True, help="Of each timing.")
@click.option("--timeout", type=float, default=1800, show_default=True, help="Seconds for one measurement.")
@click.option("--plots", type=click.Choice(["svg", "png"]), default="svg", show_default=True)
@click.pass_obj
def command(arguments: list[str], models: tuple[str, ...], out: Path, **options: Any) -> None:
    """Measure table methods, ours and those of other packages, on the tables of MODELs.

    MODEL is a folder or a Hub id: an encoder is measured by --pairs, a causal language model by --text. Each
    measurement of time and memory has a process of its own.
    """
    if not models and options["rows"] is None:
        raise click.UsageError("name a MODEL, or give --rows")
    require_matplotlib()
    start = time.perf_counter()
    languages = tuple(options["languages"].split(",")) if options["languages"] else ()
    shared = {name: options[name] for name in ("pairs", "text", "calibrate", "calibration_tokens", "prefix", "limit")}
    data = Data(**shared, languages=languages)
    names = options["methods"] or (*METHODS, STATIC)
    settings = Settings(
        [name for name in names if name != STATIC],
        options["bits"],
        options["timeout"],
        options["repeats"],
        options["batches"],
        progress=lambda line: click.echo(line, err=True),
    )
    with staged_folder(out) as staging, tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = Path(temporary)
        found = []
        for model in models:
            settings.progress(f"{model}: the dense model")
            subject = load_subject(model, data)
            found.append(report_model(subject, settings, work, with_static=STATIC in names))
        scaling = []
        if options["rows"]:
            scaling_settings = Settings(**{**vars(settings), "bits": (options["scaling_bits"],)})
            scaling = measure_scaling(options["rows"], options["dim"], scaling_settings, work)
        line = shlex.join(["python", "-m", "benchmarks.peers", *portable_arguments(arguments)])
        report = Report(line, time.perf_counter() - start, found, scaling, options["dim"])
        write(report, staging)
        draw(report, staging, options["plots"])
    click.echo(report.to_markdown())


def report_model(subject: Subject, settings: Settings, work: Path, *, with_static: bool) -> ModelReport:
    """All measurements of a model."""
    rows = subject.table.rows
    return ModelReport(
        subject.name,
        subject.measure,
        subject.change,
        subject.lower_is_better,
        (rows.shape[0], rows.shape[1]),
        subject.tied,
        subject.dense,
        measure_subject(subject, settings, work),
        distil(subject, settings, work) if with_static and isinstance(subject, Encoder) else {},
    )


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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        command.main(arguments, prog_name="python -m benchmarks.peers", standalone_mode=False, obj=arguments)
    except (click.ClickException, DirEmbedError) as error:
        line = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"peers: {line}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("\npeers: interrupted", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
