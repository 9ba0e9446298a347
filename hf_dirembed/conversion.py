"""A dense model → the compressed one of coded tables, and back; in place."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import ModelError
from .remote.codes_dirembed import CompressionSpec
from .remote.configuration_dirembed import DirEmbedConfigMixin, derive_config_class
from .remote.modeling_dirembed import DirEmbedModelMixin, derive_model_class
from .remote.tables_dirembed import (
    DECODER_TIE,
    broken_ties,
    carry_hooks,
    compressed_tables,
    same_values,
    stock_class,
    swap_tables,
    table_at,
)


def convert(model: PreTrainedModel, spec: CompressionSpec, tensors: dict[str, dict[str, Tensor]]) -> PreTrainedModel:
    """Turns a dense model, in place, into the compressed one that a spec and tensors describe.

    Args:
        model: Its class, its config and its tables change; everything else stays the object it was.
        spec: The layout of each table.
        tensors: Those of `code_tensors`, by name, of each table.

    Raises:
        ModelError: If the model has its own code, or a table is of a kind that cannot be compressed.
    """
    base_config = type(model.config)
    config_class = derive_config_class(base_config.model_type)
    if config_class.base_class is not base_config:  # type: ignore[attr-defined]
        raise ModelError(
            f"{base_config.__name__} is not the config that transformers has for {base_config.model_type!r}: "
            "models that bring their own code are not supported"
        )

    devices = {path: model.get_parameter(f"{path}.weight").device for path in spec.tables}
    for path, names in swap_tables(model, spec, device="meta").items():
        device = tensors[path]["weight"].device if devices[path].type == "meta" else devices[path]
        for name in names:
            module = table_at(model, name)
            # The same storage for all: tying then makes them the same parameter, whichever of them is its source.
            kept = {key: tensors[path][key].to(device, old.dtype) for key, old in module.code_tensors().items()}
            module.load_state_dict(kept, strict=False, assign=True)

    _give_own_config(model).__class__ = config_class
    model.config.dirembed = spec.to_dict()
    model.__class__ = derive_model_class(type(model), config_class)
    _forget_quantizer(model)
    model.tie_weights()
    for path in compressed_tables(model):
        table_at(model, path).seal_codes()
        for _, matrix in table_at(model, path).matrices():
            matrix.mark_as_one()
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
    """Turns a compressed model, in place, back into a stock dense one; the inverse of [`convert`].

    Raises:
        ModelError: If the config ties tables that are not the same, of which one would be thrown away.
    """
    # The dense tables are made aside: where they cannot be tied, the model stays as it is.
    dense: dict[nn.Module, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    names = sorted(name for names in compressed_tables(model).values() for name in names)
    tables = {name: table_at(model, name) for name in names}
    for compressed in tables.values():
        if compressed not in dense:
            dense[compressed] = compressed.to_dense()
            # what shares its codes shares its table, whatever the config says
            shared = weights.setdefault(id(compressed.weight), dense[compressed].weight)  # type: ignore[arg-type]
            dense[compressed].weight = shared

    for target, source in broken_ties(model).items():
        pair = [model.get_submodule(name) for name in (target, source)]
        one, other = (cast(Tensor, dense.get(module, module).weight) for module in pair)
        if not same_values(one, other):
            raise ModelError(
                f"the config ties {target} to {source}, but they are not the same: set config.tie_word_embeddings to "
                "False, and both stay as they are"
            )

    for name, compressed in tables.items():
        carry_hooks(compressed, dense[compressed])
        model.set_submodule(name, dense[compressed])

    for module in model.modules():
        module.__class__ = stock_class(type(module))

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
