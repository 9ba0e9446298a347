"""Imports without the warnings of packages that nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from hf_dirembed_command import WARNING_AT_IMPORT  # which cannot import it from here: it runs before this package


@contextmanager
def importing_quietly() -> Iterator[None]:
    """Holds back what some packages log while they are imported, but for errors; afterwards they log as before.

    Example:
        >>> with importing_quietly():
        ...     logging.getLogger("torchao").warning("Failed to load a kernel of another machine")
    """
    loggers = [logging.getLogger(name) for name in WARNING_AT_IMPORT]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
