"""Runs sequences until the time is over, and prints what each finding is and how to see it again.

python -m benchmarks.sequences [--minutes 60] [--start 0] [--length 6] [--subject llama]
python -m benchmarks.sequences --seed 1234
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter

import torch

from .machine import run
from .subjects import SUBJECTS


def main() -> None:
    """Runs the sequences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--length", type=int, default=6, help="the most actions of a sequence")
    parser.add_argument("--subject", choices=SUBJECTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.seed is not None:
        print(run(options.seed, length=options.length, only=options.subject))
        return

    ends, seed, counts, actions = time.monotonic() + 60 * options.minutes, options.start, Counter(), Counter()
    with contextlib.suppress(KeyboardInterrupt):  # which ends it early, with the counts
        while time.monotonic() < ends:
            sequence = run(seed, length=options.length, only=options.subject)
            counts["findings" if sequence.finding else "the same"] += 1
            counts.update({"refused": sequence.refusals, "failed as stock": sequence.failures})
            actions.update(sequence.actions)
            if sequence.finding:
                print(sequence, flush=True)
            seed += 1
    print(f"seeds {options.start} to {seed - 1}: {dict(counts)}; {sum(actions.values())} actions {dict(actions)}")


if __name__ == "__main__":
    main()
