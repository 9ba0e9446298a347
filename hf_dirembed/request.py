"""What a user asks for when a model is compressed: checked once, before anything is read, calibrated or downloaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .calibration.calibrated import Calibration
from .calibration.languages import wordfreq_language
from .calibration.statistics import Statistics
from .calibration.text import Texts, check_file
from .compression.budget import Budget
from .compression.compress import WEIGHING, Effort, MethodOptions, Settings
from .errors import BudgetError, OptionError


@dataclass(frozen=True)
class CompressionRequest:
    """The options of [`hf_dirembed.compress`], which says what each is.

    Raises:
        BudgetError: If there is not exactly one budget, or it is no positive number.
        CalibrationError: If a text file to calibrate on cannot be read.
        OptionError: If the method is unknown, or options are not of their kind, or do not go together.
        WeightsError: If there is no word list for a language.

    Example:
        >>> CompressionRequest(method="svd", rank=4, calibration="text.txt")
        Traceback (most recent call last):
        ...
        hf_dirembed...OptionError: method 'svd' takes no calibration: leave it out, or choose transform
    """

    bits: float | Mapping[str, float] | None = None
    ratio: float | None = None
    rank: int | None = None
    tables: Sequence[str] | None = None
    method: str = "transform"
    languages: str | Sequence[str] | None = None
    calibration: Texts | Statistics | Calibration | None = None
    token_weights: Tensor | None = None
    hessian: Tensor | None = None
    latent_dtype: str | None = None
    settings: Settings | None = None
    device: torch.device | str | None = None
    base_model: str | None = None
    resume: str | Path | None = None
    effort: Effort | None = None

    def __post_init__(self) -> None:
        for budget in self._budgets():
            self.options.check(budget, self.hessian)
        listed = isinstance(self.tables, Sequence) and not isinstance(self.tables, str)
        if self.tables is not None and not (listed and all(isinstance(name, str) for name in self.tables)):
            raise OptionError(f"tables={self.tables!r} is no list of names: give one, like ['embed_tokens']")
        if self.tables is not None and not self.tables:
            raise OptionError(f"tables={self.tables!r} names no table: name one at least, or leave it out for all")
        if self.tables is not None and isinstance(self.bits, Mapping):
            raise OptionError(f"tables={self.tables!r} beside the names of bits= says the same twice: leave one out")
        if not all(isinstance(tag, str) for tag in self.language_tags):
            raise OptionError(f"languages={self.languages!r} are no tags: give some, like ('en', 'de')")
        for tag in self.language_tags:
            wordfreq_language(tag)
        self._check_calibration()

    def _budgets(self) -> list[Budget]:
        if not isinstance(self.bits, Mapping):
            return [Budget(self.bits, self.ratio, self.rank)]
        if not self.bits or not all(isinstance(name, str) for name in self.bits):
            raise BudgetError(
                f"bits={dict(self.bits)!r} names no table: give bits by name, like {{'embed_tokens': 2}}"
            )
        return [Budget(bits, self.ratio, self.rank) for bits in self.bits.values()]

    def _check_calibration(self) -> None:
        calibration = self.calibration
        if calibration is not None and self.method not in WEIGHING:
            raise OptionError(f"method {self.method!r} takes no calibration: leave it out, or choose transform")
        if isinstance(calibration, str | Path) and calibration != "self":
            check_file(calibration)
        reads_text = not (calibration is None or isinstance(calibration, (Statistics, Calibration)))
        if self.resume is not None and not reads_text and self.method != "autoencoder":
            raise OptionError("resume goes with calibration on text and with method 'autoencoder': leave it out")

    @property
    def options(self) -> MethodOptions:
        """How each table is compressed, whatever its budget."""
        return MethodOptions(self.method, self.latent_dtype, self.settings, self.device, self.effort)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The tables that are asked for; None for all."""
        if isinstance(self.bits, Mapping):
            return tuple(self.bits)
        return None if self.tables is None else tuple(self.tables)

    @property
    def language_tags(self) -> list[str]:
        """The languages that were told."""
        given = self.languages
        if isinstance(given, str) or not isinstance(given, Sequence | None):
            return [given]
        return list(given or ())


def whole_bytes(bits: float, num_weights: int) -> int:
    """The most bytes that so many bits per weight are."""
    return math.floor(bits * num_weights / 8)
