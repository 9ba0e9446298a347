"""Token embeddings 8 to 32 times smaller, behind plain `from_pretrained`."""

from transformers import AutoConfig

from .api import compress, expand
from .calibration.calibrate import calibrate
from .calibration.statistics import Statistics
from .compression.baselines.autoencoder import AutoencoderSettings
from .compression.compress import compress_table
from .compression.transform.transform import TransformSettings
from .errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    DirEmbedError,
    EvaluationError,
    ModelError,
    SpecError,
    TableError,
    UnreadableCheckpointError,
    WeightsError,
)
from .hub.publishing import write_upload_card
from .integrations import quantizer  # noqa: F401 (it registers itself)
from .remote.codes_dirembed import CompressionSpec
from .remote.configuration_dirembed import MODEL_TYPE, DirEmbedConfig
from .remote.modules_dirembed import CompressedEmbedding, CompressedLMHead, package
from .training.straight_through import LatentShadow


AutoConfig.register(MODEL_TYPE, DirEmbedConfig, exist_ok=True)
package.compress_table = compress_table
package.shadow_latents = LatentShadow
package.before_upload = write_upload_card

__all__ = [
    "AutoencoderSettings",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CompressedEmbedding",
    "CompressedLMHead",
    "CompressionSpec",
    "DirEmbedConfig",
    "DirEmbedError",
    "EvaluationError",
    "ModelError",
    "SpecError",
    "Statistics",
    "TableError",
    "TransformSettings",
    "UnreadableCheckpointError",
    "WeightsError",
    "calibrate",
    "compress",
    "expand",
]
