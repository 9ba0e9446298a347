"""The decoder for given latents."""

from __future__ import annotations

import torch
from torch import Tensor


_RIDGE = 1e-7  # of the mean eigenvalue: latents that never vary leave the normal equations singular


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
