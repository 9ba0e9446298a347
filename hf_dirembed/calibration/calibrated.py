"""What calibration says about a table: the weights of its rows, and the metric of their errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError
from ..remote.modeling_dirembed import embedding_of, tied_modules
from .calibrate import calibrate
from .self_text import reads_words, self_texts
from .statistics import Statistics, metric, usage
from .text import CALIBRATION_TOKENS, Texts
from .token_weights import token_weights


@dataclass(frozen=True)
class Calibration:
    """What calibration says about a table.

    Attributes:
        weights: (V,) token weights.
        metric: (d, d) what errors are measured in.
        num_tokens: Tokens of the text that it was made of.
        source: What it was made of, for the record; of a file its name alone.
    """

    weights: Tensor
    metric: Tensor
    num_tokens: int
    source: str

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        source: Texts | Statistics,
        languages: str | Sequence[str] | None,
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
            raise CalibrationError("calibration needs the model's tokenizer: pass it as the second argument")
        languages, described = (languages,) if isinstance(languages, str) else languages, _describe(source)
        tied, of_lists = has_tied_head(model), False
        if isinstance(source, str) and source == "self":
            of_lists = reads_words(model)
            source = self_texts(model, tokenizer, num_tokens=max_tokens, languages=languages)
        if not isinstance(source, Statistics):
            source = calibrate(model, tokenizer, source, max_tokens=max_tokens, resume=resume)
        # Words that were drawn from lists say less of how frequent they are than the lists themselves.
        counts = None if of_lists else usage(source, tied=tied)
        weights = token_weights(tokenizer, embedding_of(model).num_embeddings, languages=languages, counts=counts)
        return cls(weights, metric(source, use_head=tied), source.num_tokens, described)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the model's output embedding multiplies the same table."""
    head = model.get_output_embeddings()
    return any(model.get_submodule(name) is head for name in tied_modules(model))


def _describe(calibration: Texts | Statistics) -> str:
    """What a model was calibrated on, for the record; of a file its name alone."""
    if isinstance(calibration, Statistics):
        return "given statistics"
    if isinstance(calibration, (str, os.PathLike)):
        return Path(calibration).name
    return "given texts"
