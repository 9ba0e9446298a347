"""The models that tables are taken from, and how good they are with the rows that a method gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dirembed import calibrate
from hf_dirembed.calibration.calibrated import Calibration
from hf_dirembed.calibration.languages import card_languages
from hf_dirembed.calibration.text import CALIBRATION_TOKENS
from hf_dirembed.calibration.token_weights import token_weights
from hf_dirembed.checkpoints.convert import load_model, load_tokenizer, resolve_checkpoint
from hf_dirembed.evaluation import EvaluationError, load_pairs, load_text, perplexity, sts
from hf_dirembed.remote.modules_dirembed import CompressedEmbedding
from hf_dirembed.remote.tables_dirembed import embedding_of, input_table
from hf_dirembed.tables import has_tied_head

from .methods import Table


Items = Sequence[float]


@dataclass(frozen=True)
class Data:
    """What models are evaluated on.

    Attributes:
        pairs: STS files or dataset ids, for encoders.
        text: Held-out text files or dataset ids, for causal language models.
        calibrate: A text file for those methods that can use one; for causal language models only.
        calibration_tokens: How much of it, at most.
        languages: Of the text that the models are for; by default those of their cards.
        prefix: Put before each sentence of a pair.
        limit: Pairs or tokens of each file, at most.
    """

    pairs: Sequence[str] = ()
    text: Sequence[str] = ()
    calibrate: str | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
    languages: Sequence[str] = ()
    prefix: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        for sources in (self.pairs, self.text):
            names = [Path(source).name for source in sources]
            if twice := {name for name in names if names.count(name) > 1}:
                raise EvaluationError(f"two files are called {twice.pop()}: rename one, as figures go by the name")


class Subject(ABC):
    """A model whose table is replaced.

    Attributes:
        measure: What its figures are.
        change: How a figure is compared with the dense model's.
        name: The model's.
        folder: Where it lies.
        shape: Of its table.
        tied: Whether its head is the same table.
        dense: Its figures on each file, as it is.
        base: What stays the same on each file: the gold score of each pair, the counted tokens of each window.
    """

    measure: ClassVar[str]
    change: ClassVar[str]
    lower_is_better: ClassVar[bool]

    def __init__(self, name: str, folder: Path, model: PreTrainedModel, tokenizer: Any, data: Data) -> None:
        self.name, self.folder, self.data = name, folder, data
        self._model, self._tokenizer = model, tokenizer
        self.tied = has_tied_head(model)
        self._rows = embedding_of(model).weight.detach().clone()
        self.shape: tuple[int, int] = (self._rows.shape[0], self._rows.shape[1])
        self.base: dict[str, Items] = {}
        self.dense = {name: figure for name, (figure, _) in self._figures().items()}

    def table(self, state: Path) -> Table:
        """Its table, with what hf_dirembed's methods know of it.

        Args:
            state: A file that calibration on text goes on from, and is written to meanwhile.
        """
        embedding_of(self._model).weight.data.copy_(self._rows)
        return Table(self._rows, *self._hints(state))

    def _hints(self, state: Path) -> tuple[Tensor | None, Tensor | None]:
        """Token weights and Hessian."""
        languages = tuple(self.data.languages) or card_languages(self.folder) or None
        return token_weights(self._tokenizer, self.shape[0], languages=languages), None

    @torch.no_grad()
    def quality(self, rows: Tensor) -> tuple[dict[str, float], dict[str, Items]]:
        """With these rows as the table, and as the tied head: how the figures change, and their items, on each file.

        Items are the cosine of each pair, or the sum of the losses of each window.
        """
        embedding_of(self._model).weight.copy_(rows)
        figures = self._figures()
        changed = {name: self._changed(found, self.dense[name]) for name, (found, _) in figures.items()}
        return changed, {name: items for name, (_, items) in figures.items()}

    @abstractmethod
    def _figures(self) -> dict[str, tuple[float, Items]]:
        """The figure on each file, and its items; notes `base`."""

    @staticmethod
    @abstractmethod
    def _changed(found: float, dense: float) -> float:
        """A figure compared with the dense model's."""


class Encoder(Subject):
    """A sentence encoder, by semantic textual similarity."""

    measure = "Spearman x 100"
    change = "difference to dense"
    lower_is_better = False

    def _figures(self) -> dict[str, tuple[float, Items]]:
        found: dict[str, tuple[float, Items]] = {}
        for source in self.data.pairs:
            pairs, name = load_pairs(source), Path(source).name
            figures = sts(self._model, pairs, self._tokenizer, prefix=self.data.prefix, limit=self.data.limit)
            found[name] = 100 * figures.spearman, figures.cosines
            self.base[name] = pairs.scores[: self.data.limit]
        return found

    @staticmethod
    def _changed(found: float, dense: float) -> float:
        return found - dense


class CausalLM(Subject):
    """A causal language model, by perplexity in windows of 512 tokens."""

    measure = "perplexity"
    change = "ratio to dense"
    lower_is_better = True

    def _hints(self, state: Path) -> tuple[Tensor | None, Tensor | None]:
        if self.data.calibrate is None:
            return super()._hints(state)
        languages = tuple(self.data.languages) or card_languages(self.folder) or None
        tokens = self.data.calibration_tokens
        statistics = calibrate(self._model, self._tokenizer, self.data.calibrate, max_tokens=tokens, resume=state)
        found = Calibration.of(self._model, self._tokenizer, statistics, languages)
        return found.measure(self._model, self._tokenizer, input_table(self._model), languages)

    def _figures(self) -> dict[str, tuple[float, Items]]:
        found: dict[str, tuple[float, Items]] = {}
        for source in self.data.text:
            text, name = load_text(source), Path(source).name
            figures = perplexity(self._model, self._tokenizer, text, max_tokens=self.data.limit, batch_size=2)
            found[name] = figures.perplexity, figures.window_nll
            self.base[name] = figures.window_tokens
        return found

    @staticmethod
    def _changed(found: float, dense: float) -> float:
        return found / dense


def load_subject(name: str, data: Data) -> Subject:
    """Loads a model, a folder or a Hub id, and evaluates it as it is.

    Raises:
        EvaluationError: If there is no data for a model of its kind, or it comes without a tokenizer.
        DirEmbedError: If it cannot be loaded, or has no table to compress.
    """
    folder = resolve_checkpoint(name)
    model: PreTrainedModel = load_model(folder).eval()
    if isinstance(embedding_of(model), CompressedEmbedding):
        raise EvaluationError(f"{name} is compressed already: name the dense model")
    tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(folder)
    if tokenizer is None:
        raise EvaluationError(f"{name} comes without a tokenizer: save one beside it")
    causal = model.can_generate() and not model.config.is_encoder_decoder
    if not (data.text if causal else data.pairs):
        kind, option = ("a causal language model", "--text") if causal else ("an encoder", "--pairs")
        raise EvaluationError(f"{name} is {kind}: give {option}")
    return (CausalLM if causal else Encoder)(Path(name).name, folder, model, tokenizer, data)
