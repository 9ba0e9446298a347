"""Table → weights and metric → subspace → codes and decoder; it knows no model."""

from .baselines.autoencoder import AutoencoderSettings
from .coded import CodedTable
from .compress import METHODS, compress_table
from .transform.transform import TransformSettings


__all__ = ["METHODS", "AutoencoderSettings", "CodedTable", "TransformSettings", "compress_table"]
