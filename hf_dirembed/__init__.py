"""Vocabulary tables up to 32 times smaller, behind plain `from_pretrained`."""

from .quiet import importing_quietly


with importing_quietly():  # of what other packages have to say about themselves while transformers imports them
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
        ExportError,
        ModelError,
        OptionError,
        SpecError,
        TableError,
        UnreadableCheckpointError,
        WeightsError,
    )
    from .exporting.export import export
    from .hub.publishing import write_upload_card
    from .integrations import quantizer  # noqa: F401 (it registers itself)
    from .integrations.quantization_config import DirEmbedQuantizationConfig
    from .kernels import compiled, patch_rows, read_rows, rows_product
    from .remote.codes_dirembed import CompressionSpec, TableLayout
    from .remote.configuration_dirembed import MODEL_TYPE, DirEmbedConfig
    from .remote.modules_dirembed import CompressedEmbedding, CompressedLinear
    from .remote.products_dirembed import package
    from .tables import VocabularyTable, find_tables
    from .training.straight_through import LatentShadow


AutoConfig.register(MODEL_TYPE, DirEmbedConfig, exist_ok=True)
package.compress_table = compress_table
package.shadow_latents = LatentShadow
package.find_tables = find_tables
package.before_upload = write_upload_card
package.compiled = compiled
package.read_rows = read_rows
package.patch_rows = patch_rows
package.rows_product = rows_product

__all__ = [
    "AutoencoderSettings",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CompressedEmbedding",
    "CompressedLinear",
    "CompressionSpec",
    "DirEmbedConfig",
    "DirEmbedError",
    "DirEmbedQuantizationConfig",
    "EvaluationError",
    "ExportError",
    "ModelError",
    "OptionError",
    "SpecError",
    "Statistics",
    "TableError",
    "TableLayout",
    "TransformSettings",
    "UnreadableCheckpointError",
    "VocabularyTable",
    "WeightsError",
    "calibrate",
    "compress",
    "expand",
    "export",
    "find_tables",
]
