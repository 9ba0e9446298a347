"""`python -m benchmarks.peers`: Ctrl-C is heard from the start, while torch and transformers are imported."""

from __future__ import annotations

import sys


if __name__ == "__main__":
    try:
        from .command import main  # takes seconds
    except KeyboardInterrupt:
        sys.stderr.write("\npeers: interrupted before it began\n")
        sys.exit(130)
    sys.exit(main(sys.argv[1:]))
