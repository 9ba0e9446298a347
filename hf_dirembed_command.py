"""The entry point of `hf-dirembed`: Ctrl-C is heard from the start, while torch and transformers are imported."""

from __future__ import annotations

import sys


INTERRUPTED = "hf-dirembed: interrupted"


def main() -> None:
    """Runs the command line; exit code 130 when it is interrupted."""
    try:
        from hf_dirembed.cli import main as run  # takes seconds
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{INTERRUPTED}\n")
        sys.exit(130)
    run()
