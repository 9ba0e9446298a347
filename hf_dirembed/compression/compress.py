"""From a table, or a model, to its compressed form and back."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_dirembed import FLOAT_CODES, BudgetError, CompressionSpec, ModelError, TableError
from ..embedding_dirembed import CompressedEmbedding
from ..modeling_dirembed import convert, embedding_of, restore
from .autoencoder import AutoencoderSettings, train_autoencoder
from .budget import Budget, TableSize
from .coded import CodedTable
from .factorization import Factorization
from .subspace import direction, mean_cosine, svd
from .table import Table
from .weights import token_weights


METHODS = ("direction", "autoencoder", "svd")


def compress_table(
    rows: Tensor,
    *,
    method: str = "direction",
    bits: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    codes: str | None = None,
    weights: Tensor | None = None,
    settings: AutoencoderSettings | None = None,
    device: torch.device | str | None = None,
) -> CodedTable:
    """Compresses a table of any torch model: [`compress`] without the model.

    Args:
        rows: (V, d) table of a floating dtype; left as it is.
        method: One of `METHODS`.
        bits: Budget in bits per weight, all tensors that replace the table counted.
        ratio: Budget as the table's bytes over the bytes that replace it.
        rank: Budget as the number of latents. Exactly one of the three is given.
        codes: Dtype of the latents, `float32`, `float16` or `bfloat16`; by default the table's.
        weights: (V,) non-negative: how much each row counts, for `direction`. Uniform by default.
        settings: How `autoencoder` trains; by default as in the paper, with larger batches.
        device: Where to fit; by default a GPU where there is one.

    Raises:
        BudgetError: If the method is unknown, or the budget or a setting cannot be met.
        TableError: If `rows` is no matrix of finite floats.

    Example:
        >>> coded = compress_table(torch.randn(500, 32), method="svd", ratio=4)
        >>> coded.spec.rank, {name: tuple(tensor.shape) for name, tensor in coded.tensors.items()}
        (7, {'weight': (500, 7), 'decoder_weight': (7, 32)})
    """
    if method not in METHODS:
        raise BudgetError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if settings is not None and method != "autoencoder":
        raise BudgetError(f"method {method!r} takes no settings: leave out {settings!r}")
    if not rows.is_floating_point():
        raise TableError(f"the embedding table is of dtype {rows.dtype}: load the model unquantised")
    table = Table(rows, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = TableSize(table.num_rows, table.dim, rows.element_size())
    budget = Budget(bits, ratio, rank)
    codes = codes or str(rows.dtype).removeprefix("torch.")
    if codes not in FLOAT_CODES:
        raise BudgetError(f"codes {codes!r} are no dtype of latents: choose one of {', '.join(FLOAT_CODES)}")

    code_dtype = getattr(torch, codes)
    rank = budget.float_rank(
        size, code_itemsize=code_dtype.itemsize, decoder_itemsize=rows.element_size(), bias=method != "svd"
    )
    made_with: dict[str, Any] = {"budget": str(budget), "token_weights": weights is not None}
    if method == "autoencoder":
        settings = settings or AutoencoderSettings()
        made_with["autoencoder"] = asdict(settings)
    factorization = _factorize(table, method, rank, weights, settings)
    spec = CompressionSpec(
        method=method,
        rank=rank,
        codes=codes,
        decoder=str(rows.dtype).removeprefix("torch."),
        bias=factorization.bias is not None,
        settings={**made_with, "versions": {name: version(name) for name in ("hf_dirembed", "torch")}},
    )
    tensors = {
        "weight": factorization.latents.to(code_dtype),
        "decoder_weight": factorization.decoder.to(rows.dtype),
    }
    if factorization.bias is not None:
        tensors["decoder_bias_weight"] = factorization.bias.to(rows.dtype)
    coded = CodedTable(spec, tensors, rows.dtype)
    figures = {"dense_bytes": size.dense_bytes, "mean_cosine": round(mean_cosine(table, coded), 6)}
    return replace(coded, spec=replace(spec, figures=figures))


def _factorize(
    table: Table, method: str, rank: int, weights: Tensor | None, settings: AutoencoderSettings | None
) -> Factorization:
    if method == "svd":
        return svd(table, rank)
    if method == "direction":
        return direction(table, rank, weights)
    return train_autoencoder(table, rank, settings)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "direction",
    languages: tuple[str, ...] | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Compresses the token embedding of a pretrained model, and the head that is tied to it, in place.

    Args:
        model: Any transformers model whose input embedding is an `nn.Embedding`. An untied head stays dense.
        tokenizer: Tells which tokens are frequent, which is what `direction` weighs them by.
        method: `svd`, the paper's baseline; `autoencoder`, the paper's method; or `direction`, the same in closed
            form.
        languages: ISO codes of the text that the model is for, like `("en", "de")`, for the token weights.
        weights: (V,) token weights, instead of those that the tokenizer gives.
        **options: Those of [`compress_table`]: exactly one of `bits`, `ratio` and `rank`; `codes`, `settings`,
            `device`.

    Returns:
        The model it was given.

    Raises:
        BudgetError: If the method is unknown, or the budget or a setting cannot be met.
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
    if weights is None and tokenizer is not None and method != "svd":
        weights = token_weights(tokenizer, embedding.num_embeddings, languages=languages)
    coded = compress_table(embedding.weight.data, method=method, weights=weights, **options)
    return convert(model, coded.spec, coded.tensors)


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
    if not isinstance(embedding_of(model), CompressedEmbedding):
        raise ModelError(f"{type(model).__name__} is not compressed: there is nothing to expand")
    return restore(model)
