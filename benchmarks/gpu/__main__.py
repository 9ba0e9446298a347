"""Checks and measures compressed tables on one GPU, in less than eight minutes; writes a page.

    python -m benchmarks.gpu [--model COMPRESSED] [--dense DENSE] [--out benchmarks/gpu.md]

Nothing is downloaded: tables and models are made up, with random codes, unless a compressed causal language model is
given, and the dense one that it was made of. First the kernels are held against float64, for every shape that a layout
can have; then lookups, heads and generation are timed against dense bfloat16, bitsandbytes and torchao, in turns.
`--device cpu --small` tries the script where there is no GPU, `TRITON_INTERPRET=1` the kernels there. What is wrong is
on the page, and the exit code is 1; without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from hf_dirembed.remote.triton_dirembed import triton_works

from ..turns import machine
from .checks import Check, check_kernels, check_modules
from .generation import contestants
from .generation import race as race_models
from .speed import check_graph, race_heads, race_lookups


NO_GPU = "no GPU is here: run this where torch.cuda.is_available(), or try it with --device cpu --small"
MINUTES = 8.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a compressed causal language model")
    parser.add_argument("--dense", type=Path, help="folder of the dense model that it was made of")
    parser.add_argument("--rows", type=int, default=262_144, help="of the table that is made up")
    parser.add_argument("--dim", type=int, default=640, help="its columns")
    parser.add_argument("--layers", type=int, default=18, help="of the model that is made up")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--repeats", type=int, default=50, help="of each lookup and head")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no further model is begun")
    parser.add_argument("--device", default="cuda", help="cpu to try the script")
    parser.add_argument("--small", action="store_true", help="a small table and model, and few repeats")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled: minutes on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "gpu.md", help="the page")
    return parser.parse_args(arguments)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def checks(device: torch.device) -> tuple[str, bool]:
    """The section of what is right, and whether all is."""
    interpreted = device.type == "cpu" and bool(os.environ.get("TRITON_INTERPRET"))
    found: list[Check] = []
    if device.type == "cuda" or interpreted:
        if not triton_works(device):
            return "Triton does not run here: what it said is among the warnings.", False
        found += check_kernels(device, narrow=not interpreted)
    found += check_modules(device)
    wrong = [each for each in found if each.worst > 1]
    rows = [[each.what, str(each.dtype).removeprefix("torch."), f"{each.worst:.3f}"] for each in found]
    said = f"{len(found) - len(wrong)} of {len(found)} comparisons with float64 are within rounding."
    kernels = "" if device.type == "cuda" or interpreted else " Triton's kernels are not among them."
    return f"{said}{kernels}\n\n{table(['what', 'dtype', 'largest error, of what is allowed'], rows)}", not wrong


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.small:
        options.rows, options.dim, options.layers, options.tokens, options.repeats = 2_000, 128, 2, 4, 2
    device, start = torch.device(options.device), time.monotonic()
    torch.manual_seed(0)

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - start)

    sections, right = [], True

    def add(title: str, make: Callable[[], tuple[str, bool]]) -> None:
        nonlocal right
        begun = time.monotonic()
        try:
            text, is_right = make()
        except Exception as error:
            text, is_right = f"Failed: {type(error).__name__}: {error}", False
        right &= is_right
        sections.append(f"## {title}\n\n{text}\n")
        print(f"{title}: {'right' if is_right else 'WRONG'}, {time.monotonic() - begun:.0f} s", file=sys.stderr)

    size, repeats = (options.rows, options.dim), options.repeats
    add("Right or wrong", lambda: checks(device))
    if device.type == "cuda":
        add("CUDA graphs", lambda: _graph(check_graph(*size, device)))
    add("Lookups", lambda: (table(*race_lookups(*size, repeats, device)), True))
    add("Heads", lambda: (table(*race_heads(*size, repeats, device)), True))
    makers = contestants(*size, options.layers, device, options.model, options.dense)
    if options.eager:
        makers = {name: make for name, make in makers.items() if "compiled" not in name}
    head = ["model", "tokens/s", "MB after loading", "MB at most", "tokens as the first of its kind"]
    add("Generation", lambda: (table(head, race_models(makers, options.tokens, device, left)), True))

    command = shlex.join(["python", "-m", "benchmarks.gpu", *(arguments if arguments is not None else sys.argv[1:])])
    made = f"{options.rows:,} x {options.dim}" + (f"; generation with {options.model.name}" if options.model else "")
    about = f"`{command}`: hf_dirembed {version('hf_dirembed')}, {machine(device)}, a table of {made}; bfloat16."
    options.out.write_text("\n".join(["# On a GPU", "", about, "", *sections]), encoding="utf-8")
    print(f"{options.out} is written, after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0 if right else 1


def _graph(same: bool) -> tuple[str, bool]:
    said = "gives the same to the bit" if same else "GIVES SOMETHING ELSE"
    return f"Lookup and head are captured in one graph, which, replayed with other ids, {said}.", same


if __name__ == "__main__":
    sys.exit(main())
