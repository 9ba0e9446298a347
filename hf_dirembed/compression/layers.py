"""How a budget is spent: bytes for every row, further bytes for some rows, and the decoder's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout_dirembed import BudgetError
from .quantisation import Allocation, BitAllocator


ROW_NUMBER_ITEMSIZE = 4  # int32
# The first layer's share of the bytes that a row could have, and the second's bytes relative to the first's.
# No split and one split: what the quantisers promise is good enough to choose between these, not to tune the split.
BASE_SHARE, METRIC_BASE_SHARE = 0.6, 0.8
_REFINEMENT_SHARES = (0.25, 1.0)
# Of the error that is promised to two layers, what one layer must promise to be preferred: coding in two stages comes
# out better than its estimate.
_ONE_LAYER_BELOW = 0.8
_TRIED_SIZES = 100
_CLEARLY_WORSE = 1.2


def decoder_bytes(rank: int, dim: int) -> int:
    """Bytes of a decoder: float16, and an exponent for each latent."""
    return rank * (2 * dim + 1)


@dataclass(frozen=True)
class LayerPlan:
    """The bytes of the two layers.

    Attributes:
        base: The bits of every row.
        refinement_bytes: Of each refined row; 0 for no second layer.
    """

    base: Allocation
    refinement_bytes: int


def affordable_rows(left: int, refinement_bytes: int, refinement_rank: int, dim: int) -> int:
    """How many rows can be refined with `left` bytes, of which the second layer's decoder takes its part."""
    return max(0, left - decoder_bytes(refinement_rank, dim)) // (refinement_bytes + ROW_NUMBER_ITEMSIZE)


def left_for_refinement(plan: LayerPlan, num_rows: int, dim: int, room: int) -> int:
    """The bytes that the first layer leaves, its decoder counted."""
    return room - num_rows * plan.base.num_bytes - decoder_bytes(plan.base.rank, dim)


def plan_layers(allocator: BitAllocator, shares: Tensor, dim: int, room: int, base_share: float) -> LayerPlan:
    """Splits the bytes between the two layers, to the least error that the quantisers promise.

    The error of a refined row is taken for that of a row with the bytes of both layers in one. Where all rows count
    alike, one layer is best; the more uneven the weights are, the more bytes go to the second.

    Args:
        allocator: Of the latents of all rows.
        shares: (num_rows,) each row's share of the error, descending.
        dim: d.
        room: The most bytes for codes and decoder.
        base_share: The first layer's share of the bytes that a row could have, if there are two.

    Raises:
        BudgetError: If not even one byte a row and its decoder fit.
    """
    num_rows = len(shares)
    covered = torch.cat([shares.new_zeros(1), shares.cumsum(dim=0)]).tolist()
    best, least_error = None, float("inf")
    for share in (1.0, base_share):
        base = _first_layer(allocator, num_rows, dim, room, share)
        if base is None:
            continue
        if base.error / _ONE_LAYER_BELOW < least_error:
            best, least_error = LayerPlan(base, 0), base.error / _ONE_LAYER_BELOW
        left = left_for_refinement(LayerPlan(base, 0), num_rows, dim, room)
        for relative in _REFINEMENT_SHARES:
            further = max(1, int(relative * base.num_bytes))
            refined = allocator.allocate(base.num_bytes + further, dim)
            rank = min(dim, base.rank * further // base.num_bytes)  # of what the first layer leaves, roughly
            rows = affordable_rows(left, further, rank, dim)
            if refined is not None and 0 < rows <= num_rows:
                error = base.error * (1 - covered[rows]) + refined.error * covered[rows]
                if error < least_error:
                    best, least_error = LayerPlan(base, further), error
    if best is None:
        raise BudgetError(
            f"{room} bytes do not hold the codes of a {num_rows} x {dim} table and their decoder: ask for more bits"
        )
    return best


def _first_layer(allocator: BitAllocator, num_rows: int, dim: int, room: int, base_share: float) -> Allocation | None:
    """The best allocation within a share of the bytes that a row could have, its decoder within the rest.

    Towards the whole share the decoder has no room, and few latents take many bits each; so fewer bytes are tried
    until they are clearly worse.
    """
    best: Allocation | None = None
    most = int(base_share * room / num_rows)
    for num_bytes in range(most, 0, -max(1, most // _TRIED_SIZES)):
        decoder_rows = (room - num_rows * num_bytes) // decoder_bytes(1, dim)
        found = allocator.allocate(num_bytes, min(dim, decoder_rows)) if num_bytes != dim else None
        if found is not None and (best is None or found.error < best.error):
            best = found
        elif found is not None and best is not None and found.error > _CLEARLY_WORSE * best.error:
            break
    return best
