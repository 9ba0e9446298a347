"""How fast, and in how much memory, broken checkpoints are refused: those that the tests make.

python -m benchmarks.refusals

Each is loaded with `AutoModelForMaskedLM`, one after the other in one process. Memory is the most resident above that
at the start, over the bytes of the checkpoint's safetensors; of less than 4 MiB, as of emptied ones, over 4 MiB.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForMaskedLM
from transformers.utils import logging

from .peers.measure import PeakMemory


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from attacks.spoiling import ATTACKS, save_intact, weight_bytes


WARM = "tensor: NaN in the decoder"  # which is found last of all, when every module is imported


@dataclass(frozen=True)
class Refusal:
    """How a broken checkpoint ended.

    Attributes:
        kind: What is broken.
        error: The class of what was raised; None if it loaded.
        seconds: Until then.
        memory: The peak over the size of the weights; None where the system hides it.
    """

    kind: str
    error: str | None
    seconds: float
    memory: float | None

    def row(self) -> str:
        """A line of the table."""
        memory = "?" if self.memory is None else f"{self.memory:.2f}"
        return f"| {self.kind} | {self.error or '**loads**'} | {self.seconds:.3f} | {memory} |"


def refuse(intact: Path, kind: str) -> Refusal:
    """Loads a copy of the intact checkpoint that is broken in one way."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(intact, Path(place, "above", "model")))
        ATTACKS[kind](folder)
        release()
        memory, start, error = PeakMemory(), time.perf_counter(), None
        try:
            AutoModelForMaskedLM.from_pretrained(folder)
        except ValueError as raised:
            error = type(raised).__name__
        seconds, peak = time.perf_counter() - start, memory.bytes()
        return Refusal(kind, error, seconds, None if peak is None else peak / weight_bytes(folder))


def release() -> None:
    """Gives memory that was freed back to the system, where it would be taken from unnoticed."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        intact = Path(place)
        save_intact(intact)
        refuse(intact, WARM)
        print("| broken | error | seconds | memory / file |\n| --- | --- | --- | --- |")
        refusals = []
        for kind in ATTACKS:
            refusals.append(refuse(intact, kind))
            print(refusals[-1].row(), flush=True)
    refused = sum(refusal.error is not None for refusal in refusals)
    slowest = max(refusals, key=lambda refusal: refusal.seconds)
    largest = max(refusals, key=lambda refusal: refusal.memory or 0)
    print(f"\n{refused} of {len(refusals)} are refused; the slowest is {slowest.kind!r}, most memory takes", end=" ")
    print(f"{largest.kind!r}.")


if __name__ == "__main__":
    main()
