"""Stock classes, `BertForMaskedLM.from_pretrained`, load compressed checkpoints where this package is imported.

A `config.json` names `dirembed` as its quantisation method too, so that transformers asks the quantiser here how to
load it. Where the package is not imported nothing answers to that name, and stock classes fail on the shape of the
code matrix.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ModelError
from ..remote.configuration_dirembed import MODEL_TYPE, derive_config_class, read_spec
from ..remote.modeling_dirembed import AGAIN, check_files, check_table, derive_model_class, settle, swap_modules
from ..remote.modules_dirembed import CompressedMatrix


@register_quantization_config(MODEL_TYPE)
class DirEmbedQuantizationConfig(QuantizationConfigMixin):
    """What a compressed checkpoint's `quantization_config` reads as: a pointer to the quantiser below."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = MODEL_TYPE  # type: ignore[assignment]
        self.dequantize = True  # what transformers asks before it takes this config off a model that is loaded


@register_quantizer(MODEL_TYPE)
class DirEmbedQuantizer(HfQuantizer):
    """Turns a stock model into one of the derived class, between its construction and the loading of its tensors."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        if not all(str(file).endswith(".safetensors") for file in files):
            raise CheckpointError("compressed models load from safetensors only: drop use_safetensors=False")
        config = model.config
        base_model_type, spec = read_spec(vars(config))
        check_files(spec, map(str, files))
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
        swap_modules(model, spec)
        model.__class__ = derive_model_class(type(model), config_class)
        model.tie_weights()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for prefix, module in model.named_modules():
            if not isinstance(module, CompressedMatrix):
                continue
            for name, tensor in module.code_tensors().items():
                # The mark that transformers leaves on what it read; without it, this would be a random tensor.
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"the checkpoint lacks {prefix}.{name}: {AGAIN}")
            check_table(module)
        settle(model)
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
