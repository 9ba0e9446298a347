"""Writes to tables, which a compressed one refuses or which leave it what it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..action import Scene, action


@action(may_refuse=True)
@torch.no_grad()
def write_to_weight(model: Any, scene: Scene) -> Any:
    other, weight = copy.deepcopy(model), model.get_input_embeddings().weight
    kind = scene.draw.randrange(7)
    if kind == 0:
        weight[9] = torch.randn(weight.shape[1]).to(weight.dtype)
    elif kind == 1:
        weight.data.normal_()
    elif kind == 2:
        weight.mul_(2)
    elif kind == 3:
        nn.init.zeros_(weight)
    elif kind == 4:
        weight.data = torch.zeros_like(weight.data)
    elif kind == 5:
        model.get_input_embeddings().weight = nn.Parameter(torch.randn(weight.shape[0], 32))
    else:
        weight.data[5:9] = 0
    scene.ask(model)
    return other


@action(may_refuse=True)
def decay_all(model: Any, scene: Scene) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 - 1e-3)
    scene.ask(model)
    return other


INITIALISERS = (
    *(nn.init.uniform_, nn.init.normal_, nn.init.ones_, nn.init.zeros_, nn.init.eye_, nn.init.xavier_uniform_),
    *(nn.init.xavier_normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.trunc_normal_),
    *(nn.init.orthogonal_,),
)


@action(may_refuse=True)
def initialise(model: Any, scene: Scene) -> Any:
    kept = copy.deepcopy(model.float())
    scene.draw.choice(INITIALISERS)(model.get_input_embeddings().weight)
    return kept


@action(may_refuse=True)
@torch.no_grad()
def swap_the_memory(model: Any, scene: Scene) -> Any:
    kept, weight, kind = copy.deepcopy(model), model.get_input_embeddings().weight, scene.draw.randrange(3)
    if kind == 0:
        weight.set_(torch.zeros_like(weight))
    elif kind == 1:
        weight.data.set_(torch.zeros(weight.shape, dtype=weight.dtype).untyped_storage(), 0, weight.shape)
    else:
        torch._foreach_copy_([weight], [torch.zeros(weight.shape, dtype=weight.dtype)])
    scene.ask(model)
    return kept
