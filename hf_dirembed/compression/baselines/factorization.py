"""Latents and an affine decoder: what a subspace method finds, before it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Approximation(Protocol):
    """Anything that gives approximated rows of a table."""

    def reconstruct(self, rows: slice, /) -> Tensor:
        """The approximated rows, (n, dim)."""


@dataclass(frozen=True)
class Factorization:
    """An approximation x̂ᵢ = zᵢ D + b of every row of a table.

    Attributes:
        latents: z, (num_rows, rank) float32.
        decoder: D, (rank, dim) float32.
        bias: b, (dim,) float32, or None for a linear decoder.
    """

    latents: Tensor
    decoder: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of latent dimensions."""
        return self.decoder.shape[0]

    def reconstruct(self, rows: slice = slice(None)) -> Tensor:
        """The approximated rows, (n, dim) float32."""
        approximation = self.latents[rows] @ self.decoder
        return approximation if self.bias is None else approximation + self.bias
