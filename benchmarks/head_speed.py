"""Times the tied head's big product at generation: dense, packed codes, expanded codes; prints a Markdown table.

python benchmarks/head_speed.py [--vocabulary 49152] [--dim 576] [--bit-allocation 0 8 192 100] [--batches 1 8 128]

The competitors take turns within each repeat, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dirembed.remote.codes_dirembed import CODEBOOK_SHAPE, code_bytes
from hf_dirembed.remote.kernels_dirembed import ExpandedCodes, PackedCodes, packed_linear, padded_rank


Contest = dict[str, tuple[Callable[[], Tensor], int]]  # a name to the product and the bytes that it holds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the table")
    parser.add_argument("--dim", type=int, default=576, help="columns of the dense table")
    parser.add_argument(
        "--bit-allocation", type=int, nargs=4, default=(0, 8, 192, 100), metavar=("N8", "N4", "N2", "N1")
    )
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 128), help="hidden states at a time")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of the CPU; by default what torch takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def head(hidden: Tensor, decoder: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole head over codes: the small product with the decoder, then the one over the vocabulary."""
    return product(F.linear(hidden, decoder))


def contest(arguments: argparse.Namespace, batch: int, tables: dict[str, Tensor]) -> Contest:
    """The competitors for one batch size; the expansion happens before the clock runs."""
    allocation = tuple(arguments.bit_allocation)
    packed = tables["packed"]
    codes = PackedCodes(packed, allocation, tables["codebook"])
    hidden = torch.randn(batch, arguments.dim, device=packed.device)
    contestants: Contest = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        states, dense, decoder = hidden.to(dtype), tables[name], tables["decoder"].to(dtype)
        expanded = ExpandedCodes()
        small = packed.numel() + decoder.numel() * decoder.element_size()
        contestants |= {
            f"dense {name}": (lambda states=states, dense=dense: F.linear(states, dense), dense.nbytes),
            f"unpack each time, {name}": (
                lambda states=states, decoder=decoder, dtype=dtype: head(
                    states, decoder, lambda inner: F.linear(inner, codes.unpack().to(dtype))
                ),
                small,
            ),
            f"{'Triton' if packed.is_cuda else 'unpack in chunks'}, {name}": (
                lambda states=states, decoder=decoder: head(
                    states, decoder, lambda inner: packed_linear(inner, codes)
                ),
                small,
            ),
        }
        if not packed.is_cuda:
            contestants[f"int8 expanded, {name}"] = (
                lambda states=states, decoder=decoder, expanded=expanded: head(
                    states, decoder, lambda inner: packed_linear(inner, codes, expanded=expanded)
                ),
                small + arguments.vocabulary * padded_rank(codes.rank),
            )
    return contestants


@torch.inference_mode()
def milliseconds(contestants: Contest, repeats: int, device: str) -> dict[str, float]:
    """The median time of each competitor."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):  # the first two warm up
        for name, (run, _) in contestants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, allocation = torch.device(arguments.device), tuple(arguments.bit_allocation)
    width = code_bytes(allocation)
    dense = torch.randn(arguments.vocabulary, arguments.dim, device=device) * 0.02
    tables = {
        str(dtype).removeprefix("torch."): dense.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    tables["packed"] = torch.randint(0, 256, (arguments.vocabulary, width), dtype=torch.uint8, device=device)
    tables["codebook"] = torch.randint(-128, 128, CODEBOOK_SHAPE, dtype=torch.int8, device=device)
    tables["decoder"] = torch.randn(sum(allocation), arguments.dim, device=device)
    print(f"`{shlex.join(['python', *sys.argv])}`: rank {sum(allocation)}, {width} bytes per row,", end=" ")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}\n")
    print("| batch | head | ms | against dense bfloat16 | against dense of its dtype | MB held |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in arguments.batches:
        contestants = contest(arguments, batch, tables)
        repeats = max(3, arguments.repeats // max(1, batch // 8))
        medians = milliseconds(contestants, repeats, arguments.device)
        for name, median in medians.items():
            own = medians[f"dense {name.split()[-1]}"]
            ratios = f"{median / medians['dense bfloat16']:.2f} | {median / own:.2f}"
            print(f"| {batch} | {name} | {median:.2f} | {ratios} | {contestants[name][1] / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
