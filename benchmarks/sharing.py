"""One budget over two tables: what moving bytes between the input embedding and an untied head does to perplexity.

    python benchmarks/sharing.py MODEL --text held-out.txt [--calibrate mixed.txt] --bits 4 3 2 --shifts -0.5 0 0.5
    python benchmarks/sharing.py MODEL --text held-out.txt --errors 0.03 0.1 0.3

MODEL is a local folder or a Hub id of a causal or masked language model. A tied head is untied by copying the table.
Prints a Markdown table: for each budget a row for each shift, where the input table has that many bits per weight less
than the budget and the head as many more, and a row for what `compress` shares by itself. Figures are the rise of the
mean negative log-likelihood over the dense model's in the same run, in thousandths of a nat. Each table is fitted once
for each number of bits; `--cache` keeps what was fitted, and the statistics of calibration, from run to run.

`--errors` fits nothing: it adds white noise to the rows of a table, of that squared length relative to the row, and
says how much more it raises the loss in the head than in the input table, from which the rule without calibration is.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_dirembed
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.checkpoints.loading import model_class
from hf_dirembed.evaluation import load_text, masked_perplexity, perplexity


@dataclass(frozen=True)
class Subject:
    """A model with two tables of its own, and how it is compressed.

    Attributes:
        model: Dense, in float32.
        tokenizer: Its tokenizer.
        calibration: What was seen of it; None for no calibration.
        cache: A folder for fitted tables.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration | None
    cache: Path

    @property
    def names(self) -> tuple[str, str]:
        """The paths of the input table and of the head."""
        kinds = {table.kind: table.name for table in hf_dirembed.find_tables(self.model)}
        return kinds["input"], kinds["head"]

    def fitted(self, name: str, bits: float) -> Tensor:
        """The rows that one table has after compression to so many bits per weight, the other left dense."""
        mode = "plain" if self.calibration is None else "calibrated"
        file = self.cache / f"{name}-{bits:.6f}-{mode}.safetensors"
        if not file.exists():
            model = copy.deepcopy(self.model)
            hf_dirembed.compress(model, self.tokenizer, bits={name: bits}, calibration=self.calibration)
            rows = hf_dirembed.expand(model).get_parameter(f"{name}.weight")
            save_file({"rows": rows.detach().half().contiguous()}, file)
        return load_file(file)["rows"].float()

    def with_rows(self, rows: dict[str, Tensor]) -> PreTrainedModel:
        """The dense model with other rows in some tables, until it is asked for again."""
        model = copy.deepcopy(self.model)
        for name, values in rows.items():
            model.get_parameter(f"{name}.weight").data = values
        return model

    def shared_bits(self, bits: float) -> dict[str, float]:
        """The bits per weight of each table where `compress` shares one budget."""
        model = hf_dirembed.compress(
            copy.deepcopy(self.model), self.tokenizer, bits=bits, calibration=self.calibration
        )
        return {
            table.name: 8 * table.num_bytes / (table.rows * table.dim)
            for table in hf_dirembed.find_tables(model)
            if table.compressed
        }


def untied(source: str) -> PreTrainedModel:
    """Loads a language model in float32, its head a table of its own."""
    config = AutoConfig.from_pretrained(source)
    kind = model_class(config)
    model = kind.from_pretrained(source, dtype=torch.float32)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return kind.from_pretrained(folder).eval()


def measure(arguments: argparse.Namespace, subject: Subject) -> Callable[[PreTrainedModel], float]:
    """What takes the mean negative log-likelihood of a model on all texts, in nats per token."""
    texts = [load_text(path) for path in arguments.text]
    causal = type(subject.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def nll(model: PreTrainedModel) -> float:
        if causal:
            found = [perplexity(model, subject.tokenizer, text, max_tokens=arguments.limit) for text in texts]
        else:
            found = [masked_perplexity(model, subject.tokenizer, text, max_tokens=arguments.limit) for text in texts]
        return sum(each.nll for each in found) / len(found)

    return nll


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True, help="held-out text files or dataset ids")
    parser.add_argument("--calibrate", help="text file")
    parser.add_argument("--calibration-tokens", type=int, default=8_000)
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 3, 2])
    parser.add_argument("--shifts", nargs="+", type=float, default=[-0.5, 0, 0.5])
    parser.add_argument("--limit", type=int, help="tokens of each held-out text")
    parser.add_argument("--cache", type=Path, help="a folder for what was fitted; by default a temporary one")
    parser.add_argument("--errors", nargs="+", type=float, help="of white noise, instead of compressed tables")
    parser.add_argument("--alone", action="store_true", help="also with one table compressed, the other dense")
    parser.add_argument("--no-shared", dest="shared", action="store_false", help="leave the last row out")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer, model = AutoTokenizer.from_pretrained(arguments.model), untied(arguments.model)
        calibration = None
        if arguments.calibrate:
            limit, resume = arguments.calibration_tokens, cache / "statistics.safetensors"
            calibration = Calibration.of(model, tokenizer, arguments.calibrate, None, max_tokens=limit, resume=resume)
        subject = Subject(model, tokenizer, calibration, cache)
        (report_errors if arguments.errors else report)(arguments, subject)


def report_errors(arguments: argparse.Namespace, subject: Subject) -> None:
    """Prints what white errors of each table cost."""
    nll = measure(arguments, subject)
    dense = nll(subject.model)
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"Dense: {dense:.4f} nats per token.\n")
    print("| relative squared error | input table | head | ratio |")
    print("| --- " * 4 + "|")
    for error in arguments.errors:
        rises = []
        for name in subject.names:
            rows = subject.model.get_parameter(f"{name}.weight").data
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
            noise *= rows.norm(dim=1, keepdim=True) * (error / rows.shape[1]) ** 0.5
            rises.append(nll(subject.with_rows({name: rows + noise})) - dense)
        cells = [f"{error:g}", *(f"{1000 * rise:.1f}" for rise in rises), f"{rises[1] / rises[0]:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def report(arguments: argparse.Namespace, subject: Subject) -> None:
    """Prints the table of one model."""
    nll = measure(arguments, subject)
    dense = nll(subject.model)
    names = subject.names
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"Dense: {dense:.4f} nats per token.\n")
    alone = ["input alone", "head alone"] if arguments.alone else []
    print(f"| {' | '.join(['budget', 'bits of the input table', 'bits of the head', *alone, 'both'])} |")
    print("| --- " * (4 + len(alone)) + "|")
    for bits in arguments.bits:
        splits = [(bits - shift, bits + shift) for shift in arguments.shifts]
        if arguments.shared:
            shared = subject.shared_bits(bits)
            splits.append((shared[names[0]], shared[names[1]]))
        for split in splits:
            rows = {name: subject.fitted(name, each) for name, each in zip(names, split, strict=True)}
            rises = [nll(subject.with_rows({name: rows[name]})) - dense for name in names if arguments.alone]
            rises.append(nll(subject.with_rows(rows)) - dense)
            print(f"| {bits:g} | {split[0]:.2f} | {split[1]:.2f} | ", end="")
            print(" | ".join(f"{1000 * rise:.1f}" for rise in rises) + " |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
