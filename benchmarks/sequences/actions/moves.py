"""Casts, moves, and what is asked of all parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..action import Scene, action


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@action()
def cast(model: Any, scene: Scene) -> Any:
    return model.to(scene.draw.choice(FLOATS))


@action()
def cast_vectors_by_hand(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    return model.float()


@action()
def cast_all_by_hand(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    return model


@action()
def through_a_vector(model: Any, scene: Scene) -> Any:
    parameters = list(model.float().parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # views of one vector are not saved
    return model


@action(exact=True)
def share_memory(model: Any, scene: Scene) -> Any:
    return model.share_memory()


@action(exact=True)
def freeze_and_unfreeze(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model.requires_grad_(scene.draw.random() < 0.5)


@action(exact=True)
def train_and_eval(model: Any, scene: Scene) -> Any:
    return model.train().eval()


@action()
def cast_by_name(model: Any, scene: Scene) -> Any:
    return getattr(model, scene.draw.choice(["half", "double", "bfloat16", "float"]))()


@action(exact=True)
def to_the_same_device(model: Any, scene: Scene) -> Any:
    return model.to("cpu").cpu().to(model.dtype)
