"""Which modules of a model stand for its table, and the compressed ones in their place, tied alike.

This file travels with every compressed model, so it imports nothing of the package but its travelling neighbours.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from .embedding_dirembed import CompressedEmbedding
from .head_dirembed import CompressedLMHead
from .layout_dirembed import CODE_TENSORS, CompressionSpec, ModelError
from .matrix_dirembed import CompressedMatrix


# Of the entries of a tie map, those that `_tie_decoders` adds.
DECODER_TIE = re.compile(rf"\b({'|'.join(name for name in CODE_TENSORS if name != 'weight')})$")


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


def tied_modules(model: PreTrainedModel) -> set[str]:
    """Names of the input embedding and of every module whose `weight` is tied to it."""
    ties = [
        {target.removesuffix(".weight"), source.removesuffix(".weight")}
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if target.endswith(".weight") and source.endswith(".weight")
    ]
    embedding = embedding_of(model)
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module is embedding}
    while grown := {name for tie in ties if tie & names for name in tie} - names:
        names |= grown
    return names


def compressed_modules(model: nn.Module) -> set[str]:
    """Names of the modules that stand for the table, or for what was tied to it."""
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if isinstance(module, CompressedMatrix)}


def swap_modules(model: PreTrainedModel, spec: CompressionSpec, device: str | None = None) -> set[str]:
    """Puts compressed modules, their codes still to be set, where the table and what is tied to it were.

    Args:
        model: Changed in place.
        spec: The layout of the codes.
        device: Where the codes are made; by default where the table is.

    Returns:
        The names of the compressed modules.
    """
    names = tied_modules(model)
    swapped: dict[nn.Module, CompressedMatrix] = {}
    for name in sorted(names):
        dense = model.get_submodule(name)
        if dense in swapped or isinstance(dense, CompressedMatrix):
            continue  # a model that is built around an inner AutoModel gets it with its embedding swapped
        if isinstance(dense, nn.Embedding):
            swapped[dense] = CompressedEmbedding.like(dense, spec, device=device)
        elif isinstance(dense, nn.Linear):
            swapped[dense] = CompressedLMHead.like(dense, spec, device=device)
        else:
            raise ModelError(f"the table is tied to a {type(dense).__name__}: only linear heads are supported")
    for name in names:  # only now that all of them can be
        dense = model.get_submodule(name)
        model.set_submodule(name, swapped.get(dense, dense))
    _tie_decoders(model, names)
    return names


def _tie_decoders(model: PreTrainedModel, names: set[str]) -> None:
    """Extends the tie maps, so that whatever shares a code matrix shares its decoder."""
    modules = {module for name in sorted(names) if isinstance(module := model.get_submodule(name), CompressedMatrix)}
    for module in modules:
        module.tied = len(modules) > 1
    source = next(iter(modules))
    shared = [name for name in source.code_tensors() if name != "weight"]
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
