"""Table → weights and metric → subspace → codes and decoder."""

from .autoencoder import AutoencoderSettings
from .calibration import calibrate
from .coded import CodedTable
from .compress import METHODS, compress, compress_table, expand
from .statistics import Statistics
from .transform import TransformSettings


__all__ = [
    "METHODS",
    "AutoencoderSettings",
    "CodedTable",
    "Statistics",
    "TransformSettings",
    "calibrate",
    "compress",
    "compress_table",
    "expand",
]
