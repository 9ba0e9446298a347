"""How many bits each latent of a row gets, and how rows are sorted into classes that get more or fewer of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...remote.codes_dirembed import BIT_WIDTHS, CLASS_BLOCK
from .quantisation import CODES_OF_BITS


CODE_ENTRY_BYTES = 5  # of each code of a class: its latent's number and its step's exponent
_BISECTIONS = 40  # of the logarithm of the Lagrangian multiplier
_PRICE_RANGE = 1e-14  # from a gain to be found to what is no gain


def class_count_bytes(num_rows: int, num_classes: int) -> int:
    """Bytes that say how many rows of each class but the first come before each block of rows.

    Example:
        >>> class_count_bytes(1000, 1), class_count_bytes(1000, 3)
        (0, 128)
    """
    return -(-num_rows // CLASS_BLOCK) * 4 * (num_classes - 1)


@dataclass(frozen=True)
class Allocation:
    """The bits of each latent in rows of one class.

    Attributes:
        bits: (rank,) int64, on the CPU.
    """

    bits: Tensor

    @property
    def num_bytes(self) -> int:
        """How many bytes the codes of a row take."""
        return -(-int(self.bits.sum()) // 8)

    @property
    def num_codes(self) -> int:
        """How many codes a row has."""
        return sum(len(latents) for _, latents in self.codes())

    @property
    def counts(self) -> tuple[int, ...]:
        """How many codes of a row have 4, 3, 2 and 1 bits."""
        return tuple(len(latents) for _, latents in self.codes())

    def codes(self) -> list[tuple[int, Tensor]]:
        """Each of `BIT_WIDTHS`, with the latents that have a code of this width, in order.

        Example:
            >>> [(width, latents.tolist()) for width, latents in Allocation(torch.tensor([6, 4, 0, 2])).codes()]
            [(4, [0, 1]), (3, []), (2, [0, 3]), (1, [])]
        """
        has = torch.tensor([[width in codes for codes in CODES_OF_BITS] for width in BIT_WIDTHS])
        return [(width, has[row][self.bits].nonzero().squeeze(1)) for row, width in enumerate(BIT_WIDTHS)]


class Gains:
    """What every further bit of a latent takes away from the error of some groups of rows, the largest gains first.

    The error of a latent falls ever more slowly with its bits, so the best allocation of any number of bits has the
    largest gains: sorted once, they tell the error of every number of bits.

    Args:
        variances: (groups, rank) the weighted variance of each latent, summed over the rows of each group.
        left: (1 + `MAX_BITS`, rank) the share of it that 0, 1, 2, … bits leave.
    """

    def __init__(self, variances: Tensor, left: Tensor) -> None:
        self._variances, self._falls = variances.double(), self._convex(left.double())
        gains = (self._variances.unsqueeze(1) * self._falls).flatten(1)
        falling, order = gains.sort(dim=1, descending=True)
        self.falling, self._order = falling, order
        # how many codes there are after so many bits
        further = torch.tensor([len(b) - len(a) for a, b in pairwise(CODES_OF_BITS)], device=order.device)
        self.num_codes = F.pad(further[order // variances.shape[1]].cumsum(dim=1), (1, 0))
        self.errors = self._variances.sum(dim=1, keepdim=True) - F.pad(falling.cumsum(dim=1), (1, 0))

    @staticmethod
    def _convex(left: Tensor) -> Tensor:
        """(`MAX_BITS`, rank) what each bit takes away; where a sample lets it rise with the bits, the least."""
        return (left[:-1] - left[1:]).clamp_min(0).cummin(dim=0).values

    def bits_at(self, prices: Tensor) -> Tensor:
        """(groups,) how many bits gain more than a price for each group, rounded to whole bytes, one at least."""
        number = (self.falling > prices.unsqueeze(1)).sum(dim=1)
        return ((number + 4) // 8 * 8).clamp(8, self.falling.shape[1] // 8 * 8)

    def allocation(self, group: int, num_bits: int) -> Allocation:
        """The best allocation of so many bits for a group."""
        latents = self._order[group, :num_bits] % self._falls.shape[1]
        return Allocation(torch.bincount(latents.cpu(), minlength=self._falls.shape[1]))


@dataclass(frozen=True)
class RowsByShare:
    """Rows in the order of their share of the error, cut into parts that stay together.

    Attributes:
        edges: (parts + 1,) int64, ascending: where in the order the parts begin and end.
        variances: (parts, rank) the weighted variance of each latent, summed over the rows of each part.
    """

    edges: Tensor
    variances: Tensor

    def segments(self, rank: int, left: Tensor, num_rows: int) -> Segments:
        """All runs of parts, with latents beyond a rank left out.

        Args:
            rank: How many latents may have bits.
            left: (1 + `MAX_BITS`, dim) the share of a latent's variance that 0, 1, 2, … bits leave.
            num_rows: How many rows there are, where these are a sample of them.
        """
        parts = len(self.edges) - 1
        begins, ends = torch.triu_indices(parts, parts)
        sums = F.pad(self.variances[:, :rank].double().cumsum(dim=0), (0, 0, 1, 0))
        gains = Gains(sums[ends + 1] - sums[begins], left[:, :rank])
        beyond = float(self.variances[:, rank:].sum())
        rows = (self.edges[ends + 1] - self.edges[begins]) * num_rows // self.edges[-1]
        return Segments(begins, ends + 1, rows, gains, beyond)


@dataclass(frozen=True)
class Segments:
    """All runs of parts of the rows, any of which may become a class.

    Attributes:
        begins: (segments,) the first part of each.
        ends: (segments,) the part behind its last.
        num_rows: (segments,) its rows.
        gains: What bits are worth to it.
        beyond: The error of latents without any bits, of all rows.
    """

    begins: Tensor
    ends: Tensor
    num_rows: Tensor
    gains: Gains
    beyond: float

    def best_classes(self, num_bytes: int, most: int, forbidden: int) -> tuple[float, list[tuple[int, int]]] | None:
        """Cuts the rows into classes and gives each its bits, to the least error within a number of bytes.

        Args:
            num_bytes: The most bytes for the codes of all rows, and for what is stored of each class.
            most: The most classes.
            forbidden: How many bytes rows of the smallest class must not have.

        Returns:
            The error, and for each class, in the order of the rows, its segment and its bits; None if one byte a row
            is too much.
        """
        best = None
        high = float((self.gains.falling[:, 0] / self.num_rows).max() * self.num_rows.max()) or 1.0
        low = high * _PRICE_RANGE
        for _ in range(_BISECTIONS):
            price = (low * high) ** 0.5
            found = self._at_price(price, most)
            if self._num_bytes(found) > num_bytes:
                low = price
            else:
                high, best = price, found
        if best is not None:
            best = [(segment, bits - 8 if bits == 8 * forbidden else bits) for segment, bits in best]
        if best is None or any(bits < 8 for _, bits in best):
            return None
        best = self._filled(best, num_bytes, forbidden)
        return sum(float(self.gains.errors[each]) for each in best) + self.beyond, best

    def _filled(self, classes: list[tuple[int, int]], num_bytes: int, forbidden: int) -> list[tuple[int, int]]:
        """Gives classes a byte a row more, the one that gains most by it first, as long as there is room."""
        while True:
            better, most = None, 0.0
            for number, (segment, bits) in enumerate(classes):
                more = bits + 8 * (1 + (bits + 8 == 8 * forbidden))
                if more >= self.gains.errors.shape[1]:
                    continue
                gain = float(self.gains.errors[segment, bits] - self.gains.errors[segment, more])
                tried = [*classes[:number], (segment, more), *classes[number + 1 :]]
                if gain / int(self.num_rows[segment]) > most and self._num_bytes(tried) <= num_bytes:
                    better, most = tried, gain / int(self.num_rows[segment])
            if better is None:
                return classes
            classes = better

    def _at_price(self, price: float, most: int) -> list[tuple[int, int]]:
        """The cut that is best where a bit costs so much: shortest paths from the first part to the last."""
        per_row = price * self.num_rows.double() / float(self.num_rows.max())
        bits = self.gains.bits_at(per_row)
        errors, codes = (
            each.gather(1, bits.unsqueeze(1)).squeeze(1) for each in (self.gains.errors, self.gains.num_codes)
        )
        num_rows = int(self.num_rows.max())
        of_class = price / num_rows * 8 * (CODE_ENTRY_BYTES * codes + class_count_bytes(num_rows, 2))
        costs = (errors + per_row * bits + of_class).tolist()
        parts, begins, unreached = len(self._into) - 1, self._begins, (float("inf"), -1)
        paths = [[(0.0, -1)] + [unreached] * parts]
        for _ in range(most):
            before, path = paths[-1], [unreached]
            for segments in self._into[1:]:
                path.append(min([(before[begins[each]][0] + costs[each], each) for each in segments]))
            paths.append(path)

        # back from the last part, with as many classes as are best
        end, classes = parts, []
        used = min(range(1, most + 1), key=lambda number: paths[number][parts][0])
        for number in range(used, 0, -1):
            segment = paths[number][end][1]
            classes.append((segment, int(bits[segment])))
            end = begins[segment]
        return classes[::-1]

    @cached_property
    def _begins(self) -> list[int]:
        return self.begins.tolist()

    @cached_property
    def _into(self) -> list[list[int]]:
        """The segments that end at each part."""
        into: list[list[int]] = [[] for _ in range(int(self.ends.max()) + 1)]
        for segment, end in enumerate(self.ends.tolist()):
            into[end].append(segment)
        return into

    def _num_bytes(self, classes: list[tuple[int, int]]) -> int:
        """Bytes of the codes of all rows, and of what is stored of the classes."""
        total = class_count_bytes(int(self.num_rows.max()), len(classes))
        for segment, bits in classes:
            codes = int(self.gains.num_codes[segment, bits])
            total += int(self.num_rows[segment]) * bits // 8 + CODE_ENTRY_BYTES * codes
        return total
