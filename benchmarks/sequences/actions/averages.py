"""Averages over models, and what is changed by them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import swa_utils

from ..action import Scene, action
from .training import train_body


@action(amplifies=True)
def averaged_model(model: Any, scene: Scene) -> Any:
    kind = scene.draw.randrange(6)
    options: dict[str, Any] = [
        {},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        {"avg_fn": swa_utils.get_ema_avg_fn(0.99)},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
        {"avg_fn": swa_utils.get_swa_avg_fn(), "use_buffers": True},
    ][kind]
    average = swa_utils.AveragedModel(model.float(), **options)
    for _ in range(2):
        average.update_parameters(model)
        train_body(model, scene)
    average.update_parameters(model)
    for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)  # positions, of which `use_buffers` makes other integers
    return average.module


@action(amplifies=True)
@torch.no_grad()
def ema_by_hand(model: Any, scene: Scene) -> Any:
    ema = copy.deepcopy(model.float())
    with torch.enable_grad():
        train_body(model, scene)
    kind = scene.draw.randrange(7)
    if kind == 5:  # what has 16 bits and 32, lists do not mix
        torch._foreach_lerp_(list(ema.parameters()), [each.detach() for each in model.parameters()], 0.1)
        return ema
    if kind == 6:
        torch._foreach_mul_(list(ema.parameters()), 0.9)
        torch._foreach_add_(list(ema.parameters()), list(model.parameters()), alpha=0.1)
        return ema
    for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
        if kind == 0:
            mine.copy_(0.9 * mine + 0.1 * theirs)
        elif kind == 1:
            mine.mul_(0.9).add_(theirs, alpha=0.1)
        elif kind == 2:
            mine.data.mul_(0.999).add_(theirs.data, alpha=0.001)
        elif kind == 3:
            mine.sub_(0.25 * (mine - theirs))
        else:
            mine.data = 0.5 * mine.data + 0.5 * theirs.data
    return ema


@action(amplifies=True)
@torch.no_grad()
def soup(model: Any, scene: Scene) -> Any:
    other = copy.deepcopy(model.float())
    with torch.enable_grad():
        train_body(other, scene)
    mine, theirs = model.state_dict(), other.state_dict()
    kind = scene.draw.randrange(4)
    if kind == 0:
        state = {
            name: mine[name].lerp(theirs[name], 0.3) if mine[name].is_floating_point() else mine[name] for name in mine
        }
    elif kind == 1:
        state = {name: torch.stack([mine[name].float(), theirs[name].float()]).mean(0) for name in mine}
    elif kind == 2:
        state = {name: sum(w * each[name] for w, each in ((0.3, mine), (0.7, theirs))) for name in mine}
    else:
        state = {name: 0.5 * mine[name] + 0.5 * theirs[name] for name in mine}
    model.load_state_dict(state)
    return model


@action()
@torch.no_grad()
def ema_of_a_state_dict(model: Any, scene: Scene) -> Any:
    average = copy.deepcopy(model)
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)
    return average


@action(may_refuse=True, amplifies=True)
@torch.no_grad()
def federate(model: Any, scene: Scene) -> Any:
    arrays = [
        {name: tensor.cpu().numpy() for name, tensor in each.state_dict().items()}
        for each in (model.float(), train_for(copy.deepcopy(model), scene))
    ]
    mean = {name: 0.25 * arrays[0][name] + 0.75 * arrays[1][name] for name in arrays[0]}
    model.load_state_dict({name: torch.from_numpy(each) for name, each in mean.items()})
    return model


@torch.enable_grad()
def train_for(model: Any, scene: Scene) -> Any:
    """A model whose body was trained a little."""
    return train_body(model, scene)
