"""Processes that `accelerate launch` or `torchrun` started: they share the long work, and one of them writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env  # type: ignore[import-untyped]

from .errors import CheckpointError, DirEmbedError, first_line


Outcome = TypeVar("Outcome")


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints; said by the launcher, before the others are met."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """The processes that were started together; this one alone, where it was not started by a launcher."""
    launched_on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    return PartialState(cpu=launched_on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))


def on_main_process(work: Callable[[], Outcome]) -> Outcome:
    """Does work in the main process, while the others wait; its result, or its failure, is that of every process.

    What the work asks for by `on_every_process`, the others do with it.

    Args:
        work: What to do; its result must be picklable where there are several processes.

    Raises:
        DirEmbedError: In every process what the main process raised, or that it failed.

    Example:
        >>> on_main_process(lambda: 2 + 2)
        4
    """
    state = process_state()
    if state.num_processes == 1:
        return work()
    return _lead(work) if state.is_main_process else _follow()


def on_every_process(job: Callable[[int, int], Outcome]) -> list[Outcome]:
    """Does a job in all processes, where the others wait for the main one; in this one alone otherwise.

    Args:
        job: Gets the number of its process and how many there are; it and its result must be picklable where there are
            several. It does the share of the work that these two say.

    Returns:
        The results, in the order of the processes.

    Raises:
        DirEmbedError: What the job raised in any of the processes, or that it failed there.

    Example:
        >>> on_every_process(lambda number, processes: list(range(number, 5, processes)))
        [[0, 1, 2, 3, 4]]
    """
    if not _followed:
        return [job(0, 1)]
    broadcast_object_list([job])
    results, failures = _share(job)
    if failures:
        raise failures[0]
    return results


@dataclass(frozen=True)
class _Agreed:
    """What the main process found: what it has to say at the end of its work."""

    result: Any
    failure: DirEmbedError | None


_followed: list[Callable[[], Any]] = []  # the work of the main process that the others wait for


def _lead(work: Callable[[], Outcome]) -> Outcome:
    """Does the work while the others wait, and tells them what came of it."""
    failure: Exception | None = None
    agreed = _Agreed(None, None)
    _followed.append(work)
    try:
        agreed = _Agreed(work(), None)
    except Exception as error:  # all processes end on it
        failure = error
        agreed = _Agreed(None, _as_error(error, "the main process"))
    finally:
        _followed.pop()
    broadcast_object_list([agreed])
    if failure is not None:
        raise failure
    return agreed.result


def _follow() -> Any:
    """Waits for the main process, does the share of its jobs that falls to this one, and ends as it does."""
    while True:
        message: list[Any] = [None]
        broadcast_object_list(message)
        if isinstance(message[0], _Agreed):
            if message[0].failure is not None:
                raise message[0].failure
            return message[0].result
        _share(message[0])


def _share(job: Callable[[int, int], Outcome]) -> tuple[list[Outcome], list[DirEmbedError]]:
    """Does this process's share of a job: the results of all processes, and what failed."""
    state = process_state()
    done: tuple[Any, DirEmbedError | None]
    try:
        done = job(state.process_index, state.num_processes), None
    except Exception as error:  # the main process says it
        done = None, _as_error(error, f"process {state.process_index}")
    every = gather_object([done])
    return [result for result, _ in every], [failure for _, failure in every if failure is not None]


def _as_error(error: Exception, where: str) -> DirEmbedError:
    said = CheckpointError(f"{where} failed ({first_line(error)}): see what it says")
    return error if isinstance(error, DirEmbedError) else said
