"""Runs the tests over versions of transformers, each in an environment of its own; a Markdown table of what came out.

python -m benchmarks.versions FOLDER [--transformers 5.16.1 5.19.0 5.23.0] [-- arguments of pytest]

The environments go to FOLDER and are kept: whatever is there is taken as it is. PyTorch's build for CPUs comes first,
or gigabytes for CUDA would; where pip does not find it by itself, set PIP_EXTRA_INDEX_URL. Without arguments of pytest
the whole suite is run, which takes long; `-- tests/test_families.py` runs a part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
FLOOR = "5.16.1"  # what setup.cfg asks for
VERSIONS = (FLOOR, "5.19.0", "5.23.0")
TORCH = "2.13.0"
NAMES = ("torch", "numpy", "tokenizers", "huggingface_hub", "peft", "sentence-transformers")
OUTCOMES = ("passed", "failed", "errors", "skipped", "xfailed")


@dataclass(frozen=True)
class Result:
    """What the tests came to with one version.

    Attributes:
        version: Of transformers.
        others: The versions of other packages, by name.
        outcomes: How many tests ended how.
        seconds: How long they took.
    """

    version: str
    others: dict[str, str]
    outcomes: dict[str, int]
    seconds: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the environments")
    parser.add_argument("--transformers", nargs="+", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, behind --")
    return parser.parse_args()


def make_environment(folder: Path, version: str) -> Path:
    """An environment with a version of transformers and what the tests need; gives its Python."""
    target = folder / f"transformers-{version}"
    python = target / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = target / "ready"
    if not ready.exists():
        venv.create(target, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={TORCH}"], check=True)
        subprocess.run([*install, f"torch=={TORCH}", f"transformers=={version}", "-e", f"{ROOT}[test]"], check=True)
        ready.touch()
    return python


def run_tests(python: Path, version: str, tests: list[str]) -> Result:
    """Runs tests with an environment's Python, and counts how they ended."""
    command = [str(python), "-m", "pytest", "-q", *tests]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace")
    seconds = time.monotonic() - start
    sys.stderr.write(done.stdout[-20_000:])
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest did not run with transformers {version}: exit code {done.returncode}")

    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run(
        [str(python), "-c", code, "transformers", *NAMES], check=True, stdout=subprocess.PIPE, text=True
    )
    others = json.loads(found.stdout)
    if (installed := others.pop("transformers")) != version:
        raise SystemExit(f"{python.parents[1]} has transformers {installed}, not {version}: delete the folder")
    return Result(version, others, count_outcomes(done.stdout), seconds)


def count_outcomes(output: str) -> dict[str, int]:
    r"""How many tests ended how, as the last line of pytest's output says.

    Example:
        >>> count_outcomes("F.\\n1 failed, 12 passed, 1 error in 3.21s\\n")
        {'passed': 12, 'failed': 1, 'errors': 1}
    """
    lines = [line for line in output.splitlines() if re.search(r"\d (passed|failed|error|skipped)", line)]
    counts = dict[str, int]()
    for number, outcome in re.findall(r"(\d+) (\w+)", lines[-1] if lines else ""):
        counts["errors" if outcome == "error" else outcome] = int(number)
    return {outcome: counts[outcome] for outcome in OUTCOMES if outcome in counts}


def table(results: list[Result]) -> list[str]:
    """The results as the lines of a Markdown table."""
    lines = [f"| transformers | {' | '.join(OUTCOMES)} | minutes | with |", f"| {' | '.join(['---'] * 8)} |"]
    for result in results:
        counts = [str(result.outcomes.get(outcome, 0)) for outcome in OUTCOMES]
        others = ", ".join(f"{name} {version}" for name, version in result.others.items())
        lines.append(f"| {result.version} | {' | '.join(counts)} | {result.seconds / 60:.0f} | {others} |")
    return lines


def main() -> None:
    arguments = parse()
    pythons = {version: make_environment(arguments.folder, version) for version in arguments.transformers}
    results = [run_tests(python, version, arguments.tests) for version, python in pythons.items()]
    print(
        f"`{shlex.join(['python', '-m', 'benchmarks.versions', *sys.argv[1:]])}`: Python {platform.python_version()}\n"
    )
    print("\n".join(table(results)))
    raise SystemExit(any(result.outcomes.get(bad) for result in results for bad in ("failed", "errors")))


if __name__ == "__main__":
    main()
