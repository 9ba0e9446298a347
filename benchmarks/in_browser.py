"""Loads exported models in Chromium, and says what each takes there; prints a Markdown table.

    python benchmarks/in_browser.py NODE_MODULES FOLDER:DTYPE [FOLDER:DTYPE ...]

`DTYPE` is what transformers.js calls a file: fp32, q8 or int8. NODE_MODULES is made by `tests/engines/make.sh node`.
The page is that of `examples/browser`, on one thread of WASM; its memory is what Chromium says after a collection of
garbage, the time of a text the least of twenty.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from turns import machine


ROOT = Path(__file__).parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", type=Path)
    parser.add_argument("models", nargs="+")
    return parser.parse_args()


def measure(modules: Path, folder: str, dtype: str) -> dict[str, float]:
    """What a page says that loaded a model."""
    command = [sys.executable, ROOT / "examples/browser/serve.py", folder, "--port", "0", "--modules", modules]
    server = subprocess.Popen([str(each) for each in command], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with tempfile.NamedTemporaryFile("w", suffix=".json") as texts:
            texts.write('["A group of men play soccer on the beach."]')
            texts.flush()
            script = ROOT / "tests/engines/browser.mjs"
            run = subprocess.run(
                ["node", script, modules.resolve(), f"{address}?dtype={dtype}&threads=1", texts.name],
                capture_output=True, text=True, check=True, env={**os.environ, "MEMORY": "1"},
            )  # fmt: skip
        return json.loads(run.stdout)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    arguments = parse()
    print(f"`{shlex.join(['python', *sys.argv])}`: {machine(torch.device('cpu'))}\n")
    print("| model | file, MB | memory of the page, MB | load, s | a text, ms |")
    print("| --- | --- | --- | --- | --- |")
    names = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "int8": "model_int8.onnx"}
    for model in arguments.models:
        folder, _, dtype = model.rpartition(":")
        found = measure(arguments.modules, folder, dtype)
        size = (Path(folder) / "onnx" / names[dtype]).stat().st_size
        memory = "" if found["memory"] is None else f"{found['memory'] / 1e6:.0f}"
        print(
            f"| {Path(folder).name}, {dtype} | {size / 1e6:.1f} | {memory} | {found['load'] / 1e3:.1f} "
            f"| {found['latency']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
