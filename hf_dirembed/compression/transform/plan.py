"""How a budget is spent: bytes for every row, further bytes for some rows, and the decoder's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import DecoderStorage
from .quantisation import Allocation, BitAllocator


ROW_NUMBER_ITEMSIZE = 4  # int32
_STEP_BYTES = 5  # of each code of the second stage: the latent's number and the exponent
# How bytes may be split: the first stage's share of those that a row could have, the second's relative to the first's.
_SHARES, _REFINEMENTS = (0.9, 0.8, 0.7, 0.6), (0.25, 0.5, 1.0, 1.5, 2.0)
_TRIED_SIZES = 100
_CLEARLY_WORSE = 1.2


@dataclass(frozen=True)
class ByteBudget:
    """The bytes that codes and decoder of a table may take.

    Attributes:
        num_bytes: The most.
        num_rows: V.
        dim: d.
        storage: How the decoder is stored.
    """

    num_bytes: int
    num_rows: int
    dim: int
    storage: DecoderStorage

    def decoder_bytes(self, rank: int) -> int:
        """Bytes of a decoder of so many latents."""
        return self.storage.num_bytes(rank, self.dim)

    def left_by(self, base: Allocation) -> int:
        """The bytes that the first stage leaves, its decoder counted."""
        return self.num_bytes - self.num_rows * base.num_bytes - self.decoder_bytes(base.rank)

    def left_by_both(self, base: Allocation, refinement_rank: int, further: int) -> int:
        """The bytes that are left for rows of a second stage, some of whose latents the first stage has not."""
        return self.left_by(base) - _STEP_BYTES * refinement_rank - self.decoder_bytes(further)

    def refinable_rows(self, left: int, refinement_bytes: int) -> int:
        """How many rows can be refined with `left` bytes."""
        return min(self.num_rows, max(0, left // (refinement_bytes + ROW_NUMBER_ITEMSIZE)))


@dataclass(frozen=True)
class StagePlan:
    """The bytes of the two stages.

    Attributes:
        base: The bits of every row.
        refinement_bytes: The further bytes of each refined row; 0 for no second stage.
        error: What the quantisers promise.
    """

    base: Allocation
    refinement_bytes: int
    error: float


def plan_stages(allocator: BitAllocator, shares: Tensor, room: ByteBudget, rounding: Tensor) -> StagePlan | None:
    """Puts all bytes into one stage or splits them between two, to the least error that the quantisers promise.

    Where all rows count alike, one stage is best; the more uneven the weights are, the more bytes go to the second.

    Args:
        allocator: Allocates the bits of the latents of all rows.
        shares: (num_rows,) each row's share of the error, descending.
        room: The bytes for codes and decoder.
        rounding: (dim,) the error that storing the decoder adds, of each latent.

    Returns:
        The best plan; None if not even one byte a row and its decoder fit.
    """
    covered = torch.cat([shares.new_zeros(1), shares.cumsum(dim=0)]).tolist()
    rounded = torch.cat([rounding.new_zeros(1), rounding.cumsum(dim=0)]).tolist()

    plans = []
    if one := plan_one_stage(allocator, room, rounding):
        plans.append(one)

    # both stages, for every split of the bytes that is tried
    for share in _SHARES:
        base = _first_stage(allocator, room, share)
        if base is None:
            continue
        further = allocator.after(base)

        for relative in _REFINEMENTS:
            num_bytes = max(1, int(relative * base.num_bytes))
            refined = further.allocate(num_bytes, room.dim)
            if refined is None:
                continue

            of_base = int((further.latents[: refined.rank] < base.rank).sum())
            left = room.left_by_both(base, refined.rank, refined.rank - of_base)
            if rows := room.refinable_rows(left, num_bytes):
                error = base.error * (1 - covered[rows]) + refined.error * covered[rows]
                plans.append(StagePlan(base, num_bytes, error + rounded[base.rank]))

    return min(plans, key=lambda plan: plan.error, default=None)


def plan_one_stage(allocator: BitAllocator, room: ByteBudget, rounding: Tensor) -> StagePlan | None:
    """Puts all bytes into one stage.

    Args:
        allocator: Allocates the bits of the latents of all rows.
        room: The bytes for codes and decoder.
        rounding: (dim,) the error that storing the decoder adds, of each latent.

    Returns:
        The plan; None if not even one byte a row and its decoder fit.
    """
    one = _first_stage(allocator, room, 1.0)
    return None if one is None else StagePlan(one, 0, one.error + float(rounding[: one.rank].cumsum(dim=0)[-1]))


def _first_stage(allocator: BitAllocator, room: ByteBudget, share: float) -> Allocation | None:
    """The best allocation within a share of the bytes that a row could have, its decoder within the rest.

    Towards the whole share the decoder has no room, and few latents take many bits each; so fewer bytes are tried
    until they are clearly worse.
    """
    best: Allocation | None = None
    most = int(share * room.num_bytes / room.num_rows)
    for num_bytes in range(most, 0, -max(1, most // _TRIED_SIZES)):
        decoder_rows = (room.num_bytes - room.num_rows * num_bytes) // room.decoder_bytes(1)
        found = allocator.allocate(num_bytes, min(room.dim, decoder_rows)) if num_bytes != room.dim else None
        if found is not None and (best is None or found.error < best.error):
            best = found
        elif found is not None and best is not None and found.error > _CLEARLY_WORSE * best.error:
            break
    return best
