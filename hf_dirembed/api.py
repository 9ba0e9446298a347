"""From a model to its compressed form and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration.calibrated import Calibration
from .calibration.statistics import Statistics
from .calibration.text import Texts
from .compression.compress import Effort, Settings
from .conversion import restore
from .errors import ModelError
from .hub.publishing import remove_traces
from .pipeline import compress_model
from .remote.codes_dirembed import with_known_options
from .remote.modeling_dirembed import DirEmbedModelMixin
from .request import CompressionRequest


@with_known_options
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    bits: float | Mapping[str, float] | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    tables: Sequence[str] | None = None,
    method: str = "transform",
    languages: str | Sequence[str] | None = None,
    calibration: Texts | Statistics | Calibration | None = None,
    token_weights: Tensor | None = None,
    hessian: Tensor | None = None,
    latent_dtype: str | None = None,
    settings: Settings | None = None,
    device: torch.device | str | None = None,
    base_model: str | None = None,
    resume: str | Path | None = None,
    effort: Effort | None = None,
) -> PreTrainedModel:
    """Compresses the vocabulary tables of a pretrained model, in place: whatever token ids look up, and LM heads.

    Exactly one of `bits`, `ratio` and `rank` says how small.

    Args:
        model: Any transformers model with an `nn.Embedding` that reads token ids.
        tokenizer: Tells which tokens are frequent. Without it, and without weights, all rows count alike.
        bits: Bits per weight over all tables together, all tensors that replace them counted; or of each table, by
            name, like `{"embed_tokens": 2, "lm_head": 4}`: then tables that are not named stay dense.
        ratio: The bytes of the tables over the bytes that replace them.
        rank: The number of latents, for the methods with float latents.
        tables: Paths of the tables to compress, or their last parts; by default all that [`find_tables`] finds.
        method: `transform`, packed integer latents, the smallest for the quality; `direction`, the subspace that
            keeps directions best, float latents; `autoencoder`, the paper's; `svd`, its baseline.
        languages: Tags of the text that the model is for, like `("en", "de")`, for the token weights; by default
            those that the tokenizer was made for.
        calibration: How the model uses its tables: text (a file's path, strings or a `datasets` dataset), the
            statistics that [`calibrate`] made of some, or `"self"`, which needs no data: text that a causal language
            model generates itself, words of the lists for an encoder without a head. It runs the model, and lets a
            table of the same size do far better. Processes that were launched together share the work: call it in
            all of them.
        token_weights: (V,) token weights, instead of those that tokenizer, languages and calibration give.
        hessian: (d, d) what errors of the one table are measured in, instead of what calibration gives.
        latent_dtype: Of float latents: `float32`, `float16` or `bfloat16`; by default the table's.
        settings: `TransformSettings` or `AutoencoderSettings`: how the method fits.
        device: Where to fit; by default a GPU where there is one.
        base_model: The model's Hub id, for the record; by default the one that it was loaded by.
        resume: A file that calibration on text, or the training of `autoencoder`, is saved in now and then, and goes
            on from if it exists.
        effort: How long `transform` may fit: `fast`, `balanced`, which is the default, or `thorough`; docs/budgets.md
            says what each costs and gives.

    Returns:
        The model it was given.

    Raises:
        BudgetError: If there is not exactly one budget, or it cannot be met.
        CalibrationError: If there is nothing to calibrate with, or the model cannot be calibrated.
        CheckpointError: If `resume` does not belong to this model and settings, or cannot be written.
        ModelError: If the model has no table that can be compressed, or is compressed already.
        OptionError: If an option is not of its kind, does not go with another, or names no table.
        TableError: If a table holds NaNs or infinities, or is quantised.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = compress(BertModel(config), method="svd", ratio=4)
        >>> model.get_input_embeddings()
        CompressedEmbedding(500, 32, method=svd, rank=7, bits_per_weight=7.45)
    """
    request = CompressionRequest(
        bits, ratio, rank, tables, method, languages, calibration, token_weights, hessian, latent_dtype, settings,
        device, base_model, resume, effort,
    )  # fmt: skip
    return compress_model(model, tokenizer, request)


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a compressed model, in place, back into a stock dense one, for engines that know no plugin.

    Args:
        model: A compressed model.

    Returns:
        The model it was given: of the stock class, its tables the ones that the codes stand for.

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
    stock = restore(model)
    vars(stock)["save_pretrained"] = MethodType(_save_over_compressed, stock)
    return stock


def _save_over_compressed(self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Like the class's; a folder that held a compressed model holds none of its code, card and figures afterwards."""
    saved = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    remove_traces(save_directory)
    return saved


_save_over_compressed.__name__ = "save_pretrained"  # by which pickle finds the method again, the class's
