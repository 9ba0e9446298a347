"""What calibration says about each table of a model: how much its rows count, and what their errors cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..compression.distortion import weighted_variance
from ..compression.table import Table
from ..errors import CalibrationError
from ..remote.tables_dirembed import tied_modules
from ..tables import is_head
from .calibrate import calibrate
from .self_text import reads_words, self_texts
from .statistics import Statistics, damped, hessian, usage
from .text import CALIBRATION_TOKENS, Texts
from .token_weights import token_weights


FEW_TOKENS = 1_000  # of which statistics are hardly better than none
logger = logging.get_logger(__name__)

Languages: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Calibration:
    """What was seen of a model on text.

    Attributes:
        statistics: Of its input embedding, its head, and what else is looked up.
        of_lists: Whether the text was drawn from word lists, which say more of how frequent tokens are than it does.
        source: What it was made of, for the record; of a file its name alone.
    """

    statistics: Statistics
    of_lists: bool
    source: str

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        source: Texts | Statistics,
        languages: Languages,
        *,
        max_tokens: int = CALIBRATION_TOKENS,
        resume: str | Path | None = None,
    ) -> Calibration:
        """Reads text, or statistics made of it.

        Raises:
            CalibrationError: If there is no tokenizer, or the model cannot be calibrated, or `resume` is of another
                calibration.
            CheckpointError: If `resume` cannot be written.
        """
        if tokenizer is None:
            raise CalibrationError(
                "calibration needs the model's tokenizer: pass it as the second argument, or save it beside the model"
            )
        languages, described = (languages,) if isinstance(languages, str) else languages, _describe(source)
        of_lists = False
        if isinstance(source, str) and source == "self":
            of_lists = reads_words(model)
            source = self_texts(model, tokenizer, num_tokens=max_tokens, languages=languages)
        if not isinstance(source, Statistics):
            source = calibrate(model, tokenizer, source, max_tokens=max_tokens, resume=resume)
        if source.num_tokens < FEW_TOKENS:
            logger.warning(
                f"calibration on {described} saw {source.num_tokens:,} tokens alone, which say little: give a few ten "
                "thousand"
            )
        return cls(source, of_lists, described)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, languages: Languages
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token weights and Hessian of a table that is coded as one, as [`weights`] and [`hessian`] give them."""
        return self.weights(model, tokenizer, path, languages), self.hessian(model, path)

    def weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, languages: Languages
    ) -> Tensor | None:
        """Token weights of a table, (V,) float64; None of a hashed table, whose rows count alike.

        Args:
            model: The dense model.
            tokenizer: Its tokenizer.
            path: Of the table's module.
            languages: As for [`token_weights`].
        """
        is_read, predicts = _sides(model, path)
        seen = self.statistics.further.get(path)
        if seen is not None and seen.counts is None:
            return None

        counts = None if seen is None else seen.counts
        if is_read or predicts:
            counts = self._counts(is_read, predicts)
        rows = model.get_parameter(f"{path}.weight").shape[0]
        return token_weights(tokenizer, rows, languages=languages, counts=None if self.of_lists else counts)

    def hessian(self, model: PreTrainedModel, path: str, block: int = 0) -> Tensor | None:
        """Hessian of a table, (d, d) float64; None where nothing was seen of it.

        Args:
            model: The dense model.
            path: Of the table's module.
            block: Which block of columns, of a table that is coded in several.
        """
        is_read, predicts = _sides(model, path)
        if is_read or predicts:
            return hessian(self.statistics, use_head=predicts, use_gradient=is_read)
        seen = self.statistics.further.get(path)
        moment = None if seen is None else seen.moment(block)
        return None if moment is None else damped(moment)

    def cost(self, model: PreTrainedModel, path: str, block: int, rows: Table) -> float | None:
        """What leaving a table uncoded, but for its mean, costs the loss, to second order, in nats per prediction.

        An error e of the row of token v costs ½ eᵀ E[g gᵀ] e each time that v is read, and ½ p (1 - p) eᵀ E[h hᵀ] e
        for each prediction that gives v the probability p. [`hessian`] is scaled, this is not: so costs compare.

        Args:
            model: The dense model.
            path: Of the table's module.
            block: Which block of columns, of a table that is coded in several; 0 otherwise.
            rows: Of the table, or of that block.

        Returns:
            The cost; None where nothing was seen of the table, or nothing was predicted, and so there is no loss.
        """
        seen, (is_read, predicts) = self.statistics, _sides(model, path)
        further = seen.further.get(path)
        moment = None if further is None else further.moment(block)
        if not seen.num_predictions or not (is_read or predicts or moment is not None):
            return None
        total = 0.0
        if is_read and seen.gradient_moment is not None:
            total += weighted_variance(rows, seen.counts / seen.num_predictions, seen.gradient_moment) / 2
        if predicts and seen.head_moment is not None:
            weights = _known(seen.probabilities) if seen.uncertainty is None else seen.uncertainty
            total += weighted_variance(rows, weights, seen.head_moment) / 2
        if further is not None and moment is not None:
            counts = torch.full((rows.num_rows,), further.num_reads / rows.num_rows)
            counts = counts if further.counts is None else further.counts
            total += weighted_variance(rows, counts / seen.num_predictions, moment) / 2
        return total

    def _counts(self, is_read: bool, predicts: bool) -> Tensor:
        """How often each row of a table was used."""
        if is_read:
            return usage(self.statistics, tied=predicts)
        return self.statistics.num_tokens * _known(self.statistics.probabilities)


def _sides(model: PreTrainedModel, path: str) -> tuple[bool, bool]:
    """Whether a table is the one that calibration sees token ids read, and whether the model's head multiplies it."""
    shared = {model.get_submodule(name) for name in tied_modules(model, path)}
    return model.get_input_embeddings() in shared, is_head(model, path)


def _known(probabilities: Tensor | None) -> Tensor:
    if probabilities is None:
        raise CalibrationError("the statistics are of a model without a head: calibrate the model that has one")
    return probabilities


def _describe(calibration: Texts | Statistics) -> str:
    """What a model was calibrated on, for the record; of a file its name alone."""
    if isinstance(calibration, Statistics):
        return "given statistics"
    if isinstance(calibration, (str, os.PathLike)):
        return Path(calibration).name
    return "given texts"
