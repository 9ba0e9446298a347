"""Token embeddings 8 to 32 times smaller, behind plain `from_pretrained`."""

from transformers import AutoConfig

from . import bridge, modeling_dirembed  # noqa: F401 (the first only registers)
from .compression import AutoencoderSettings, Statistics, TransformSettings, calibrate, compress, expand
from .configuration_dirembed import MODEL_TYPE, DirEmbedConfig
from .embedding_dirembed import CompressedEmbedding
from .head_dirembed import CompressedLMHead
from .layout_dirembed import (
    BudgetError,
    CheckpointError,
    CompressionSpec,
    DirEmbedError,
    ModelError,
    SpecError,
    TableError,
)
from .publishing import write_upload_card


AutoConfig.register(MODEL_TYPE, DirEmbedConfig, exist_ok=True)
modeling_dirembed.before_upload.append(write_upload_card)

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
