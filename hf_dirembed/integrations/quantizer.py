"""Stock classes, `BertForMaskedLM.from_pretrained`, load compressed checkpoints where this package is imported.

Dense checkpoints are compressed while they are loaded where `from_pretrained` is given a `DirEmbedQuantizationConfig`.
A `config.json` names `dirembed` as its quantisation method too, so that transformers asks the quantiser here how to
load it. Where the package is not imported nothing answers to that name, and stock classes fail on the shape of the
code matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ModelError
from ..remote.checks_dirembed import AGAIN, check_checksum, check_files, check_table, finish_loading, warn_of_decoder
from ..remote.configuration_dirembed import MODEL_TYPE, derive_config_class, read_spec
from ..remote.matrix_dirembed import CompressedMatrix
from ..remote.modeling_dirembed import derive_model_class
from ..remote.placement_dirembed import keep_mapped
from ..remote.tables_dirembed import compressed_tables, swap_tables, table_at
from .on_load import CompressionOnLoad, forget_quantisation, refuse_compressed
from .quantization_config import DirEmbedQuantizationConfig


class CompressedCheckpoint:
    """Turns a stock model into one of the derived class, between its construction and the loading of its tensors."""

    def __init__(self, config: DirEmbedQuantizationConfig) -> None:
        self.asks = config.asks
        self.made: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def check_devices(self, device_map: Any) -> None:
        """Codes may lie anywhere."""

    def before_weights(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Makes room for codes in place of tables.

        Raises:
            CheckpointError: If the checkpoint is not one of safetensors, or a tensor is of another kind than stated.
            ModelError: If the checkpoint is of another architecture, or was to be compressed again.
            SpecError: If the config does not say how it is compressed.
        """
        if self.asks:
            refuse_compressed(model)
        if not all(file.endswith(".safetensors") for file in files):
            raise CheckpointError("compressed models load from safetensors only: drop use_safetensors=False")

        config = model.config
        base_model_type, spec = read_spec(vars(config))
        check_files(spec, files)
        config_class = derive_config_class(base_model_type)
        base_config = config_class.base_class  # type: ignore[attr-defined]
        if type(config) is not base_config:
            raise ModelError(
                f"the checkpoint is a compressed {base_model_type!r}, which {type(model).__name__} does not read: "
                "load it with an AutoModel class"
            )

        for name in ("model_type", "auto_map"):  # a stock config keeps what the file says of the compressed one
            vars(config).pop(name, None)
        config.__class__ = config_class
        config.dirembed = spec.to_dict()

        swap_tables(model, spec)
        model.__class__ = derive_model_class(type(model), config_class)
        model.tie_weights()
        for prefix, module in model.named_modules():
            if isinstance(module, CompressedMatrix):
                tensors = module.code_tensors().items()
                self.made |= {f"{prefix}.{name}": (tensor.shape, tensor.dtype) for name, tensor in tensors}

    def after_weights(self, model: PreTrainedModel) -> None:
        """Checks the codes that were read.

        Raises:
            CheckpointError: If some are missing, or not those that the checkpoint states.
        """
        for prefix, module in model.named_modules():
            if not isinstance(module, CompressedMatrix):
                continue
            for name, tensor in module.code_tensors().items():
                # The mark that transformers leaves on what it read; without it, this would be a random tensor.
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"the checkpoint lacks {prefix}.{name}: {AGAIN}")

                # transformers before 5.20 keeps a file's shapes and dtypes where a quantiser reads it
                shape, dtype = self.made[f"{prefix}.{name}"]
                if tensor.shape != shape:
                    found = f"{list(tensor.shape)}, not {list(shape)}"
                    raise CheckpointError(f"{prefix}.{name} is mismatched, {found}: {AGAIN}")
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)
            check_table(module)
        for path in compressed_tables(model):
            check_checksum(table_at(model, path), path)
            warn_of_decoder(table_at(model, path), path)
        finish_loading(model)


@register_quantizer(MODEL_TYPE)
class DirEmbedQuantizer(HfQuantizer):
    """Loads a compressed checkpoint into a stock class, and compresses a dense one while it is loaded."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config: Any = quantization_config
        self.loading = CompressedCheckpoint(config) if self.pre_quantized else CompressionOnLoad(config)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Looks at the map of devices, which transformers shows before there is a model, and once it is a dictionary.

        Raises:
            ModelError: If it leaves a table on disk that is to be compressed.
        """
        self.loading.check_devices(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """A map of the quantiser's own, in which it may change where tables are."""
        return dict(device_map) if isinstance(device_map, dict) else device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        self.loading.before_weights(model, [str(file) for file in checkpoint_files or ()])
        if isinstance(device_map, dict):
            keep_mapped(model, device_map)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        forget_quantisation(model)
        self.loading.after_weights(model)
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved: as any compressed model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: as any compressed model."""
        return True


def _is_news(record: logging.LogRecord) -> bool:
    """Drops the warning that a stock config is not of the type that the file names: here that is meant."""
    return f"You are using a model of type `{MODEL_TYPE}` to instantiate" not in record.getMessage()


logging.getLogger("transformers.configuration_utils").addFilter(_is_news)
