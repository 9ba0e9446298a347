"""How a kernel's work is shared out: among which threads, and in which parts."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple


# Nanoseconds, of a core of 2017: how long it takes to look a code up and to multiply it with a state, and which work
# is worth waking another thread for. Parts are small, so that a thread that is held up leaves more to the others.
LOOKUP_TIME, MULTIPLY_TIME = 0.2, 0.07
WORTH_A_THREAD = 100_000.0
PART_TIME = 1_000_000.0

MATMUL_STATES = 64  # with more of them, torch's product is faster, even though all rows are unpacked to floats before


class Course(NamedTuple):
    """How a kernel goes about its work.

    Attributes:
        threads: How many take part, with the one that asks.
        parts: In how many parts the work is shared out.
        unpacked: Whether rows are unpacked to floats that torch multiplies, a part at a time.
    """

    threads: int
    parts: int
    unpacked: bool = False


_ALONE = Course(1, 1), Course(1, 1, unpacked=True)


def course_of(num_codes: int, num_states: int, most_threads: int) -> Course:
    """How to go about reading codes and multiplying them with states, none to read them only.

    Example:
        >>> course_of(num_codes=500, num_states=0, most_threads=8)
        Course(threads=1, parts=1, unpacked=False)
        >>> course_of(num_codes=1_000_000, num_states=1, most_threads=8).threads
        2
        >>> course_of(num_codes=100_000_000, num_states=100, most_threads=8).unpacked
        True
    """
    work = num_codes * (LOOKUP_TIME + MULTIPLY_TIME * num_states)
    if most_threads == 1 or work < 2 * WORTH_A_THREAD:
        return _ALONE[num_states > MATMUL_STATES]
    threads = min(most_threads, int(work // WORTH_A_THREAD))
    parts = max(threads, int(work // PART_TIME))
    return Course(threads, parts, num_states > MATMUL_STATES)


_pool: ThreadPoolExecutor | None = None
_pool_threads = 0
_lock = threading.Lock()


def _forget_pool() -> None:
    """A fork has none of its parent's threads."""
    global _pool, _pool_threads, _lock
    _pool, _pool_threads, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _pool_of(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work, at least so many; they are kept, as to start them takes longer than some work."""
    global _pool, _pool_threads
    with _lock:
        if _pool is None or _pool_threads < threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_threads = ThreadPoolExecutor(threads, thread_name_prefix="hf_dirembed"), threads
        return _pool


def share_out(work: Callable[[int, int], int], length: int, multiple: int, course: Course) -> int:
    """Does work on a range in parts, in several threads.

    Args:
        work: Takes where a part begins and ends, and gives a number: 0, unless there is something wrong.
        length: Of the range.
        multiple: Parts begin at multiples of it.
        course: How many threads and parts there shall be.

    Returns:
        The highest of the numbers.

    Example:
        >>> done = []
        >>> share_out(lambda first, last: done.append((first, last)) or 0, 10, multiple=4, course=Course(2, 2))
        0
        >>> sorted(done)
        [(0, 8), (8, 10)]
    """
    if course.threads == 1:
        return work(0, length)
    step = max(1, -(-length // (course.parts * multiple))) * multiple
    waiting = deque((first, min(first + step, length)) for first in range(0, length, step))

    def take_parts() -> int:
        worst = 0
        while True:
            try:
                part = waiting.popleft()
            except IndexError:
                return worst
            worst = max(worst, work(*part))

    pool = _pool_of(course.threads - 1)
    others = [pool.submit(take_parts) for _ in range(course.threads - 1)]
    return max(take_parts(), *(other.result() for other in others))
