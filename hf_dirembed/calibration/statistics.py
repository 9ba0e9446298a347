"""Calibration statistics: what a model does with its embedding table, and the Hessian that follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.atomic import save_state
from ..errors import CalibrationError
from .lookups import LookupStatistics


DAMPING = 0.1  # of directions that calibration text never needed: they still count a little
FORMAT = "dirembed-statistics-3"
TENSORS = ("counts", "head_moment", "gradient_moment", "probabilities", "uncertainty")
NUMBERS = ("num_tokens", "num_predictions", "num_windows")
_FURTHER = "further."  # of names in files: what follows is the path of a table, and a field of `LookupStatistics`


@dataclass(frozen=True)
class Statistics:
    """What calibration text says about an embedding table of V rows and d columns.

    Two statistics of different text about one model are merged by `+`: moments are means, weighted by what they are
    means of.

    Attributes:
        counts: How often each token occurred, (V,) float64.
        head_moment: E[h hᵀ] over predicted positions, h the input of the output embedding, (d, d) float64; None for
            a model without a head.
        gradient_moment: E[g gᵀ] over tokens, g the gradient of the loss at the embedding's rows, (d, d) float64.
        num_tokens: Tokens seen: the sum of the counts.
        num_predictions: Positions at which the head's input was taken.
        num_windows: Windows of text seen.
        probabilities: The mean probability of each token in the model's own predictions, (rows of the head,) float64
            of sum 1; None for a model without a head.
        uncertainty: The mean of p (1 - p), p the probability of a token in a prediction, (rows of the head,) float64;
            None for a model without a head, and where it was not taken.
        further: What was seen of the tables that are looked up beside the input embedding, by their module's path.
    """

    counts: Tensor
    head_moment: Tensor | None
    gradient_moment: Tensor | None
    num_tokens: int
    num_predictions: int = 0
    num_windows: int = 0
    probabilities: Tensor | None = None
    uncertainty: Tensor | None = None
    further: Mapping[str, LookupStatistics] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.counts.shape != other.counts.shape:
            raise CalibrationError(
                f"statistics of {len(self.counts)} and {len(other.counts)} tokens: merge those of one model only"
            )

        if not (self.num_tokens and other.num_tokens):  # nothing seen yet: no moments either
            return self if self.num_tokens else other

        uncertainty = None
        if self.uncertainty is not None and other.uncertainty is not None:  # else one is of a file without it
            uncertainty = _mean(self.uncertainty, self.num_predictions, other.uncertainty, other.num_predictions)

        return Statistics(
            self.counts + other.counts,
            _mean(self.head_moment, self.num_predictions, other.head_moment, other.num_predictions),
            _mean(self.gradient_moment, self.num_tokens, other.gradient_moment, other.num_tokens),
            self.num_tokens + other.num_tokens,
            self.num_predictions + other.num_predictions,
            self.num_windows + other.num_windows,
            _mean(self.probabilities, self.num_predictions, other.probabilities, other.num_predictions),
            uncertainty,
            _added(self.further, other.further),
        )

    def save(self, path: str | Path, *, metadata: Mapping[str, object] | None = None) -> None:
        """Writes one safetensors file, whole or not at all.

        Args:
            path: The file; its folder must exist.
            metadata: Anything JSON holds, to be had back by `read_metadata`.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in TENSORS}
        numbers = {name: str(getattr(self, name)) for name in NUMBERS}
        for table, seen in self.further.items():
            tensors |= {f"{_FURTHER}{table}.{name}": getattr(seen, name) for name in ("counts", "gradient_moment")}
            numbers[f"{_FURTHER}{table}.num_reads"] = str(seen.num_reads)
        header = {"format": FORMAT, "settings": json.dumps(dict(metadata or {})), **numbers}
        save_state(path, {name: value for name, value in tensors.items() if value is not None}, header)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            CalibrationError: If the file is missing, damaged or something else.

        Example:
            >>> import tempfile, torch
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = f"{folder}/statistics.safetensors"
            ...     Statistics(torch.ones(3), None, torch.eye(2), num_tokens=3).save(path)
            ...     Statistics.load(path).num_tokens
            3
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path} is no readable statistics file ({error}): calibrate anew") from error

        counts, head, gradient, probabilities, uncertainty = (tensors.get(name) for name in TENSORS)
        numbers = {name: int(header[name]) for name in NUMBERS if header.get(name, "").isdigit()}

        if header.get("format") != FORMAT or len(numbers) != len(NUMBERS) or counts is None or counts.ndim != 1:
            raise CalibrationError(f"{path} holds no {FORMAT}: give a file that calibrate(resume=...) wrote")
        if any(moment is not None and moment.shape != (len(moment),) * 2 for moment in (head, gradient)):
            raise CalibrationError(f"{path} holds a moment that is no square matrix: calibrate anew")
        if any(each is not None and each.ndim != 1 for each in (probabilities, uncertainty)):
            raise CalibrationError(f"{path} holds probabilities that are no vector: calibrate anew")

        further = _further_of(tensors, header)
        return cls(
            counts, head, gradient, probabilities=probabilities, uncertainty=uncertainty, further=further, **numbers
        )


def _further_of(tensors: dict[str, Tensor], header: Mapping[str, str]) -> dict[str, LookupStatistics]:
    """What a file says of further lookups.

    Raises:
        CalibrationError: If a number or a moment is missing or malformed.
    """
    further = {}
    for name, moment in tensors.items():
        if name.startswith(_FURTHER) and name.endswith(".gradient_moment"):
            table = name.removeprefix(_FURTHER).removesuffix(".gradient_moment")
            reads = header.get(f"{_FURTHER}{table}.num_reads", "")
            if moment.ndim != 3 or moment.shape[1] != moment.shape[2] or not reads.isdigit():
                raise CalibrationError(f"what the file says of {table} is malformed: calibrate anew")
            further[table] = LookupStatistics(tensors.get(f"{_FURTHER}{table}.counts"), moment, int(reads))
    return further


def _added(mine: Mapping[str, LookupStatistics], other: Mapping[str, LookupStatistics]) -> dict[str, LookupStatistics]:
    if mine.keys() != other.keys():
        raise CalibrationError("statistics of models with different tables: merge those of one model only")
    return {path: seen + other[path] for path, seen in mine.items()}


def read_metadata(path: str | Path) -> dict[str, object]:
    """The `metadata` that `Statistics.save` was given; the file must be one that `Statistics.load` reads."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("settings", "{}"))


def hessian(
    statistics: Statistics, *, damping: float = DAMPING, use_head: bool = True, use_gradient: bool = True
) -> Tensor:
    """The matrix C in which errors of the table's rows are measured: ‖x − x̂‖² = (x − x̂)ᵀ C (x − x̂).

    C is E[h hᵀ] + E[g gᵀ] scaled to mean diagonal 1, plus `damping` times the identity: directions that the
    calibration text never needed still count a little.

    The two sides are added as they are, not each scaled to the same size. To second order, an error e of the row of
    token v raises the expected loss by about p (hᵀe)² / 2 where the head gives v the probability p, and by (gᵀe)² / 2
    where v is read. Both are in nats, so their natural scales say how much more
    one side matters than the other. How often each happens is left to the weights: see `usage`.

    Args:
        statistics: What `calibrate` gave.
        damping: λ, at least 0; with λ > 0 it is positive definite, whatever the text.
        use_head: Count the head's side; for a table that is only an input embedding (an untied head) say False.
        use_gradient: Count the input's side; for an untied head's own table say False.

    Returns:
        C, (d, d) float64, symmetric.

    Raises:
        CalibrationError: If there is no moment to use, two of different size, one that is zero or not finite, or
            the damping is negative.

    Example:
        >>> import torch
        >>> moment = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> hessian(Statistics(torch.ones(5), None, moment, num_tokens=5), damping=0.5).diagonal().tolist()
        [2.0, 1.0]
    """
    head = statistics.head_moment if use_head else None
    gradient = statistics.gradient_moment if use_gradient else None
    moments = [moment.double() for moment in (head, gradient) if moment is not None]
    if not moments:
        raise CalibrationError("no moment to make a Hessian of: calibrate, or compress without one")

    if len({moment.shape for moment in moments}) > 1:
        raise CalibrationError(
            f"the head has dimension {len(moments[0])}, the embedding {len(moments[1])}: give use_head=False"
        )
    return damped(torch.stack(moments).sum(0), damping=damping)


def damped(moment: Tensor, *, damping: float = DAMPING) -> Tensor:
    """A moment, (d, d), as a Hessian: symmetric, scaled to mean diagonal 1, plus `damping` times the identity.

    Raises:
        CalibrationError: If the moment is zero or not finite, or the damping is negative.

    Example:
        >>> import torch
        >>> damped(torch.diag(torch.tensor([3.0, 1.0])), damping=0.5).diagonal().tolist()
        [2.0, 1.0]
    """
    if not 0 <= damping < float("inf"):
        raise CalibrationError(f"damping {damping}: give a number that is at least 0, such as 0.1")
    if not (moment.isfinite().all() and moment.diagonal().sum() > 0):
        raise CalibrationError("a calibration moment is zero or not finite: is the model broken, the text too short?")
    total = moment.double()
    total = (total + total.T) / (2 * total.diagonal().mean())
    return total + damping * torch.eye(len(total), dtype=torch.float64)


def usage(statistics: Statistics, *, tied: bool) -> Tensor:
    """How often each row of the table was used on the calibration text: the `counts` of `token_weights`.

    A row is used where its token is read. A tied head uses every row at every prediction, but an error of a logit
    raises the loss in proportion to the probability of its token (the diagonal of the softmax's Fisher information),
    so there a token counts as often as the model expects it. The two sides get half of the weight each.

    Args:
        statistics: What `calibrate` gave.
        tied: Whether the head multiplies the same table. A model without a head gives the same either way.

    Returns:
        (V,) float64, non-negative, of sum `num_tokens` whatever the sides, so that a long text counts more.

    Raises:
        CalibrationError: If the head predicts another number of tokens than the table has.

    Example:
        >>> import torch
        >>> counts, probabilities = torch.tensor([4.0, 0.0]).double(), torch.tensor([0.5, 0.5]).double()
        >>> seen = Statistics(counts, None, None, num_tokens=4, num_predictions=3, probabilities=probabilities)
        >>> usage(seen, tied=True).tolist(), usage(seen, tied=False).tolist()
        ([3.0, 1.0], [4.0, 0.0])
    """
    counts, probabilities = statistics.counts.double(), statistics.probabilities
    if not tied or probabilities is None or not statistics.num_predictions:
        return counts
    if probabilities.shape != counts.shape:
        raise CalibrationError(
            f"the head predicts {len(probabilities)} tokens, the table has {len(counts)}: give tied=False"
        )
    return (counts + statistics.num_tokens * probabilities) / 2


def _mean(mine: Tensor | None, number: int, other: Tensor | None, other_number: int) -> Tensor | None:
    if mine is None and other is None:
        return None
    if mine is None or other is None or mine.shape != other.shape:
        raise CalibrationError("statistics with different moments: merge those of one model only")
    return (number * mine + other_number * other) / max(number + other_number, 1)
