"""Whether a server kept the pace that an open loop asked for."""

from __future__ import annotations

import math

from .histogram import Histogram

__all__ = ["is_achieved", "is_kept_up"]

_ACHIEVED_LEAST = 0.98  # of the rate asked for
_LAG_LEAST_S = 0.05  # a hiccup at the end of the time is no overload


def is_achieved(rate: float, echoes: int, duration_s: float) -> bool:
    """Whether so many of the messages that were due in the time have been echoed. By where the
    time begins in the schedule, it holds one message less or more than rate x time."""
    due = rate * duration_s
    return echoes > 0 and echoes >= min(_ACHIEVED_LEAST * due, due - 1)


def is_kept_up(
    rate: float, duration_s: float, owed_half: int, owed: int, response: Histogram | None
) -> bool:
    """Whether the server answered as fast as messages were due, and not only after the end.

    owed_half, owed: outstanding at half of the time, and at its end. A delay that stays the same
    adds nothing in between, once it is over; nor does it make later messages wait longer than
    earlier ones. By chance what is outstanding varies as its square root does.
    """
    slack_s = max(_LAG_LEAST_S, (1 - _ACHIEVED_LEAST) / 2 * duration_s)
    if owed - owed_half <= rate * slack_s + 3 * math.sqrt(owed):
        return True
    if not response:
        return False
    return (response.percentile(90) - response.percentile(10)) / 1e9 <= slack_s
