"""The command line: `hf-dirembed`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import click

from ..checkpoints.convert import compress_checkpoint, expand_checkpoint
from ..checkpoints.loading import resolve_checkpoint
from ..checkpoints.summary import CheckpointSummary, TableSummary, inspect_checkpoint
from ..compression.compress import EFFORTS, METHODS, SETTINGS, Settings
from ..errors import CheckpointError, DirEmbedError, OptionError
from ..exporting.export import export as export_checkpoint
from ..exporting.folder import POOLINGS
from ..exporting.quantise import BODIES
from ..hub.metadata import valid_repo_id
from ..hub.publishing import upload_checkpoint, write_checkpoint_card
from ..processes import is_main_process
from .demo import PAIRS, SENTENCES, DemoResult, run_demo
from .evaluate import evaluate_command
from .picture import TableProfile, require_matplotlib, save_picture


class ErrorReportingGroup(click.Group):
    """Ends a user's mistake in one line on stderr and exit code 2, Ctrl-C in one and 130, without a traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the options before the command's name."""
        try:
            return super().make_context(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _report(error)
            sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except (click.UsageError, DirEmbedError) as error:
            _report(error)
            ctx.exit(2)
        except KeyboardInterrupt:
            if is_main_process():
                click.echo("\nhf-dirembed: interrupted", err=True)
            ctx.exit(130)


def _report(error: click.UsageError | DirEmbedError) -> None:
    if not is_main_process():
        return
    line = str(error)
    if isinstance(error, click.UsageError):
        line = " ".join(error.format_message().split())
        if error.ctx is not None:
            line += f" ({error.ctx.command_path} --help)"
    click.echo(f"hf-dirembed: {line}", err=True)


class Bits(click.ParamType):
    """Bits per weight: a number, or numbers of tables by name."""

    name = "bits"

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """What stands for it in the help."""
        return "BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a dictionary of numbers by name."""
        if not isinstance(value, str):
            return value
        try:
            if "=" not in value:
                return float(value)
            pairs = [part.partition("=") for part in value.split(",")]
            numbers = {name.strip(): float(bits) for name, _, bits in pairs}
        except ValueError:
            self.fail(f"{value!r} is neither a number nor numbers by name, like embed_tokens=2,lm_head=4", param, ctx)
        if len(numbers) < len(pairs):
            self.fail(f"{value!r} names a table twice: give each one number", param, ctx)
        return numbers


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how small a table shall be."""
    for option in (
        click.option("--rank", type=int, help="Budget: latent dimensions (float methods)."),
        click.option("--ratio", type=float, help="Budget: how many times smaller than in the source checkpoint."),
        click.option(
            "--bits",
            type=Bits(),
            help="Budget: bits per weight over all tables, all that replaces them counted; or of each, like "
            "embed_tokens=2,lm_head=4.",
        ),
    ):
        command = option(command)
    return command


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf_dirembed")
def main() -> None:
    """Makes a model's vocabulary tables up to 32 times smaller, behind plain from_pretrained."""


@main.command(short_help="Make the vocabulary tables of a checkpoint smaller.")
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", default="transform", show_default=True, help=f"One of {', '.join(METHODS)}.")
@budget_options
@click.option("--latent-dtype", help="Dtype of float latents: float32, float16 or bfloat16.  [default: the table's]")
@click.option("--tables", help="Tables to compress, like embed_tokens,lm_head.  [default: all]")
@click.option("--languages", help="Languages of the text that the model is for, like en,de.  [default: the card's]")
@click.option(
    "--calibrate",
    metavar="TEXT",
    help="Run the model on this text file of mixed domains, or on 'self', which needs no data: what a language model "
    "writes, for an encoder words in no order.",
)
@click.option(
    "--resume",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Save the calibration, or the autoencoder's training, in this file now and then, and go on from it.",
)
@click.option("--effort", help=f"How long transform may fit: one of {', '.join(EFFORTS)}.  [default: balanced]")
@click.option("--seed", type=int, help="Seed of transform and autoencoder.  [default: 0]")
@click.option("--device", help="Where to fit.  [default: a GPU where there is one]")
@click.option("--base-model", metavar="REPO", help="Hub id of SRC, for the model card.  [default: SRC, if it is one]")
@click.option("--push-to-hub", metavar="REPO", help="Also upload OUT to this Hub repo.")
@click.option("--private", is_flag=True, help="Make that Hub repo private.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def compress(
    src: str,
    out: Path,
    tables: str | None,
    languages: str | None,
    calibrate: str | None,
    seed: int | None,
    effort: str | None,
    method: str,
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress the vocabulary tables of SRC, a folder or a Hub id, into the folder OUT."""
    if seed is not None and method in METHODS and method not in SETTINGS:
        raise OptionError(f"method {method!r} draws no random numbers: leave --seed out")
    if private and not push_to_hub:
        raise CheckpointError("--private is for an upload: name its repo with --push-to-hub")
    if push_to_hub and valid_repo_id(push_to_hub) is None:  # said before the work, not after it
        raise CheckpointError(f"--push-to-hub {push_to_hub!r} is no id of the Hub: give one like org/name")

    summary = compress_checkpoint(
        src,
        out,
        tables=_listed(tables),
        languages=_listed(languages),
        method=method,
        calibration=calibrate,
        effort=cast(Any, effort),  # checked where it is used
        settings=_seeded(seed, method, effort),
        **options,
    )

    if not is_main_process():
        return
    _print_summary(summary, as_json)
    if push_to_hub:
        click.echo(f"uploaded to {upload_checkpoint(out, push_to_hub, private=private)}", err=True)


def _seeded(seed: int | None, method: str, effort: str | None) -> Settings | None:
    """The settings of a method with a seed; None where there is none, or no such method."""
    if seed is None or method not in SETTINGS:
        return None
    if method == "transform" and effort in EFFORTS:
        return replace(EFFORTS[effort], seed=seed)
    return SETTINGS[method](seed=seed)


def _listed(text: str | None) -> tuple[str, ...] | None:
    """The parts of a text between commas; None if there is no text."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


@main.command(short_help="Show the vocabulary tables of a checkpoint.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Also draw its spectrum and bits into this image."
)
@click.option("--reference", metavar="BASE", help="The dense model, whose table the picture compares with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def inspect(folder: Path, plot: Path | None, reference: str | None, as_json: bool) -> None:
    """Show the vocabulary tables of the checkpoint DIR, compressed or not."""
    if reference and not plot:
        raise CheckpointError("--reference is for the picture: name its file with --plot")
    summary = inspect_checkpoint(folder)
    if plot:
        require_matplotlib()
        dense = resolve_checkpoint(reference) if reference else None
        save_picture(TableProfile.of_checkpoint(resolve_checkpoint(folder), dense), plot)
    _print_summary(summary, as_json)


main.add_command(evaluate_command)


@main.command(short_help="Write the model card of a compressed checkpoint.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base-model", metavar="REPO", help="Hub id of the model that DIR was made from.  [default: as known]")
@click.option("--model-id", metavar="REPO", help="Hub id that DIR will have.  [default: the folder's name]")
@click.option("--force", is_flag=True, help="Replace a card that was written by hand.")
def card(folder: Path, base_model: str | None, model_id: str | None, force: bool) -> None:
    """Write the model card of the compressed checkpoint DIR, with the results of its evaluations."""
    written = write_checkpoint_card(folder, base_model=base_model, model_id=model_id, force=force)
    click.echo(f"{written}: the card", err=True)


@main.command(short_help="Turn a compressed checkpoint into a stock one.")
@click.argument("folder", metavar="DIR")
@click.argument("out", type=click.Path(path_type=Path))
def expand(folder: str, out: Path) -> None:
    """Expand DIR, a compressed folder or Hub id, into the stock checkpoint OUT, which loads without this package."""
    expand_checkpoint(folder, out)
    click.echo(f"{out}: a stock checkpoint", err=True)


@main.command(short_help="Write an encoder or a classifier as ONNX.")
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--body",
    default="fp32",
    show_default=True,
    help="Beside model.onnx, whose body is in float32: int8 adds model_quantized.onnx, int8-weights, which is closer "
    "to the model, model_int8.onnx.",
)
@click.option("--opset", type=int, help="Version of ONNX's operators.  [default: the exporter's]")
@click.option(
    "--pooling",
    help=f"How token vectors become one of the text, where SRC does not say: one of {', '.join(POOLINGS)}.",
)
@click.option("--method", default="transform", show_default=True, help=f"One of {', '.join(METHODS)}; of a dense SRC.")
@budget_options
@click.option("--languages", help="Languages of the text that the model is for, like en,de.  [default: the card's]")
@click.option("--calibrate", metavar="TEXT", help="As for compress; of a dense SRC.")
@click.option("--base-model", metavar="REPO", help="Hub id of SRC, for the model card.  [default: SRC, if it is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def export(src: str, out: Path, languages: str | None, calibrate: str | None, as_json: bool, **options: Any) -> None:
    """Export an encoder or a classifier as ONNX.

    SRC is a compressed folder or Hub id, or a dense one and a budget; OUT is a new folder.
    """
    summary = export_checkpoint(src, out, languages=_listed(languages), calibration=calibrate, **options)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    click.echo(f"{'dense, float32':<28} {_size(summary.dense_bytes)}")
    for file in summary.files:
        said = f"differs by {file.difference:.0e}" if file.cosine is None else f"cosine {file.cosine:.4f} at least"
        click.echo(f"{file.name:<28} {_size(file.num_bytes)}, {BODIES[file.body].description} ({said})")


@main.command(short_help="Compress a real model and show what changed.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the compressed model in this folder.")
@click.option("--method", default="transform", show_default=True, help=f"One of {', '.join(METHODS)}.")
@budget_options
def demo(out: Path | None, **options: Any) -> None:
    """Compress the real all-MiniLM-L6-v2 that a package ships, reload it, and show what changed.

    Without a budget it is compressed to 2 bits per weight, by transform calibrated on words in no order.
    """
    if options["method"] == "transform":
        options["calibration"] = "self"
    if all(options[name] is None for name in ("bits", "ratio", "rank")):
        options["bits"] = 2.0
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(out or Path(folder) / "all-MiniLM-L6-v2-dirembed", **options)
    _print_demo(result)
    if out is not None:
        click.echo(f"\nThe compressed model is in {out}: AutoModel.from_pretrained({str(out)!r})")


def _print_summary(summary: CheckpointSummary, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return

    click.echo(f"{'base model':<16} {summary.base_model_type}")
    if not summary.tables and not summary.dense_tables:
        click.echo(f"{'tables':<16} none: it reads no token ids")
    for table in summary.tables:
        click.echo()
        for label, value in [("table", table.name), *_table_lines(table)]:
            click.echo(f"{label:<16} {value}")

    before = f"{_size(summary.dense_model_bytes)} -> " if summary.tables else ""
    click.echo(f"\n{'whole model':<16} {before}{_size(summary.model_bytes)}")
    if len(summary.tables) > 1:
        smaller = f"{_size(summary.dense_bytes)} -> {_size(summary.bytes)}, {summary.ratio:.2f}x smaller"
        click.echo(f"{'all tables':<16} {smaller}, {summary.bits_per_weight:.3f} bits per weight")

    for number, dense in enumerate(summary.dense_tables):
        size = f"{dense.rows:,} x {dense.dim:,}"
        said = f"shares that of {dense.tied_to}" if dense.tied_to else f"{_size(dense.num_bytes)}, dense"
        refusal = f" ({dense.refusal})" if dense.refusal else ""
        click.echo(("" if number else "\n") + f"{dense.kind:<16} {dense.name}, {size}: {said}{refusal}")


def _table_lines(table: TableSummary) -> list[tuple[str, str]]:
    """What is said of one table, labels and values."""
    cosine = "not recorded" if table.mean_cosine is None else f"{table.mean_cosine:.4f}"
    if table.token_cosine is not None:
        cosine += f" over rows, {table.token_cosine:.4f} over tokens in use"

    latents = f"{table.rank} for {table.embedding_dim} dimensions, {table.codes}"
    if table.blocks > 1:
        latents += f", in {table.blocks} blocks of columns"

    lines = [
        ("kind", table.kind),
        ("method", table.method),
        ("size", f"{table.num_embeddings:,} x {table.embedding_dim:,}, {_size(table.dense_bytes)}"),
        ("replaced by", f"{_size(table.bytes)}, {table.ratio:.2f}x smaller"),
        ("", f"codes {_size(table.code_bytes)}, decoder {_size(table.decoder_bytes)}"),
        ("bits per weight", f"{table.bits_per_weight:.3f}"),
        ("latents", latents),
        ("mean cosine", cosine),
    ]

    if len(table.classes) > 1:
        label = "bits of rows"
        for each in table.classes:
            lines.append((label, f"{each.bits_per_weight:.3f} per weight in the codes of {each.rows:,}"))
            label = ""

    if table.outliers:
        lines.append(("outlier rows", f"{table.outliers:,} kept as they are"))
    if table.shortened_rows and table.shortened_cosine is not None:
        kept = f"their length is cut, their mean cosine {table.shortened_cosine:.4f}"
        lines.append(("long rows", f"{table.shortened_rows:,}, far longer than most: {kept}"))

    if table.distortion is not None and table.bound_bits is not None:
        lines.append(("squared error", f"{table.distortion:.2%} of the table's variance, rows weighed by use"))
        needed = f"{table.bound_bits:.3f} bits per weight for that"
        lines.append(("", f"a Gaussian table of this spectrum needs at least {needed}"))
    return lines


def _print_demo(result: DemoResult) -> None:
    click.echo("all-MiniLM-L6-v2, its token embeddings compressed\n")
    _print_summary(result.summary, as_json=False)
    click.echo(f"{'sentence cosine':<16} {result.sentence_cosine:.4f} between embeddings before and after\n")
    click.echo("similarity     before   after")
    for (first, second), (dense, compressed) in zip(PAIRS, result.similarities, strict=True):
        click.echo(f"               {dense:6.3f}  {compressed:6.3f}   {SENTENCES[first]}  |  {SENTENCES[second]}")
    click.echo(f"\nAutoModel and SentenceTransformer load it alike (largest difference {result.agreement:.1e}).")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 or not num_bytes else f"{num_bytes / 1e3:,.1f} kB"
