"""Measures memory and throughput of a dense language model and of compressed copies in vLLM; a Markdown table.

python benchmarks/serving.py DENSE COMPRESSED [COMPRESSED ...] [--turns 3] [--dtype float32]

Needs vLLM, as tests/engines/vllm.sh installs it. Each model is loaded in a fresh process, in turns; the best turn
counts. Memory is what only the process and those that vLLM starts have (USS), vLLM's cache with it, as far as it is
used. Prompts are random ids.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from turns import machine


PROMPT_TOKENS, NEW_TOKENS = 64, 32
BATCHES = (1, 8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of models, the dense one first")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="lets vLLM compile the model")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """What the first folder's model takes in this process and in those that it starts."""
    import vllm

    torch.manual_seed(0)
    engine = vllm.LLM(
        str(arguments.folders[0]),
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        enforce_eager=not arguments.compiled,
        max_model_len=256,
        max_num_seqs=max(BATCHES),
    )
    found: dict[str, float] = {}

    def seconds(batch: int, new: int) -> float:
        settings: Any = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in torch.randint(5, 10_000, (batch, PROMPT_TOKENS))]
        start = time.perf_counter()
        engine.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    for batch in BATCHES:
        seconds(batch, 2)  # warms up
        found[f"prefill {batch}"] = batch * PROMPT_TOKENS / seconds(batch, 1)
        found[f"decode {batch}"] = batch * NEW_TOKENS / seconds(batch, NEW_TOKENS)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found["uss_mb"] = sum(each.memory_full_info().uss for each in processes) / 1e6
    return found


def measure_apart(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What a model takes in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--measure", f"--dtype={arguments.dtype}"]
    command += ["--compiled"] * arguments.compiled
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"prefill')))


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments)), flush=True)
        return
    turns = [[measure_apart(folder, arguments) for folder in arguments.folders] for _ in range(arguments.turns)]
    speeds = [f"{kind} {batch}" for batch in BATCHES for kind in ("prefill", "decode")]
    print(f"`{shlex.join(['python', *sys.argv])}`: {machine(torch.device('cpu'))}\n")
    print(f"| model | USS, MB | {' | '.join(f'{speed}, tokens/s' for speed in speeds)} |")
    print(f"| {' | '.join(['---'] * (2 + len(speeds)))} |")
    for folder, results in zip(arguments.folders, zip(*turns, strict=True), strict=True):
        best = [max(each[speed] for each in results) for speed in speeds]
        memory = min(each["uss_mb"] for each in results)
        print(f"| {folder.name} | {memory:.0f} | {' | '.join(f'{each:.1f}' for each in best)} |")


if __name__ == "__main__":
    main()
