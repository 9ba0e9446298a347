"""How a compressed table gets into a model: derived classes, the from_pretrained hook, and the way in and back.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from .adapters_dirembed import refuse_wrapper  # noqa: F401 (which registers itself)
from .configuration_dirembed import DirEmbedConfigMixin, derive_config_class
from .embedding_dirembed import CompressedEmbedding, compression_line
from .head_dirembed import CompressedLMHead
from .layout_dirembed import CheckpointError, CompressionSpec, ModelError, SpecError, first_line
from .loading_dirembed import as_checkpoint_error, check_files, check_index, check_keys, check_table, settle
from .matrix_dirembed import CompressedMatrix, freeze, unfreeze
from .resizing_dirembed import resize_rows
from .tying_dirembed import DECODER_TIE, compressed_modules, embedding_of, swap_modules, tied_modules


# Called with model, folder and repo before `push_to_hub` uploads the folder: the package writes a card there. Empty
# where this file alone loads models.
before_upload: list[Callable[[PreTrainedModel, str, str], None]] = []

# Architectures whose forward passes index the table itself, or multiply with it.
TABLE_READERS = ("gemma4", "mobilebert")


class DirEmbedModelMixin(PreTrainedModel):
    """Makes a base model's class one whose token embedding, and the head tied to it, are compressed."""

    base_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(config, *args, **kwargs)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if args or kwargs or not torch.empty(0).is_meta:
                raise
            # While loading: nothing is allocated and the caller passed nothing, so it is the config's fault.
            raise SpecError(
                f"the config makes no {self.base_class.__name__} ({first_line(error)}): download the model again"
            ) from error
        swap_modules(self, CompressionSpec.from_dict(config.dirembed))
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Like the base class's, from safetensors only; refuses a checkpoint whose codes or decoder do not fit.

        Raises:
            CheckpointError: If a file is missing or damaged, a tensor of the compressed table is missing or holds what
                no table does, or any tensor has the wrong shape.
            SpecError: If the config makes no model.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise CheckpointError("compressed models load from safetensors only: drop use_safetensors=False")
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with as_checkpoint_error(name):
            if isinstance(name, (str, os.PathLike)):
                check_index(Path(name, kwargs.get("subfolder") or ""))
            loaded: Any = super().from_pretrained(*args, **kwargs)
        settle(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        if state_dict is None and checkpoint_files:
            check_files(CompressionSpec.from_dict(model.config.dirembed), checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        check_keys(model, loading_info, load_config.ignore_mismatched_sizes)
        for module in model.modules():
            if isinstance(module, CompressedMatrix):
                check_table(module)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def initialize_weights(self) -> None:
        """Like the base class's, which draws what no file had; codes that stay on disk are not among that."""
        for module in self.modules():
            if isinstance(module, CompressedMatrix):
                for tensor in module.code_tensors().values():
                    if tensor.is_meta:
                        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        super().initialize_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the modeling is the base's own, and so are its checkpoint conversions (MoE and others)."""
        return False

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Like the base class's; the decoder goes into the file in its narrow dtype, where that loses nothing.

        Raises:
            ModelError: If the embedding was replaced by a dense one, or a compressed head is no longer tied to it,
                which a file cannot say.
        """
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):
            raise ModelError(
                "the compressed embedding was replaced by a dense one (set_input_embeddings): make a stock model "
                "with hf_dirembed.expand, and compress that again if it should be"
            )
        if untied := sorted(compressed_modules(self) - tied_modules(self)):
            raise ModelError(
                f"{untied} are compressed, but no longer tied to the input embedding: set "
                "config.tie_word_embeddings and call tie_weights(), or expand the model with hf_dirembed.expand"
            )
        state = dict(self.state_dict() if state_dict is None else state_dict)
        names = [name for module in tied_modules(self) if (name := f"{module}.decoder_weight") in state]
        decoder = state[names[0]] if names else None
        self.config.dirembed = embedding.current_spec(decoder).to_dict()
        # One tensor for all names, which saving finds tied.
        state |= dict.fromkeys(names, embedding.stored_decoder(decoder))
        super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        for call in before_upload:
            call(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def print_compression(self) -> None:
        """Prints how large the token embeddings are, and were, in a line.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> import hf_dirembed
            >>> config = BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            >>> hf_dirembed.compress(BertModel(config), method="svd", ratio=4).print_compression()
            token embeddings 500 x 32: 14,896 bytes, 4.3x smaller than dense, 7.45 bits per weight (svd)
        """
        print(compression_line(embedding_of(self)))

    def unfreeze_codes(self) -> Any:
        """Makes the codes of the embedding and of every tied head learn; see [`CompressedMatrix.unfreeze_codes`].

        Raises:
            ModelError: If the embedding is no longer compressed; and as there.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> import hf_dirembed
            >>> sizes = dict(vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            >>> model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True))
            >>> hf_dirembed.compress(model, bits=4).unfreeze_codes().get_output_embeddings().shadow
            LatentShadow(weight=(500, 32))
        """
        unfreeze(self._sharing_codes())
        return self

    def freeze_codes(self) -> Any:
        """Undoes `unfreeze_codes`; see [`CompressedMatrix.freeze_codes`]."""
        freeze(self._sharing_codes())
        return self

    def _sharing_codes(self) -> list[CompressedMatrix]:
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):
            raise ModelError("the compressed embedding was replaced by a dense one, which has no codes")
        sharing = [module for module in self.modules() if isinstance(module, CompressedMatrix)]
        return [module for module in sharing if module.weight is embedding.weight]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Like torch's, but does not unfreeze the codes; see [`unfreeze_codes`]."""
        compressed = [module for module in self.modules() if isinstance(module, CompressedMatrix)]
        frozen = {id(tensor) for module in compressed for tensor in module.frozen_tensors().values()}
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
        return self

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        embedding = embedding_of(self)
        if not isinstance(embedding, CompressedEmbedding):  # replaced by hand, with set_input_embeddings
            return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        num_tokens = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        resize_rows(embedding, num_tokens)
        head = self.get_output_embeddings()
        if isinstance(head, CompressedLMHead):
            head.spec = embedding.spec
            head.out_features = num_tokens  # its codes and its bias follow when the weights are tied again
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, num_tokens, mean_resizing=mean_resizing))
        return embedding


_model_classes: dict[tuple[type, type], type] = {}


def derive_model_class(base: type[PreTrainedModel], config_class: Any) -> type[PreTrainedModel]:
    """The class of compressed models over a base class, made once.

    Args:
        base: A class of transformers.
        config_class: The derived config; where it is not over the base's own (several architectures may use one
            class), its name becomes part of the class's.
    """
    if (base, config_class) not in _model_classes:
        attributes = {"__module__": __name__, "config_class": config_class, "base_class": base}
        own = base.config_class is config_class.base_class
        prefix = "DirEmbed" if own else config_class.__name__
        derived = type(f"{prefix}{base.__name__}", (DirEmbedModelMixin, base), attributes)
        conversions = get_checkpoint_conversion_mapping(base.__name__)
        if conversions is not None:  # renamings of checkpoint keys that go by the name of the class
            register_checkpoint_conversion_mapping(derived.__name__, conversions, overwrite=True)
        _model_classes[base, config_class] = derived
    return _model_classes[base, config_class]


def register_model_classes(base_config: type, config_class: type) -> None:
    """Registers a derived model class with every AutoModel class that knows the base config."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or base_config not in mapping:
            continue
        bases = mapping[base_config]
        if isinstance(bases, (tuple, list)):
            derived = tuple(derive_model_class(base, config_class) for base in bases)
            mapping.register(config_class, derived, exist_ok=True)
        else:
            auto.register(config_class, derive_model_class(bases, config_class), exist_ok=True)


def convert(model: PreTrainedModel, spec: CompressionSpec, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Turns a dense model, in place, into the compressed one that `spec` and `tensors` describe.

    Args:
        model: Its class, its config and its embedding change; everything else stays the object it was.
        spec: The layout of the codes.
        tensors: Those of `CompressedMatrix.code_tensors`, by name.

    Raises:
        ModelError: If the model has its own code, or its embedding or head is of a kind that cannot be compressed.
    """
    base_config = type(model.config)
    config_class = derive_config_class(base_config.model_type)
    if config_class.base_class is not base_config:  # type: ignore[attr-defined]
        raise ModelError(
            f"{base_config.__name__} is not the config that transformers has for {base_config.model_type!r}: "
            "models that bring their own code are not supported"
        )
    if base_config.model_type in TABLE_READERS:
        raise ModelError(f"{type(model).__name__} reads its table's rows past the embedding: it is not supported")
    device = embedding_of(model).weight.device
    device = tensors["weight"].device if device.type == "meta" else device
    for name in swap_modules(model, spec, device="meta"):
        module = model.get_submodule(name)
        assert isinstance(module, CompressedMatrix)
        # The same storage for all: tying then makes them the same parameter, whichever of them is its source.
        kept = {key: tensors[key].to(device, parameter.dtype) for key, parameter in module.code_tensors().items()}
        module.load_state_dict(kept, strict=False, assign=True)
    _give_own_config(model).__class__ = config_class
    model.config.dirembed = spec.to_dict()
    model.__class__ = derive_model_class(type(model), config_class)
    _forget_quantizer(model)
    model.tie_weights()
    return model


def _give_own_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Replaces a config, which other models may be made with, by a copy; its parts stay the objects that they are.

    Returns:
        The copy.
    """
    shared, own = model.config, copy.copy(model.config)
    for attributes in (vars(module) for module in model.modules()):
        if attributes.get("config") is shared:
            attributes["config"] = own
    return own


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a compressed model, in place, back into a stock dense one; the inverse of [`convert`]."""
    dense: dict[nn.Module, nn.Module] = {}
    for name in sorted(compressed_modules(model)):
        compressed = model.get_submodule(name)
        assert isinstance(compressed, (CompressedEmbedding, CompressedLMHead))
        if compressed not in dense:
            dense[compressed] = compressed.to_dense()
        model.set_submodule(name, dense[compressed])
    for submodel in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if ties := vars(submodel).get("_tied_weights_keys"):
            kept = {target: source for target, source in ties.items() if not DECODER_TIE.search(target)}
            submodel._tied_weights_keys = kept
        if isinstance(submodel, DirEmbedModelMixin):
            submodel.__class__ = submodel.base_class  # type: ignore[assignment]
        if isinstance(submodel.config, DirEmbedConfigMixin):
            del submodel.config.dirembed
            vars(submodel.config).pop("auto_map", None)  # left there by a save of the compressed model
            submodel.config.__class__ = submodel.config.base_class
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    return model


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Drops what a GGUF file leaves on a model whose weights are dense by now; it would refuse to be saved."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        del model.config.quantization_config
        del model.hf_quantizer


def __getattr__(name: str) -> type:
    """Finds derived model classes by name, as unpickling does in a fresh process."""
    if name.startswith("DirEmbed"):
        config_name, _, base_name = name.removeprefix("DirEmbed").rpartition("Config")
        base = getattr(transformers, base_name, None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.config_class is not None:
            base_config = getattr(transformers, f"{config_name}Config") if config_name else base.config_class
            return derive_model_class(base, derive_config_class(base_config.model_type))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
