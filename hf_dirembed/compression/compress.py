"""One table → codes, decoder and record, by any of the methods."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import BudgetError, OptionError, TableError, first_line
from ..progress import Progress, progress_bar
from ..remote.codes_dirembed import FLOAT_CODES, TableRecord
from .baselines.autoencoder import AutoencoderSettings, train_autoencoder
from .baselines.factorization import Factorization
from .budget import Budget, LatentStorage, TableSize
from .coded import CodedTable
from .distortion import TEMPERING, Measure
from .quality import table_quality
from .row_files import MakeSink, memory_sink
from .subspace import direction, svd
from .table import RowSource, Table
from .transform.sampled import CodedRows, code_large, is_large
from .transform.transform import EFFORTS, TransformSettings, transform
from .work import FittingWork


logger = logging.get_logger(__name__)

METHODS = ("transform", "direction", "autoencoder", "svd")
WEIGHING = ("transform", "direction")  # that is, rows by how often their tokens are expected
SETTINGS = {"transform": TransformSettings, "autoencoder": AutoencoderSettings}
VERSIONS = ("hf_dirembed", "torch", "transformers", "numpy", "wordfreq")  # that the bytes may depend on

Settings = TransformSettings | AutoencoderSettings
Effort: TypeAlias = Literal["fast", "balanced", "thorough"]  # of `EFFORTS`


@dataclass(frozen=True)
class MethodOptions:
    """How tables are compressed, whatever their budget; checked when it is made.

    Attributes:
        method: One of `METHODS`.
        latent_dtype: Dtype of float latents, one of `FLOAT_CODES`; by default the table's.
        settings: How `transform` or `autoencoder` fit; by default as their classes say.
        device: Where to fit; by default a GPU where there is one.
        effort: How long `transform` may fit, one of `EFFORTS`; by default as long as the settings say.

    Raises:
        OptionError: If the method is unknown, or an option is not of its kind, or does not go with the method.

    Example:
        >>> MethodOptions("svd", settings=TransformSettings())
        Traceback (most recent call last):
        ...
        hf_dirembed...OptionError: method 'svd' takes no TransformSettings: leave the settings out
        >>> MethodOptions(effort="fast").transform_settings.passes
        0
    """

    method: str = "transform"
    latent_dtype: str | None = None
    settings: Settings | None = None
    device: torch.device | str | None = None
    effort: Effort | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method {self.method!r} is unknown: choose one of {', '.join(METHODS)}")
        if self.settings is not None and type(self.settings) is not SETTINGS.get(self.method):
            kind = type(self.settings).__name__
            raise OptionError(f"method {self.method!r} takes no {kind}: leave the settings out")
        self._check_effort()
        if self.latent_dtype is not None and self.method == "transform":
            raise OptionError(
                f"latent_dtype={self.latent_dtype!r} goes with methods of float latents: transform packs its own"
            )
        if self.latent_dtype is not None and self.latent_dtype not in FLOAT_CODES:
            known = ", ".join(FLOAT_CODES)
            raise OptionError(f"latent_dtype={self.latent_dtype!r} is no dtype of latents: choose one of {known}")

    def _check_effort(self) -> None:
        if self.effort is None:
            return
        if not isinstance(self.effort, str) or self.effort not in EFFORTS:
            raise OptionError(f"effort={self.effort!r} is unknown: choose one of {', '.join(EFFORTS)}")
        if self.method != "transform":
            raise OptionError(f"method {self.method!r} takes no effort: leave it out, or choose transform")
        if self.settings is None:
            return
        assert isinstance(self.settings, TransformSettings)
        preset = EFFORTS[self.effort]
        if (self.settings.passes, self.settings.sample_rows) != (preset.passes, preset.sample_rows):
            raise OptionError(
                f"effort={self.effort!r} stands for passes={preset.passes} and sample_rows={preset.sample_rows}, the "
                f"settings for {self.settings.passes} and {self.settings.sample_rows}: leave one of them out"
            )

    def check(self, budget: Budget, hessian: Tensor | None) -> None:
        """Refuses a budget or a Hessian that does not go with the method.

        Raises:
            OptionError: If it does not.
        """
        if self.method == "transform" and budget.rank is not None:
            raise BudgetError(f"{budget} goes with methods of float latents: give transform bits or a ratio")
        if self.method != "transform" and hessian is not None:
            raise OptionError(f"method {self.method!r} takes no hessian: leave it out, or choose transform")

    @property
    def tempering(self) -> float:
        """The exponent of the token weights."""
        return self.transform_settings.tempering if self.method == "transform" else TEMPERING

    @property
    def transform_settings(self) -> TransformSettings:
        """How `transform` fits."""
        if isinstance(self.settings, TransformSettings):
            return self.settings
        return EFFORTS[self.effort or "balanced"]

    @property
    def all_settings(self) -> Settings | None:
        """How the method fits; None for one without settings."""
        if self.method == "transform":
            return self.transform_settings
        return self.settings or (AutoencoderSettings() if self.method == "autoencoder" else None)

    def latent_storage(self, dtype: torch.dtype) -> LatentStorage:
        """How float latents of a table of that dtype are stored.

        Raises:
            TableError: If decoders of that dtype cannot be stored.
        """
        decoder = str(dtype).removeprefix("torch.")
        if decoder not in FLOAT_CODES:
            raise TableError(
                f"the embedding table is of dtype {decoder}: give the model in {' or '.join(FLOAT_CODES)}"
            )
        codes = getattr(torch, self.latent_dtype or decoder)
        return LatentStorage(codes.itemsize, decoder_itemsize=dtype.itemsize, bias=self.method != "svd")

    def fitting_device(self) -> torch.device:
        """Where to fit.

        Raises:
            OptionError: If torch cannot use that device.
        """
        return _usable(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # what torch raises on a device that it was not built for
        raise OptionError(f"device {str(device)!r} cannot be used ({first_line(error)}): give cpu") from error


def compress_table(
    rows: Tensor | RowSource,
    *,
    bits: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    num_bytes: int | None = None,
    method: str = "transform",
    token_weights: Tensor | None = None,
    hessian: Tensor | None = None,
    latent_dtype: str | None = None,
    settings: Settings | None = None,
    padding_idx: int | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    make_sink: MakeSink = memory_sink,
    effort: Effort | None = None,
) -> CodedTable:
    """Compresses a table of any torch model: [`hf_dirembed.compress`] without the model.

    Args:
        rows: (V, d) table of a floating dtype, or anything that gives its row slices; left as it is.
        bits: Budget in bits per weight, all tensors that replace the table counted.
        ratio: Budget as the table's bytes over the bytes that replace it.
        rank: Budget as the number of latents, for the methods with float latents.
        num_bytes: Budget as the bytes of all tensors that replace the table. Exactly one of the four is given.
        method: One of `METHODS`.
        token_weights: (V,) non-negative: how much each row counts, for `transform` and `direction`. Uniform by
            default.
        hessian: (d, d) what errors are measured in, for `transform`; by default they are relative to rows' lengths.
        latent_dtype: Dtype of float latents, `float32`, `float16` or `bfloat16`; by default the table's.
        settings: How `transform` or `autoencoder` fit; by default as their classes say.
        padding_idx: The row of the padding token; where it is zero, it stays exactly so.
        device: Where to fit; by default a GPU where there is one.
        resume: A file that `autoencoder` saves its training in after every epoch, and goes on from if it exists.
        make_sink: Makes the place, for the codes of a table of more than a million rows that all count alike, from
            the name and shape of their tensor; by default in memory.
        effort: How long `transform` may fit: `fast`, `balanced` or `thorough`; by default as the settings say.

    Raises:
        BudgetError: If the budget cannot be met.
        CheckpointError: If `resume` does not belong to this table and settings, or cannot be written.
        OptionError: If the method is unknown, or options are out of range or do not go together.
        TableError: If `rows` is no matrix of finite floats.

    Example:
        >>> coded = compress_table(torch.randn(500, 32), method="svd", ratio=4)
        >>> coded.layout.rank, {name: tuple(tensor.shape) for name, tensor in coded.tensors.items()}
        (7, {'decoder_weight': (7, 32), 'weight': (500, 7)})
    """
    options = MethodOptions(method, latent_dtype, settings, device, effort)
    budget = Budget(bits, ratio, rank, num_bytes)
    options.check(budget, hessian)
    if resume is not None and method != "autoencoder":
        raise OptionError("resume goes with calibration on text and with method 'autoencoder': leave it out")
    with progress_bar(f"Fitting {' x '.join(map(str, rows.shape))}", 1.0, shown=shows_progress(method)) as progress:
        coded = fit_table(
            rows, budget, options, Measure(token_weights, hessian, options.tempering), padding_idx=padding_idx,
            resume=resume, make_sink=make_sink, progress=progress,
        )  # fmt: skip
    warn_of_shortened(coded.record)
    return coded


def shows_progress(method: str) -> bool:
    """Whether a method says how far it is: the autoencoder has a bar of its own, over its epochs.

    Example:
        >>> shows_progress("transform"), shows_progress("autoencoder")
        (True, False)
    """
    return method != "autoencoder"


def fit_table(
    rows: Tensor | RowSource,
    budget: Budget,
    options: MethodOptions,
    measure: Measure,
    *,
    padding_idx: int | None = None,
    resume: str | Path | None = None,
    make_sink: MakeSink = memory_sink,
    progress: Progress | None = None,
) -> CodedTable:
    """What `compress_table` does, which says what each argument is, of options that are checked already.

    It warns of nothing, and shows no bar.

    Args:
        rows: The table.
        budget: What may replace it.
        options: How it is compressed.
        measure: What errors of its rows cost.
        padding_idx: The row of the padding token.
        resume: The file of the autoencoder's training.
        make_sink: Makes the place for the codes of a large table.
        progress: Is told what share of the work is done.

    Raises:
        DirEmbedError: As `compress_table` does.
    """
    dtype, method, progress = rows.dtype, options.method, progress or Progress()
    if dtype is None or not dtype.is_floating_point:
        raise TableError(f"the embedding table is of dtype {dtype}: load the model unquantised")

    table = Table(rows, device=options.fitting_device())
    budget.check_smaller(_size(table, dtype))
    fitting = progress.part(_share_of_fitting(table, measure, options))
    if method == "transform":
        made = _transform(table, budget, dtype, measure, options, make_sink, fitting)
    else:
        made = _factorize(table, budget, dtype, measure.weights, options, resume, fitting)
    coded = made.coded if isinstance(made, CodedRows) else made
    if not (made.fits if isinstance(made, CodedRows) else coded.fits(dtype)):
        raise _out_of_range(coded, dtype)
    fitting.finish()

    is_zero = padding_idx is not None and not table.rows[padding_idx : padding_idx + 1].any()
    layout = replace(coded.layout, zero_row=padding_idx if is_zero else None)
    figures = made.quality if isinstance(made, CodedRows) else table_quality(table, coded, measure)
    quality = {"dense_bytes": _size(table, dtype).dense_bytes, **figures}
    progress.finish()
    record = TableRecord(_made_with(budget, measure, options, table.device), quality)
    return replace(coded, layout=layout, record=record)


def warn_of_shortened(record: TableRecord) -> None:
    """Warns where rows were cut in length."""
    if shortened := record.quality.get("shortened_rows"):
        logger.warning(
            f"rows of the embedding table that are far longer than most: {shortened:,}. Their direction is kept, to a "
            f"mean cosine of {record.quality['shortened_cosine']:.4f}, their length is cut; methods of float latents "
            "keep it."
        )


def _share_of_fitting(table: Table, measure: Measure, options: MethodOptions) -> float:
    """The share of the work that is over before the figures are made."""
    settings = options.transform_settings
    if options.method == "transform" and is_large(table, measure, settings):
        return 1.0  # the figures are made on the way
    work = FittingWork.of_rows(table.num_rows, settings.passes)
    return work.fitting / work.total


def _size(table: Table, dtype: torch.dtype) -> TableSize:
    return TableSize(table.num_rows, table.dim, dtype.itemsize)


def _made_with(budget: Budget, measure: Measure, options: MethodOptions, device: torch.device) -> dict[str, Any]:
    """The settings of a table's record."""
    method = options.method
    made_with: dict[str, Any] = {"budget": str(budget), "token_weights": measure.weights is not None}
    if method == "transform":
        made_with["hessian"] = measure.hessian is not None
    if (settings := options.all_settings) is not None:
        made_with[method] = asdict(settings)
    if options.effort is not None:
        made_with["effort"] = options.effort
    made_with |= {"device": device.type, "threads": torch.get_num_threads()}  # sums round differently on others
    made_with["versions"] = {name: version(name) for name in VERSIONS}
    return made_with


def _out_of_range(coded: CodedTable, dtype: torch.dtype) -> TableError:
    narrow = "float16" if dtype == torch.float16 else coded.layout.codes
    return TableError(
        f"what would replace the embedding table exceeds the range of {narrow}: "
        "give the model, and float latents, in bfloat16 or float32"
    )


def _transform(
    table: Table,
    budget: Budget,
    dtype: torch.dtype,
    measure: Measure,
    options: MethodOptions,
    make_sink: MakeSink,
    progress: Progress,
) -> CodedTable | CodedRows:
    max_bytes = budget.max_bytes(_size(table, dtype))
    assert max_bytes is not None
    settings = options.transform_settings
    if is_large(table, measure, settings):
        return code_large(
            table, max_bytes, make_sink, dtype=dtype, measure=measure, settings=settings, progress=progress
        )
    return transform(table, max_bytes, dtype=dtype, measure=measure, settings=settings, progress=progress)


def _factorize(
    table: Table,
    budget: Budget,
    dtype: torch.dtype,
    token_weights: Tensor | None,
    options: MethodOptions,
    resume: str | Path | None,
    progress: Progress,
) -> CodedTable:
    rank = budget.float_rank(_size(table, dtype), options.latent_storage(dtype))
    found = _find_factors(table, rank, token_weights, options, resume, progress)
    decoder = str(dtype).removeprefix("torch.")
    coded = CodedTable.of(found, options.method, codes=options.latent_dtype or decoder, decoder=decoder)
    if not coded.keeps(found):
        raise _out_of_range(coded, dtype)
    return coded


def _find_factors(
    table: Table,
    rank: int,
    token_weights: Tensor | None,
    options: MethodOptions,
    resume: str | Path | None,
    progress: Progress,
) -> Factorization:
    if options.method == "svd":
        return svd(table, rank)
    if options.method == "direction":
        return direction(table, rank, token_weights, progress=progress)
    assert not isinstance(options.settings, TransformSettings)
    return train_autoencoder(table, rank, options.settings, resume=resume)
