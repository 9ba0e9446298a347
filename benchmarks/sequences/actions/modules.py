"""What changes how a module has its weight: pruning, norms of weights, parametrisations, wrappers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ..action import Scene, action


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


WAYS: dict[str, Any] = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "pruned rows": lambda module: prune.ln_structured(module, "weight", 0.3, n=2, dim=0),
    "pruned at random": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "masked": lambda module: prune.custom_from_mask(module, "weight", torch.ones(module.weight.shape)),
    "normalised": nn.utils.weight_norm,
    "parametrised norm": parametrizations.weight_norm,
    "spectral": nn.utils.spectral_norm,
    "parametrised spectral": parametrizations.spectral_norm,
    "parametrised": lambda module: parametrize.register_parametrization(module, "weight", _Doubled()),
}


@action(may_refuse=True)
def change_how_weight_is_had(model: Any, scene: Scene) -> Any:
    kept = copy.deepcopy(model.float())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        WAYS[scene.draw.choice(list(WAYS))](model.get_input_embeddings())
    scene.tell(scene.ask(model))
    return kept


@action(weight=0.5)
def prune_the_body(model: Any, scene: Scene) -> Any:
    for module in model.float().modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            prune.l1_unstructured(module, "weight", 0.2)
            prune.remove(module, "weight")
    return model


@action(exact=True)
def prepare_with_accelerate(model: Any, scene: Scene) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, _ = accelerator.prepare(model, optimizer)
    return accelerator.unwrap_model(prepared)
