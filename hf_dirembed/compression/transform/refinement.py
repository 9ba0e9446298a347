"""The second stage: further codes for what the first stage leaves of important rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_weights import Sample
from ..subspace import eigenbasis
from .codec import Codec, Stage
from .plan import ByteBudget
from .quantisation import QUANTISER_SAMPLE, BitAllocator, Quantisers


@dataclass(frozen=True)
class RefinementPlan:
    """A second stage, before codes and decoder are fitted to each other.

    Attributes:
        stage: Its codes.
        further: (n, dim) the decoder's rows of the latents that the first stage has not, which follow its own.
        rows: How many there is room for.
        error: What the quantisers promise, of all rows.
    """

    stage: Stage
    further: Tensor
    rows: int
    error: float


def plan_refinement(
    codec: Codec,
    quantisers: Quantisers,
    basis: Tensor,
    sample: Sample,
    shares: Tensor,
    room: ByteBudget,
    num_bytes: int,
) -> RefinementPlan | None:
    """Finds the quantisers of what a codec's first stage leaves.

    They may make its latents finer, which costs no bytes in the decoder, or have latents of their own, which fit the
    residual of these rows better: what promises the lesser error is taken.

    Args:
        codec: What has the first stage alone.
        quantisers: Those of its latents.
        basis: (dim, dim) the axes that these latents are on.
        sample: What to fit to: the sampled rows among those that will roughly be refined.
        shares: (num_rows,) each row's share of the error, descending.
        room: How many bytes codes and decoder may take.
        num_bytes: How many bytes a refined row's further codes take.

    Returns:
        The plan; None if there is no room for a row.
    """
    nothing = torch.zeros(len(sample.rows), dtype=torch.bool, device=sample.rows.device)
    residual = codec.residual(sample.rows, codec.encode(sample.rows, nothing))
    moment = ((residual * sample.omega.unsqueeze(1)).T @ residual / sample.omega.sum()).double()
    resampled = residual[sample.resample(residual, QUANTISER_SAMPLE)]

    steps, covered, plans = codec.base.steps(quantisers).to(residual), shares.cumsum(dim=0), []

    # Latents of the first stage made finer are tried first, then latents of their own.
    for shared in (codec.base.rank, 0):
        axes, variances = _axes(moment, basis[:, :shared])
        variances, order = variances.sort(descending=True, stable=True)
        found = Quantisers.fit(resampled @ axes[:, order], variances, codec.codebooks)
        allocation = BitAllocator(found.errors).allocate(num_bytes, room.dim)
        if allocation is None:
            continue

        named, wanted = order[: allocation.rank], allocation.steps(found).to(residual)
        own = named >= shared  # in order: `further` has them as they come
        rows = room.refinable_rows(room.left_by_both(codec.base, allocation.rank, int(own.sum())), num_bytes)

        if rows:
            units = torch.where(own, wanted, steps[named.clamp(max=codec.base.rank - 1)])
            stage = Stage.of_steps(allocation, named + codec.base.rank - shared, wanted / units)
            further = wanted[own].unsqueeze(1) * axes[:, named[own]].T
            missed = 1 - float(covered[rows - 1])
            error = missed * float(moment.trace()) + (1 - missed) * allocation.error
            plans.append(RefinementPlan(stage, further, rows, error))

    return min(plans, key=lambda plan: plan.error, default=None)


def _axes(moment: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Axes of residuals with that second moment, (dim, dim), and their variances, (dim,).

    The first ones are given, (dim, n) orthonormal; the others span what these leave, the strongest first.
    """
    complete, _ = torch.linalg.qr(first.double(), mode="complete")
    others = complete[:, first.shape[1] :]
    if others.shape[1]:
        others = others @ eigenbasis(others.T @ moment @ others)[1]
    axes = torch.cat([first.double(), others], dim=1)
    return axes.to(first), (axes * (moment @ axes)).sum(dim=0).to(first)
