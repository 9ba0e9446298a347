"""Runs sequences on both models, and tells what is neither rounding nor a clear error."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

import hf_dirembed

from .actions import ACTIONS, Scene
from .subjects import SUBJECTS, VOCAB, pair


METHODS = ("transform", "transform", "direction", "svd")
RARE = {"compile_eagerly": 0.05, "pickled": 0.5, "peft_of_tables": 0.7, "lora": 0.6}  # those that take long


@dataclass
class Sequence:
    """A sequence of actions, and what came of it.

    Attributes:
        seed: What it is drawn from: the same seed gives the same sequence.
        subject: What it starts from.
        method: How that was compressed.
        actions: The names of the actions, as far as they were done.
        finding: What is neither rounding nor a clear error; None if nothing is.
        refusals: How many of them were refused by a clear error.
        failed: Whether it ended in an error that the stock model raises as well.
    """

    seed: int
    subject: str
    method: str
    actions: list[str] = field(default_factory=list)
    finding: str | None = None
    refusals: int = 0
    failed: bool = False

    def __str__(self) -> str:
        said = self.finding or ("fails as stock" if self.failed else "the same")
        return f"seed {self.seed}: {self.subject} ({self.method}), {' > '.join(self.actions)}: {said}"


def run(seed: int, *, length: int = 5, only: str | None = None) -> Sequence:
    """Draws a sequence of actions and does them.

    Args:
        seed: What is drawn from.
        length: The most actions.
        only: The subject; by default any.
    """
    draw = Random(seed)
    sequence = Sequence(seed, only or draw.choice(list(SUBJECTS)), draw.choice(METHODS))
    weights = [RARE.get(name, 1.0) for name in ACTIONS]
    names = draw.choices(list(ACTIONS), weights, k=draw.randint(1, length))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        models: list[Any] = list(pair(sequence.subject, sequence.method))
        for number, name in enumerate(names):
            sequence.actions.append(name)
            models = _do(sequence, name, models, f"{seed}.{number}", Path(folder, str(number)))
            if sequence.finding or sequence.failed:
                break
    return sequence


def _do(sequence: Sequence, name: str, models: list[Any], seed: str, folder: Path) -> list[Any]:
    """Does one action to both models."""
    act, results, errors = ACTIONS[name], [], []
    kept = copy.deepcopy(models) if act.may_refuse else models
    for number, model in enumerate(models):
        place = folder / str(number)
        place.mkdir(parents=True)
        try:
            results.append(act.do(model, Scene(sequence.subject, place, Random(seed))))
            errors.append(None)
        except Exception as error:
            results.append(None)
            errors.append(error)

    ours, stock = errors
    if isinstance(ours, hf_dirembed.DirEmbedError) or _names_a_mend(ours):
        sequence.refusals += 1
        if not act.may_refuse:
            sequence.finding = f"{name} is refused: {ours}"
        return kept
    if ours is not None or stock is not None:
        if type(ours) is type(stock):
            sequence.failed = True
        else:
            said = "".join(traceback.format_exception(ours or stock)[-3:])
            sequence.finding = f"{name} fails with {'ours' if ours else 'stock'} alone: {said}"
        return models

    try:
        _answers(sequence.subject, results[1:], folder)
    except Exception:  # some models of transformers do not outlive an untied config
        sequence.failed = True
        return models

    try:
        if act.compares:
            sequence.finding = _difference(*_answers(sequence.subject, results, folder), results)
        if act.rebases:
            results[1] = hf_dirembed.expand(copy.deepcopy(results[0]))
        found = _answers(sequence.subject, results, folder)
        sequence.finding = sequence.finding or _difference(*found, results)
    except Exception as error:
        sequence.finding = f"after {name}: {''.join(traceback.format_exception(error)[-4:])}"
    return results


def _names_a_mend(error: Exception | None) -> bool:
    """Whether it is PEFT's error on a target that it does not know, which quotes ours."""
    return isinstance(error, ValueError) and "hf_dirembed" in str(error)


@torch.no_grad()
def _answers(subject: str, models: list[Any], folder: Path) -> list[Tensor]:
    scene = Scene(subject, folder, Random(0))
    return [scene.ask(model.eval()).double() for model in models]


def _difference(ours: Tensor, stock: Tensor, models: list[Any]) -> str | None:
    """What differs by more than rounding."""
    dtypes = [next(model.parameters()).dtype for model in models]
    if dtypes[0] != dtypes[1]:
        return f"the dtype is {dtypes[0]}, not {dtypes[1]}"
    counts = [(m.num_parameters(), m.num_parameters(exclude_embeddings=True)) for m in models]
    tied = models[1].config.tie_word_embeddings  # what is shared otherwise, a file does not say
    if tied and counts[0] != counts[1]:
        return f"the parameters are counted as {counts[0]}, not {counts[1]}"
    if ours.shape != stock.shape:
        return f"the logits are {list(ours.shape)}, not {list(stock.shape)}"
    ours, stock = ours[..., : VOCAB // 2], stock[..., : VOCAB // 2]  # rows of new tokens are drawn
    if not ours.isfinite().all() and stock.isfinite().all():
        return "ours are not finite"
    off = ((ours - stock).norm() / stock.norm()).item()
    allowed = 3e-2  # once they were in 16 bits, they are no more the same
    return f"the logits differ by {off:.1%}" if off > allowed else None
