"""Processes that `accelerate launch` or `torchrun` started: they calibrate together, and one of them writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, parse_flag_from_env  # type: ignore[import-untyped]

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
    agreed: list[Any] = [None, None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            agreed[0] = work()
        except Exception as error:  # all processes end on it
            failure = error
            said = CheckpointError(f"the main process failed ({first_line(error)}): see what it says")
            agreed[1] = error if isinstance(error, DirEmbedError) else said
    broadcast_object_list(agreed)
    result, said = agreed
    if failure or said:
        raise failure or said
    return result
