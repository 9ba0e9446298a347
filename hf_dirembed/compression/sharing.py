"""One number of bytes for several matrices: shared so that the summed cost of their errors is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..errors import BudgetError


_BISECTIONS = 200  # of the logarithm of the multiplier: to the precision of float64
_FARTHEST = 900.0  # of that logarithm: beyond, powers of two leave float64
_DIGITS = 3  # of the bits that a message asks for


class Curve(Protocol):
    """How the relative error of a matrix falls as its bits grow: from 1 at no bits, ever more slowly."""

    def rate_at_slope(self, slope: float) -> float:
        """The bits per weight from which on one more bit per weight lowers the relative error by less than `slope`."""


@dataclass(frozen=True)
class LatentCurve:
    """The curve of float latents: each takes as many bits as every other, and the leading ones come first.

    Attributes:
        spectrum: (dim,) float64, descending: the variance along each axis.
        bits: What one latent and its row of the decoder take, in bits per weight of the matrix.

    Example:
        >>> import torch
        >>> LatentCurve(torch.tensor([3.0, 1.0]), bits=16).rate_at_slope(0.02)  # the second: 1/64 a bit
        16
    """

    spectrum: Tensor
    bits: float

    def rate_at_slope(self, slope: float) -> float:
        """As `Curve` has it: the bits of the latents that lower the error by more than `slope` for each of theirs."""
        gains = self.spectrum / (self.spectrum.sum() * self.bits)
        return self.bits * int((gains > slope).sum())


@dataclass(frozen=True)
class Demand:
    """What a matrix asks of the bytes.

    Attributes:
        name: Of the table that it is, or is a part of.
        num_weights: V x d.
        curve: Its relative error as a function of its bits per weight.
        cost: What leaving it uncoded costs, non-negative: the cost of an error is this times the relative error.
        least: The fewest bytes that hold any code of it.
        most: The most bytes that it can use.
    """

    name: str
    num_weights: int
    curve: Curve
    cost: float
    least: int
    most: int

    def num_bytes(self, multiplier: float) -> float:
        """The bytes from which on one more lowers the cost by less than `multiplier`, within least and most."""
        if not self.cost:
            return self.least
        slope = multiplier * self.num_weights / 8 / self.cost
        return min(max(self.curve.rate_at_slope(slope) * self.num_weights / 8, self.least), self.most)


def share_bytes(demands: Sequence[Demand], total: int, *, reserved: int = 0) -> list[int]:
    """Shares bytes between matrices so that the sum of what their errors cost is least.

    At the optimum one more byte lowers the cost of every matrix by as much, but for those that are held at their
    least or most. That common gain is the Lagrangian multiplier, which is found by bisection. Where a curve has a
    corner, the gain of one more byte jumps there, and the last bytes go to the matrix that is at its corner.

    Args:
        demands: Of the matrices.
        total: The most bytes for all of them.
        reserved: Bytes of these that are taken already.

    Returns:
        The bytes of each, whole, of sum at most `total`, and below it by less than a byte for each matrix where the
        most of all exceed it.

    Raises:
        BudgetError: If even the least of all exceed `total`.

    Source: Shoham & Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers.

    Example:
        >>> import torch
        >>> from hf_dirembed.compression.rate_distortion import RateDistortion
        >>> curve = RateDistortion(torch.ones(100), torch.ones(8))
        >>> cheap = Demand("embed_tokens", 800, curve, cost=1, least=1, most=800)
        >>> dear = Demand("lm_head", 800, curve, cost=16, least=1, most=800)
        >>> share_bytes([cheap, dear], total=600)  # 4 times the error, relative to the cost: 2 bits per weight more
        [200, 400]
    """
    _check_least(demands, total, reserved)
    total -= reserved
    if total >= sum(demand.most for demand in demands):
        return [demand.most for demand in demands]

    low, high = -_FARTHEST, _FARTHEST  # too many bytes are asked for at the first, not too many at the second
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(demand.num_bytes(2**middle) for demand in demands) > total:
            low = middle
        else:
            high = middle

    fewer = [demand.num_bytes(2**high) for demand in demands]
    jumps = [max(0.0, demand.num_bytes(2**low) - held) for demand, held in zip(demands, fewer, strict=True)]
    share = min(1.0, (total - sum(fewer)) / sum(jumps)) if any(jumps) else 0.0
    return _whole([held + share * jump for held, jump in zip(fewer, jumps, strict=True)], total)


def _whole(shares: list[float], total: int) -> list[int]:
    """Rounds to whole bytes: up where rounding of floats alone keeps a share from its next byte and there is room."""
    rounded = [math.floor(share + 1e-6) for share in shares]
    while sum(rounded) > total:
        rounded[rounded.index(max(rounded))] -= 1
    return rounded


def _check_least(demands: Sequence[Demand], total: int, reserved: int) -> None:
    least = sum(demand.least for demand in demands) + reserved
    if least <= total:
        return
    of_table: dict[str, int] = {}
    weights: dict[str, int] = {}
    for demand in demands:
        of_table[demand.name] = of_table.get(demand.name, 0) + demand.least
        weights[demand.name] = weights.get(demand.name, 0) + demand.num_weights

    name, every = max(of_table, key=of_table.__getitem__), sum(weights.values())
    mend = f"ask for at least bits={_rounded_up(8 * (least + 1) / every)}"  # a byte more, as floats are rounded
    others = every - weights[name]
    if others and sum(of_table.values()) - of_table[name] <= math.floor(total * others / every):
        mend += f", or leave {name} out of tables="
    if len(of_table) == 1:
        raise BudgetError(f"{total} bytes do not hold the codes of {name}, which take {least} at least: {mend}")
    raise BudgetError(
        f"{total} bytes do not hold the codes of {len(of_table)} tables and their decoders, which take {least} at "
        f"least, {name} {of_table[name]} of them: {mend}"
    )


def _rounded_up(bits: float) -> str:
    """A number to three digits, not below it."""
    step = 10.0 ** (math.floor(math.log10(bits)) + 1 - _DIGITS)
    return f"{math.ceil(bits / step) * step:.{_DIGITS}g}"
