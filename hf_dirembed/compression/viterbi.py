"""Viterbi's algorithm on a CPU, compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy
import torch
from torch import Tensor

from .trellis import NUM_STATES, POSITIVE


# Numba's cache does not see it when these change: clear it then.
_LANES = 32  # rows that are searched in step: their path costs stay in a core's first cache
_SMALLEST = numpy.float32(POSITIVE)
_UNREACHABLE = numpy.float32(1e30)  # the path cost of what the stream cannot start on


def cheapest_paths(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> Tensor:
    """The states of each row's cheapest path, the same on any number of threads.

    Args:
        targets: (steps, n) float32, in the order of the stream.
        importance: (steps,) float32, up to 1: what the squared error of each step counts.
        levels: (256,) float32, of the trellis's states.
        width: Bits of a symbol: 4, 2 or 1.

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
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        searches = [pool.submit(_search, *arrays, width, states, each, threads) for each in range(threads)]
    for search in searches:
        search.result()  # raises what a thread raised
    return torch.from_numpy(states)


def _cached(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled once for all processes, where they can write to one of numba's caches."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no such place
        return numba.njit(nogil=True)(function)


@_cached
def _search(targets, importance, levels, width, states, thread, threads):  # type: ignore[no-untyped-def]
    """Fills in the states of every so many'th block of rows."""
    steps, num_rows = targets.shape
    pasts = NUM_STATES >> width  # what of a state the next one still knows
    survivors = numpy.empty((steps, pasts, _LANES), dtype=numpy.uint8)
    best = numpy.empty((pasts, _LANES), dtype=numpy.float32)
    cost = numpy.empty((NUM_STATES, _LANES), dtype=numpy.float32)
    target = numpy.zeros(_LANES, dtype=numpy.float32)
    for first in range(thread * _LANES, num_rows, threads * _LANES):
        rows = min(_LANES, num_rows - first)
        best[:] = _UNREACHABLE
        best[0] = 0  # the stream starts on zeros
        for step in range(steps):
            if step:
                _survive(cost.view(numpy.int32), best.view(numpy.int32), survivors[step], width)
            target[:rows] = targets[step, first : first + rows]
            _branch(best, target, importance[step], levels, width, cost)
        for row in range(rows):
            _trace_back(cost[:, row].argmin(), survivors[:, :, row], width, states[:, first + row])


@numba.njit
def _survive(cost, best, survivors, width):  # type: ignore[no-untyped-def]
    """Of all states with the same past the cheapest survives; which, its oldest symbol says.

    Costs are positive floats, whose order is that of their bits; so each carries its oldest symbol in its lowest bits,
    and one minimum finds cost and symbol.
    """
    clear, keep = numpy.int32(-1 << width), numpy.int32((1 << width) - 1)
    cost, best, survivors = cost.reshape(-1), best.reshape(-1), survivors.reshape(-1)
    for oldest in range(1 << width):
        candidates, symbol = cost[oldest * len(best) : (oldest + 1) * len(best)], numpy.int32(oldest)
        if oldest == 0:
            for each in range(len(best)):
                best[each] = candidates[each] & clear
        else:
            for each in range(len(best)):
                best[each] = min(best[each], numpy.int32((candidates[each] & clear) | symbol))
    for each in range(len(best)):
        survivors[each] = best[each] & keep


@numba.njit
def _branch(best, target, importance, levels, width, cost):  # type: ignore[no-untyped-def]
    """Every past goes on with every symbol."""
    for state in range(NUM_STATES):
        level, so_far, after = levels[state], best[state >> width], cost[state]
        for lane in range(_LANES):
            error = target[lane] - level
            after[lane] = so_far[lane] + (importance * (error * error) + _SMALLEST)


@numba.njit
def _trace_back(last, survivors, width, states):  # type: ignore[no-untyped-def]
    """The states from the last to the first."""
    pasts = survivors.shape[1]
    for step in range(len(states) - 1, -1, -1):
        states[step] = last
        if step:
            past = last >> width
            # The state before is the past below the symbol that fell out of this one's memory.
            last = numpy.intp(survivors[step, past]) * pasts + past
