"""Compresses checkpoints with a table that does not fit into memory, and says what it took.

    python benchmarks/larger_tables.py n-gram [--rows 2000000 4000000]
    python benchmarks/larger_tables.py per-layer [--rows 262144] [--columns 1024]
    python benchmarks/larger_tables.py n-gram --rows 2000000 --processes 1 2

make, for each number of rows, the checkpoint of a tiny model (of the type `qwen4_exp_text` with an n-gram table of 160
columns, of the type `gemma3n_text` with a per-layer table in blocks of 256 columns) whose table is in bfloat16 and of
decaying spectrum, and compress that table in processes of their own: one, or as many as `torchrun` is told to start by
--processes, which share the rows of an n-gram table and have one thread each. Printed are the core seconds of all and
the largest peak of resident memory of one; from two numbers of rows, what 320,000,000 rows would take, and from two
numbers of processes, how long 16 would take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedConfig, Qwen4ExpTextConfig


GIB, BILLED_ROWS, PIECES = 1 << 30, 320_000_000, 8
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "dtype": "bfloat16",
}  # fmt: skip
N_GRAM = {
    **SIZES, "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2, "num_experts": 4, "hc_lowrank": 16,
    "ple_layer_ids": [1], "ple_embed_dim": 320, "ngram_size": 3, "heads_per_ngram": 1,
    "make_ngram_vocab_size_divisible_by": PIECES, "split_ngram_parts": PIECES, "eos_token_id": 2,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
PER_LAYER = {
    **SIZES, "hidden_size_per_layer_input": 256, "intermediate_size": 64, "num_kv_shared_layers": 0, "laurel_rank": 16,
    "max_position_embeddings": 64, "sliding_window": 16,
}  # fmt: skip


def configs(kind: str, rows: int, columns: int) -> tuple[PreTrainedConfig, PreTrainedConfig, str]:
    """The config with the large table and one with a small one, and the path of the table's module."""
    if kind == "n-gram":
        large, small = (Qwen4ExpTextConfig(**N_GRAM, ngram_vocab_size_base=size) for size in (rows // 2, 101))
        return large, small, "model.layers.0.ple.ple_embedding.ngram_embedding"
    layers = {**PER_LAYER, "num_hidden_layers": columns // 256}
    large, small = (Gemma3nTextConfig(**layers, vocab_size_per_layer_input=size) for size in (rows, 8))
    return large, small, "model.embed_tokens_per_layer"


def make(folder: Path, kind: str, rows: int, columns: int) -> tuple[int, int]:
    """Writes the dense checkpoint, the table in several files; the rows and columns of the table."""
    config, small, path = configs(kind, rows, columns)
    tiny = AutoModelForCausalLM.from_config(small)
    tiny.save_pretrained(folder)
    config.architectures = [type(tiny).__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_rows, dim = model.get_parameter(f"{path}.weight").shape

    file = folder / "model.safetensors"
    others = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{path}.")}
    file.unlink()
    if kind == "n-gram":
        module = model.get_submodule(path.rpartition(".")[0])
        for name, numbers in (("vocab_sizes", module.head_vocab_sizes), ("offsets", module.head_offsets)):
            others[f"{path.rpartition('.')[0]}.ngram_heads_{name}"] = torch.tensor(numbers)
    weight_map = dict.fromkeys(others, "model-others.safetensors")
    save_file(others, folder / "model-others.safetensors", {"format": "pt"})

    generator = torch.Generator().manual_seed(0)
    pieces = PIECES if kind == "n-gram" else 1
    for number in range(pieces):
        name = f"{path}.shard_{number}.weight" if kind == "n-gram" else f"{path}.weight"
        weight_map[name] = f"model-table-{number}.safetensors"
        save_file({name: table_of(num_rows // pieces, dim, generator)}, folder / weight_map[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_rows, dim


def table_of(num_rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows whose variance falls as 1/k along the k-th of their axes, of lengths that differ by a factor of 3."""
    table = torch.empty(num_rows, dim, dtype=torch.bfloat16)
    scale = 0.1 * torch.arange(1, dim + 1).pow(-0.5)
    for rows in table.split(65_536):
        lengths = 0.5 + torch.rand(len(rows), 1, generator=generator)
        rows.copy_(torch.randn(rows.shape, generator=generator) * scale * lengths)
    return table


def compress(source: Path, out: Path, table: str, bits: float, threads: int) -> None:
    """Runs in processes of its own: compresses, and each prints what it took as JSON."""
    from hf_dirembed.checkpoints.convert import compress_checkpoint

    torch.set_num_threads(threads)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    summary = compress_checkpoint(source, out, bits=bits, tables=[table])
    after = resource.getrusage(resource.RUSAGE_SELF)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {"wall": time.perf_counter() - start, "cores": cores, "peak": after.ru_maxrss * 1024}
    print(json.dumps({**figures, "bits": summary.bits_per_weight, "cosine": summary.tables[0].mean_cosine}))


@dataclass(frozen=True)
class Cost:
    """What compressing a table took.

    Attributes:
        rows: Of the table.
        wall: Seconds.
        cores: Core seconds, of all processes.
        peak: Bytes of resident memory, of the process that took most.
    """

    rows: int
    wall: float
    cores: float
    peak: int


def measure(kind: str, rows: int, processes: int, options: argparse.Namespace) -> Cost:
    """Makes a checkpoint, compresses it and prints a row of figures."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name, "dense"), Path(name, "compressed")
        num_rows, dim = make(source, kind, rows, options.columns)
        threads = 2 if len(options.processes) == 1 and processes == 1 else 1
        arguments = [kind, "--bits", str(options.bits), "--threads", str(threads), "--compress", str(source), str(out)]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), __file__, *arguments]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(found) == processes, printed
    wall, peak = (max(each[figure] for each in found) for figure in ("wall", "peak"))
    cost = Cost(num_rows, wall, sum(each["cores"] for each in found), peak)
    per_weight = 1e6 * cost.cores / (num_rows * dim)
    dense = num_rows * dim * 2 / GIB
    print(f"| {kind} | {num_rows:,} x {dim:,} | {dense:.2f} | {processes} | {found[0]['bits']:.3f} ", end="")
    print(
        f"| {found[0]['cosine']:.4f} | {wall:.0f} | {cost.cores:.0f} | {per_weight:.3f} | {peak / GIB:.2f} |",
        flush=True,
    )
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["n-gram", "per-layer"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--columns", type=int, default=1024, help="of a per-layer table")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--compress", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compress:
        compress(*options.compress, configs(options.kind, 2, 512)[2], options.bits, options.threads)
        return

    heads = "table", "size", "dense, GiB", "processes", "bits per weight", "mean cosine", "wall s", "core s"
    print(f"| {' | '.join(heads)} | µs per weight | peak, GiB |")
    print("| --- " * (len(heads) + 2) + "|")
    rows = options.rows or ([2_000_000, 4_000_000] if options.kind == "n-gram" else [262_144])
    by_processes: list[tuple[int, float]] = []
    for processes in options.processes:
        costs = [measure(options.kind, each, processes, options) for each in rows]
        if len(costs) > 1:
            first, last = costs[0], costs[-1]
            share = (BILLED_ROWS - first.rows) / (last.rows - first.rows)
            hours = (first.cores + share * (last.cores - first.cores)) / 3600
            grown = (last.peak - first.peak) / (1 << 20)
            print(f"\n{BILLED_ROWS:,} rows: {hours:.1f} core hours; memory grew by {grown:.0f} MiB between the sizes")
        by_processes.append((processes, costs[-1].wall))

    if len(by_processes) > 1:
        (few, longer), (more, shorter) = by_processes[0], by_processes[-1]
        shared = (longer - shorter) / (1 / few - 1 / more)
        alone = longer - shared / few
        print(
            f"\nShared is {shared:.0f} s of it, {alone:.0f} s are of one process: 16 take {alone + shared / 16:.0f} s"
        )


if __name__ == "__main__":
    main()
