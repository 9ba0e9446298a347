"""How long the steps of compressing a table take beside each other, for bars that say how long the rest takes."""

from __future__ import annotations

from dataclasses import dataclass


_PLANNING_ROWS = 20_000.0  # that could be coded in the time that bits are planned in, whatever the table's size
_READING, _IMPROVING, _MEASURING = 0.3, 1.1, 0.4  # of the time of coding: a table, in its moments; anew; its figures
_OF_A_WEIGHT = 300.0  # columns, whose products take as long as all else that is done with a weight


@dataclass(frozen=True)
class FittingWork:
    """The steps of `transform`, each in the time that coding a row takes.

    Attributes:
        planning: Bits, codebooks and a first decoder, before any row is coded for good.
        coding: Coding the rows once.
        improving: Coding them anew, once.
        measuring: The figures of what came of it.

    Example:
        >>> work = FittingWork.of_rows(100_000, passes=1)
        >>> 0.1 < work.planning / work.total < 0.2
        True
    """

    planning: float
    coding: float
    improving: float
    measuring: float
    passes: int

    @classmethod
    def of_rows(cls, num_rows: int, passes: int) -> FittingWork:
        """The work of so many rows, which are coded anew so often."""
        return cls(
            _PLANNING_ROWS + _READING * num_rows, num_rows, _IMPROVING * num_rows, _MEASURING * num_rows, passes
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.fitting + self.measuring

    @property
    def fitting(self) -> float:
        """All but the figures."""
        return self.planning + self.coding + self.passes * self.improving


def table_work(num_rows: int, dim: int) -> float:
    """How long a table takes beside others."""
    return num_rows * dim * (dim + _OF_A_WEIGHT)
