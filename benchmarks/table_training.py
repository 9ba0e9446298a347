"""What a table learns from a text: its decoder alone, its codes too, or dense, compressed after that.

    python benchmarks/table_training.py MODEL --train text.txt --held-out more.txt --bits 2 --steps 100

MODEL is a local folder or a Hub id: a causal language model, or with --masked a masked one. Everything but the table,
and the head that is tied to it, is frozen, and every variant sees the same batches. Packed codes learn through floats
behind them, whose rate is stated in their standard deviations (--spreads). Prints a Markdown table of perplexities
on the held-out text; all rates that were tried are in it.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_dirembed
from hf_dirembed import CompressedEmbedding
from hf_dirembed.evaluation import load_text, masked_perplexity, perplexity


def batches(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Windows of the text to train on, side by side, in random order, labelled."""
    text = load_text(arguments.train).content
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = torch.stack(ids.split(arguments.window)[:-1])
    needed = arguments.steps * arguments.batch
    generator = torch.Generator().manual_seed(arguments.seed)
    orders = [torch.randperm(len(windows), generator=generator) for _ in range(-(-needed // len(windows)))]
    chosen = windows[torch.cat(orders)[:needed]]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=arguments.masked, seed=arguments.seed)
    return [dict(collator([{"input_ids": row} for row in part])) for part in chosen.split(arguments.batch)]


def train(model: PreTrainedModel, data: list[dict[str, Tensor]], rate: float, spread: float | None = None) -> None:
    """Trains the table alone by Adam, the rates falling to zero; its codes too where their spread is given."""
    table = model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    floats = [] if spread is None else list(model.unfreeze_codes().get_input_embeddings().shadow.parameters())
    others = [each for each in table.parameters() if each.requires_grad and not any(each is one for one in floats)]
    groups = [{"params": [each], "lr": spread * each.std().item()} for each in floats]
    optimizer = torch.optim.Adam([*groups, {"params": others, "lr": rate}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(data))
    model.eval()  # without dropout
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def variants(
    arguments: argparse.Namespace, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str, PreTrainedModel, float]]:
    """Yields what learnt, at which rate, the model, and the seconds of training."""
    data = batches(arguments, tokenizer)

    def compressed(model: PreTrainedModel) -> PreTrainedModel:
        return hf_dirembed.compress(copy.deepcopy(model), tokenizer, bits=arguments.bits)

    def trained(model: PreTrainedModel, rate: float, spread: float | None = None) -> tuple[PreTrainedModel, float]:
        start, model = time.perf_counter(), copy.deepcopy(model)
        train(model, data, rate, spread)
        return model, time.perf_counter() - start

    yield "nothing, dense", "", dense, 0.0
    start = compressed(dense)
    yield "nothing", "", start, 0.0
    for rate in arguments.rates:
        yield "decoder", f"{rate:g}", *trained(start, rate)
    for rate in arguments.rates[:1]:
        for spread in arguments.spreads:
            yield "decoder and codes", f"{rate:g}, {spread:g} std", *trained(start, rate, spread)
    for rate in arguments.dense_rates:
        model, seconds = trained(dense, rate)
        yield "dense table, compressed again", f"{rate:g}", compressed(model), seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="text file or dataset id to train on")
    parser.add_argument("--held-out", required=True, nargs="+", help="text files or dataset ids to evaluate on")
    parser.add_argument("--masked", action="store_true", help="the model is a masked language model")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--window", type=int, default=128, help="tokens of a window")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3], help="of the decoder; the first with codes")
    parser.add_argument("--spreads", nargs="+", type=float, default=[0.1], help="rates of codes, in their deviations")
    parser.add_argument("--dense-rates", nargs="*", type=float, default=[1e-3], help="of the dense table")
    parser.add_argument("--limit", type=int, help="tokens of each held-out text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    auto = AutoModelForMaskedLM if arguments.masked else AutoModelForCausalLM
    measure = masked_perplexity if arguments.masked else perplexity
    dense = auto.from_pretrained(arguments.model, dtype=torch.float32)
    held_out = [load_text(text) for text in arguments.held_out]
    names = " | ".join(f"perplexity, {text.rsplit('/', 1)[-1]}" for text in arguments.held_out)
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"| what learns | rate | bits per weight | {names} | training, s |")
    print("| --- " * (4 + len(held_out)) + "|")
    for what, rate, model, seconds in variants(arguments, dense, tokenizer):
        table = model.get_input_embeddings()
        bits = f"{table.bits_per_weight:.2f}" if isinstance(table, CompressedEmbedding) else "32"
        options = {"window": arguments.window, "max_tokens": arguments.limit}
        found = [measure(model.eval(), tokenizer, text, **options).perplexity for text in held_out]
        cells = " | ".join(f"{value:.2f}" for value in found)
        print(f"| {what} | {rate} | {bits} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
