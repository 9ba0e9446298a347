"""Times lookups of tokens' rows, over packed codes and dense, in turns; prints a Markdown table.

    python benchmarks/lookup_speed.py [--rows 30522] [--dim 384] [--bits 20 44 120 200]
    python benchmarks/lookup_speed.py --folder COMPRESSED

reads rows of random packed codes, each `--bits` a class of rows with so many codes of 4, 3, 2 and 1 bits, without the
decoder; or looks up with the whole embedding module of a compressed model. `torch.nn.Embedding` of the same shape is
what it is held against.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel
from turns import CLOCKS, best_seconds, machine, random_rows

import hf_dirembed  # noqa: F401 (makes compressed folders load)
from hf_dirembed.kernels import read_rows
from hf_dirembed.remote.triton_dirembed import triton_read


Lookup = Callable[[Tensor], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a compressed model")
    parser.add_argument("--rows", type=int, default=30_522, help="of the table")
    parser.add_argument("--dim", type=int, default=384, help="columns of the dense table")
    parser.add_argument("--bits", type=int, nargs=4, action="append", metavar=("N4", "N3", "N2", "N1"))
    parser.add_argument("--ids", type=int, nargs="+", default=(1, 16, 4096), help="how many rows at a time")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--threads", type=int, help="of the CPU; by default what torch takes")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cores, with one thread, on a busy machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def random_lookup(arguments: argparse.Namespace) -> tuple[Lookup, tuple[int, int]]:
    """Reads random codes; the shape of their table."""
    torch.manual_seed(0)
    allocations = [tuple(each) for each in arguments.bits or [(20, 44, 120, 200)]]
    rank = min(arguments.dim, max(sum(each) for each in allocations))
    rows = random_rows(arguments.rows, rank, allocations, torch.device(arguments.device))
    read = triton_read if arguments.device.startswith("cuda") else read_rows
    return lambda ids: read(rows, ids), (arguments.rows, arguments.dim)


def lookup_of_folder(arguments: argparse.Namespace) -> tuple[Lookup, tuple[int, int]]:
    """The embedding module of a compressed model, and the shape of the table that it stands for."""
    model = AutoModel.from_pretrained(arguments.folder, dtype=torch.float32).to(arguments.device)
    embedding = model.get_input_embeddings()
    return embedding, (embedding.num_embeddings, embedding.embedding_dim)


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    lookup, shape = (lookup_of_folder if arguments.folder else random_lookup)(arguments)
    dense = nn.Embedding(*shape, device=device)
    print(f"`{shlex.join(['python', *sys.argv])}`: {shape[0]} x {shape[1]}, {machine(device)}\n")
    print("| ids | dense µs | packed µs |")
    print("| --- | --- | --- |")
    for count in arguments.ids:
        ids = torch.randint(0, shape[0], (1, count), device=device)
        contest = {"dense": lambda ids=ids: dense(ids), "packed": lambda ids=ids: lookup(ids)}
        best = best_seconds(contest, arguments.repeats, device, arguments.clock)
        print(f"| {count} | {1e6 * best['dense']:.1f} | {1e6 * best['packed']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
