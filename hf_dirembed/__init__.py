"""Token embeddings 8 to 32 times smaller, behind plain `from_pretrained`."""

from transformers import AutoConfig

from . import bridge  # noqa: F401 (registers a quantiser)
from .compression import AutoencoderSettings, Statistics, TransformSettings, calibrate, compress, expand
from .configuration_dirembed import (
    MODEL_TYPE,
    BudgetError,
    CheckpointError,
    CompressionSpec,
    DirEmbedConfig,
    DirEmbedError,
    ModelError,
    SpecError,
    TableError,
)
from .embedding_dirembed import CompressedEmbedding
from .head_dirembed import CompressedLMHead


AutoConfig.register(MODEL_TYPE, DirEmbedConfig, exist_ok=True)

__all__ = [
    "AutoencoderSettings",
    "BudgetError",
    "CheckpointError",
    "CompressedEmbedding",
    "CompressedLMHead",
    "CompressionSpec",
    "DirEmbedConfig",
    "DirEmbedError",
    "ModelError",
    "SpecError",
    "Statistics",
    "TableError",
    "TransformSettings",
    "calibrate",
    "compress",
    "expand",
]
