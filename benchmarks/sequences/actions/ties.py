"""Other sizes, and what shares what."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..action import Scene, action
from ..subjects import VOCAB


@action(rebases=True, compares=True)
def resize(model: Any, scene: Scene) -> Any:
    size = VOCAB + scene.draw.randint(-VOCAB // 3, 20)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@action(exact=True)
def tie_again(model: Any, scene: Scene) -> Any:
    model.tie_weights()
    return model


@action(may_refuse=True, rebases=True)
def tie(model: Any, scene: Scene) -> Any:
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@action()
def untie(model: Any, scene: Scene) -> Any:
    model.config.tie_word_embeddings = False
    return model


@action(exact=True)
def set_the_same(model: Any, scene: Scene) -> Any:
    model.set_input_embeddings(model.get_input_embeddings())
    return model


@action(may_refuse=True)
def tie_by_hand(model: Any, scene: Scene) -> Any:
    head = model.get_output_embeddings()
    dense = nn.Linear(*reversed(head.weight.shape), bias=False)
    dense.weight = head.weight
    return model
