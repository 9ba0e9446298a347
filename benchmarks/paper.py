r"""The table of "Direction is what you need" (Bałazy et al. 2021, arXiv 2106.08181) again, of any model.

    python benchmarks/paper.py bert-base-uncased --text wikitext-103-test.txt --fine-tune mrpc=nyu-mll/glue \
        --squad rajpurkar/squad --json paper.json
    python benchmarks/paper.py all-MiniLM-L6-v2 --pairs stsb-en-dev.csv --fine-tune sst2=sst2-dev.tsv,sst2-train.tsv
    python benchmarks/paper.py SmolLM2-135M-Instruct --text held-out.txt --calibrate mixed.txt --languages en

MODEL is a Hub id or a folder. A masked language model gives perplexity under whole-word masking and under plain 15 %
masking, a causal one its own. Without --text, --pairs, --fine-tune and --squad the tables alone are compared. Data is
a file in the official format or a dataset on the Hub; after a file, and a comma, follows what to train on.

Three flaws of the published protocol are mended: perplexity is given with the dense head (input only) *and* with the
head that is tied to the compressed table; the autoencoder's last epoch is taken, none is chosen; in fine-tuning the
decoder trains whatever the method. --faithful brings the three back, and trains the autoencoder as published.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from paper_protocol import CODES, METHODS, Dense, Measures, fit, root_mean_square_error
from transformers import PreTrainedModel

from hf_dirembed import CompressedEmbedding, DirEmbedError
from hf_dirembed.checkpoints.atomic import save_bytes
from hf_dirembed.compression.subspace import mean_cosine
from hf_dirembed.compression.table import Table
from hf_dirembed.evaluation import GLUE
from hf_dirembed.evaluation.results import installed_versions
from hf_dirembed.evaluation.tasks import parse_seeds
from hf_dirembed.remote.tables_dirembed import embedding_of


COLUMNS = ("method", "ratio", "rank", "bits", "fit, s", "mean cosine", "token cosine", "RMSE")


@dataclass
class Row:
    """A row of the table.

    Attributes:
        method: What it is called; `dense` for the model as it is.
        parameter_ratio: V d over the numbers in latents and decoder; for packed latents, whose bytes they get.
        rank: Latents of a token; None where they are packed.
        bits_per_weight: 8 x the bytes of all tensors that replace the table / (V d).
        fit_seconds: Of what `compress` does to a table, its figures included.
        mean_cosine: Over all tokens alike.
        token_cosine: Over tokens weighted by how often they are expected.
        rmse: √ mean (x - x̂)² over the table.
        metrics: By column.
        deviations: Over seeds, where there are several.
    """

    method: str
    parameter_ratio: float | None
    rank: int | None
    bits_per_weight: float
    fit_seconds: float | None = None
    mean_cosine: float | None = None
    token_cosine: float | None = None
    rmse: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """As Markdown has them, metrics in the order in which they were taken."""
        ratio = "" if self.parameter_ratio is None else f"{self.parameter_ratio:g}"
        packed = self.rank is None and ratio
        cells = [self.method, f"bytes of {ratio}" if packed else ratio, str(self.rank or "")]
        cells += [f"{self.bits_per_weight:.2f}", number(self.fit_seconds, 1)]
        cells += [number(self.mean_cosine, 4), number(self.token_cosine, 4), number(self.rmse, 5)]
        for column, value in self.metrics.items():
            deviation = self.deviations.get(column)
            cells.append(number(value, 2) + ("" if deviation is None else f" ± {deviation:.2f}"))
        return cells


def number(value: float | None, digits: int) -> str:
    """A figure, with fewer digits where it is large."""
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if abs(value) < 1e3 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def make_rows(dense: Dense, measures: Measures, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows, each as it is done: the dense model's, then ratio by ratio every method's."""

    def measured(row: Row, model: PreTrainedModel, method: str) -> Row:
        for column, (value, deviation) in measures(model, method).items():
            row.metrics[column] = value
            if deviation is not None:
                row.deviations[column] = deviation
        return row

    table = Table(dense.rows, device=dense.rows.device)
    yield measured(Row("dense", None, None, 8.0 * dense.rows.element_size()), dense.model, "dense")
    for ratio in arguments.ratios:
        # As the paper counts: a bias is left out.
        rank = int(table.num_rows * table.dim / (ratio * (table.num_rows + table.dim)))
        for method in arguments.methods:
            start = time.perf_counter()
            coded = fit(dense, method, rank, measures, faithful=arguments.faithful)
            seconds = time.perf_counter() - start
            model = dense.compressed(coded)
            embedding = embedding_of(model)
            assert isinstance(embedding, CompressedEmbedding)
            row = Row(
                METHODS[method], ratio, None if method == "transform" else rank,
                bits_per_weight=embedding.bits_per_weight,
                fit_seconds=seconds,
                mean_cosine=mean_cosine(table, coded),
                token_cosine=mean_cosine(table, coded, dense.weights),
                rmse=root_mean_square_error(table, coded),
            )  # fmt: skip
            yield measured(row, model, method)


def notes(dense: Dense, measures: Measures, arguments: argparse.Namespace) -> list[str]:
    """How the table is to be read, and how the measures were taken."""
    rows, dim = dense.rows.shape
    dtype = str(dense.rows.dtype).removeprefix("torch.")
    head = "the head is tied to it" if dense.tied else "no head is tied to it"
    weights = "expected counts" if arguments.calibrate is None else f"counts of {Path(arguments.calibrate).name}"
    found = [
        f"Table: {rows:,} x {dim}, {dtype}; {head}. Token weights: {weights}"
        + ("." if dense.hessian is None else "; `transform` measures errors by the Hessian of that text."),
        f"Ratio: of parameters, as the paper counts, V d / (rank (V + d)). Latents are stored in {CODES}, decoders in "
        f"{dtype}: 16 bits per parameter, where float32 as published takes 32. Packed latents have no such count: "
        "`transform` gets at most the bytes of the SVD's factors in its block (`bits`: per weight of the table).",
    ]
    if arguments.faithful:
        chosen = (
            f"the autoencoder's epoch is the one of the lowest perplexity on {measures.texts[0].source}, which it is "
            "evaluated on (the search counts as fitting)"
            if measures.texts
            else "of the autoencoder the last epoch is taken, as there is no text to choose one by"
        )
        protocol = f"as published: the head stays dense; {chosen}; in fine-tuning the decoder of the SVD is frozen"
    else:
        protocol = (
            "mended: perplexity also with the tied head; the autoencoder's last epoch, none chosen; in fine-tuning "
            "all decoders train, and all codes stay"
        )
    taken = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items() if value not in ("", None))
        for name, settings in measures.settings.items()
    ]
    return [*found, f"Protocol, {protocol}.", *taken]


def keep(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON; readers see the old file or the new one.

    Raises:
        CheckpointError: If it cannot be written.
    """
    save_bytes(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def run(arguments: argparse.Namespace, command: str) -> None:
    """Prints the Markdown table row by row, and keeps JSON of what there is after each."""
    dense = Dense.load(arguments.model, arguments.calibrate, arguments.languages)
    measures = Measures(dense, arguments)
    done: list[Row] = []
    for row in make_rows(dense, measures, arguments):
        done.append(row)
        said = notes(dense, measures, arguments)
        if len(done) == 1:
            titles = (*COLUMNS, *row.metrics)
            print(f"`{command}`\n", *(f"- {note}" for note in said), sep="\n", end="\n\n")
            print(line(titles), line(["---"] * len(titles)), sep="\n")
        print(line(row.cells()), flush=True)
        if arguments.json is not None:
            protocol = "faithful" if arguments.faithful else "mended"
            rows = [asdict(each) for each in done]
            found = {"command": command, "protocol": protocol, "notes": said, "settings": measures.settings}
            keep(arguments.json, {**found, "rows": rows, "versions": installed_versions()})


class Parser(argparse.ArgumentParser):
    """Ends a user's mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def ratio(text: str) -> float:
    value = float(text)
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} does not compress: give a ratio above 1, like 2.5")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} leaves nothing: give a whole number from 1")
    return value


def parse_data(text: str) -> tuple[str, ...]:
    """DATA or DATA,TRAIN."""
    return tuple(text.split(",", 1))


def parse_task(text: str) -> tuple[str, tuple[str, ...]]:
    """SUBSET=DATA or SUBSET=DATA,TRAIN."""
    subset, _, data = text.partition("=")
    if subset not in GLUE or not data:
        raise argparse.ArgumentTypeError(f"{text!r} is not SUBSET=DATA, SUBSET one of {', '.join(GLUE)}")
    return subset, parse_data(data)


def output_file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}: make it first")
    return Path(text)


def make_parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        "paper.py", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("model", help="a Hub id or a folder")
    add("--text", nargs="+", default=[], metavar="DATA", help="running text for perplexity")
    add("--pairs", nargs="+", default=[], metavar="DATA", help="sentence pairs with gold similarities")
    add("--fine-tune", nargs="+", default=[], type=parse_task, metavar="SUBSET=DATA", help="tasks of GLUE")
    add("--squad", nargs=1, default=[], type=parse_data, metavar="DATA", help="SQuAD v1.1")
    add("--ratios", nargs="+", type=ratio, default=[2.5, 5.0, 10.0], metavar="RATIO", help="by default 2.5 5 10")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--faithful", action="store_true", help="the published protocol, flaws and all")
    add("--calibrate", metavar="TEXT", help="text to weigh tokens by; gives transform its metric too")
    add("--languages", nargs="+", metavar="TAG", help="what token weights are for; by default as the tokenizer tells")
    add("--pooling", choices=("mean", "cls"), default="mean", help="of sentence pairs")
    add("--prefix", default="", help='put before each sentence of the pairs, like "query: "')
    add("--epochs", type=float, metavar="N", help="of fine-tuning; by default the paper's 3")
    add("--seeds", type=parse_seeds, help="of fine-tuning, like 0,1,2, which is the default")
    add("--max-tokens", type=count, metavar="N", help="of each text, for a quick look")
    add("--max-pairs", type=count, metavar="N", help="of each set, for a quick look")
    add("--max-examples", type=count, metavar="N", help="of each set to train and to evaluate on, for a quick look")
    add("--json", type=output_file, metavar="FILE", help="keep the figures here, too; written anew after each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 on a user's mistake."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    try:
        run(parser.parse_args(given), f"python benchmarks/paper.py {shlex.join(given)}")
    except DirEmbedError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\npaper.py: interrupted; what was printed holds\n")


if __name__ == "__main__":
    main()
