"""Quality at equal bytes: the table methods and plain integer tables, on one model in one run.

    python benchmarks/quality.py sts MODEL --pairs stsb-en-dev.csv stsb-de-dev.csv --bits 2 1 0.5 [--prefix "query: "]
    python benchmarks/quality.py perplexity MODEL --text held-out.txt --calibrate mixed.txt --bits 4 3 2

MODEL is a local folder or a Hub id. Prints a Markdown table; every figure is relative to the dense model's in the
same run, with the bits per weight that were really spent and the seconds of fitting. Beside the ranks of pairs stands
the error of their similarities: root mean square x 100 of what they differ by from the dense model's.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_dirembed
from hf_dirembed import CompressedEmbedding
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.text import CALIBRATION_TOKENS
from hf_dirembed.evaluation import (
    PerplexityFigures,
    STSFigures,
    load_pairs,
    load_text,
    perplexity,
    similarity_error,
    sts,
)


GROUP = 32  # weights that share a scale and a zero point


def integer_table(rows: Tensor, width: int) -> Tensor:
    """Rounds a table to `width` bits in groups of 32, each with a scale and a zero point.

    It is stated at width + 0.5 bits per weight, in its favour: a float16 scale alone takes that half bit.
    """
    groups = rows.float().reshape(-1, GROUP)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = ((high - low) / (2**width - 1)).clamp_min(1e-12)
    return (((groups - low) / step).round() * step + low).view_as(rows).to(rows.dtype)


def variants(
    arguments: argparse.Namespace, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, float, float, PreTrainedModel]]:
    """Yields name, bits per weight, seconds of fitting, and the model."""
    for width in arguments.integers:
        model = load()
        table = model.get_input_embeddings().weight
        table.data = integer_table(table.data, width)
        yield f"int{width}, groups of {GROUP}", width + 0.5, 0.0, model
    calibration = None
    if arguments.calibrate:
        limit, languages = arguments.calibration_tokens, arguments.languages
        calibration = Calibration.of(load(), tokenizer, arguments.calibrate, languages, max_tokens=limit)
    for method, bits, seed in product(arguments.methods, arguments.bits, arguments.seeds):
        model, options = load(), {"method": method, "bits": bits, "languages": arguments.languages}
        if method in ("transform", "direction"):
            options["calibration"] = calibration
        if method == "transform":
            options["settings"] = hf_dirembed.TransformSettings(seed=seed)
        start = time.perf_counter()
        hf_dirembed.compress(model, tokenizer, **options)
        seconds = time.perf_counter() - start
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, CompressedEmbedding)
        name = method if len(arguments.seeds) == 1 else f"{method}, seed {seed}"
        yield name, embedding.bits_per_weight, seconds, model


Measure = Callable[[nn.Module], list[Any]]


def measure_sts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The figures on each file of pairs."""
    sets = [load_pairs(path) for path in arguments.pairs]
    return lambda model: [
        sts(model, pairs, tokenizer, pooling="mean", prefix=arguments.prefix, limit=arguments.limit) for pairs in sets
    ]


def spearman(dense: STSFigures) -> list[str]:
    """What the dense model has."""
    return [f"{100 * dense.spearman:.3f}", ""]


def relative_sts(found: STSFigures, dense: STSFigures) -> list[str]:
    """Spearman x 100 less that of the dense model, and the error of the similarities."""
    change, error = 100 * (found.spearman - dense.spearman), similarity_error(found.cosines, dense.cosines)
    return [f"{change:+.3f}", f"{error:.2f}"]


def measure_perplexity(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The figures on each text, in windows of 512 tokens side by side."""
    texts = [load_text(path) for path in arguments.text]
    return lambda model: [
        perplexity(model, tokenizer, text, window=512, max_tokens=arguments.limit, batch_size=2) for text in texts
    ]


def relative_perplexity(found: PerplexityFigures, dense: PerplexityFigures) -> list[str]:
    """Perplexity over that of the dense model."""
    return [f"{found.perplexity / dense.perplexity:.4f}x"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sts", "perplexity"])
    parser.add_argument("model")
    parser.add_argument("--pairs", nargs="+", default=[], help="STS files or dataset ids")
    parser.add_argument("--text", nargs="+", default=[], help="held-out text files or dataset ids")
    parser.add_argument("--prefix", default="", help="put before each sentence")
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 2, 1])
    parser.add_argument("--methods", nargs="+", default=["transform"])
    parser.add_argument("--integers", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--calibrate", help="text file, or self")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--languages", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of transform's sample, a row each")
    parser.add_argument("--limit", type=int, help="pairs or tokens of each file")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    auto = AutoModel if arguments.task == "sts" else AutoModelForCausalLM
    loaded = auto.from_pretrained(arguments.model).eval()
    pairs = arguments.task == "sts"
    measure = (measure_sts if pairs else measure_perplexity)(arguments, tokenizer)
    relative = relative_sts if pairs else relative_perplexity
    dense = measure(loaded)
    names = [name.rsplit("/", 1)[-1] for name in arguments.pairs or arguments.text]
    header = [column for name in names for column in (name, *(["error"] if pairs else []))]
    stock = [cell for each in dense for cell in (spearman(each) if pairs else [f"{each.perplexity:.3f}"])]
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"| table | bits per weight | fit, s | {' | '.join(header)} |")
    print("| --- " * (3 + len(header)) + "|")
    print(f"| dense | {8 * loaded.get_input_embeddings().weight.element_size()} | | {' | '.join(stock)} |")
    for name, bits, seconds, model in variants(arguments, lambda: copy.deepcopy(loaded), tokenizer):
        found = [cell for each in zip(measure(model), dense, strict=True) for cell in relative(*each)]
        print(f"| {name} | {bits:.4f} | {seconds:.1f} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
