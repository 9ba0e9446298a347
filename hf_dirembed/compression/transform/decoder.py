"""The decoder for given latents, and how files hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


_RIDGE = 1e-7  # of the mean eigenvalue: latents that never vary leave the normal equations singular
_TINY = torch.finfo(torch.float64).tiny


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
        """Counts rows in: (n, dim) rows, (n, up to rank) leading latents, the others being 0, (n,) importance ω."""
        affine = torch.cat([latents.new_ones(len(latents), 1), latents], dim=1)
        weighted, leading = (affine * importance.unsqueeze(1)).T, slice(affine.shape[1])
        self._gram[leading, leading] += (weighted @ affine).double()
        self._shared[leading] += (weighted @ rows).double()

    def solve(self) -> Tensor:
        """The decoder that fits best beside its own bias, (rank, dim) float32."""
        gram = self._gram.clone()
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + _TINY)
        return torch.linalg.solve(gram, self._shared)[1:].float()

    def bias(self, decoder: Tensor) -> Tensor:
        """The bias that fits best beside a decoder, (dim,) float32."""
        total, latents = self._gram[0, 0], self._gram[0, 1:]
        return ((self._shared[0] - latents @ decoder.double()) / total.clamp_min(_TINY)).float()


@dataclass(frozen=True)
class StoredDecoder:
    """A decoder as files hold it: row k is 2^exponentₖ weightₖ.

    Attributes:
        weight: (rank, dim), rounded to a narrow dtype. The largest magnitude of a row is about 1.
        exponents: (rank,) int8.
    """

    weight: Tensor
    exponents: Tensor

    def float(self) -> Tensor:
        """What it stands for, (rank, dim) float32."""
        return torch.ldexp(self.weight.float(), self.exponents.unsqueeze(1))

    def __reduce__(self) -> tuple[Callable[..., StoredDecoder], tuple[Any, ...]]:
        """As bytes: torch's pickles, by which processes send each other tensors, hold none of 8-bit floats."""
        return _from_bytes, (self.weight.contiguous().view(torch.uint8), self.weight.dtype, self.exponents)


def _from_bytes(weight: Tensor, dtype: torch.dtype, exponents: Tensor) -> StoredDecoder:
    return StoredDecoder(weight.view(dtype), exponents)


@dataclass(frozen=True)
class DecoderStorage:
    """How files hold a decoder that was fitted in a metric M = L Lᵀ.

    Attributes:
        dtype: Of the weight: float16 or float8_e4m3fn.
        factor: L, (dim, dim) lower triangular float64; None for the identity.
    """

    dtype: torch.dtype
    factor: Tensor | None

    def num_bytes(self, rank: int, dim: int) -> int:
        """Bytes of a decoder of this size, its exponents included."""
        return rank * (self.dtype.itemsize * dim + 1)

    def round(self, decoder: Tensor) -> StoredDecoder:
        """Rounds a decoder in the metric, (rank, dim), to one in the table's own coordinates.

        The error of each column is made up for by the columns still to be rounded, as far as the metric allows.

        Source: Babai 1986, the nearest plane algorithm; Frantar et al. 2023 (GPTQ) do so with a stage's weights.

        Example:
            >>> generator = torch.Generator().manual_seed(0)
            >>> factor = torch.randn(8, 8, dtype=torch.float64, generator=generator).tril()
            >>> decoder = torch.randn(100, 8, generator=generator)
            >>> inverse = torch.linalg.inv(factor).float()
            >>> plain = DecoderStorage(torch.float8_e4m3fn, None).round(decoder @ inverse).float() @ factor.float()
            >>> storage = DecoderStorage(torch.float8_e4m3fn, factor)
            >>> bool((storage.in_metric(storage.round(decoder)) - decoder).norm() < 0.9 * (plain - decoder).norm())
            True
        """
        if self.factor is not None:
            decoder = torch.linalg.solve_triangular(self.factor, decoder.double(), upper=False, left=False)
        _, exponents = torch.frexp(decoder.abs().amax(dim=1))
        exponents = exponents.clamp(-100, 100)
        exact = torch.ldexp(decoder, -exponents.unsqueeze(1))
        weight = exact.to(self.dtype)
        if self.factor is not None and weight.itemsize == 1:  # a finer grid leaves nothing to make up for
            weight = self._nearest_plane(exact, self.factor / self.factor.diagonal())
        return StoredDecoder(weight, exponents.to(torch.int8))

    def _nearest_plane(self, exact: Tensor, factor: Tensor) -> Tensor:
        """Rounds column by column, from the last, which touches every column of the product with L."""
        errors, weight = torch.zeros_like(exact), torch.empty_like(exact, dtype=self.dtype)
        for column in range(exact.shape[1] - 1, -1, -1):
            later = slice(column + 1, None)
            target = exact[:, column] + errors[:, later] @ factor[later, column]
            weight[:, column] = target.to(self.dtype)
            errors[:, column] = exact[:, column] - weight[:, column].to(exact)
        return weight

    def in_metric(self, stored: StoredDecoder) -> Tensor:
        """What a stored decoder is in the metric, (rank, dim) float32."""
        decoder = stored.float()
        return decoder if self.factor is None else decoder @ self.factor.to(decoder)
