"""Of the trellis's states, what both searches through it know: the one in torch's operations and the compiled one."""

from __future__ import annotations

from ...remote.codes_dirembed import STATE_BITS


NUM_STATES = 1 << STATE_BITS
POSITIVE = 1e-3  # added to each squared error: path costs must stay positive, as their bits are compared
