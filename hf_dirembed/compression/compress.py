"""From a table, or a model, to its compressed form and back."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import BudgetError, TableError, first_line
from ..remote.codes_dirembed import FLOAT_CODES
from .baselines.autoencoder import AutoencoderSettings, train_autoencoder
from .budget import Budget, TableSize
from .coded import CodedTable
from .distortion import TEMPERING, Measure
from .quality import table_figures
from .subspace import direction, svd
from .table import RowSource, Table
from .transform.transform import TransformSettings, transform


logger = logging.get_logger(__name__)

METHODS = ("transform", "direction", "autoencoder", "svd")
WEIGHING = ("transform", "direction")  # that is, rows by how often their tokens are expected
SETTINGS = {"transform": TransformSettings, "autoencoder": AutoencoderSettings}
VERSIONS = ("hf_dirembed", "torch", "transformers", "numba", "numpy", "wordfreq")  # that the bytes may depend on
RESUME_WITH = "resume goes with calibration on text and with method 'autoencoder': leave it out"

Settings = TransformSettings | AutoencoderSettings


def compress_table(
    rows: Tensor | RowSource,
    *,
    method: str = "transform",
    bits: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    codes: str | None = None,
    weights: Tensor | None = None,
    metric: Tensor | None = None,
    settings: Settings | None = None,
    padding_idx: int | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
) -> CodedTable:
    """Compresses a table of any torch model: [`compress`] without the model.

    Args:
        rows: (V, d) table of a floating dtype, or anything that gives its row slices; left as it is.
        method: One of `METHODS`.
        bits: Budget in bits per weight, all tensors that replace the table counted.
        ratio: Budget as the table's bytes over the bytes that replace it.
        rank: Budget as the number of latents, for the methods with float latents. Exactly one of the three is given.
        codes: Dtype of float latents, `float32`, `float16` or `bfloat16`; by default the table's.
        weights: (V,) non-negative: how much each row counts, for `transform` and `direction`. Uniform by default.
        metric: (d, d) what errors are measured in, for `transform`; by default they are relative to rows' lengths.
        settings: How `transform` or `autoencoder` fit; by default as their classes say.
        padding_idx: The row of the padding token; where it is zero, it stays exactly so.
        device: Where to fit; by default a GPU where there is one.
        resume: A file that `autoencoder` saves its training in after every epoch, and goes on from if it exists.

    Raises:
        BudgetError: If the method is unknown, or the budget or a setting cannot be met.
        CheckpointError: If `resume` does not belong to this table and settings, or cannot be written.
        TableError: If `rows` is no matrix of finite floats.

    Example:
        >>> coded = compress_table(torch.randn(500, 32), method="svd", ratio=4)
        >>> coded.spec.rank, {name: tuple(tensor.shape) for name, tensor in coded.tensors.items()}
        (7, {'decoder_weight': (7, 32), 'weight': (500, 7)})
    """
    check_options(method, settings, metric)
    if resume is not None and method != "autoencoder":
        raise BudgetError(RESUME_WITH)
    dtype = rows.dtype
    if dtype is None or not dtype.is_floating_point:
        raise TableError(f"the embedding table is of dtype {dtype}: load the model unquantised")
    device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    table = Table(rows, device=device)
    size = TableSize(table.num_rows, table.dim, dtype.itemsize)
    budget = Budget(bits, ratio, rank)
    tempering = settings.tempering if isinstance(settings, TransformSettings) else TEMPERING
    measure = Measure(weights, metric, tempering)
    if method == "transform":
        coded = _transform(table, size, budget, dtype, codes, measure, settings)
    else:
        coded = _factorize(table, size, budget, dtype, codes, method, weights, settings, resume)
    if not coded.fits(dtype):
        raise _out_of_range(coded, dtype)
    made_with: dict[str, Any] = {"budget": str(budget), "token_weights": weights is not None}
    if method == "transform":
        made_with["metric"] = metric is not None
    if method in SETTINGS:
        made_with[method] = asdict(settings or SETTINGS[method]())
    made_with |= {"device": device.type, "threads": torch.get_num_threads()}  # sums round differently on others
    made_with["versions"] = {name: version(name) for name in VERSIONS}
    figures = {"dense_bytes": size.dense_bytes, **table_figures(table, coded, measure)}
    if shortened := figures.get("shortened_rows"):
        logger.warning(
            f"rows of the embedding table that are far longer than most: {shortened:,}. Their direction is kept, to a "
            f"mean cosine of {figures['shortened_cosine']:.4f}, their length is cut; methods of float latents keep it."
        )
    is_zero = padding_idx is not None and not table.rows[padding_idx : padding_idx + 1].any()
    zero_row = padding_idx if is_zero else None
    return replace(coded, spec=replace(coded.spec, zero_row=zero_row, settings=made_with, figures=figures))


def _out_of_range(coded: CodedTable, dtype: torch.dtype) -> TableError:
    narrow = "float16" if dtype == torch.float16 else coded.spec.codes
    return TableError(
        f"what would replace the embedding table exceeds the range of {narrow}: "
        "give the model, and float latents, in bfloat16 or float32"
    )


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # what torch raises on a device that it was not built for
        raise BudgetError(f"device {str(device)!r} cannot be used ({first_line(error)}): give cpu") from error


def check_options(method: str, settings: Settings | None, metric: Tensor | None) -> None:
    """Refuses a method that there is not, and what it does not take.

    Raises:
        BudgetError: If the method is unknown, or settings or metric do not go with it.
    """
    if method not in METHODS:
        raise BudgetError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if settings is not None and type(settings) is not SETTINGS.get(method):
        raise BudgetError(f"method {method!r} does not take {type(settings).__name__}: leave the settings out")
    if metric is not None and method != "transform":
        raise BudgetError(f"method {method!r} takes no metric: leave it out, or choose transform")


def _transform(
    table: Table,
    size: TableSize,
    budget: Budget,
    dtype: torch.dtype,
    codes: str | None,
    measure: Measure,
    settings: Settings | None,
) -> CodedTable:
    max_bytes = budget.max_bytes(size)
    if max_bytes is None:
        raise BudgetError(f"{budget} goes with methods of float latents: give transform bits or a ratio")
    if codes is not None:
        raise BudgetError(f"codes={codes!r} goes with methods of float latents: transform packs its own")
    assert not isinstance(settings, AutoencoderSettings)
    return transform(table, max_bytes, dtype=dtype, measure=measure, settings=settings)


def _factorize(
    table: Table,
    size: TableSize,
    budget: Budget,
    dtype: torch.dtype,
    codes: str | None,
    method: str,
    weights: Tensor | None,
    settings: Settings | None,
    resume: str | Path | None,
) -> CodedTable:
    decoder = str(dtype).removeprefix("torch.")
    if decoder not in FLOAT_CODES:
        raise TableError(f"the embedding table is of dtype {decoder}: give the model in {' or '.join(FLOAT_CODES)}")
    codes = codes or decoder
    if codes not in FLOAT_CODES:
        raise BudgetError(f"codes {codes!r} are no dtype of latents: choose one of {', '.join(FLOAT_CODES)}")
    code_dtype = getattr(torch, codes)
    rank = budget.float_rank(
        size, code_itemsize=code_dtype.itemsize, decoder_itemsize=dtype.itemsize, bias=method != "svd"
    )
    if method == "svd":
        found = svd(table, rank)
    elif method == "direction":
        found = direction(table, rank, weights)
    else:
        assert not isinstance(settings, TransformSettings)
        found = train_autoencoder(table, rank, settings, resume=resume)
    coded = CodedTable.of(found, method, codes=codes, decoder=decoder)
    if not coded.keeps(found):
        raise _out_of_range(coded, dtype)
    return coded
