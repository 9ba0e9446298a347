"""Subspaces in closed form: truncated SVD, and the subspace that keeps the directions of the rows best.

Every method reads the table chunk by chunk; sums over rows and eigenproblems are float64, which the latents and the
decoder are rounded from. Memory: one chunk, a few (dim, dim) matrices, and the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..errors import BudgetError, OptionError
from ..progress import Progress
from .baselines.factorization import Approximation, Factorization
from .table import Table


_COSINE_FLOOR = 1e-2  # bounds the weight of a row that the subspace misses; the objective itself has no floor
_TOLERANCE = 1e-6  # of the mean cosine
_EXPONENTS = (-126, 126)  # of a scale that float32 holds, and the inverse of
_SMALLER_STEP = {None: 8, 8: 1}  # block power steps to try after a full eigenproblem lowered the objective


def check_rank(rank: int, dim: int) -> None:
    """Raises `BudgetError` unless `rank` is an integer from 1 to `dim`.

    Example:
        >>> check_rank(9, dim=8)
        Traceback (most recent call last):
        ...
        hf_dirembed.remote.codes_dirembed.BudgetError: rank=9: give an integer from 1 to the embedding's dimension, 8
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= dim:
        raise BudgetError(f"rank={rank!r}: give an integer from 1 to the embedding's dimension, {dim}")


def second_moment(table: Table, weights: Tensor | None = None) -> Tensor:
    """The weighted second moment Σ wᵢ xᵢᵀxᵢ of the rows xᵢ of a table.

    Args:
        table: The (num_rows, dim) table.
        weights: (num_rows,) non-negative; by default 1 for every row.

    Returns:
        (dim, dim) float64, symmetric, on the table's device (on the CPU where the device has no float64).

    Raises:
        OptionError: If `weights` are of the wrong shape, negative, not finite or all zero.
        TableError: If the table holds a NaN or an infinity.

    Example:
        >>> second_moment(Table(torch.tensor([[1.0, 0.0], [1.0, 2.0]])), weights=torch.tensor([1.0, 0.5]))
        tensor([[1.5000, 1.0000],
                [1.0000, 2.0000]], dtype=torch.float64)
    """
    return moments(table, weights)[1]


def moments(table: Table, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weighted first and second moment, Σ wᵢ xᵢ, (dim,), and what `second_moment` gives, in one pass."""
    weights = check_weights(weights, table)
    first, second = weights.new_zeros(table.dim), weights.new_zeros(table.dim, table.dim)
    for rows, chunk in exact_chunks(table):
        first += weights[rows] @ chunk
        second += (chunk * weights[rows, None]).T @ chunk
    return first, (second + second.T) / 2


def eigenbasis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The eigendecomposition of a symmetric matrix, largest eigenvalue first, with the signs fixed.

    Args:
        moment: (dim, dim) symmetric, float64.

    Returns:
        `(values, vectors)`: (dim,) descending, and (dim, dim) with the unit eigenvectors as columns. The component
        of largest magnitude of each eigenvector is positive (the first of them, where several are as large).

    Example:
        >>> values, vectors = eigenbasis(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
        >>> values.tolist(), vectors[:, 0].tolist()
        ([4.0, 1.0], [0.0, 1.0])
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors.dtype)
    return values, vectors * signs


def direction_weights(norms: Tensor, approximated_norms: Tensor, weights: Tensor) -> Tensor:
    """The row weights ωᵢ = wᵢ / (‖xᵢ‖ ‖x̂ᵢ‖), with which a weighted PCA ascends Σ wᵢ cos(xᵢ, x̂ᵢ).

    The gradient of the mean cosine with respect to a projector P is ½ Σ ωᵢ xᵢᵀxᵢ where x̂ᵢ = P xᵢ. A row without
    direction (‖xᵢ‖ = 0) weighs nothing; ‖x̂ᵢ‖ counts as at least ‖xᵢ‖ / 100.

    Args:
        norms: ‖xᵢ‖, (n,) float.
        approximated_norms: ‖x̂ᵢ‖, (n,) float.
        weights: wᵢ, (n,) float, non-negative.

    Returns:
        ω, (n,) of the dtype of the arguments.

    Example:
        >>> direction_weights(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), torch.ones(2))
        tensor([0.5000, 0.0000])
    """
    product = norms * torch.maximum(approximated_norms, norms * _COSINE_FLOOR)
    return torch.where(product > 0, weights / product, 0.0)


def mean_cosine(table: Table, approximation: Approximation, weights: Tensor | None = None) -> float:
    """The weighted mean of cos(xᵢ, x̂ᵢ) over the rows that have a direction (‖xᵢ‖ > 0); 1.0 if none has.

    Args:
        table: The (num_rows, dim) table that was approximated.
        approximation: Gives x̂.
        weights: (num_rows,) non-negative; by default uniform.

    Raises:
        OptionError: If `weights` are of the wrong shape, negative, not finite or all zero.

    Example:
        >>> table = Table(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> round(mean_cosine(table, Factorization(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]]))), 6)
        0.8
    """
    weights = check_weights(weights, table)
    total = cosines = 0.0
    for rows, chunk in exact_chunks(table):
        cosine = row_cosines(chunk, approximation.reconstruct(rows).to(chunk))
        total += float((weights[rows] * cosine.isfinite()).sum())
        cosines += float((weights[rows] * cosine.nan_to_num()).sum())
    return cosines / total if total else 1.0


def row_cosines(rows: Tensor, approximated: Tensor) -> Tensor:
    """cos(xᵢ, x̂ᵢ) of each row; 0 where only x̂ᵢ is zero, NaN where xᵢ has no direction.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
        >>> row_cosines(rows, torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))
        tensor([0.8000, 0.0000,    nan])
    """
    norms = rows.norm(dim=1)
    product = norms * approximated.norm(dim=1)
    cosines = torch.where(product > 0, (rows * approximated).sum(dim=1) / product, 0.0)
    return torch.where(norms > 0, cosines, torch.nan)


def svd(table: Table, rank: int) -> Factorization:
    """Truncated SVD: the least squared error of any linear model of that rank, all rows alike.

    Args:
        table: The (num_rows, dim) table.
        rank: The number of latent dimensions, 1 to dim.

    Returns:
        Latents (num_rows, rank), orthonormal decoder (rank, dim), largest singular value first; no bias.

    Raises:
        BudgetError: If `rank` is not in 1 to dim.
        TableError: If the table holds a NaN or an infinity.

    Source: the baseline of Bałazy et al. 2021, arXiv 2106.08181; by the eigenvectors of XᵀX.

    Example:
        >>> svd(Table(torch.tensor([[2.0, 0.0], [0.0, 1.0]])), rank=1).reconstruct()
        tensor([[2., 0.],
                [0., 0.]])
    """
    check_rank(rank, table.dim)
    basis = eigenbasis(second_moment(table))[1][:, :rank]
    return _project(table, basis)


def direction(
    table: Table,
    rank: int,
    weights: Tensor | None = None,
    *,
    affine: bool = True,
    iterations: int = 30,
    progress: Progress | None = None,
) -> Factorization:
    """The subspace that maximises Σ wᵢ cos(xᵢ, x̂ᵢ), in closed form, where the paper trains an autoencoder.

    Only latents and decoder are stored, so the latents are free, and the best cosine that a subspace with projector P
    allows is ‖P xᵢ‖ / ‖xᵢ‖. That objective is concave in P: its linearisation at the current P is the second moment
    weighted by `direction_weights`, whose leading eigenvectors are the next P. A step that lowers the objective is
    replaced by a few block power steps, one of which can lower it no more, as the objective is convex in the basis.
    So the objective never falls from one iteration to the next, and where a full step leaves P in place, P is the
    global optimum (the objective lies under each of its linearisations).

    The affine model goes on from the linear solution with weighted PCA about the weighted mean, and x̂ᵢ is the
    orthogonal projection of xᵢ onto the affine subspace: least error, hence a norm that is never out of proportion.
    Latents that stretch each x̂ᵢ to gain cosine from the bias were measured and rejected: on all-MiniLM-L6-v2's
    table, with norms up to 1.2 ‖xᵢ‖, they gained less cosine than this, and the squared error rose by 14 % and more.

    Args:
        table: The (num_rows, dim) table.
        rank: The number of latent dimensions, 1 to dim.
        weights: wᵢ, (num_rows,) non-negative; by default uniform.
        affine: Whether the decoder has a bias. It costs dim numbers and gives at least the linear model's cosine.
        iterations: The most passes over the table, those for the linear model first. A dozen is usual.
        progress: Is told of each pass.

    Returns:
        Latents (num_rows, rank), orthonormal decoder (rank, dim) in descending order of weighted variance, and with
        `affine` a bias (dim,) orthogonal to the decoder's rows; float32. A zero row has the latents zero.

    Raises:
        BudgetError: If `rank` is not in 1 to dim, `iterations` is below 1, or `weights` are of the wrong shape,
            negative, not finite or all zero.
        TableError: If the table holds a NaN or an infinity.

    Example:
        >>> rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
        >>> table = Table(rows * torch.arange(1, 65)[:, None])
        >>> mean_cosine(table, direction(table, rank=3)) > mean_cosine(table, svd(table, rank=3))
        True
    """
    check_rank(rank, table.dim)
    if not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations={iterations!r}: give an integer of at least 1")
    weights = check_weights(weights, table)
    progress = progress or Progress()
    ascent = _ascent(table, rank, weights, affine)
    best = next(ascent)
    for later in islice(ascent, iterations - 1):
        progress.advance(1 / iterations)
        best = later
    variances = ((best.basis.T @ best.covariance(affine)) * best.basis.T).sum(dim=1)
    basis = best.basis[:, variances.argsort(descending=True, stable=True)]
    return _project(table, basis, best.bias if affine else None)


@dataclass(frozen=True)
class _Subspace:
    """A subspace, its mean cosine, and the moments of the rows weighted by `direction_weights` under it."""

    basis: Tensor  # (dim, rank), orthonormal columns
    bias: Tensor  # (dim,), orthogonal to them
    objective: float
    mean: Tensor  # (dim,)
    total: float
    second: Tensor  # (dim, dim)

    def covariance(self, affine: bool) -> Tensor:
        return self.second - self.total * torch.outer(self.mean, self.mean) if affine else self.second


def _measure(table: Table, basis: Tensor, bias: Tensor, weights: Tensor) -> _Subspace:
    """One pass over the table. As bias ⟂ basis, ‖x̂‖² = ‖xQ‖² + ‖b‖² and x·x̂ = ‖xQ‖² + x·b."""
    cosines = directed = total = weights.new_zeros(())
    first, second = weights.new_zeros(table.dim), weights.new_zeros(table.dim, table.dim)

    for rows, chunk in exact_chunks(table):
        norms = chunk.norm(dim=1)
        kept = (chunk @ basis).square().sum(dim=1)
        approximated_norms = (kept + bias.square().sum()).sqrt()
        product = norms * approximated_norms
        cosine = torch.where(product > 0, (kept + chunk @ bias) / product, 0.0)

        cosines = cosines + (weights[rows] * cosine).sum()
        directed = directed + weights[rows][norms > 0].sum()

        omega = direction_weights(norms, approximated_norms, weights[rows])
        weighted = chunk * omega[:, None]
        total, first, second = total + omega.sum(), first + weighted.sum(dim=0), second + weighted.T @ chunk

    objective = float(cosines / directed) if directed > 0 else 0.0
    mean = first / total if total > 0 else first
    return _Subspace(basis, bias, objective, mean, float(total), (second + second.T) / 2)


def _step(current: _Subspace, rank: int, *, affine: bool, power: int | None = None) -> tuple[Tensor, Tensor]:
    """The next basis and bias: the leading eigenvectors, or `power` steps of block power iteration towards them."""
    covariance = current.covariance(affine)
    if power is None:
        basis = eigenbasis(covariance)[1][:, :rank]
    else:
        basis = current.basis
        for _ in range(power):
            left, _, right = torch.linalg.svd(covariance @ basis, full_matrices=False)
            basis = left @ right
    bias = current.mean - basis @ (basis.T @ current.mean) if affine else current.bias
    return basis, bias


def _ascent(table: Table, rank: int, weights: Tensor, affine: bool) -> Iterator[_Subspace]:
    """Yields the best subspace so far after each pass: those of the linear model, then those of the affine one."""
    identity = torch.eye(table.dim, dtype=torch.float64, device=weights.device)
    whole = _measure(table, identity, identity.new_zeros(table.dim), weights)  # x̂ = x: unit rows weigh alike
    best = _measure(table, *_step(whole, rank, affine=False), weights)
    yield best
    for with_bias in (False, True)[: 1 + affine]:
        power = None
        while True:
            candidate = _measure(table, *_step(best, rank, affine=with_bias, power=power), weights)
            gain = candidate.objective - best.objective
            best = candidate if gain > 0 else best
            yield best
            if abs(gain) <= _TOLERANCE or (gain < 0 and power not in _SMALLER_STEP):
                break
            power = _SMALLER_STEP[power] if gain < 0 else power


def _project(table: Table, basis: Tensor, bias: Tensor | None = None) -> Factorization:
    """Orthogonal projection of every row onto a subspace; bias ⟂ basis, so the latents need no shift."""
    decoder = basis.T.to(device=table.device, dtype=torch.float32).contiguous()
    latents = torch.cat([(chunk @ basis).to(decoder) for _, chunk in exact_chunks(table)])
    return Factorization(latents, decoder, None if bias is None else bias.to(decoder))


def check_weights(weights: Tensor | None, table: Table) -> Tensor:
    """Row weights as the sums use them: (num_rows,) float64; ones for None.

    Raises:
        OptionError: If they are of the wrong shape, negative, not finite or all zero.
    """
    device = _exact_device(table)
    if weights is None:
        return torch.ones(table.num_rows, dtype=torch.float64, device=device)
    if tuple(weights.shape) != (table.num_rows,):
        raise OptionError(f"token_weights of shape {tuple(weights.shape)}: give one per row, ({table.num_rows},)")
    weights = weights.detach().to(device=device, dtype=torch.float64)
    if not weights.isfinite().all() or weights.min() < 0 or weights.max() == 0:
        raise OptionError("token_weights: give finite numbers, none negative and at least one positive")
    return weights


def _exact_device(table: Table) -> torch.device:
    return torch.device("cpu") if table.device.type == "mps" else table.device  # MPS has no float64


def exact_chunks(table: Table) -> Iterator[tuple[slice, Tensor]]:
    """The chunks of a table in float64, on its device (on the CPU where the device has no float64)."""
    for rows, chunk in table.chunks():
        yield rows, chunk.to(_exact_device(table)).double()


def length_scale(table: Table) -> float:
    """The power of two that the median length of the rows, those of zeros left out, is 1 to 2 times.

    Example:
        >>> length_scale(Table(torch.tensor([[3.0, 4.0], [0.0, 0.0]])))
        4.0
    """
    lengths = torch.cat([chunk.norm(dim=1) for _, chunk in exact_chunks(table)])
    if not lengths.any():
        return 1.0
    exponent = math.frexp(float(lengths[lengths > 0].median()))[1] - 1
    least, most = _EXPONENTS
    return 2.0 ** min(max(exponent, least), most)
