"""Compresses a checkpoint that does not fit into memory, and says what it took.

    python benchmarks/larger_than_memory.py [--folder FOLDER] [--method transform] [--bits 2] [--limit-gib 3]

makes a Llama-like checkpoint of 8 shards with a 262,144 x 2,048 bfloat16 table in FOLDER (17 GiB of disk for both),
compresses it in a process whose memory is limited, checks that every other tensor came through byte for byte, and
loads the result. The limit is one of private memory (RLIMIT_DATA), which a process cannot get around; the peak of
resident memory that is printed beside it also has pages of the libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hf_dirembed


ROWS, DIM, SHARDS = 262_144, 2_048, 8
TABLE = "model.embed_tokens.weight"
GIB = 1 << 30


def make(folder: Path, gib: float) -> None:
    """Writes the dense checkpoint, one shard after the other."""
    layers = round((gib * GIB - ROWS * DIM * 2) / (2 * (3 * DIM * 4 * DIM + 4 * DIM * DIM))) + 1
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shapes.pop("lm_head.weight")
    generator, weight_map = torch.Generator().manual_seed(0), {}
    names = [TABLE, *sorted(set(shapes) - {TABLE})]
    parts = [names[:1], *(names[1:][i :: SHARDS - 1] for i in range(SHARDS - 1))]
    for position, part in enumerate(parts, start=1):
        shard = f"model-{position:05}-of-{SHARDS:05}.safetensors"
        held = {}
        for name in part:
            if name == TABLE:  # of decaying spectrum, so that there is something to fit
                held[name] = torch.empty(shapes[name], dtype=torch.bfloat16)
                scale = torch.linspace(1, 0.05, DIM)
                for rows in held[name].split(8192):
                    rows.copy_(torch.randn(rows.shape, generator=generator) * scale)
            else:  # one random block again and again: cheap, and still not all alike
                number = shapes[name].numel()
                block = torch.randn(min(4096, number), generator=generator).bfloat16()
                held[name] = block.repeat(-(-number // len(block)))[:number].view(shapes[name])
            weight_map[name] = shard
        save_file(held, folder / shard, {"format": "pt"})
        del held
    index = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def compress(source: Path, out: Path, method: str, bits: float, limit: float) -> None:
    """Runs in a process of its own: compresses within the limit, and prints what it took."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB),) * 2)
    from hf_dirembed.checkpoints.convert import compress_checkpoint

    start = time.perf_counter()
    summary = compress_checkpoint(source, out, method=method, bits=bits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{method}: {time.perf_counter() - start:.0f} s, {summary.bits_per_weight:.3f} bits per weight", end=", ")
    cosines = ", ".join(str(table.mean_cosine) for table in summary.tables)
    print(f"mean cosine {cosines}, peak of resident memory {peak / GIB:.2f} GiB")


def check(source: Path, out: Path) -> None:
    """That all tensors but the table are equal, and that the result loads."""
    compared = 0
    for shard in sorted(file.name for file in source.glob("*.safetensors")):
        with safe_open(source / shard, framework="pt") as before, safe_open(out / shard, framework="pt") as after:
            for name in before.keys():  # noqa: SIM118 (no dict)
                if name != TABLE:
                    assert torch.equal(
                        before.get_tensor(name).view(torch.int16), after.get_tensor(name).view(torch.int16)
                    )
                    compared += 1
    print(f"{compared} other tensors are equal, bit for bit")
    model = AutoModelForCausalLM.from_pretrained(out)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, hf_dirembed.CompressedEmbedding)
    with safe_open(source / "model-00001-of-00008.safetensors", framework="pt") as file:
        rows = file.get_slice(TABLE)[:1000].float()
    cosine = torch.nn.functional.cosine_similarity(embedding(torch.arange(1000)).float(), rows).mean()
    print(f"it loads as {type(model).__name__}; mean cosine of the first 1,000 rows {cosine:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gib", type=float, default=8.2, help="size of the checkpoint")
    parser.add_argument("--limit-gib", type=float, default=3.0)
    parser.add_argument("--method", default="transform")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--compress", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compress:
        compress(*options.compress, options.method, options.bits, options.limit_gib)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name, "dense"), Path(name, "compressed")
        make(source, options.gib)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{len(list(source.glob('*.safetensors')))} shards, {size / GIB:.2f} GiB", flush=True)
        arguments = ["--method", options.method, "--bits", options.bits, "--limit-gib", options.limit_gib]
        arguments += ["--compress", source, out]
        subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True)
        check(source, out)
        print(f"transformers calls it {AutoConfig.from_pretrained(out).model_type}, compressed")


if __name__ == "__main__":
    main()
