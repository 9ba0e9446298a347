"""From a model to its compressed form and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration.calibrated import Calibration
from .calibration.statistics import Statistics
from .calibration.text import Texts, check_file
from .calibration.token_weights import token_weights
from .compression.budget import Budget
from .compression.compress import RESUME_WITH, WEIGHING, Settings, check_options, compress_table
from .compression.table import RowSource
from .errors import BudgetError, ModelError
from .hub.metadata import hub_id
from .remote.modeling_dirembed import DirEmbedModelMixin, convert, embedding_of, restore
from .remote.modules_dirembed import CompressedEmbedding


def check_request(
    *,
    method: str = "transform",
    bits: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    calibration: Texts | Statistics | Calibration | None = None,
    resume: str | Path | None = None,
    settings: Settings | None = None,
    metric: Tensor | None = None,
    **_: Any,
) -> None:
    """Refuses what [`compress`] cannot do with any model, before one is read.

    Raises:
        BudgetError: If the method is unknown, there is not exactly one budget, or options do not go together.
        CalibrationError: If a text file to calibrate on cannot be read.

    Example:
        >>> check_request(method="svd", rank=4, calibration="text.txt")
        Traceback (most recent call last):
        ...
        hf_dirembed...BudgetError: method 'svd' takes no calibration: leave it out, or choose transform
    """
    check_options(method, settings, metric)
    Budget(bits, ratio, rank)
    if calibration is not None and method not in WEIGHING:
        raise BudgetError(f"method {method!r} takes no calibration: leave it out, or choose transform")
    if isinstance(calibration, str | Path) and calibration != "self":
        check_file(calibration)
    reads_text = not (calibration is None or isinstance(calibration, (Statistics, Calibration)))
    if resume is not None and not reads_text and method != "autoencoder":
        raise BudgetError(RESUME_WITH)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "transform",
    languages: str | Sequence[str] | None = None,
    calibration: Texts | Statistics | Calibration | None = None,
    weights: Tensor | None = None,
    base_model: str | None = None,
    rows: RowSource | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Compresses the token embedding of a pretrained model, and the head that is tied to it, in place.

    Args:
        model: Any transformers model whose input embedding is an `nn.Embedding`. An untied head stays dense.
        tokenizer: Tells which tokens are frequent. Without it, and without weights, all rows count alike.
        method: `transform`, packed integer latents, the smallest for the quality; `direction`, the subspace that
            keeps directions best, float latents; `autoencoder`, the paper's; `svd`, its baseline.
        languages: Tags of the text that the model is for, like `("en", "de")`, for the token weights; by default
            those that the tokenizer was made for.
        calibration: How the model uses its table: text (a file's path, strings or a `datasets` dataset), the
            statistics that [`calibrate`] made of some, or `"self"`, which needs no data: text that a causal language
            model generates itself, words of the lists for an encoder without a head. It runs the model, and lets a
            table of the same size do far better. Processes that were launched together share the work: call it in
            all of them.
        weights: (V,) token weights, instead of those that tokenizer, languages and calibration give.
        base_model: The model's Hub id, for the record; by default the one that it was loaded by.
        rows: The table, where the model is on the meta device and so does not hold it.
        resume: A file that calibration on text, or the training of `autoencoder`, is saved in now and then, and goes
            on from if it exists.
        **options: Those of [`compress_table`]: exactly one of `bits`, `ratio` and `rank`; `codes`, `settings`,
            `metric`, `device`.

    Returns:
        The model it was given.

    Raises:
        BudgetError: If the method is unknown, or the budget or a setting cannot be met.
        CalibrationError: If there is nothing to calibrate with, or the model cannot be calibrated.
        CheckpointError: If `resume` does not belong to this model and settings, or cannot be written.
        ModelError: If the model has no token embedding that can be compressed, or is compressed already.
        TableError: If the table holds NaNs or infinities, or is quantised.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = compress(BertModel(config), method="svd", ratio=4)
        >>> model.get_input_embeddings()
        CompressedEmbedding(500, 32, method=svd, rank=7, bits_per_weight=7.45)
    """
    embedding = embedding_of(model)
    if isinstance(embedding, CompressedEmbedding):
        raise ModelError(f"the model is compressed already (method {embedding.spec.method!r}): expand it first")
    check_request(method=method, calibration=calibration, resume=resume, **options)
    used = calibration if isinstance(calibration, Calibration) else None
    if calibration is not None:
        used = used or Calibration.of(model, tokenizer, calibration, languages, resume=resume)
        resume = None
        weights = used.weights if weights is None else weights
        if method == "transform" and options.get("metric") is None:
            options["metric"] = used.metric
    elif weights is None and tokenizer is not None and method in WEIGHING:
        weights = token_weights(tokenizer, embedding.num_embeddings, languages=languages)
    rows = embedding.weight.data if rows is None else rows
    coded = compress_table(
        rows, method=method, weights=weights, padding_idx=embedding.padding_idx, resume=resume, **options
    )
    record = {
        "base_model": base_model or hub_id(model.name_or_path),
        "languages": [languages] if isinstance(languages, str) else list(languages or ()),
        "calibration": None if used is None else used.source,
        "calibration_tokens": None if used is None else used.num_tokens,
    }
    settings = {**coded.spec.settings, **{name: value for name, value in record.items() if value}}
    return convert(model, replace(coded.spec, settings=settings), coded.tensors)


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a compressed model, in place, back into a stock dense one, for engines that know no plugin.

    Args:
        model: A compressed model.

    Returns:
        The model it was given: of the stock class, its table the one that the codes stand for.

    Raises:
        ModelError: If the model is not compressed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = expand(compress(BertModel(config), method="svd", ratio=4))
        >>> type(model).__name__, model.get_input_embeddings()
        ('BertModel', Embedding(500, 32, padding_idx=0))
    """
    if not isinstance(model, DirEmbedModelMixin):
        raise ModelError(f"{type(model).__name__} is not compressed: there is nothing to expand")
    return restore(model)
