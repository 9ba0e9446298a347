"""The entry point of `hf-dirembed`: Ctrl-C is heard from the start, while torch and transformers are imported."""

from __future__ import annotations

import logging
import sys


# transformers imports torchao where it is installed, which then warns of kernels for other machines.
WARNING_AT_IMPORT = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Runs the command line; exit code 130 when it is interrupted."""
    for name in WARNING_AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from hf_dirembed.cli import main as run  # takes seconds
    except KeyboardInterrupt:
        sys.stderr.write("\nhf-dirembed: interrupted\n")
        sys.exit(130)
    run()
