"""HdrHistogram's log of intervals, format 1.3.

Source of the format: HistogramLogWriter.java in https://github.com/HdrHistogram/HdrHistogram.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime

from .histogram import Histogram

__all__ = ["write_hlog"]

_NS_PER_MS = 1_000_000


def write_hlog(intervals: Iterable[tuple[str, float, float, Histogram]], started_at: float) -> str:
    """Return a log with a line for each interval.

    intervals: of each its tag (empty: none), its start (seconds after `started_at`), its length
        (seconds) and its samples.
    started_at: seconds since the epoch.

    Raises ValueError for what the format cannot express: a tag with a comma or white space, a time
    that is negative or not finite.
    """
    _check_time(started_at)
    moment = datetime.fromtimestamp(started_at, UTC).isoformat(timespec="milliseconds")
    lines = [
        "#[Histogram log format version 1.3]",
        f"#[StartTime: {started_at:.3f} (seconds since epoch), {moment}]",
        # Without this line, readers have to guess whether the timestamps below are relative.
        f"#[BaseTime: {started_at:.3f} (seconds since epoch)]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    for tag, start, duration, histogram in intervals:
        if any(character == "," or character.isspace() for character in tag):
            raise ValueError(f"a tag has a comma or white space: {tag!r}")
        _check_time(start)
        _check_time(duration)
        tagged = f"Tag={tag}," if tag else ""
        highest = histogram.max / _NS_PER_MS
        lines.append(f"{tagged}{start:.6f},{duration:.6f},{highest:.6f},{histogram.encode()}")
    return "\n".join(lines) + "\n"


def _check_time(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} is not a time in seconds")
