"""How often a line about the same thing is worth another one: less and less."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

__all__ = ["LONGEST_S", "Seldom"]

LONGEST_S = 3600.0
_HALVINGS_MOST = 12  # from LONGEST_S to less than a second
_KINDS_MOST = 256


@dataclass
class _Kind:
    interval_s: float
    due_s: float
    said_s: float
    seen_s: float
    untold: int = 0


class Seldom:
    """Whoever can make a line be written can make many, and fill a disk with them. So a kind of
    line is due at once, and then after an interval that doubles each time, up to LONGEST_S. The
    interval is halved, down to the first, for each LONGEST_S in which a kind has not occurred: so
    bursts with pauses make no more lines than what lasts, a dozen and then one an hour.

    What is not told at once is told with the next line. At most 256 kinds are known at a time; of
    further ones nothing is said until one of them has not occurred for LONGEST_S.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}

    def tell(self, kind: Hashable, count: int, first_s: float = 1.0) -> tuple[int, float] | None:
        """count: how often it has occurred since the last call, which may be 0: what was not told
        before may be due now. first_s: the first interval.

        Returns how often it has occurred since the last line, and in how many seconds (first_s for
        the first line), if a line is due; else None.
        """
        now_s = self._clock()
        known = self._kinds.get(kind)
        if known is None:
            if not count or not self._has_room(now_s):
                return None
            known = self._kinds[kind] = _Kind(first_s, now_s, now_s - first_s, now_s)
        if count:
            quiet = int(min((now_s - known.seen_s) // LONGEST_S, _HALVINGS_MOST))
            known.interval_s = max(known.interval_s / 2**quiet, first_s)
            known.untold += count
            known.seen_s = now_s
        if not known.untold or now_s < known.due_s:
            return None
        told = known.untold, now_s - known.said_s
        known.untold, known.said_s, known.due_s = 0, now_s, now_s + known.interval_s
        known.interval_s = min(2 * known.interval_s, LONGEST_S)
        return told

    def _has_room(self, now_s: float) -> bool:
        if len(self._kinds) >= _KINDS_MOST:
            self._kinds = {
                kind: known
                for kind, known in self._kinds.items()
                if now_s - known.seen_s < LONGEST_S
            }
        return len(self._kinds) < _KINDS_MOST
