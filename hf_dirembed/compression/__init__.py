"""Table → weights and metric → subspace → codes and decoder."""

from .autoencoder import AutoencoderSettings
from .coded import CodedTable
from .compress import METHODS, compress, compress_table, expand


__all__ = ["METHODS", "AutoencoderSettings", "CodedTable", "compress", "compress_table", "expand"]
