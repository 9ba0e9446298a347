"""Bars on stderr that say how much of a long work is done and how long the rest takes: those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from .processes import is_main_process


DELAY = 1.0  # seconds: work that takes less needs no bar
_WITHOUT_UNIT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Progress:
    """How much of some work is done.

    Args:
        total: The work, in any unit.
        report: Is told of all work that is done, when it is done; by default nobody is.

    Example:
        >>> done = []
        >>> progress = Progress(10, done.append)
        >>> progress.advance(4)
        >>> half = progress.part(5)
        >>> half.advance(0.2)
        >>> half.finish()
        >>> progress.advance(3)  # more than is left
        >>> done
        [4, 1.0, 4.0, 1.0]
    """

    def __init__(self, total: float = 1.0, report: Callable[[float], object] | None = None) -> None:
        self._left, self._report = total, report

    def advance(self, work: float) -> None:
        """Says that so much more is done; never more than there is."""
        work = min(work, self._left)
        self._left -= work
        if self._report is not None and work > 0:
            self._report(work)

    def finish(self) -> None:
        """Says that all is done."""
        self.advance(self._left)

    def part(self, work: float) -> Progress:
        """The progress of a part of the work, whose own total is 1."""
        return Progress(1.0, lambda share: self.advance(share * work))


@contextmanager
def progress_bar(
    description: str, total: float, *, unit: str | None = None, done: float = 0, shown: bool = True
) -> Iterator[Progress]:
    """Shows a bar while work is done.

    `transformers.logging.disable_progress_bar()`, or HF_HUB_DISABLE_PROGRESS_BARS=1 in the environment, turns all bars
    off. Processes beside the main one show none, and work of less than a second has none.

    Args:
        description: What is done.
        total: The work.
        unit: What it is counted in; by default only the share that is done is shown.
        done: How much was done before.
        shown: False for no bar.

    Yields:
        What is to be told of work that is done.

    Example:
        >>> with progress_bar("Counting", 3, unit="row") as progress:
        ...     progress.advance(3)
    """
    looks: dict[str, Any] = {"unit": f" {unit}s"} if unit else {"bar_format": _WITHOUT_UNIT}
    bar = logging.tqdm(
        total=total, initial=done, desc=description, delay=DELAY, smoothing=0.1,
        disable=not (shown and is_main_process()), **looks,
    )  # fmt: skip
    with bar:
        yield Progress(total - done, bar.update)
