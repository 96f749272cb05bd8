"""The course of a run over time, in memory that does not grow with its length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import hdr, reading
from .histogram import Histogram

__all__ = ["Interval", "Series"]

_MOST = 300


@dataclass(frozen=True)
class Interval:
    """A stretch of a run: its start and length in s, from the start of the measurement.

    hdr: its histogram, encoded, which takes a hundredth of the memory.
    """

    start_s: float
    duration_s: float
    echoes: int
    bytes: int
    hdr: str

    @classmethod
    def of(
        cls, start_s: float, duration_s: float, echoes: int, size: int, latency: Histogram
    ) -> Interval:
        """Make an interval from a histogram that is not encoded. size: bytes."""
        return cls(start_s, duration_s, echoes, size, latency.encode())

    @property
    def latency(self) -> Histogram:
        """Its histogram, decoded."""
        return Histogram.decode(self.hdr)

    def joined(self, following: Interval) -> Interval:
        """Return one interval in the place of this one and the next."""
        return Interval.of(
            self.start_s,
            following.start_s + following.duration_s - self.start_s,
            self.echoes + following.echoes,
            self.bytes + following.bytes,
            self.latency + following.latency,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the interval for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, budget: reading.Budget | None) -> Interval:
        """Make an interval from what to_dict() returned. Raise ValueError if it is malformed.

        budget: None if its histogram will not be used, as in a repeat; then it is not checked.
        """
        interval = cls(
            reading.amount(data["start_s"], "series.start_s"),
            reading.amount(data["duration_s"], "series.duration_s"),
            reading.count(data["echoes"], "series.echoes"),
            reading.count(data["bytes"], "series.bytes"),
            reading.text(data["hdr"], "series.hdr", reading.HISTOGRAM_MOST),
        )
        if budget is not None:
            budget.take_histogram(hdr.size_of(interval.hdr))
            Histogram.decode(interval.hdr)
        return interval


class Series:
    """Collect consecutive intervals. Above a limit, the shortest neighbours are joined."""

    def __init__(self) -> None:
        self._intervals: list[Interval] = []

    def append(self, interval: Interval) -> None:
        """Add the next interval."""
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
        """Return the intervals in order."""
        return tuple(self._intervals)
