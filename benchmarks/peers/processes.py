"""A measurement in a process of its own, which ends when it takes too long and when Ctrl-C is pressed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any


# Forked from a process that has imported torch and transformers and done nothing else: importing takes seconds.
PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform.startswith("linux") else "spawn")
PROCESSES.set_forkserver_preload(["benchmarks.peers.measure"])
GLANCE = 0.2  # seconds between looks at whether Ctrl-C was pressed


def run_process(
    measurement: Callable[[str], dict[str, Any]], job: str, work: Path, timeout: float
) -> tuple[dict[str, Any], str | None]:
    """Runs a measurement in a process of its own.

    Args:
        measurement: A function of a module, given `job`.
        job: As JSON.
        work: A folder for what the process finds and says.
        timeout: Seconds after which it is killed.

    Returns:
        What it found, and why there is nothing.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed meanwhile; the process is killed.
    """
    result, log = work / "result.json", work / "log.txt"
    result.unlink(missing_ok=True)
    log.write_bytes(b"")  # not what the process before said
    _start_server()
    with _interrupt_later() as heard:
        process = PROCESSES.Process(target=_write, args=(measurement, job, result, log))
        process.start()
        end = time.monotonic() + timeout
        while process.is_alive() and not heard and (left := end - time.monotonic()) > 0:
            process.join(min(left, GLANCE))
        late = process.is_alive()
        process.kill()
        process.join()
        exitcode = process.exitcode
        process.close()  # its destructor would, later, and swallow what Ctrl-C raises then
    if late:
        return {}, f"took longer than {timeout:g} s"
    if exitcode < 0:
        return {}, f"killed by signal {-exitcode}"
    if exitcode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {}, f"does not run here: {lines[-1] if lines else f'exit code {exitcode}'}"
    return json.loads(result.read_text(encoding="utf-8")), None


@cache
def _start_server() -> None:
    """Starts what measuring processes are forked from, deaf to Ctrl-C as they are: who hears it kills them."""
    if PROCESSES.get_start_method() != "forkserver":
        return
    resource_tracker.ensure_running()  # by itself, as it unblocks signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; what is pressed now comes after
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    ready = PROCESSES.Process()  # that does nothing, when the imports are done: Ctrl-C need not wait for them
    ready.start()
    ready.join()
    ready.close()


@contextmanager
def _interrupt_later() -> Iterator[list[int]]:
    """Raises what Ctrl-C raises in the end, not in between; gives what was heard up to now."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _write(measurement: Callable[[str], dict[str, Any]], job: str, result: Path, log: Path) -> None:
    """In the process; what it raises is the last line of the log."""
    with log.open("w", encoding="utf-8") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    result.write_text(json.dumps(measurement(job)), encoding="utf-8")
