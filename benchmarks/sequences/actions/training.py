"""Training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hf_dirembed.remote.modeling_dirembed import DirEmbedModelMixin

from ..action import Scene, action


def train_body(model: Any, scene: Scene, steps: int = 1) -> Any:
    """Trains all but tables, which learn otherwise than dense ones."""
    tables = {
        id(p) for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()
    }
    tables |= {
        id(p) for name, p in model.named_parameters() if "per_layer.weight" in name or "_per_layer.blocks" in name
    }
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) not in tables
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    for _ in range(steps):
        loss = model.eval()(**scene.inputs, labels=labels).loss  # without dropout, which draws
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@action(amplifies=True)
def train_the_body(model: Any, scene: Scene) -> Any:
    return train_body(model.float(), scene, steps=2)


@action(rebases=True)
def train_all(model: Any, scene: Scene) -> Any:
    model.float().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    model.train()(**scene.inputs, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@action(rebases=True)
def train_codes(model: Any, scene: Scene) -> Any:
    if not isinstance(model, DirEmbedModelMixin):
        return model
    train_all(model.float().unfreeze_codes(), scene)
    return model.freeze_codes() if scene.draw.random() < 0.7 else model


@action()
def unfreeze_codes(model: Any, scene: Scene) -> Any:
    if isinstance(model, DirEmbedModelMixin):
        model.unfreeze_codes()
    return model


@action(may_refuse=True)
def optimise_the_table_alone(model: Any, scene: Scene) -> Any:
    kept, weight = copy.deepcopy(model), model.float().requires_grad_().get_input_embeddings().weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    model(**scene.inputs, labels=labels).loss.backward()
    optimizer.step()
    return kept


@action()
def clip_and_collect(model: Any, scene: Scene) -> Any:
    model.float().requires_grad_().zero_grad()
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    model.eval()(**scene.inputs, labels=labels).loss.backward()
    learning = [parameter for parameter in model.parameters() if parameter.grad is not None]
    nn.utils.clip_grad_norm_(learning, 1.0, foreach=scene.draw.random() < 0.5)
    nn.utils.clip_grad_value_(model.parameters(), 0.5)
    model.zero_grad()
    return model
