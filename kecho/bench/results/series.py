"""What a run was like over time, in memory that does not grow with it."""

from __future__ import annotations

from .result import Interval

__all__ = ["Series"]

_MOST = 300


class Series:
    """Intervals one after the other; when there are many, the shortest neighbours are joined."""

    def __init__(self) -> None:
        self._intervals: list[Interval] = []

    def append(self, interval: Interval) -> None:
        self._intervals.append(interval)
        if len(self._intervals) <= _MOST:
            return
        # One pair at a time: joining them all at once would take the client's CPU for seconds.
        lengths = [one.duration_s for one in self._intervals]
        at = min(range(_MOST), key=lambda index: lengths[index] + lengths[index + 1])
        self._intervals[at : at + 2] = [self._intervals[at].joined(self._intervals[at + 1])]

    def __bool__(self) -> bool:
        return bool(self._intervals)

    def intervals(self) -> tuple[Interval, ...]:
        return tuple(self._intervals)
