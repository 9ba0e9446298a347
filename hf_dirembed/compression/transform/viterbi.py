"""Viterbi's algorithm on a CPU, compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.library import library, threads_for
from ...kernels.reading import raise_for


_STATE_TIME = 10.0  # nanoseconds, to find the state of a code


def cheapest_paths(targets: Tensor, importance: Tensor, levels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The states of each row's cheapest path, and their levels, the same on any number of threads.

    Args:
        targets: (n, count) float32, on a CPU.
        importance: (count,) float32, up to 1: what the squared error of each code counts.
        levels: (256,) float32, of the trellis's states.
        width: Bits of a symbol: 4, 3, 2 or 1.

    Returns:
        (n, count) uint8: a code's own symbol is in the lowest bits, those of the codes behind it above; and (n, count)
        float32.

    Source: Viterbi 1967.

    Example:
        >>> targets = torch.tensor([[0.1, 0.9], [0.8, -0.2]])
        >>> newest_bit = torch.arange(256).remainder(2).float()
        >>> states, found = cheapest_paths(targets, torch.ones(2), newest_bit, width=1)
        >>> states.tolist(), found.tolist()
        ([[2, 1], [1, 0]], [[0.0, 1.0], [1.0, 0.0]])
    """
    held = [each.float().contiguous() for each in (targets, importance, levels)]
    states, found = (torch.empty(targets.shape, dtype=dtype, device="cpu") for dtype in (torch.uint8, torch.float32))
    threads = threads_for(targets.numel() * _STATE_TIME)
    state = library().dirembed_search(
        *[each.data_ptr() for each in held], *targets.shape, width, states.data_ptr(), found.data_ptr(), threads
    )
    if state:
        raise_for(state)
    return states, found
