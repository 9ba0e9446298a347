"""What the evaluations share: a model put into evaluation mode, its loss over batches, two models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import EvaluationError


IGNORED = -100  # the label of a position that does not count, in transformers and in torch


class Figures(Protocol):
    """What an evaluation returns: a frozen dataclass that says which of its fields are what.

    Attributes:
        MEASURES: The fields that are the results.
        ITEMS: Those that hold a number for each item of the data, from which differences can be tested.
    """

    MEASURES: ClassVar[tuple[str, ...]]
    ITEMS: ClassVar[tuple[str, ...]]


def settings_of(figures: Figures) -> dict[str, Any]:
    """How figures were taken, and on what data: the fields that are neither results nor items."""
    left_out = {*figures.MEASURES, *figures.ITEMS}
    names = [field.name for field in fields(figures)]  # type: ignore[arg-type]
    return {name: getattr(figures, name) for name in names if name not in left_out}


AnyFigures = TypeVar("AnyFigures", bound=Figures)


@dataclass(frozen=True)
class Comparison(Generic[AnyFigures]):
    """A model and its reference, evaluated in the same run.

    Attributes:
        model: The model's figures.
        reference: The reference's figures.
        difference: The model's measures minus the reference's, by name.
        ratio: The model's measures over the reference's, by name; left out where the reference's is 0.
        agreement: How alike the two models' outputs are, where the task says so; else empty.
    """

    model: AnyFigures
    reference: AnyFigures
    difference: dict[str, float]
    ratio: dict[str, float]
    agreement: dict[str, float]


def side_by_side(
    model: AnyFigures, reference: AnyFigures, agreement: dict[str, float] | None = None
) -> Comparison[AnyFigures]:
    """Sets the figures of a model beside those of its reference."""
    pairs = {name: (float(getattr(model, name)), float(getattr(reference, name))) for name in model.MEASURES}
    return Comparison(
        model=model,
        reference=reference,
        difference={name: ours - theirs for name, (ours, theirs) in pairs.items()},
        ratio={name: ours / theirs for name, (ours, theirs) in pairs.items() if theirs},
        agreement=agreement or {},
    )


def compare(
    evaluate: Callable[..., AnyFigures],
    model: PreTrainedModel,
    reference: PreTrainedModel,
    /,
    *args: Any,
    **options: Any,
) -> Comparison[AnyFigures]:
    """Evaluates two models alike.

    Args:
        evaluate: `perplexity` or `masked_perplexity`; for STS there is `compare_sts`.
        model: The model, compressed or dense.
        reference: What it is compared with.
        *args: What `evaluate` takes after the model.
        **options: Its settings; a `reference` among them is that of `evaluate`.

    Raises:
        EvaluationError: As `evaluate` does.
    """
    return side_by_side(evaluate(model, *args, **options), evaluate(reference, *args, **options))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients; afterwards each module is back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def mean_nll(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], *, description: str) -> tuple[float, int]:
    """The mean of what [`sum_nll`] gives, and how many labels there are."""
    totals, counts = sum_nll(model, batches, description=description)
    count = int(counts.sum())
    return totals.sum().item() / count, count


def sum_nll(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], *, description: str
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of the labels of each row, in nats, and how many labels it has.

    Args:
        model: A model with a language-model head.
        batches: Inputs of the model, and `labels` (batch, length) aligned with the logits, `IGNORED` where a position
            does not count.
        description: What the progress bar says.

    Returns:
        (rows,) sums in float64, and (rows,) counts; of the rows of all batches, on the CPU.

    Raises:
        EvaluationError: If nothing counts, an id is beyond the model's vocabulary, or the model gives NaN.
    """
    if not sum(int((batch["labels"] != IGNORED).sum()) for batch in batches):
        raise EvaluationError("the text is too short, nothing of it counts: give more text")
    head: Any = model.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    if (largest := max(int(batch["input_ids"].max()) for batch in batches)) >= vocabulary:
        raise EvaluationError(f"token id {largest} is beyond the model's {vocabulary} rows: give its own tokenizer")

    totals: list[Tensor] = []
    with inference(model):
        for batch in logging.tqdm(batches, desc=description):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            labels = batch["labels"].to(logits.device)  # which is another one for a model spread over several
            counted = labels != IGNORED

            # The logits that do not count are dropped before the copy in float32, which is the large one.
            losses = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
            rows = counted.nonzero()[:, 0].cpu()
            totals.append(torch.zeros(len(labels), dtype=torch.float64).index_add_(0, rows, losses.cpu().double()))

    total = torch.cat(totals)
    if total.isnan().any():
        raise EvaluationError(f"{type(model).__name__} gives NaN: load it in float32 or bfloat16")
    return total, torch.cat([(batch["labels"] != IGNORED).sum(dim=1) for batch in batches]).cpu()


def exp(nll: float) -> float:
    """The perplexity of a mean negative log-likelihood in nats; infinite where a float holds no more."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def check_head(model: PreTrainedModel, auto_class: str) -> None:
    """Refuses a model without a language-model head.

    Raises:
        EvaluationError: If it has none.
    """
    if model.get_output_embeddings() is None:
        raise EvaluationError(f"{type(model).__name__} has no language-model head: load it with {auto_class}")


def find_device(name: str | None = None) -> torch.device:
    """The device of that name; by default a GPU where there is one.

    Raises:
        EvaluationError: If there is none of that name here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from torch without CUDA
        raise EvaluationError(f"device={name!r} is none of this machine's: choose another, like cpu") from error
    return device


def check_counts(**counts: int | None) -> None:
    """Refuses settings that are no whole number from 1; None stands for no limit.

    Raises:
        EvaluationError: If one is.

    Example:
        >>> check_counts(window=0)
        Traceback (most recent call last):
        ...
        hf_dirembed.errors.EvaluationError: window=0 is no whole number from 1: give one
    """
    for name, count in counts.items():
        if count is not None and (type(count) is not int or count < 1):
            raise EvaluationError(f"{name}={count!r} is no whole number from 1: give one")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The most tokens that the model has positions for and, where it is given, that the tokenizer allows."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [positions, None if tokenizer is None else tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and limit > 0), default=1 << 30)


def check_window(window: int, longest: int) -> None:
    """Refuses a window that the model has no positions for.

    Raises:
        EvaluationError: If it is too long.
    """
    if window > longest:
        raise EvaluationError(f"window={window} exceeds the {longest} tokens that the model takes: give at most that")
