"""Every error that hf_dirembed raises on bad input: one family, each message with the value and a mend."""

from __future__ import annotations

from .remote.codes_dirembed import (
    BudgetError,
    CheckpointError,
    DirEmbedError,
    ModelError,
    OptionError,
    SpecError,
    TableError,
    UnreadableCheckpointError,
    first_line,
)


__all__ = [
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "DirEmbedError",
    "EvaluationError",
    "ExportError",
    "ModelError",
    "OptionError",
    "SpecError",
    "TableError",
    "UnreadableCheckpointError",
    "WeightsError",
    "first_line",
]


class CalibrationError(DirEmbedError):
    """Calibration statistics cannot be gathered, read or used."""


class EvaluationError(DirEmbedError):
    """A model cannot be evaluated: the data, a setting, or the model itself does not fit the task."""


class ExportError(DirEmbedError):
    """A model cannot be exported to ONNX, or the file that was made does not answer as the model does."""


class WeightsError(DirEmbedError):
    """Token weights cannot be had from what was given."""
