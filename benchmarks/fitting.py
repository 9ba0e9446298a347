"""Time and memory of compressing, in fresh processes: real models, and tables of more and more rows.

python -m benchmarks.fitting all-MiniLM-L6-v2 multilingual-e5-small [--bits 2] [--rows 30000 120000 480000] [--dim 384]
python -m benchmarks.fitting all-MiniLM-L6-v2 SmolLM2-135M-Instruct --bits 2 --efforts fast balanced thorough

The error is the share of the table's weighted variance that is lost.
Times are the median of `--repeats`. Memory is the peak above what the loaded model, or the table, takes already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import hf_dirembed
from hf_dirembed.compression.table import Table
from hf_dirembed.compression.transform.transform import EFFORTS, transform

from .peers.measure import PeakMemory


MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """Seconds on the clock and of all cores, and bytes above those at the start (None where the system hides them)."""

    rows: int
    dim: int
    seconds: float
    core_seconds: float
    peak_bytes: int | None
    error: float | None = None

    @property
    def mib(self) -> str:
        """The peak in a table's cell."""
        return "?" if self.peak_bytes is None else f"{self.peak_bytes / MIB:,.0f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders or Hub ids")
    parser.add_argument("--bits", type=float, default=2.0, help="per weight")
    parser.add_argument("--efforts", nargs="+", default=["balanced"], choices=list(EFFORTS), help="in turns")
    parser.add_argument("--languages", nargs="+", help="of the token weights; by default the cards'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=(), help="of made-up tables")
    parser.add_argument("--dim", type=int, default=384, help="of made-up tables")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def measure(fit: Callable[[], Any], rows: int, dim: int) -> Measured:
    memory, start, cores = PeakMemory(), time.perf_counter(), time.process_time()
    fit()
    return Measured(rows, dim, time.perf_counter() - start, time.process_time() - cores, memory.bytes())


def of_model(name: str, effort: str, bits: float, languages: list[str] | None, threads: int) -> Measured:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    rows, dim = model.get_input_embeddings().weight.shape
    options: dict[str, Any] = {"bits": bits, "languages": languages, "effort": effort}
    found = measure(lambda: hf_dirembed.compress(model, tokenizer, **options), rows, dim)
    (record,) = model.config.dirembed["record"]["tables"].values()
    return replace(found, error=record["quality"]["distortion"])


def of_rows(rows: int, dim: int, bits: float, threads: int) -> Measured:
    """A Gaussian table with a decaying spectrum."""
    torch.set_num_threads(threads)
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    table *= torch.linspace(0, 4, dim).neg().exp()
    return measure(lambda: transform(Table(table), int(bits * rows * dim / 8), dtype=table.dtype), rows, dim)


def alone(function: Callable[..., Measured], *arguments: object) -> Measured:
    """Calls a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    given = parse()
    if given.models:
        print("| model | table | effort | fit, s | core seconds | peak above the model, MiB | error |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in given.models:
        runs: dict[str, list[Measured]] = {effort: [] for effort in given.efforts}
        for _, effort in product(range(given.repeats), given.efforts):
            runs[effort].append(alone(of_model, name, effort, given.bits, given.languages, given.threads))
        for effort, each in runs.items():
            print(
                f"| {Path(name).name} | {each[0].rows:,} x {each[0].dim} | {effort} "
                f"| {statistics.median(run.seconds for run in each):.1f} "
                f"| {statistics.median(run.core_seconds for run in each):.1f} | {each[-1].mib} "
                f"| {each[-1].error:.4%} |",
                flush=True,
            )
    if given.rows:
        print("\n| rows | table, MiB | fit, s | per 1,000 rows, s | peak above the table, MiB |")
        print("| --- | --- | --- | --- | --- |")
    for rows in given.rows:
        run = alone(of_rows, rows, given.dim, given.bits, given.threads)
        size, thousand = 4 * rows * given.dim / MIB, 1000 * run.seconds / rows
        print(f"| {rows:,} | {size:,.0f} | {run.seconds:.1f} | {thousand:.2f} | {run.mib} |", flush=True)


if __name__ == "__main__":
    main()
