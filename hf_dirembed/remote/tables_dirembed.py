"""Where the tables of a model are, what is tied to them, and compressed modules in their place.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .codes_dirembed import CODE_TENSORS, BlocksLayout, CompressionSpec, Layout, ModelError, SpecError
from .matrix_dirembed import CompressedMatrix
from .modules_dirembed import (
    CompressedBlocks,
    CompressedEmbedding,
    CompressedLinear,
    CompressedLookup,
    CompressedTable,
    ids_of,
    view_of,
)
from .stock_dirembed import DecodedWeight


# Of the entries of a tie map, those that `_tie_codes` adds.
DECODER_TIE = re.compile(rf"\b({'|'.join(name for name in CODE_TENSORS if name != 'weight')})$")

# What stands for tables, and is tied to what does.
TABLE_MODULES = (CompressedEmbedding, CompressedBlocks, CompressedLinear)
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_PLAIN_WEIGHT = re.compile(r"[\w.]+\.weight$")  # other entries are patterns, which tie layers


def embedding_of(model: nn.Module) -> nn.Embedding | CompressedEmbedding:
    """The module that looks token embeddings up.

    Raises:
        ModelError: If the model has none.
    """
    embedding = None
    if isinstance(model, PreTrainedModel):
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:
            embedding = None
    if not isinstance(embedding, (nn.Embedding, CompressedEmbedding)):
        found = "none" if embedding is None else f"a {type(embedding).__name__}"
        raise ModelError(
            f"{type(model).__name__} has no token embedding to compress (get_input_embeddings gives {found}): "
            "choose a transformers model that reads token ids"
        )
    return embedding


def declared_ties(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose `weight` a class ties to another's if its config says so, by name, with the name of that."""
    stated: dict[str, str] = model._tied_weights_keys or {}
    ties = {target.removesuffix("$"): source.removesuffix("$") for target, source in stated.items()}
    plain = {t: s for t, s in ties.items() if _PLAIN_WEIGHT.match(t) and _PLAIN_WEIGHT.match(s)}
    return {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in plain.items()}


def ties_of(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose `weight` is tied to another's, by name, with the name of that."""
    return {target: source for target, source in configured_ties(model) if not _differ(model, target, source)}


def broken_ties(model: PreTrainedModel) -> dict[str, str]:
    """The modules whose `weight` the config says is tied to another's, but has other values."""
    return {target: source for target, source in configured_ties(model) if _differ(model, target, source)}


def configured_ties(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The modules whose `weight` the config says is tied to another's, whether it is or not."""
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    weights = ((target, source) for target, source in ties.items() if target.endswith(".weight"))
    return [(t.removesuffix(".weight"), s.removesuffix(".weight")) for t, s in weights if s.endswith(".weight")]


def _differ(model: PreTrainedModel, target: str, source: str) -> bool:
    """Whether the weights of two modules are in memory, and are not the same."""
    one, other = (getattr(model.get_submodule(name), "weight", None) for name in (target, source))
    if one is other or not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.is_meta or other.is_meta:
        return False
    return not same_values(one, other)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype, and hold the same."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def tied_modules(model: PreTrainedModel, path: str) -> set[str]:
    """Names of a module and of every module whose `weight` is tied to its own, under all names that each has."""
    ties, module = ties_of(model), model.get_submodule(path)
    names = {name for name, each in model.named_modules(remove_duplicate=False) if each is module}
    while grown := {name for tie in ties.items() if set(tie) & names for name in tie} - names:
        names |= grown
    return names


def input_table(model: PreTrainedModel) -> str:
    """The path of the table that a model looks token ids up in.

    Raises:
        ModelError: If the model has none.
    """
    embedding = embedding_of(model)
    return next(name for name, module in model.named_modules() if module is embedding)


def source_of(model: PreTrainedModel, names: set[str]) -> str:
    """The one of the names of tied modules that files have their tensors under, and configs their layout."""
    return min(names - ties_of(model).keys() or names)


def table_at(model: PreTrainedModel, path: str) -> CompressedTable:
    """The compressed module at a path.

    Raises:
        ModelError: If there is a dense one.
    """
    module = model.get_submodule(path)
    if not isinstance(module, TABLE_MODULES):
        raise ModelError(f"{path} of the model is a {type(module).__name__}, no compressed table: compress it first")
    return module


def compressed_tables(model: PreTrainedModel) -> dict[str, set[str]]:
    """The compressed tables of a model, each by the path of its module, with the names of all that share its codes."""
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TABLE_MODULES) and not any(name in names for names in found.values()):
            names = tied_modules(model, name)
            found[source_of(model, names)] = names
    return found


def locate_tables(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """Where a model has the tables that a config names: the path of each in the model, by the config's.

    The config may be that of a model with another head, whose body stands under `base_model_prefix`, or stands bare.
    Or this is a part of the model that it is of: BART's decoder alone has no `shared`, but a lookup that the whole
    ties to that. A table that this model has not, such as the head of a body, is left out.
    """
    prefix, found = f"{model.base_model_prefix}.", {}
    kinds = (nn.Embedding, nn.Linear, *TABLE_MODULES)
    modules = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kinds)}
    ties = _ties_of_body(model)
    for path in paths:
        bare = path.removeprefix(prefix)
        places = [path, *(each for name in (bare, *ties.get(bare, ())) for each in (name, prefix + name))]
        if place := next((place for place in places if place in modules), None):
            found[path] = place
    return found


def _ties_of_body(model: PreTrainedModel) -> dict[str, list[str]]:
    """What the architecture's whole body ties to each of its tables, by the table's name there."""
    config_class = getattr(type(model.config), "base_class", type(model.config))
    body: Any = modeling_auto.MODEL_MAPPING.get(config_class, None)
    ties: dict[str, str] = getattr(body, "_tied_weights_keys", None) or {}

    found: dict[str, list[str]] = {}
    for target, source in ties.items():
        found.setdefault(source.removesuffix(".weight"), []).append(target.removesuffix(".weight"))
    return found


def swap_tables(model: PreTrainedModel, spec: CompressionSpec, device: str | None = None) -> dict[str, set[str]]:
    """Puts compressed modules, their codes still to be set, where tables and what is tied to them were.

    Args:
        model: Changed in place.
        spec: Which tables are compressed, and the layout of each.
        device: Where the codes are made; by default where each table is.

    Returns:
        The names of the modules that now share each table's codes, by the table's path in the spec.

    Raises:
        ModelError: If a module is of a kind that has no compressed one.
        SpecError: If a layout does not fit its table, or two layouts are of one table.
    """
    swapped: dict[nn.Module, nn.Module] = {}
    places = locate_tables(model, spec.tables)
    _cut_ties(model, set(places.values()))
    tables = {path: tied_modules(model, place) for path, place in places.items()}

    for path, names in tables.items():
        if twice := [other for other, theirs in tables.items() if other != path and theirs & names]:
            raise SpecError(
                f"{path} and {twice[0]} are tied, but have layouts of their own: set config.tie_word_embeddings to "
                "False, or compress the model again"
            )
        for name in sorted(names):
            dense = model.get_submodule(name)
            if dense in swapped or isinstance(dense, TABLE_MODULES):
                continue  # a model that is built around an inner AutoModel gets it with its embedding swapped
            swapped[dense] = _compressed_like(dense, spec.tables[path], device)
            swapped[dense].record = spec.record(path)  # type: ignore[assignment]
            carry_hooks(dense, swapped[dense])

    for names in tables.values():  # only now that all of them can be
        for name in names:
            dense = model.get_submodule(name)
            model.set_submodule(name, swapped.get(dense, dense))
        _tie_codes(model, names)

    for module in model.modules():
        if module is not model:  # whose class is derived by `derive_model_class`
            module.__class__ = reading_class(type(module))
    model._no_split_modules = {*(model._no_split_modules or ()), *(each.__name__ for each in TABLE_MODULES)}
    return tables


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks of the one that it replaces, such as that of `enable_input_require_grads`."""
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]  # the same object: what was registered can be removed


def _cut_ties(model: PreTrainedModel, places: set[str]) -> None:
    """Unties, in this model alone, tables that a spec names side by side, whatever its config says of them.

    T5's config, for one, always says that the head is tied, of models whose heads have weights of their own as well.
    """
    cut = False
    for prefix, submodel in model.named_modules():
        if not isinstance(submodel, PreTrainedModel) or not submodel._tied_weights_keys:
            continue
        ties = submodel.get_expanded_tied_weights_keys()
        full = {
            name: f"{prefix}.{name}".removeprefix(".").removesuffix(".weight") for tie in ties.items() for name in tie
        }
        kept = {t: s for t, s in ties.items() if not (full[t] != full[s] and {full[t], full[s]} <= places)}
        if kept != ties:
            submodel._tied_weights_keys, cut = kept, True
    if cut:
        for submodel in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
            submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


def _compressed_like(dense: nn.Module, layout: Layout, device: str | None) -> nn.Module:
    if isinstance(dense, nn.Embedding):
        if isinstance(layout, BlocksLayout):
            return CompressedBlocks.like(dense, layout, device=device)
        return CompressedEmbedding.like(dense, layout, device=device)
    if not isinstance(dense, nn.Linear) or isinstance(layout, BlocksLayout):
        raise ModelError(f"the table is tied to a {type(dense).__name__}: only linear heads are supported")
    return CompressedLinear.like(dense, layout, device=device)


def _tie_codes(model: PreTrainedModel, names: set[str]) -> None:
    """Extends the tie maps, so that whatever shares a code matrix shares its decoder."""
    modules = {module for name in sorted(names) if isinstance(module := model.get_submodule(name), CompressedMatrix)}
    for module in modules:
        module.tied = len(modules) > 1
    if len(modules) < 2:
        return

    shared = [name for name in next(iter(modules)).code_tensors() if name != "weight"]
    submodels = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for prefix, submodel in submodels:
        ties = submodel.get_expanded_tied_weights_keys()
        decoder_ties = {
            target.removesuffix("weight") + tensor: source.removesuffix("weight") + tensor
            for target, source in ties.items()
            if target.endswith(".weight") and f"{prefix}.{target}".removeprefix(".").removesuffix(".weight") in names
            for tensor in shared
        }
        if decoder_ties:
            submodel._tied_weights_keys = {**ties, **decoder_ties}

    for _, submodel in submodels:
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


def _seeing(*paths: str) -> Callable[[type], dict[str, Any]]:
    """The forward pass of classes that read `weight` at some paths: they find dense weights there."""

    def methods(base: type) -> dict[str, Any]:
        stock: Any = base.forward  # type: ignore[attr-defined]

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return stock(view_of(self, paths), *args, **kwargs)

        return {"forward": forward}

    return methods


def _reversing_gemma4(base: Any) -> dict[str, Any]:
    """How gemma4's text model finds the ids that its per-layer table needs, from embeddings alone."""

    def get_per_layer_inputs(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        if input_ids is None and inputs_embeds is not None and isinstance(self.embed_tokens, CompressedLookup):
            input_ids = ids_of(self.embed_tokens, inputs_embeds)
        rows: Tensor = base.get_per_layer_inputs(self, input_ids, inputs_embeds)
        return rows

    return {"get_per_layer_inputs": get_per_layer_inputs}


def _reversing_qwen4(base: Any) -> dict[str, Any]:
    """How qwen4_exp's text model finds the ids that its n-gram tables need, from embeddings alone."""

    def reverse_embedding(self: Any, inputs_embeds: Tensor) -> Tensor:
        if isinstance(self.embed_tokens, CompressedLookup):
            return ids_of(self.embed_tokens, inputs_embeds)
        ids: Tensor = base.reverse_embedding(self, inputs_embeds)
        return ids

    return {"reverse_embedding": reverse_embedding}


def _splitting_mobilebert(base: type) -> dict[str, Any]:
    """MobileBERT's head, whose matrix is the table beside one of its own: a product with each, and their sum."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        states = self.transform(hidden_states)
        width = states.shape[-1] - self.dense.weight.shape[0]
        logits: Tensor = self.decoder(states[..., :width])

        # nobody calls that module, so accelerate would leave its weight where it keeps it
        hook = vars(self.dense).get("_hf_hook")
        if hook is not None:
            hook.pre_forward(self.dense)
        logits = logits + states[..., width:] @ self.dense.weight
        if hook is not None:
            hook.post_forward(self.dense, logits)
        return logits

    return {"forward": forward}


def _decoding_perceiver(base: Any) -> dict[str, Any]:
    """Perceiver's head, which is given the lookup to multiply with."""

    def forward(self: Any, hidden_states: Tensor, embedding_layer: Any) -> Tensor:
        if not isinstance(embedding_layer, CompressedLookup):
            dense: Tensor = base.forward(self, hidden_states, embedding_layer)
            return dense
        return DecodedWeight(embedding_layer).product(hidden_states) + self.bias

    return {"forward": forward}


# Classes of transformers that read a table otherwise than by calling its module: the module that each is in, and the
# methods in which they find what they read.
READERS: dict[str, tuple[str, Callable[[type], dict[str, Any]]]] = {
    "DiffusionGemmaDecoderModel": ("diffusion_gemma", _seeing("embed_tokens")),
    "FSMTModel": ("fsmt", _seeing("decoder.embed_tokens")),
    "FalconMambaForCausalLM": ("falcon_mamba", _seeing("lm_head")),
    "Gemma4AssistantForCausalLM": ("gemma4_assistant", _seeing("lm_head")),
    "Gemma4Model": ("gemma4", _seeing("language_model.embed_tokens")),
    "Gemma4TextModel": ("gemma4", _reversing_gemma4),
    "Gemma4UnifiedAssistantForCausalLM": ("gemma4_unified_assistant", _seeing("lm_head")),
    "HYV4ForCausalLM": ("hy_v4", _seeing("lm_head")),
    "Mamba2ForCausalLM": ("mamba2", _seeing("lm_head")),
    "MambaForCausalLM": ("mamba", _seeing("lm_head")),
    "MobileBertLMPredictionHead": ("mobilebert", _splitting_mobilebert),
    "PerceiverEmbeddingDecoder": ("perceiver", _decoding_perceiver),
    "Qwen4ExpTextModel": ("qwen4_exp", _reversing_qwen4),
    "xLSTMForCausalLM": ("xlstm", _seeing("lm_head")),
}

_READING = "Reading"  # what the names of the classes start with that are derived from these

_reading_classes: dict[type, type] = {}


def reading_class(base: type) -> type:
    """The class with which a class reads compressed tables: one derived from it, made once, or the class itself."""
    module, methods = READERS.get(base.__name__, ("", None))
    if methods is None or not base.__module__.startswith(f"transformers.models.{module}."):
        return base
    if base not in _reading_classes:
        # Its name stays, by which transformers finds conversions of checkpoints; pickle goes by the other one.
        names = {"__module__": __name__, "__qualname__": f"{_READING}{base.__name__}"}
        _reading_classes[base] = type(base.__name__, (base,), {**methods(base), **names})
    return _reading_classes[base]


def stock_class(found: type) -> type:
    """The class that a reading class is derived from; any other as it is."""
    return next((base for base, reading in _reading_classes.items() if reading is found), found)


def __getattr__(name: str) -> type:
    """Finds reading classes by name, as unpickling does in a fresh process."""
    if (reader := name.removeprefix(_READING)) != name and reader in READERS:
        module = READERS[reader][0]
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        return reading_class(getattr(found, reader))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
