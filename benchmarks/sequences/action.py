"""What people do with a model: an action takes one, changes it or makes another of it, and returns that.

It is done to the compressed and to the stock model with the same random choices. Where it asks for what a compressed
model refuses, it says so (`may_refuse`). Numbers that it reads off a model it tells the scene, which compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn

from .subjects import SUBJECTS


@dataclass
class Scene:
    """Where a sequence is.

    Attributes:
        name: The subject's.
        folder: Where it may write.
        draw: Random choices, the same for both models.
        read: Numbers that were read off the model.
    """

    name: str
    folder: Path
    draw: Random
    read: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the models are asked."""
        return SUBJECTS[self.name].inputs()

    def ask(self, model: nn.Module, **others: Any) -> Tensor:
        """The logits."""
        logits: Tensor = model(**{**self.inputs, **others}).logits
        return logits

    def tell(self, numbers: Tensor) -> None:
        """Notes numbers, which are to be those of the other model as well."""
        self.read.append(numbers.detach())


@dataclass(frozen=True)
class Action:
    """Something that people do.

    Attributes:
        do: Takes a model and the scene; gives the model to go on with.
        may_refuse: Whether a compressed model may answer with an error of ours.
        rebases: Whether the two may be other models afterwards: the stock one is made anew of the compressed one.
        compares: Whether they are to answer alike before that.
        amplifies: Whether it makes what the two differ by larger, as steps of training do: what 16 bits rounded apart
            before is first made one.
        exact: Whether the compressed model is to answer to the bit as before.
        weight: How often it is drawn, beside the others; what takes long is drawn less often.
    """

    do: Callable[[Any, Scene], Any]
    may_refuse: bool = False
    rebases: bool = False
    compares: bool = False
    amplifies: bool = False
    exact: bool = False
    weight: float = 1.0


ACTIONS: dict[str, Action] = {}


def action(**options: Any) -> Callable[[Callable[[Any, Scene], Any]], Any]:
    """Registers a function as an action by its name.

    Args:
        options: What [`Action`] says of it.
    """

    def register(do: Callable[[Any, Scene], Any]) -> Any:
        ACTIONS[do.__name__] = Action(do, **options)
        return do

    return register
