"""Exports a sentence encoder with its table compressed and dense, and compares the files; prints a Markdown table.

    python benchmarks/exported.py MODEL WORK --bits 2 --pairs stsb-en-dev.csv [--calibrate self] [--prefix "query: "]

`--pairs` are headerless CSV files of sentence1, sentence2, score. Similarities are cosines of mean token vectors; the
rank correlation is that of their similarities with those of the dense model in float32. Times are those of the
CPU, the least of many runs that took turns; `of dense` is over the dense file with the same body. Memory is USS, of a
fresh process with onnxruntime alone, after a pass over 1 x 16 tokens; so are the seconds of loading. What is in WORK
stays.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from turns import machine

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint, copy_companions
from hf_dirembed.checkpoints.loading import load_model, load_tokenizer
from hf_dirembed.exporting.body import example_inputs, make_graph
from hf_dirembed.exporting.export import input_names
from hf_dirembed.exporting.quantise import BODIES, write_quantised


SHAPES = {(1, 16): 300, (32, 128): 3}  # texts and tokens, and how many passes are a turn
FRESH = """
import json, sys, time, numpy, onnxruntime, psutil
before = psutil.Process().memory_full_info().uss
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options)
seconds = time.perf_counter() - start
ids = numpy.full((1, 16), 7)
session.run(None, {each.name: (ids * 0 if "type" in each.name else ids) for each in session.get_inputs()})
print(json.dumps([seconds, psutil.Process().memory_full_info().uss - before]))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense sentence encoder")
    parser.add_argument("work", type=Path, help="folder for what is made; what is in it already is not made again")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--calibrate", help="as for hf-dirembed compress")
    parser.add_argument("--languages", help="likewise")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--prefix", default="", help="of every sentence")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--turns", type=int, default=10, help="of the files, for their times; 0 for no times")
    return parser.parse_args()


def dense_files(folder: Path, work: Path) -> dict[str, Path]:
    """The dense model with each body."""
    files = {name: work / "dense" / "onnx" / body.file for name, body in BODIES.items()}
    if not files["fp32"].exists():
        copy_companions(folder, work / "dense")  # so that other engines load it, too
        files["fp32"].parent.mkdir(exist_ok=True)
        model = load_model(folder, dtype=torch.float32).eval()
        inputs = input_names(load_tokenizer(folder))
        graph = make_graph(model, example_inputs(inputs, model.config.vocab_size), None)
        onnx.save(graph, files["fp32"])
        for name in ("int8", "int8-weights"):
            write_quantised(graph, BODIES[name], [], files[name])
    return files


def exported_files(arguments: argparse.Namespace) -> dict[str, Path]:
    """The compressed model with each body."""
    made = arguments.work / "compressed"
    if not made.exists():
        languages = arguments.languages.split(",") if arguments.languages else None
        compress_checkpoint(
            arguments.model, made, bits=arguments.bits, calibration=arguments.calibrate, languages=languages
        )
    pooling = None if (made / "modules.json").exists() else "mean"
    files = {}
    for name, body in BODIES.items():
        out = arguments.work / f"exported-{name}"
        if not out.exists():
            hf_dirembed.export(made, out, body=name, pooling=pooling)
        files[name] = out / "onnx" / body.file
    return files


def session_of(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(file), options)


def feeds(session: onnxruntime.InferenceSession, ids: NDArray, mask: NDArray) -> dict[str, NDArray]:
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": numpy.zeros_like(ids)}
    return {each.name: values[each.name] for each in session.get_inputs()}


def embed(session: onnxruntime.InferenceSession, tokenizer: object, texts: list[str]) -> NDArray:
    """The mean token vectors of texts, of length 1."""
    order, found = sorted(range(len(texts)), key=lambda each: len(texts[each])), {}
    for first in range(0, len(texts), 32):
        part = order[first : first + 32]
        encoded = tokenizer([texts[each] for each in part], padding=True, truncation=True, return_tensors="np")
        (states,) = session.run(None, feeds(session, encoded["input_ids"], encoded["attention_mask"]))
        mask = encoded["attention_mask"][..., None]
        found |= zip(part, (states * mask).sum(1) / mask.sum(1), strict=True)
    vectors = numpy.stack([found[each] for each in range(len(texts))])
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def similarities(file: Path, arguments: argparse.Namespace) -> list[NDArray]:
    """The similarity of each pair of each file."""
    session, tokenizer = session_of(file, arguments.threads), load_tokenizer(arguments.model)
    found = []
    for pairs in arguments.pairs:
        rows = [row[:2] for row in csv.reader(pairs.open(encoding="utf-8"))]
        first, second = (embed(session, tokenizer, [arguments.prefix + row[side] for row in rows]) for side in (0, 1))
        found.append((first * second).sum(axis=1))
    return found


def latencies(files: dict[str, Path], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The least CPU seconds of a pass over each shape, of files that take turns."""
    sessions = {name: session_of(file, arguments.threads) for name, file in files.items()}
    rows, found = 30_000, {name: [] for name in files}
    for (texts, tokens), passes in SHAPES.items():
        best = dict.fromkeys(files, float("inf"))
        for _ in range(arguments.turns):
            for name, session in sessions.items():
                ids = numpy.random.default_rng(0).integers(1000, rows, (texts, tokens))
                given = feeds(session, ids, numpy.ones_like(ids))
                for _ in range(passes):
                    start = time.process_time()
                    session.run(None, given)
                    best[name] = min(best[name], time.process_time() - start)
        for name in files:
            found[name].append(best[name])
    return found


def fresh(file: Path) -> tuple[float, float]:
    """Seconds of loading and bytes of memory in a process of its own."""
    run = subprocess.run([sys.executable, "-c", FRESH, str(file)], capture_output=True, text=True, check=True)
    seconds, memory = json.loads(run.stdout)
    return seconds, memory


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    dense, exported = dense_files(arguments.model, arguments.work), exported_files(arguments)
    files = {f"dense, {name}": file for name, file in dense.items()}
    files |= {f"compressed, {name}": file for name, file in exported.items()}
    versions = f"onnxruntime {onnxruntime.__version__}, {machine(torch.device('cpu'))}"
    print(f"`{shlex.join(['python', *sys.argv])}`: {versions}\n")
    ranks = " | ".join(f"rank correlation, {pairs.stem}" for pairs in arguments.pairs)
    shapes = " | ".join(f"ms, {texts} x {tokens}" for texts, tokens in SHAPES)
    print(f"| file | MB | {ranks} | {shapes} | of dense | load, s | memory, MB |".replace("|  |", "|"))
    print("| --- |" + " --- |" * (3 + len(arguments.pairs) + 1 + len(SHAPES)))

    times, reference = latencies(files, arguments), similarities(dense["fp32"], arguments)
    for name, file in files.items():
        body = name.partition(", ")[2]
        found = similarities(file, arguments)
        ranks = [f"{spearmanr(one, other)[0]:.4f}" for one, other in zip(found, reference, strict=True)]
        own, base = times[name], times[f"dense, {body}"]
        ratios = " / ".join(f"{one / other:.3f}" for one, other in zip(own, base, strict=True) if arguments.turns)
        seconds, memory = fresh(file)
        cells = [
            name, f"{file.stat().st_size / 1e6:.1f}", *ranks, *(f"{1e3 * each:.2f}" for each in own), ratios,
            f"{seconds:.2f}", f"{memory / 1e6:.0f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
