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

from . import actions
from .action import ACTIONS, Scene
from .subjects import SUBJECTS, VOCAB, pair


__all__ = ["Sequence", "actions", "run"]

METHODS = ("transform", "transform", "direction", "svd")
ROUNDING = 1e-4  # of the size of all numbers, in float32; what dense and compressed tables sum in another order
NARROW_ROUNDING = {torch.bfloat16: 6e-2, torch.float16: 1e-2}  # decoders are rounded, where the dense table is


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
        failures: How many ended in an error that the stock model raises as well.
        narrow: Whether the models were in 16 bits since they were compared last.
    """

    seed: int
    subject: str
    method: str
    actions: list[str] = field(default_factory=list)
    finding: str | None = None
    refusals: int = 0
    failures: int = 0
    narrow: torch.dtype | None = None

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.subject} ({self.method}), {' > '.join(self.actions)}: "
            f"{self.finding or 'the same'} ({self.refusals} refused, {self.failures} fail as stock)"
        )


def run(seed: int, *, length: int = 5, only: str | None = None) -> Sequence:
    """Draws a sequence of actions and does them.

    Args:
        seed: What is drawn from.
        length: The most actions.
        only: The subject; by default any.
    """
    draw = Random(seed)
    sequence = Sequence(seed, only or draw.choice(list(SUBJECTS)), draw.choice(METHODS))
    weights = [action.weight for action in ACTIONS.values()]
    names = draw.choices(list(ACTIONS), weights, k=draw.randint(1, length))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        models: list[Any] = list(pair(sequence.subject, sequence.method))
        for number, name in enumerate(names):
            sequence.actions.append(name)
            models = _do(sequence, name, models, f"{seed}.{number}", Path(folder, str(number)))
            if sequence.finding:
                break
    return sequence


def _do(sequence: Sequence, name: str, models: list[Any], seed: str, folder: Path) -> list[Any]:
    """Does one action to both models; gives those to go on with: the ones before where it fails."""
    act, results, errors, scenes = ACTIONS[name], [], [], []
    if act.amplifies and sequence.narrow:
        models = [models[0].float()]
        models.append(hf_dirembed.expand(copy.deepcopy(models[0])))
        sequence.narrow = None
    kept = copy.deepcopy(models)
    before = _answers(sequence.subject, models, folder) if act.exact else []
    for number, model in enumerate(models):
        place = folder / str(number)
        place.mkdir(parents=True)
        scenes.append(Scene(sequence.subject, place, Random(seed)))
        try:
            results.append(act.do(model, scenes[-1]))
            errors.append(None)
        except Exception as error:
            results.append(None)
            errors.append(error)

    # errors, of which a clear one may be ours alone
    ours, stock = errors
    if isinstance(ours, hf_dirembed.DirEmbedError) or _names_a_mend(ours):
        sequence.refusals += 1
        if not act.may_refuse:
            sequence.finding = f"{name} is refused: {ours}"
        return kept
    if ours is not None or stock is not None:
        if type(ours) is not type(stock):
            said = "".join(traceback.format_exception(ours or stock)[-3:])
            sequence.finding = f"{name} fails with {'ours' if ours else 'stock'} alone: {said}"
        sequence.failures += 1
        return kept

    # some models of transformers do not outlive an untied config
    try:
        _answers(sequence.subject, results[1:], folder)
    except Exception:
        sequence.failures += 1
        return kept

    try:
        sequence.finding = _compare(sequence, act, results, scenes, before, folder)
    except Exception as error:
        sequence.finding = f"after {name}: {''.join(traceback.format_exception(error)[-4:])}"
    return results


def _compare(
    sequence: Sequence, act: Any, results: list[Any], scenes: list[Scene], before: list[Tensor], folder: Path
) -> str | None:
    """What differs after an action; where models may have become others, the stock one is made of ours again."""
    subject = sequence.subject
    found = _answers(subject, results, folder)
    dtype = next(results[0].parameters()).dtype
    if dtype in NARROW_ROUNDING:
        sequence.narrow = dtype if sequence.narrow is not torch.bfloat16 else sequence.narrow
    kept = [
        torch.equal(*each) if each[0].dtype == each[1].dtype else None for each in zip(before, found, strict=False)
    ]
    if kept == [False, True]:
        off = (before[0] - found[0]).abs().max().item()
        return f"what is exact changes the logits, by up to {off:.1e}"

    # numbers that were read, then the answers
    for mine, theirs in zip(*(scene.read for scene in scenes), strict=bool(scenes[0].read)):
        said = _differ(mine, theirs, max(_allowed(sequence.narrow), _allowed(mine.dtype)))
        if said is not None:
            return f"what is read differs: {said}"
    if not act.rebases or act.compares:
        said = _difference(*found, results, _allowed(sequence.narrow))
        if said is not None:
            return said
    if act.rebases or (sequence.narrow and dtype not in NARROW_ROUNDING):
        results[1] = hf_dirembed.expand(copy.deepcopy(results[0]))
        sequence.narrow = dtype if dtype in NARROW_ROUNDING else None
        return _difference(*_answers(subject, results, folder), results, _allowed(dtype))
    return None


def _allowed(dtype: torch.dtype | None) -> float:
    """How much numbers may differ that were in a dtype."""
    return ROUNDING if dtype is None else NARROW_ROUNDING.get(dtype, ROUNDING)


def _names_a_mend(error: Exception | None) -> bool:
    """Whether it is PEFT's error on a target that it does not know, which quotes ours."""
    return isinstance(error, ValueError) and "hf_dirembed" in str(error)


@torch.no_grad()
def _answers(subject: str, models: list[Any], folder: Path) -> list[Tensor]:
    scene = Scene(subject, folder, Random(0))
    return [scene.ask(model.eval()) for model in models]


def _difference(ours: Tensor, stock: Tensor, models: list[Any], allowed: float) -> str | None:
    """What differs by more than rounding."""
    dtypes = [next(model.parameters()).dtype for model in models]
    if dtypes[0] != dtypes[1]:
        return f"the dtype is {dtypes[0]}, not {dtypes[1]}"
    if ours.dtype != stock.dtype:
        return f"the logits are in {ours.dtype}, not {stock.dtype}"
    counts = [(m.num_parameters(), m.num_parameters(exclude_embeddings=True)) for m in models]
    tied = models[1].config.tie_word_embeddings  # what is shared otherwise, a file does not say
    if tied and counts[0] != counts[1]:
        return f"the parameters are counted as {counts[0]}, not {counts[1]}"
    if ours.shape != stock.shape:
        return f"the logits are {list(ours.shape)}, not {list(stock.shape)}"
    said = _differ(ours[..., : VOCAB // 2], stock[..., : VOCAB // 2], allowed)  # rows of new tokens are drawn
    return None if said is None else f"the logits: {said}"


def _differ(ours: Tensor, stock: Tensor, allowed: float) -> str | None:
    """Whether numbers differ, by more than a share of their size: the largest of them, and all together."""
    if ours.shape != stock.shape:
        return f"of shape {list(ours.shape)}, not {list(stock.shape)}"
    ours, stock = ours.double(), stock.double()
    if not torch.equal(ours.isfinite(), stock.isfinite()):
        return "not finite at other places"
    size = max(stock.nan_to_num(0, 0, 0).abs().max().item(), 1e-6) if stock.numel() else 1.0
    off = (ours - stock).nan_to_num(0, 0, 0).abs().max().item() / size if stock.numel() else 0.0
    return f"off by {off:.1e} of the largest" if off > allowed else None
