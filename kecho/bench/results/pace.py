"""Checks whether a server kept up with the rate of an open loop."""

from __future__ import annotations

import math

from .histogram import Histogram

__all__ = ["is_achieved", "is_kept_up"]

_ACHIEVED_LEAST = 0.98  # of the rate asked for
_LAG_LEAST_S = 0.05  # a short delay at the end of the time is no overload


def is_achieved(rate: float, echoes: int, duration_s: float) -> bool:
    """Return whether enough of the messages that were due have been echoed.

    Depending on where the time begins in the schedule, one message less or more than rate x time
    is due.
    """
    due = rate * duration_s
    return echoes > 0 and echoes >= min(_ACHIEVED_LEAST * due, due - 1)


def is_kept_up(
    rate: float, duration_s: float, owed_half: int, owed: int, response: Histogram | None
) -> bool:
    """Return whether the server answered as fast as messages were due.

    owed_half, owed: how many messages were outstanding at half of the time, and at its end. With a
    constant delay, the number does not grow in between, and later messages do not wait longer than
    earlier ones. By chance, the number varies by its square root.
    """
    slack_s = max(_LAG_LEAST_S, (1 - _ACHIEVED_LEAST) / 2 * duration_s)
    if owed - owed_half <= rate * slack_s + 3 * math.sqrt(owed):
        return True
    if not response:
        return False
    return (response.percentile(90) - response.percentile(10)) / 1e9 <= slack_s
