"""Measures the memory and the speed of a dense causal language model and of its compressed copies; a Markdown table.

python benchmarks/memory.py DENSE COMPRESSED [COMPRESSED ...] [--tokens 32] [--turns 3]

Each model is loaded in fresh processes, in turns, where it generates greedily. USS is the memory that only its process
has, after it has generated; the peak is of all resident memory, pages of libraries too. The best turn counts.
`--loading` measures `from_pretrained` alone, in seconds and core seconds; `anonymous` is the memory that it allocates,
`of files` what it has read of the files that it maps, which the system may take back at any time.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM
from turns import CLOCKS, machine

import hf_dirembed  # noqa: F401 (makes compressed folders load)


PROMPT_TOKENS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of models, the dense one first")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", help="of the model; by default its checkpoint's")
    parser.add_argument("--threads", type=int, help="of the CPU; by default what torch takes")
    parser.add_argument("--loading", action="store_true", help="measure that alone")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cores, with one thread, on a busy machine")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """What the first folder's model takes in this process."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    process = psutil.Process()
    before = process.memory_full_info().uss
    model = AutoModelForCausalLM.from_pretrained(arguments.folders[0], dtype=arguments.dtype or "auto").eval()
    prompt = torch.arange(PROMPT_TOKENS).unsqueeze(0) + 5
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}

    def generate(tokens: int) -> float:
        start = CLOCKS[arguments.clock]()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        return CLOCKS[arguments.clock]() - start

    generate(2)  # compiles, where that is left to do
    seconds = generate(arguments.tokens)
    used = process.memory_full_info().uss
    return {
        "uss_mb": used / 1e6,
        "model_mb": (used - before) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "tokens_per_second": arguments.tokens / seconds,
    }


def _mapped() -> tuple[float, float]:
    """Megabytes of this process that are anonymous, and that are clean pages of files which no other maps (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    sizes = {name: int(rest.split()[0]) / 1e3 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["Anonymous"], sizes["Private_Clean"]


def measure_loading(arguments: argparse.Namespace) -> dict[str, float]:
    """What loading the first folder's model takes in this process."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    gc.collect()
    gc.disable()  # whether a collection of all that was imported falls into it is chance
    anonymous, of_files = _mapped()
    start, start_cores = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(arguments.folders[0], dtype=arguments.dtype or "auto").eval()
    seconds, cores = time.perf_counter() - start, time.process_time() - start_cores
    after = _mapped()
    assert model is not None
    names = ("s", "core_s", "anonymous_mb", "of_files_mb")
    return dict(zip(names, (seconds, cores, after[0] - anonymous, after[1] - of_files), strict=True))


def measure_apart(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What a model takes in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--measure", "--tokens", str(arguments.tokens)]
    command += ["--loading"] * arguments.loading
    command += [f"--dtype={arguments.dtype}"] * bool(arguments.dtype)
    command += [f"--threads={arguments.threads}"] * bool(arguments.threads)
    command += [f"--clock={arguments.clock}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure_loading(arguments) if arguments.loading else measure(arguments)))
        return
    turns = [[measure_apart(folder, arguments) for folder in arguments.folders] for _ in range(arguments.turns)]
    print(f"`{shlex.join(['python', *sys.argv])}`: {machine(torch.device('cpu'))}\n")
    if arguments.loading:
        print("| model | loading, s | core s | anonymous, MB | of files, MB |")
        print("| --- | --- | --- | --- | --- |")
        for folder, results in zip(arguments.folders, zip(*turns, strict=True), strict=True):
            best = {name: min(each[name] for each in results) for name in results[0]}
            digits = {"s": 2, "core_s": 3}
            print(f"| {folder} | {' | '.join(f'{value:.{digits.get(name, 0)}f}' for name, value in best.items())} |")
        return
    print("| model | USS, MB | of it by loading and generating | peak of resident memory, MB | tokens/s |")
    print("| --- | --- | --- | --- | --- |")
    for folder, results in zip(arguments.folders, zip(*turns, strict=True), strict=True):
        memory = [min(each[name] for each in results) for name in ("uss_mb", "model_mb", "peak_mb")]
        speed = max(each["tokens_per_second"] for each in results)
        print(f"| {folder} | {' | '.join(f'{each:.0f}' for each in memory)} | {speed:.1f} |")


if __name__ == "__main__":
    main()
