"""One measurement, in a process of its own: what it finds fits JSON.

Whatever a method's package raises ends the process: the one that started it reports the last line.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .methods import Dense, Method, Runnable, Stored, Table
from .registry import METHODS


ENOUGH = 3  # repeats of what takes long
PATIENCE = 3.0  # seconds after which so many are enough
LOOKUP = (32, 128)  # token ids
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        kind: `fit`, `lookup` or `head`.
        method: Its name.
        table: A file that `Table.save` wrote.
        stored: Where `fit` writes what the method keeps, and the others read it.
        bits: The budget, for a method that has one.
        rows: Where `fit` writes the rows that come out, as a table; nowhere by default.
        dense: What `Dense` keeps of the table; for `lookup` and `head`.
        batches: Of states, for `head`.
        repeats: Of each timing, at most.
    """

    kind: str
    method: str
    table: str
    stored: str
    bits: float | None = None
    rows: str | None = None
    dense: str | None = None
    batches: tuple[int, ...] = ()
    repeats: int = 20

    def to_json(self) -> str:
        """For the process."""
        return json.dumps(asdict(self))


class PeakMemory:
    """The most resident memory from here on above that of now, in bytes (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        gc.collect()
        self._known = sys.platform.startswith("linux")
        if self._known:  # not getrusage: its peak is inherited from the process that started this one
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._status("VmRSS")

    def bytes(self) -> int | None:
        """The growth up to now."""
        return self._status("VmHWM") - self._before if self._known else None

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def fit(job: Job, method: Method) -> dict[str, Any]:
    """Seconds and memory of fitting; what is kept, and the rows that come out, are written."""
    table = Table.load(Path(job.table))
    seconds: list[float] = []
    memory = PeakMemory()
    peak = None
    while len(seconds) < ENOUGH and sum(seconds) < PATIENCE:
        start = time.perf_counter()
        stored = method.fit(table, job.bits)
        seconds.append(time.perf_counter() - start)
        peak = memory.bytes() if peak is None else peak  # of the first: later ones find the memory of earlier ones
    stored.save(Path(job.stored))
    if job.rows:
        embedding = method.load(stored).embedding
        parts = [embedding(ids) for ids in torch.arange(len(table.rows)).split(ROWS_AT_ONCE)]
        Table(torch.cat(parts).to(table.rows.dtype)).save(Path(job.rows))
    return {
        "bits": stored.kept_bits if stored.packed_bits is None else stored.packed_bits,
        "kept_bits": stored.kept_bits,
        "file_bytes": Path(job.stored).stat().st_size,
        "fit_s": statistics.median(seconds),
        "fit_repeats": len(seconds),
        "fit_peak_bytes": peak,
    }


def lookup(job: Job, method: Method) -> dict[str, Any]:
    """Loading, and looking a batch of uniformly drawn tokens up."""
    memory = PeakMemory()
    stored = Stored.load(Path(job.stored))
    run = method.load(stored)
    num_rows, _ = stored.shape
    ids = torch.randint(num_rows, LOOKUP, generator=torch.Generator().manual_seed(0))
    run.embedding(ids)
    peak = memory.bytes()
    dense_file = Path(str(job.dense))
    dense = _load(Dense(), dense_file)
    loads = compare(lambda: _load(method, Path(job.stored)), lambda: _load(Dense(), dense_file), job.repeats)
    lookups = compare(lambda: run.embedding(ids), lambda: dense.embedding(ids), job.repeats)
    return {"load": loads, "lookup": lookups, "lookup_peak_bytes": peak}


def head(job: Job, method: Method) -> dict[str, Any]:
    """The logits of a batch of states; without a head, nothing."""
    memory = PeakMemory()
    stored = Stored.load(Path(job.stored))
    run = method.load(stored)
    if run.head is None:
        return {"head": None}
    shape, seeded = (max(job.batches), stored.shape[1]), torch.Generator().manual_seed(0)
    states = torch.randn(shape, generator=seeded).to(stored.torch_dtype)
    run.head(states[:1])
    peak = memory.bytes()
    dense = _load(Dense(), Path(str(job.dense)))
    assert dense.head is not None
    times = {}
    for batch in job.batches:
        inputs = states[:batch]
        times[str(batch)] = compare(partial(run.head, inputs), partial(dense.head, inputs), job.repeats)
    return {"head": times, "head_peak_bytes": peak}


def _load(method: Method, file: Path) -> Runnable:
    return method.load(Stored.load(file))


def compare(method: Callable[[], Any], dense: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Medians of both in milliseconds, and their ratio. They take turns: a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    method(), dense()  # warm
    while len(times[0]) < repeats and (len(times[0]) < ENOUGH or sum(times[0]) < PATIENCE):
        for run, found in zip((method, dense), times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, times)
    return {"ms": 1000 * ours, "dense_ms": 1000 * theirs, "ratio": ours / theirs, "repeats": len(times[0])}


MEASUREMENTS = {"fit": fit, "lookup": lookup, "head": head}


def measure(argument: str) -> dict[str, Any]:
    """What a job, given as JSON, finds."""
    job = Job(**json.loads(argument))
    method = METHODS[job.method]
    importlib.import_module(method.package)  # its memory and time are not those of the table
    with torch.no_grad():
        return MEASUREMENTS[job.kind](job, method)
