"""Integer codes for a given decoder, and the decoder for given codes: the two halves of an alternation."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantisation import quantise


_ROWS = 4096  # at a time: what is updated for each latent then stays in a core's cache
_BLOCK = 32  # latents whose residuals are updated one by one before the rest catches up in one product
_RIDGE = 1e-7  # of the mean eigenvalue: latents that never vary leave the normal equations singular


def coordinate_descent(rows: Tensor, latents: Tensor, decoder: Tensor, largest: Tensor, sweeps: int = 1) -> Tensor:
    """Lowers ‖yᵢ - zᵢ D‖² by moving one half-integer latent at a time to its best level.

    Args:
        rows: y, (n, dim) float32.
        latents: z, (n, rank) half-integers to start from.
        decoder: D, (rank, dim).
        largest: (rank,) the largest level of each latent.
        sweeps: Passes over the latents.

    Returns:
        (n, rank) half-integers; no row's error is above that of `latents`, to rounding.

    Example:
        >>> rows, decoder = torch.tensor([[1.4, 0.6]]), torch.eye(2)
        >>> coordinate_descent(rows, torch.full((1, 2), -0.5), decoder, torch.tensor([1.5, 0.5]))
        tensor([[1.5000, 0.5000]])
    """
    gram = decoder @ decoder.T
    parts = zip(rows.split(_ROWS), latents.split(_ROWS), strict=True)
    return torch.cat([_descend(part, start, decoder, gram, largest.tolist(), sweeps) for part, start in parts])


def _descend(rows: Tensor, latents: Tensor, decoder: Tensor, gram: Tensor, levels: list[float], sweeps: int) -> Tensor:
    # Latents first: each step works on one latent of all rows, which must lie side by side in memory.
    codes = latents.T.contiguous()
    diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).tolist()
    gradient = decoder @ (rows - latents @ decoder).T  # (rank, n)
    for _ in range(sweeps):
        for start in range(0, len(codes), _BLOCK):
            stop = min(start + _BLOCK, len(codes))
            before = codes[start:stop].clone()
            for j in range(start, stop):
                best = quantise(torch.add(codes[j], gradient[j], alpha=1 / diagonal[j]), levels[j])
                gradient[start:stop].addr_(gram[start:stop, j], best - codes[j], alpha=-1)
                codes[j] = best
            moved = codes[start:stop] - before
            if start:
                gradient[:start].addmm_(gram[:start, start:stop], moved, alpha=-1)
            if stop < len(codes):
                gradient[stop:].addmm_(gram[stop:, start:stop], moved, alpha=-1)
    return codes.T


class DecoderFit:
    """Accumulates the normal equations of the affine decoder that fits given latents best.

    Minimises Σ ωᵢ ‖yᵢ - zᵢ D - b‖². The optimum is the same in every metric, as a metric is a change of basis of y.

    Args:
        rank: The number of latents.
        dim: d.
        device: Of the latents.
    """

    def __init__(self, rank: int, dim: int, device: torch.device) -> None:
        self._gram = torch.zeros(rank + 1, rank + 1, dtype=torch.float64, device=device)
        self._shared = torch.zeros(rank + 1, dim, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, latents: Tensor, importance: Tensor) -> None:
        """Counts rows in: (n, dim) rows, (n, rank) latents, (n,) importance ω."""
        affine = torch.cat([latents, latents.new_ones(len(latents), 1)], dim=1)
        weighted = (affine * importance.unsqueeze(1)).T
        self._gram += (weighted @ affine).double()
        self._shared += (weighted @ rows).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """The decoder, (rank, dim), and the bias, (dim,), float32."""
        gram = self._gram.clone()
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
        solution = torch.linalg.solve(gram, self._shared).float()
        return solution[:-1], solution[-1]
