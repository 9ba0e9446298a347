"""What `paper.py` compresses by which methods, and how it measures: the protocol, mended or as published."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.token_weights import token_weights
from hf_dirembed.checkpoints.convert import load_model, load_tokenizer, resolve_checkpoint
from hf_dirembed.compression import compress_table
from hf_dirembed.compression.baselines.autoencoder import AutoencoderSettings, autoencoder_epochs
from hf_dirembed.compression.coded import CodedTable
from hf_dirembed.compression.table import Table
from hf_dirembed.conversion import convert
from hf_dirembed.evaluation import (
    EvaluationError,
    FineTunedFigures,
    FineTuningSettings,
    SquadSettings,
    dense_head,
    glue,
    load_pairs,
    load_text,
    masked_perplexity,
    perplexity,
    squad,
    sts,
)
from hf_dirembed.evaluation.running import find_device, longest_input, settings_of
from hf_dirembed.remote.codes_dirembed import CompressionSpec
from hf_dirembed.remote.tables_dirembed import embedding_of, input_table, source_of, tied_modules
from hf_dirembed.tables import has_tied_head


# Of the latents of all methods but transform: half the bytes of float32, for an error of 1/2000 of a latent.
CODES = "float16"
METHODS = {
    "svd": "SVD",
    "autoencoder-rmse": "autoencoder, RMSE",
    "autoencoder-cosine": "autoencoder, cosine",
    "autoencoder-alpha": "autoencoder, cosine + α-norm",
    "direction": "direction",
    "direction-weighted": "direction, token weights",
    "transform": "transform, token weights",
}
LOSSES: dict[str, dict[str, Any]] = {
    "autoencoder-rmse": {"cosine_weight": 0.0, "norm_weight": 1.0, "norm_loss": "rmse"},
    "autoencoder-cosine": {"norm_weight": 0.0},
    "autoencoder-alpha": {},
}

Figures = dict[str, tuple[float, float | None]]  # by column: the value and, over several seeds, its deviation


@dataclass(frozen=True)
class Dense:
    """The model that tables are compressed of.

    Attributes:
        folder: Where it is.
        model: As it was saved, with its head.
        tokenizer: Its tokenizer.
        tied: Whether the head shares the table.
        weights: (V,) how often tokens are expected.
        hessian: (d, d) what calibration found, for `transform`.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tied: bool
    weights: Tensor
    hessian: Tensor | None

    @classmethod
    def load(cls, name: str, calibrate: str | None, languages: list[str] | None) -> Dense:
        """Loads the model of that name, and reads the text that it is calibrated on.

        Raises:
            DirEmbedError: If there is none, or it cannot be loaded or calibrated.
        """
        folder = resolve_checkpoint(name)
        model = load_model(folder).to(find_device()).eval()  # type: ignore[arg-type]
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise EvaluationError(f"{name} has no tokenizer: save one beside the model")
        path = input_table(model)
        tied = has_tied_head(model)
        if calibrate is None:
            weights = token_weights(tokenizer, embedding_of(model).num_embeddings, languages=languages)
            return cls(folder, model, tokenizer, tied, weights, None)
        found = Calibration.of(model, tokenizer, calibrate, languages)
        return cls(folder, model, tokenizer, tied, *found.measure(model, tokenizer, path, languages))

    @property
    def rows(self) -> Tensor:
        """The table, (V, d)."""
        return embedding_of(self.model).weight.data

    def compressed(self, coded: CodedTable) -> PreTrainedModel:
        """A copy of the model with another table."""
        model = copy.deepcopy(self.model)
        path = source_of(model, tied_modules(model, input_table(model)))
        return convert(model, CompressionSpec({path: coded.layout}, {path: coded.record}), {path: coded.tensors})


class Measures:
    """What every model is measured with.

    Args:
        dense: The model that the others are made from.
        arguments: Those of the command: data, limits, and whether the protocol is the published one.

    Attributes:
        settings: By measure, how it was taken last: the same for every model.

    Raises:
        EvaluationError: If a text or pairs of sentences cannot be read, or there is no head to take perplexity with.
    """

    def __init__(self, dense: Dense, arguments: argparse.Namespace) -> None:
        self.dense, self.arguments = dense, arguments
        self.texts = [load_text(each) for each in arguments.text]
        self.pairs = [load_pairs(each) for each in arguments.pairs]
        if self.texts and dense.model.get_output_embeddings() is None:
            raise EvaluationError(f"{arguments.model} has no language-model head for perplexity: leave --text out")
        self.settings: dict[str, dict[str, Any]] = {}
        self.causal = dense.model.can_generate() and not dense.model.config.is_encoder_decoder

    def __call__(self, model: PreTrainedModel, method: str) -> Figures:
        """All figures of a model, the dense one included."""
        figures = {column: figure for each in self.perplexities(model) for column, figure in each.items()}
        return figures | self._similarities(model) | self._fine_tuned(model, method)

    def perplexities(self, model: PreTrainedModel) -> Iterator[Figures]:
        """On each text, with each masking and each head, one after the other."""
        faithful, tokenizer = self.arguments.faithful, self.dense.tokenizer
        window = min(512 if self.causal else 128, longest_input(self.dense.model, tokenizer))
        sizes = {"window": window, "max_tokens": self.arguments.max_tokens}
        maskings = ("",) if self.causal else (" whole-word",) if faithful else (" whole-word", " 15 %")
        heads = ("input only", "tied") if self.dense.tied and not faithful else ("input only",)
        for text in self.texts:
            for masking in maskings:
                for head in heads:
                    lent = head == "input only" and model is not self.dense.model  # whose own head is the dense one
                    with dense_head(model, self.dense.model) if lent else nullcontext():
                        found: Any
                        if self.causal:
                            found = perplexity(model, tokenizer, text, batch_size=2, **sizes)
                        else:
                            whole_word = masking == " whole-word"
                            found = masked_perplexity(model, tokenizer, text, whole_word=whole_word, **sizes)
                    self._note(f"{text.source}{masking}", found)
                    yield {f"{text.source}{masking} perplexity, {head}": (found.perplexity, None)}

    def _similarities(self, model: PreTrainedModel) -> Figures:
        options = {name: getattr(self.arguments, name) for name in ("pooling", "prefix")}
        options["limit"] = self.arguments.max_pairs
        figures: Figures = {}
        for pairs in self.pairs:
            found = sts(model, pairs, self.dense.tokenizer, **options)
            self._note(str(pairs.source), found)
            figures[f"{pairs.source} Spearman x 100"] = (100 * found.spearman, None)
        return figures

    def _fine_tuned(self, model: PreTrainedModel, method: str) -> Figures:
        """GLUE and SQuAD; as published, the decoder of the SVD alone stays as it is."""
        given = {"epochs": self.arguments.epochs, "seeds": self.arguments.seeds}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        options["train_decoder"] = not (self.arguments.faithful and method == "svd")
        figures: Figures = {}
        with self._saved(model) as folder:
            for subset, data in self.arguments.fine_tune:
                settings = FineTuningSettings(**options)
                found = glue(folder, subset, *data, settings=settings, limit=self.arguments.max_examples)
                figures |= self._columns(subset, 100, found)
            for data in self.arguments.squad:
                settings = SquadSettings(**options)
                found = squad(folder, *data, settings=settings, limit=self.arguments.max_examples)
                figures |= self._columns("SQuAD", 1, found)
        return figures

    def _saved(self, model: PreTrainedModel) -> Any:
        """A folder to fine-tune from, for as long as it is needed."""
        if model is self.dense.model or not (self.arguments.fine_tune or self.arguments.squad):
            return nullcontext(self.dense.folder)
        folder = tempfile.TemporaryDirectory(prefix="dirembed-")
        model.save_pretrained(folder.name)
        self.dense.tokenizer.save_pretrained(folder.name)
        return folder

    def _columns(self, name: str, scale: float, found: FineTunedFigures) -> Figures:
        self._note(name, found)
        unit = f" x {scale}" if scale != 1 else ""
        deviations = {metric: scale * value for metric, value in found.deviations.items()}
        return {
            f"{name} {metric}{unit}": (scale * value, deviations.get(metric))
            for metric, value in found.metrics.items()
        }

    def _note(self, name: str, found: Any) -> None:
        """Records how figures were taken, without the figures and what the protocol says of each model."""
        if isinstance(found, FineTunedFigures):
            settings = {**found.settings, "train": str(found.training), "data": str(found.data)}
        else:
            settings = settings_of(found)
        left_out = ("head", "train_decoder", "whole_word", "subset")
        self.settings[name] = {key: value for key, value in settings.items() if key not in left_out}


def fit(dense: Dense, method: str, rank: int, measures: Measures, *, faithful: bool) -> CodedTable:
    """Compresses the table by one of `METHODS`.

    Args:
        dense: The model.
        method: Its key.
        rank: Latents of a token; `transform` gets the bytes that these and their linear decoder take.
        measures: What the autoencoder's epoch is chosen by, where it is.
        faithful: Train the autoencoder as published, and choose its epoch by the text that is evaluated on.

    Raises:
        BudgetError: If the table cannot have that rank.
    """
    rows = dense.rows
    compress = partial(compress_table, rows, padding_idx=embedding_of(dense.model).padding_idx)
    if method == "transform":
        factors = rank * (torch.float16.itemsize * rows.shape[0] + rows.element_size() * rows.shape[1])
        bits = 8 * factors / rows.numel()
        return compress(bits=bits, token_weights=dense.weights, hessian=dense.hessian)
    if method in LOSSES:
        settings = AutoencoderSettings.paper(**LOSSES[method]) if faithful else AutoencoderSettings(**LOSSES[method])
        if faithful and measures.texts:
            return _best_epoch(dense, rank, settings, measures)
        return compress(method="autoencoder", rank=rank, latent_dtype=CODES, settings=settings)
    name, _, weighted = method.partition("-")
    return compress(method=name, rank=rank, latent_dtype=CODES, token_weights=dense.weights if weighted else None)


def _best_epoch(dense: Dense, rank: int, settings: AutoencoderSettings, measures: Measures) -> CodedTable:
    """The epoch of the lowest perplexity, with the dense head, on the first text: what the paper reports."""
    table, decoder = Table(dense.rows, device=dense.rows.device), str(dense.rows.dtype).removeprefix("torch.")

    def score(coded: CodedTable) -> float:
        ((value, _),) = next(measures.perplexities(dense.compressed(coded))).values()
        return value

    epochs = autoencoder_epochs(table, rank, settings)
    stored = (CodedTable.of(each.factorize(table), "autoencoder", codes=CODES, decoder=decoder) for each in epochs)
    return min(stored, key=score)


def root_mean_square_error(table: Table, coded: CodedTable) -> float:
    """√ mean (x - x̂)² over all elements of the table."""
    total = sum(float((chunk - coded.reconstruct(part).to(chunk)).square().sum()) for part, chunk in table.chunks())
    return (total / (table.num_rows * table.dim)) ** 0.5
