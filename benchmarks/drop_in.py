"""What people do with a model, done once with a real one after it was compressed, beside the expanded stock model.

    python benchmarks/drop_in.py all-MiniLM-L6-v2 --bits 2
    python benchmarks/drop_in.py HuggingFaceTB/SmolLM2-135M-Instruct --bits 4 --rows generate,peft

MODEL is a local folder or a Hub id: a causal language model or an encoder. It is compressed without data and brought
to float32, in a temporary folder, and expanded beside it. Prints a Markdown table; a row that fails says so there, its
traceback goes to stderr, and the exit code is 1. The rows are those of drop_in_rows/.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import drop_in_rows  # noqa: F401 (which puts the rows there)
import torch
import transformers
from drop_in_subject import ROWS, Skip, Subject

from hf_dirembed import DirEmbedError
from hf_dirembed.checkpoints.convert import compress_checkpoint, expand_checkpoint, load_model
from hf_dirembed.errors import first_line


def prepare(model: str, bits: float, work: Path) -> Subject:
    """Compresses a model, brings it to float32, in which sums in another order stay close, and expands it."""
    start = time.perf_counter()
    summary = compress_checkpoint(model, work / "stored", bits=bits)
    seconds = time.perf_counter() - start
    shutil.copytree(work / "stored", work / "compressed", ignore=shutil.ignore_patterns("*.safetensors*"))
    load_model(work / "stored", dtype=torch.float32).save_pretrained(work / "compressed")
    expand_checkpoint(work / "compressed", work / "stock")
    shutil.rmtree(work / "stored")
    sizes = " and ".join(f"{table.num_embeddings:,} x {table.embedding_dim}" for table in summary.tables)
    print(
        f"{sizes} {'table' if len(summary.tables) == 1 else 'tables'} at {summary.bits_per_weight:.3f} bits per weight"
        f", {summary.bytes / 2**20:.1f} MiB, fitted in {seconds:.0f} s; float32, threads: {torch.get_num_threads()}\n"
    )
    return Subject(work)


def run(subject: Subject, names: Sequence[str]) -> int:
    """Prints a line for each row, and returns how many failed."""
    print("| row | what was done | outcome | seconds |\n| --- | --- | --- | --- |")
    failures = 0
    for row in ROWS:
        if row.name not in names or (row.kind and row.kind != subject.kind):
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            outcome = row.check(subject)
        except Skip as reason:
            outcome = f"left out: {reason}"
        except Exception as error:  # a row that fails is what this is for
            failures += 1
            outcome = f"**fails**: {type(error).__name__}: {first_line(error)}"
            traceback.print_exc()
        outcome = outcome.replace("|", "\\|")
        print(f"| {row.name} | {row.what} | {outcome} | {time.perf_counter() - start:.1f} |", flush=True)
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: exits with 1 if a row fails, with 2 on a user's mistake."""
    known = list(dict.fromkeys(row.name for row in ROWS))
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        "drop_in.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hub id or a folder")
    parser.add_argument("--bits", type=float, default=4.0, help="per weight of the table; by default 4")
    parser.add_argument(
        "--rows", default=",".join(known), metavar="A,B", help=f"of {', '.join(known)}; by default all"
    )
    asked = parser.parse_args(given)
    names = asked.rows.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.exit(2, f"drop_in.py: there is no row {unknown[0]!r}: choose from {', '.join(known)}\n")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"`python benchmarks/drop_in.py {shlex.join(given)}`\n")
    try:
        with tempfile.TemporaryDirectory(prefix="drop-in-") as folder:
            os.environ["HF_MODULES_CACHE"] = str(Path(folder) / "modules")  # of the processes that rows start
            failures = run(prepare(asked.model, asked.bits, Path(folder)), names)
    except DirEmbedError as error:
        parser.exit(2, f"drop_in.py: {first_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ndrop_in.py: interrupted; what was printed holds\n")
    if failures:
        parser.exit(1, f"drop_in.py: {failures} rows failed\n")


if __name__ == "__main__":
    main()
