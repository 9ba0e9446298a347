"""The embedding table that is to be compressed, read in row chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TableError


CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: large enough for BLAS, small beside any model
ALIGNMENT = 64  # bytes, as torch allocates: elsewhere, as in mapped files, sums are taken in another order


class RowSource(Protocol):
    """A matrix whose row slices are tensors: a `Tensor`, or rows that stay in a file until they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_rows, dim)`."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the slices; None for one that torch has no name for."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Columns:
    """Some columns of a matrix, as rows of their own.

    Example:
        >>> Columns(torch.arange(6).view(2, 3), 1, 3)[0:1].tolist()
        [[1, 2]]
    """

    def __init__(self, rows: RowSource, start: int, stop: int) -> None:
        self._rows, self._columns = rows, slice(start, stop)
        self.shape, self.dtype = (rows.shape[0], stop - start), rows.dtype

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self._rows[rows][:, self._columns]


class Table:
    """A (num_rows, dim) embedding table as every method of this package reads it: float32, chunk by chunk.

    Args:
        rows: The matrix, of any floating dtype, or an object that gives its row slices as tensors.
        shape: `(num_rows, dim)`; read from `rows.shape` where that exists.
        device: Where the chunks are put, and so where fitting runs.
        chunk_rows: Rows per chunk; by default 16 MiB of float32.
        scale: What every row is divided by, before the factor.
        factor: (dim, dim) what every row is multiplied by, to measure it in the metric `factor @ factor.T`.
        longest: The length that longer rows are scaled down to, after the factor.

    Raises:
        TableError: If `rows` is not a matrix with at least one row and one column.

    Example:
        >>> import torch
        >>> table = Table(torch.ones(5, 3, dtype=torch.float16), chunk_rows=2)
        >>> [(rows, chunk.shape[0], chunk.dtype) for rows, chunk in table.chunks()][-1]
        (slice(4, 5, None), 1, torch.float32)
    """

    def __init__(
        self,
        rows: Tensor | RowSource,
        *,
        shape: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        chunk_rows: int | None = None,
        scale: float = 1.0,
        factor: Tensor | None = None,
        longest: float | None = None,
    ) -> None:
        size = tuple(rows.shape) if shape is None else shape
        if len(size) != 2 or min(size) < 1:
            raise TableError(f"an embedding table is a matrix with at least one row and one column, not {size}")
        self.rows = rows
        self.num_rows, self.dim = size
        self.device = torch.device(device)
        self.chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // self.dim)
        self.scale = scale
        self.factor = None if factor is None else factor.to(device=self.device, dtype=torch.float32)
        self.longest = longest

    @property
    def num_chunks(self) -> int:
        """How many chunks the rows are read in."""
        return -(-self.num_rows // self.chunk_rows)

    def chunks(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yields `(rows, chunk)`: a slice of row numbers and those rows, (n, dim) float32 on `device`.

        Args:
            first: The number of the first row.
            stop: That of the row after the last; by default all rows.

        Raises:
            TableError: If a chunk holds a NaN or an infinity.
        """
        stop = self.num_rows if stop is None else stop
        for start in range(first, stop, self.chunk_rows):
            rows = slice(start, min(start + self.chunk_rows, stop))
            chunk = self.rows[rows].detach().to(device=self.device, dtype=torch.float32)
            if not chunk.sum().isfinite() and not (finite := chunk.isfinite().all(dim=1)).all():
                bad = start + int((~finite).nonzero()[0])
                raise TableError(f"row {bad} of the embedding table holds a NaN or an infinity: mend the checkpoint")

            if chunk.data_ptr() % ALIGNMENT:
                chunk = chunk.clone()

            if self.scale != 1:
                chunk = chunk / self.scale
            if self.factor is not None:
                chunk = chunk @ self.factor
            if self.longest is not None:
                chunk = chunk * (self.longest / chunk.norm(dim=1, keepdim=True)).clamp(max=1)
            yield rows, chunk

    def digest(self) -> str:
        """SHA-256 of the rows in float32, in hexadecimal: which table it is.

        Raises:
            TableError: If a chunk holds a NaN or an infinity.

        Example:
            >>> import torch
            >>> Table(torch.ones(5, 3)).digest() == Table(torch.ones(5, 3).half(), chunk_rows=2).digest()
            True
        """
        digest = hashlib.sha256()
        for _, chunk in self.chunks():
            digest.update(chunk.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def in_metric(self, factor: Tensor) -> Table:
        """The table with each row multiplied by a (dim, dim) factor of the metric that errors are measured in."""
        return self._like(factor=factor, longest=None)

    def over(self, scale: float) -> Table:
        """The table with each row divided by `scale`.

        Example:
            >>> next(Table(torch.tensor([[2.0, 4.0]])).over(2).chunks())[1].tolist()
            [[1.0, 2.0]]
        """
        return self._like(scale=self.scale * scale)

    def no_longer_than(self, longest: float) -> Table:
        """The table with every row that is longer than `longest` scaled down to that length.

        Example:
            >>> rows = Table(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])).no_longer_than(1)
            >>> next(rows.chunks())[1].tolist()
            [[0.6000000238418579, 0.800000011920929], [0.30000001192092896, 0.4000000059604645], [0.0, 0.0]]
        """
        return self._like(longest=longest)

    def _like(self, **changes: Any) -> Table:
        shape = (self.num_rows, self.dim)
        same = {"scale": self.scale, "factor": self.factor, "longest": self.longest}
        return Table(self.rows, shape=shape, device=self.device, chunk_rows=self.chunk_rows, **{**same, **changes})
