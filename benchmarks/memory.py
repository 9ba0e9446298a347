"""Measures the memory and the speed of a dense causal language model and of its compressed copies; a Markdown table.

python benchmarks/memory.py DENSE COMPRESSED [COMPRESSED ...] [--tokens 32] [--turns 3]

Each model is loaded in fresh processes, in turns, where it generates greedily. USS is the memory that only its process
has, after it has generated; the peak is of all resident memory, pages of libraries too. The best turn counts.
"""

from __future__ import annotations

import argparse
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
from turns import machine

import hf_dirembed  # noqa: F401 (makes compressed folders load)


PROMPT_TOKENS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of models, the dense one first")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", help="of the model; by default its checkpoint's")
    parser.add_argument("--threads", type=int, help="of the CPU; by default what torch takes")
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
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        return time.perf_counter() - start

    generate(2)  # compiles, where that is left to do
    seconds = generate(arguments.tokens)
    used = process.memory_full_info().uss
    return {
        "uss_mb": used / 1e6,
        "model_mb": (used - before) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "tokens_per_second": arguments.tokens / seconds,
    }


def measure_apart(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What a model takes in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--measure", "--tokens", str(arguments.tokens)]
    command += [f"--dtype={arguments.dtype}"] * bool(arguments.dtype)
    command += [f"--threads={arguments.threads}"] * bool(arguments.threads)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    turns = [[measure_apart(folder, arguments) for folder in arguments.folders] for _ in range(arguments.turns)]
    print(f"`{shlex.join(['python', *sys.argv])}`: {machine(torch.device('cpu'))}\n")
    print("| model | USS, MB | of it by loading and generating | peak of resident memory, MB | tokens/s |")
    print("| --- | --- | --- | --- | --- |")
    for folder, results in zip(arguments.folders, zip(*turns, strict=True), strict=True):
        memory = [min(each[name] for each in results) for name in ("uss_mb", "model_mb", "peak_mb")]
        speed = max(each["tokens_per_second"] for each in results)
        print(f"| {folder} | {' | '.join(f'{each:.0f}' for each in memory)} | {speed:.1f} |")


if __name__ == "__main__":
    main()
