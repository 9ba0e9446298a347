"""Quantisation of latents: what each number of bits leaves of a latent, and the steps of its codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS
from .trellis import Codebooks, best_states


QUANTISER_SAMPLE = 1024  # rows that errors and steps are measured on
# The codes of a latent by its bits: each codes what those before it leave. No two are of one width, as the codes of a
# width are found together.
CODES_OF_BITS: tuple[tuple[int, ...], ...] = (
    (), (1,), (2,), (3,), (4,), (4, 1), (4, 2), (4, 3), (4, 3, 1), (4, 3, 2), (4, 3, 2, 1),
)  # fmt: skip
MAX_BITS = len(CODES_OF_BITS) - 1


# What a code leaves has heavier tails than a Gaussian, which the codes behind it do not reach: so its steps are wider,
# once for each code behind it. Measured on a Gaussian and on latents of uneven scales.
_WIDER = 1.15
_SEVERAL_ROWS = 256  # of the sample, which latents of several codes are measured on


@dataclass(frozen=True)
class Quantisers:
    """What codes make of each latent, measured on a sample.

    Attributes:
        left: (1 + `MAX_BITS`, rank) the share of a latent's variance that 0, 1, 2, … bits leave.
        steps: (1 + `MAX_BITS`, widths, rank) what half-integers of the code of each of `BIT_WIDTHS` are multiplied by,
            in standard deviations of the latent, by the latent's bits; 0 for codes that it has not.
        codebooks: The levels of the trellis's states.
    """

    left: Tensor
    steps: Tensor
    codebooks: Codebooks

    @classmethod
    def fit(cls, sample: Tensor, codebooks: Codebooks | None = None) -> Quantisers:
        """Measures codes of all bits on every latent.

        Args:
            sample: (n, rank) latents, drawn with the weights that the error is to have.
            codebooks: What to quantise with; by default some are trained on the sample.
        """
        power = sample.square().mean(dim=0)
        normalised = sample * torch.where(power > 0, power.rsqrt(), 0)
        codebooks = codebooks or Codebooks.train(normalised)

        # one code: its best step, and what it leaves
        found = []
        for index, width in enumerate(BIT_WIDTHS):
            book, unit = codebooks.levels[index], codebooks.units[index]
            states = best_states(normalised, torch.ones_like(power), book * unit, width)
            found.append(_regression(normalised, book[states.int()], unit))
        left_by, step_of = (torch.stack(each) for each in zip(*found, strict=True))
        left_by = left_by.clamp(0, 1)

        # several codes: each for what those before it leave
        left, steps = torch.ones(1 + MAX_BITS, len(power)), torch.zeros(1 + MAX_BITS, len(BIT_WIDTHS), len(power))
        left, steps = left.to(sample), steps.to(sample)
        for bits, widths in enumerate(CODES_OF_BITS):
            for behind, width in zip(range(len(widths) - 1, -1, -1), widths, strict=True):
                index = BIT_WIDTHS.index(width)
                steps[bits, index] = step_of[index] * left[bits].sqrt() * _WIDER**behind
                left[bits] = left[bits] * left_by[index]
            if len(widths) > 1:
                left[bits] *= _left_by_several(normalised, widths, steps[bits], codebooks) / left[bits].mean()
        return cls(left.clamp(max=1), steps, codebooks)


def _left_by_several(normalised: Tensor, widths: tuple[int, ...], steps: Tensor, codebooks: Codebooks) -> float:
    """The share of the variance that codes of some widths, one after the other, leave of all latents."""
    some = normalised[:: max(1, len(normalised) // _SEVERAL_ROWS)]
    remaining = some
    for width in widths:
        index = BIT_WIDTHS.index(width)
        gains = steps[index].square()
        states = best_states(remaining / steps[index], gains, codebooks.levels[index], width)
        remaining = remaining - codebooks.levels[index][states.int()] * steps[index]
    return float(remaining.square().mean() / some.square().mean().clamp_min(torch.finfo(some.dtype).tiny))


def _regression(latents: Tensor, levels: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the variance that levels times their best step leave, and that step, (rank,) each."""
    power = latents.square().mean(dim=0)
    shared, energy = (latents * levels).mean(dim=0), levels.square().mean(dim=0)
    scale = torch.where(shared > 0, shared / energy.clamp_min(torch.finfo(energy.dtype).tiny), unit)
    left = 1 - shared * scale / power.clamp_min(torch.finfo(power.dtype).tiny)
    return torch.where(power > 0, left, 1), scale
