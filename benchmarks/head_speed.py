"""Times the tied head at generation, over packed codes and dense, in turns; prints a Markdown table.

    python benchmarks/head_speed.py [--rows 262144] [--dim 640] [--bits 20 80 200 340] [--bits 0 50 150 200]
    python benchmarks/head_speed.py --folder COMPRESSED

multiplies hidden states with tables of random packed codes, each `--bits` a class of rows with so many codes of 4, 3,
2 and 1 bits; or with the head of a compressed model. They are held against a dense head of the same shape and dtype.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from turns import CLOCKS, best_seconds, machine, random_rows

import hf_dirembed  # noqa: F401 (makes compressed folders load)
from hf_dirembed.kernels import rows_product
from hf_dirembed.remote.triton_dirembed import triton_product


Head = Callable[[Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a compressed causal language model")
    parser.add_argument("--rows", type=int, default=262_144, help="of the table")
    parser.add_argument("--dim", type=int, default=640, help="columns of the dense table")
    parser.add_argument("--bits", type=int, nargs=4, action="append", metavar=("N4", "N3", "N2", "N1"))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32, 64), help="states at a time")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of the CPU; by default what torch takes")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cores, with one thread, on a busy machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def random_head(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Head, tuple[int, int]]:
    """A head over random codes, with its decoder, and the shape of its table."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    allocations = [tuple(each) for each in arguments.bits or [(20, 80, 200, 340)]]
    rank = min(arguments.dim, max(sum(each) for each in allocations))
    rows = random_rows(arguments.rows, rank, allocations, device)
    decoder = torch.randn(rank, arguments.dim, device=device).to(dtype)

    def head(hidden: Tensor) -> Tensor:
        states = F.linear(hidden, decoder)
        if device.type == "cuda":
            return triton_product(rows, states)
        return rows_product(rows, states.float(), None, dtype)

    return head, (arguments.rows, arguments.dim)


def head_of_folder(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Head, tuple[int, int]]:
    """The head of a compressed model, and the shape of the table that it stands for."""
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=dtype).to(arguments.device)
    head = model.get_output_embeddings()
    return head, (head.out_features, head.in_features)


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"`{shlex.join(['python', *sys.argv])}`: {machine(device)}\n")
    print("| dtype | states | dense ms | packed ms | packed / dense |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in DTYPES:
        head, shape = (head_of_folder if arguments.folder else random_head)(arguments, dtype)
        table = torch.randn(shape, dtype=dtype, device=device)
        for batch in arguments.batches:
            hidden = torch.randn(batch, shape[1], dtype=dtype, device=device)
            contest = {
                "dense": lambda hidden=hidden, table=table: F.linear(hidden, table),
                "packed": lambda hidden=hidden, head=head: head(hidden),
            }
            best = best_seconds(contest, arguments.repeats, device, arguments.clock)
            ratio, milliseconds = best["packed"] / best["dense"], [1e3 * seconds for seconds in best.values()]
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {batch} | {milliseconds[0]:.2f} | {milliseconds[1]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
