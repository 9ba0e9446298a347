"""How much memory a piece of code takes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """The most resident memory above that at the start, in bytes; 0 where the system does not say."""

    num_bytes: int = 0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measures the peak of resident memory within a `with` block (Linux)."""
    growth = Growth()
    gc.collect()
    if not sys.platform.startswith("linux"):
        yield growth
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    yield growth
    growth.num_bytes = _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
