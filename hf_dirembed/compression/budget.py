"""How many bytes may replace a table, and the rank that float latents reach within them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BudgetError


_EXAMPLES = {"bits": "bits=2", "ratio": "ratio=16", "rank": "rank=64", "num_bytes": "num_bytes=1000000"}


@dataclass(frozen=True)
class LatentStorage:
    """How float latents and their decoder are stored.

    Attributes:
        code_itemsize: Bytes of one latent.
        decoder_itemsize: Bytes of one weight of the decoder.
        bias: Whether the decoder is affine.
    """

    code_itemsize: int
    decoder_itemsize: int
    bias: bool


@dataclass(frozen=True)
class TableSize:
    """A table's shape and its bytes per weight in the source checkpoint."""

    num_rows: int
    dim: int
    itemsize: int

    @property
    def num_weights(self) -> int:
        """V x d."""
        return self.num_rows * self.dim

    @property
    def dense_bytes(self) -> int:
        """The bytes of the table as the source stores it."""
        return self.num_weights * self.itemsize

    def latent_bytes(self, rank: int, storage: LatentStorage) -> int:
        """The bytes of so many float latents of every row, and of their decoder.

        Example:
            >>> TableSize(10, dim=8, itemsize=4).latent_bytes(1, LatentStorage(2, decoder_itemsize=4, bias=True))
            84
        """
        per_latent = self.num_rows * storage.code_itemsize + self.dim * storage.decoder_itemsize
        return rank * per_latent + self.dim * storage.decoder_itemsize * storage.bias


@dataclass(frozen=True)
class Budget:
    """What may replace a table; exactly one of them is given.

    Attributes:
        bits: Bits per weight: 8 x the bytes of all tensors that replace the table / (V x d).
        ratio: The table's bytes in the source checkpoint / the bytes that replace it.
        rank: The number of latent dimensions of a method with float latents.
        num_bytes: The bytes themselves.

    Raises:
        BudgetError: If not exactly one is given, or it is not a positive number.

    Example:
        >>> Budget(bits=2).max_bytes(TableSize(num_rows=1000, dim=64, itemsize=4))
        16000
        >>> Budget(bits=2, rank=3)
        Traceback (most recent call last):
        ...
        hf_dirembed.remote.codes_dirembed.BudgetError: give exactly one of bits, ratio and rank, not bits=2, rank=3
    """

    bits: float | None = None
    ratio: float | None = None
    rank: int | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise BudgetError(f"give exactly one of bits, ratio and rank, not {got}")
        ((name, value),) = given.items()
        whole = name in ("rank", "num_bytes")
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            kind = "positive whole number" if whole else "positive number"
            raise BudgetError(f"{name}={value!r} is not a {kind}: give one, like {_EXAMPLES[name]}")

    def max_bytes(self, size: TableSize) -> int | None:
        """The most bytes that may replace the table; None where a rank is given instead."""
        if self.num_bytes is not None:
            return self.num_bytes
        if self.bits is not None:
            return math.floor(self.bits * size.num_weights / 8)
        if self.ratio is not None:
            return math.floor(size.dense_bytes / self.ratio)
        return None

    def check_smaller(self, size: TableSize) -> None:
        """Refuses a budget that is no smaller than the table.

        Raises:
            BudgetError: If it is none.

        Example:
            >>> Budget(ratio=0.5).check_smaller(TableSize(num_rows=1000, dim=64, itemsize=2))
            Traceback (most recent call last):
            ...
            hf_dirembed...BudgetError: ratio=0.5 makes nothing smaller: the table takes 16 bits per weight as it is...
        """
        max_bytes = self.max_bytes(size)
        given = self.bits is not None or self.ratio is not None
        if given and max_bytes is not None and max_bytes >= size.dense_bytes:
            raise BudgetError(
                f"{self} makes nothing smaller: the table takes {8 * size.itemsize} bits per weight as it is; ask for "
                "fewer bits, or a ratio above 1"
            )

    def float_rank(self, size: TableSize, storage: LatentStorage) -> int:
        """The largest rank whose float latents and decoder stay within the budget.

        Args:
            size: The size of the table.
            storage: How latents and decoder are stored.

        Raises:
            BudgetError: If the rank is not below the table's columns and rows, or not even rank 1 fits.
        """
        limit = size.dim - 1  # a code matrix as wide as the table would be taken for one
        if self.rank is not None:
            if self.rank > limit:
                raise BudgetError(f"rank {self.rank} is not below the table's {size.dim} columns: ask for less")
            return self.rank

        max_bytes = self.max_bytes(size)
        assert max_bytes is not None
        fixed, least = size.latent_bytes(0, storage), size.latent_bytes(1, storage)
        rank = min((max_bytes - fixed) // (least - fixed), limit)

        if rank < 1:
            raise BudgetError(
                f"{self} holds no latent of a {size.num_rows} x {size.dim} table: ask for at least "
                f"bits={8 * least / size.num_weights:.3g} (ratio={size.dense_bytes / least:.3g} at most)"
            )
        return rank

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name}={value if name == 'num_bytes' else f'{value:g}'}" for name, value in given.items())
