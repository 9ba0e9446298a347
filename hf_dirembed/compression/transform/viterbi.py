"""Viterbi's algorithm on a CPU, compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy
import torch
from torch import Tensor

from .states import NUM_STATES, POSITIVE


# Numba's cache does not see it when these change: clear it then.
_LANES = 64  # rows that are searched in step: vectors are full, and path costs stay in a core's nearest caches
_UNROLLED = 4  # symbols that are compared at a time, in registers
_SMALLEST = numpy.float32(POSITIVE)
_FUSED = {"contract"}  # a product and a sum may be rounded once
_UNREACHABLE = numpy.float32(1e30)  # the path cost of what the stream cannot start on
_DEAREST = numpy.int32(numpy.iinfo(numpy.int32).max)


def cheapest_paths(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> Tensor:
    """The states of each row's cheapest path, the same on any number of threads.

    Args:
        targets: (steps, n) float32, in the order of the stream.
        importance: (steps,) float32, up to 1: what the squared error of each step counts.
        levels: (256,) float32, of the trellis's states.
        width: Bits of a symbol: 4, 3, 2 or 1.

    Returns:
        (steps, n) uint8: the newest symbol of each is in its lowest bits, those before above.

    Source: Viterbi 1967.

    Example:
        >>> targets = torch.tensor([[0.9, -0.2], [0.1, 0.8]])
        >>> newest_bit = torch.arange(256).remainder(2).float()
        >>> cheapest_paths(targets, torch.ones(2), newest_bit, width=1).tolist()
        [[1, 0], [2, 1]]
    """
    arrays = [each.contiguous().numpy() for each in (targets, importance, levels)]
    states = numpy.empty(targets.shape, dtype=numpy.uint8)
    search, threads = _search_of(width), torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        others = [pool.submit(search, *arrays, states, each, threads) for each in range(1, threads)]
        search(*arrays, states, 0, threads)
    for other in others:
        other.result()  # raises what a thread raised
    return torch.from_numpy(states)


@cache
def _search_of(width: int) -> Callable[..., None]:
    """Compiled for one width, as only loops of known length become vectors; by one process for all, where it can."""

    def search(targets, importance, levels, states, thread, threads):  # type: ignore[no-untyped-def]
        """Fills in the states of every so many'th block of rows."""
        steps, num_rows = targets.shape
        pasts = NUM_STATES >> width  # what of a state the next one still knows
        survivors = numpy.empty((steps, pasts, _LANES), dtype=numpy.uint8)
        costs = numpy.empty((2, pasts, _LANES), dtype=numpy.float32)  # before and after a step
        target = numpy.zeros(_LANES, dtype=numpy.float32)
        scaled = numpy.empty(NUM_STATES, dtype=numpy.float32)

        for first in range(thread * _LANES, num_rows, threads * _LANES):
            rows = min(_LANES, num_rows - first)
            costs[0] = _UNREACHABLE
            costs[0, 0] = _SMALLEST  # the stream starts on zeros
            for step in range(steps):
                root = numpy.sqrt(importance[step])
                scaled[:] = levels * root
                target[:rows] = targets[step, first : first + rows] * root
                before, after = costs[step & 1], costs[1 - (step & 1)]
                _survive(before, target, scaled, width, after, survivors[step])
            _trace_back(costs[steps & 1], survivors, width, states[:, first : first + rows])

    try:
        return numba.njit(nogil=True, cache=True, fastmath=_FUSED)(search)
    except RuntimeError:  # no place for numba's cache can be written to
        return numba.njit(nogil=True, fastmath=_FUSED)(search)


@numba.njit(inline="always", fastmath=_FUSED)
def _survive(before, target, levels, width, after, survivors):  # type: ignore[no-untyped-def]
    """Every past goes on with every symbol; of all states with the same new past the cheapest survives.

    Which, its oldest symbol says. Costs are positive floats, whose order is that of their bits; so each carries its
    oldest symbol in its lowest bits, and one minimum finds cost and symbol.
    """
    fan, pasts = 1 << width, NUM_STATES >> width
    unrolled = min(_UNROLLED, fan)
    clear, keep = numpy.int32(-1 << width), numpy.int32((1 << width) - 1)
    for past in range(pasts):
        for lane in range(_LANES):
            cheapest = _DEAREST
            for part in range(0, fan, unrolled):
                for oldest in range(part, part + unrolled):
                    state = oldest * pasts + past
                    error = target[lane] - levels[state]
                    cost = before[state >> width, lane] + error * error
                    cheapest = min(cheapest, (numpy.float32(cost).view(numpy.int32) & clear) | numpy.int32(oldest))
            after[past, lane] = numpy.int32(cheapest).view(numpy.float32) + _SMALLEST
            survivors[past, lane] = cheapest & keep


@numba.njit
def _trace_back(costs, survivors, width, states):  # type: ignore[no-untyped-def]
    """The states from the last to the first, of all rows in step: each waits for memory, together they do not."""
    steps, pasts, _ = survivors.shape
    rows = states.shape[1]
    past = numpy.empty(rows, dtype=numpy.intp)
    for row in range(rows):
        past[row] = costs[:, row].argmin()
    for step in range(steps - 1, -1, -1):
        for row in range(rows):
            # The state is the past below the symbol that fell out of its memory.
            state = numpy.intp(survivors[step, past[row], row]) * pasts + past[row]
            states[step, row] = state
            past[row] = state >> width
