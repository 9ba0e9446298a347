"""Imports without the warnings of packages that nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


# transformers imports torchao where it is installed, which then warns of kernels for other machines.
WARNING_AT_IMPORT = ("torchao", "torch.utils._pytree")


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
