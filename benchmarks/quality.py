"""Quality at equal bytes: the table methods and plain integer tables, on one model in one run.

    python benchmarks/quality.py sts MODEL --pairs stsb-en-dev.csv stsb-de-dev.csv --bits 2 1 0.5 [--prefix "query: "]
    python benchmarks/quality.py sentences MODEL --text held-out.txt technical.txt --bits 2 1 [--prefix "query: "]
    python benchmarks/quality.py perplexity MODEL --text held-out.txt --calibrate mixed.txt --bits 4 3 2
    python benchmarks/quality.py perplexity MODEL --text held-out.txt \
        --calibrate mixed.txt --calibration-tokens 0 2048 32768

MODEL is a local folder or a Hub id. Prints a Markdown table; every figure is relative to the dense model's in the
same run, with the bits per weight that were really spent and the seconds of fitting. Beside the ranks of pairs stands
the error of their similarities: root mean square x 100 of what they differ by from the dense model's. Of sentences of
running text stands how far their embeddings move, in % of how far the dense model's lie apart: see `movement`. That
tells codecs apart whose ranks of pairs are the same.
"""

from __future__ import annotations

import argparse
import copy
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_dirembed
from hf_dirembed import CompressedEmbedding
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.text import CALIBRATION_TOKENS
from hf_dirembed.compression.transform.transform import EFFORTS
from hf_dirembed.evaluation import (
    PerplexityFigures,
    STSFigures,
    embed_sentences,
    load_pairs,
    load_text,
    movement,
    perplexity,
    similarity_error,
    sts,
)


GROUP = 32  # weights that share a scale and a zero point
SENTENCES = 2_000  # of each text, unless told otherwise: one in every so many, from all of it
SENTENCE = range(20, 400)  # characters: neither headings nor tables


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
    seen = list(calibrations(arguments, load, tokenizer)) if arguments.calibrate else [("", None)]
    for (told, calibration), method, bits, effort, seed in product(
        seen, arguments.methods, arguments.bits, arguments.efforts, arguments.seeds
    ):
        model, options = load(), {"method": method, "bits": bits, "languages": arguments.languages}
        if method in ("transform", "direction"):
            options["calibration"] = calibration
        if method == "transform":
            options |= {"settings": replace(EFFORTS[effort], seed=seed), "effort": effort}
        start = time.perf_counter()
        hf_dirembed.compress(model, tokenizer, **options)
        seconds = time.perf_counter() - start
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, CompressedEmbedding)
        name = method if len(arguments.seeds) == 1 else f"{method}, seed {seed}"
        name = name if len(arguments.efforts) == 1 else f"{name}, {effort}"
        yield f"{name}{told}", embedding.bits_per_weight, seconds, model


def calibrations(
    arguments: argparse.Namespace, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Calibration | None]]:
    """Yields what to say of a calibration, and the calibration; each goes on from the one before."""
    model, several = load(), len(arguments.calibration_tokens) > 1
    seconds, source, tokens = 0.0, arguments.calibrate, sorted(arguments.calibration_tokens)
    if several and not tokens[0]:
        yield ", not calibrated", None
    with tempfile.TemporaryDirectory() as folder:
        for limit in tokens[tokens[0] == 0 :]:
            start = time.process_time()
            calibration = Calibration.of(
                model, tokenizer, source, arguments.languages, max_tokens=limit, resume=Path(folder, "statistics")
            )
            seconds += time.process_time() - start
            found = calibration.statistics.num_tokens
            yield f", {found:,} tokens in {seconds:,.0f} core seconds" if several else "", calibration


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


def measure_sentences(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The embeddings of sentences of each text."""
    every = [sentences_of(load_text(path).content, arguments.limit or SENTENCES) for path in arguments.text]
    return lambda model: [
        embed_sentences(model, each, tokenizer, pooling="mean", prefix=arguments.prefix) for each in every
    ]


def sentences_of(text: str, number: int) -> list[str]:
    """Some sentences of running text, evenly spaced in it."""
    every = [each.strip() for line in text.splitlines() for each in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", line)]
    kept = [each for each in every if len(each) in SENTENCE]
    return kept[:: max(1, len(kept) // number)][:number]


def relative_sentences(found: Tensor, dense: Tensor) -> list[str]:
    """How far the embeddings have moved, in % of how far those of the dense model lie apart."""
    return [f"{100 * movement(found, dense):.2f} %"]


def measure_perplexity(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The figures on each text, in windows of 512 tokens side by side."""
    texts = [load_text(path) for path in arguments.text]
    return lambda model: [
        perplexity(model, tokenizer, text, window=512, max_tokens=arguments.limit, batch_size=2) for text in texts
    ]


def relative_perplexity(found: PerplexityFigures, dense: PerplexityFigures) -> list[str]:
    """Perplexity over that of the dense model."""
    return [f"{found.perplexity / dense.perplexity:.4f}x"]


# of each task what measures, what is said of the dense model, and what of the others
TASKS: dict[str, tuple[Callable[..., Measure], Callable[..., list[str]], Callable[..., list[str]]]] = {
    "sts": (measure_sts, spearman, relative_sts),
    "sentences": (measure_sentences, lambda dense: [f"{len(dense):,} sentences"], relative_sentences),
    "perplexity": (measure_perplexity, lambda dense: [f"{dense.perplexity:.3f}"], relative_perplexity),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sts", "sentences", "perplexity"])
    parser.add_argument("model")
    parser.add_argument("--pairs", nargs="+", default=[], help="STS files or dataset ids")
    parser.add_argument("--text", nargs="+", default=[], help="held-out text files or dataset ids")
    parser.add_argument("--prefix", default="", help="put before each sentence")
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 2, 1])
    parser.add_argument("--methods", nargs="+", default=["transform"])
    parser.add_argument("--integers", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--calibrate", help="text file, or self")
    parser.add_argument(
        "--calibration-tokens", nargs="+", type=int, default=[CALIBRATION_TOKENS], help="a row each; 0 for none"
    )
    parser.add_argument("--languages", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of transform's sample, a row each")
    parser.add_argument("--efforts", nargs="+", default=["balanced"], choices=list(EFFORTS), help="a row each")
    parser.add_argument("--limit", type=int, help="pairs, sentences or tokens of each file")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    auto = AutoModelForCausalLM if arguments.task == "perplexity" else AutoModel
    loaded = auto.from_pretrained(arguments.model).eval()
    make_measure, of_dense, relative = TASKS[arguments.task]
    measure = make_measure(arguments, tokenizer)
    dense = measure(loaded)
    names = [name.rsplit("/", 1)[-1] for name in arguments.pairs or arguments.text]
    header = [column for name in names for column in (name, *(["error"] if arguments.task == "sts" else []))]
    stock = [cell for each in dense for cell in of_dense(each)]
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
