"""The search for the highest rate at which a limit still holds, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..amounts import rate_text
from .condition import Condition, is_percentile
from .histogram import BEYOND
from .pace import is_achieved, is_kept_up
from .result import Result
from .verdict_client import LATE_MOST, late_share

__all__ = ["Found", "find_rate", "least_rate"]

_HIGHEST_RATE = 1e7
_LOWEST_RATE = 1.0
_PRECISION = 1.05  # between the highest rate that held and the lowest that did not
_CONFIRMATIONS = 5
_Z = 1.645  # one-sided 95 %


@dataclass(frozen=True)
class Found:
    """What a search has found.

    rate: the highest rate that held, in messages/s; None if none did.
    too_high: the lowest rate that did not hold; None if all did.
    held, tried: of the confirming runs at `rate`, how many held, and how many there were.
    results: of all runs, in order.
    reasons: those of the verdicts at `rate`, and that the client sent late at `too_high`.
    """

    condition: Condition
    rate: float | None
    too_high: float | None
    held: int
    tried: int
    results: tuple[Result, ...]
    reasons: tuple[str, ...] = ()

    @property
    def least_share(self) -> float:
        """The share of runs that hold at `rate`, at least: Wilson's bound, 95 % confidence."""
        if not self.tried:
            return 0.0
        share, z2 = self.held / self.tried, _Z * _Z
        middle = share + z2 / (2 * self.tried)
        spread = _Z * math.sqrt(share * (1 - share) / self.tried + z2 / (4 * self.tried**2))
        return (middle - spread) / (1 + z2 / self.tried)

    def to_dict(self) -> dict[str, object]:
        """Return what was found for JSON, without the results."""
        return {
            "limit": self.condition.text,
            "rate_per_s": self.rate,
            "too_high_per_s": self.too_high,
            "held": self.held,
            "tried": self.tried,
            "least_share": self.least_share,
            "reasons": list(self.reasons),
        }

    def text(self) -> str:
        """Return what was found in words."""
        because = "".join(f"  because   {reason}\n" for reason in self.reasons)
        because = because and f"NOT VALID\n{because}"
        too_high = rate_text(self.too_high) if self.too_high else None
        if self.rate is None:
            tried = f"even at {too_high} messages/s" if too_high else "at any rate"
            return f"{self.condition.text} does not hold {tried}\n{because}"
        above = f"not at {too_high}" if too_high else "and no higher rate was tried"
        return (
            f"{self.condition.text} holds at {rate_text(self.rate)} messages/s, {above}; confirmed "
            f"in {self.held} of {self.tried} runs (at least {self.least_share:.0%} of runs, with "
            f"95 % confidence)\n{because}"
        )


def least_rate(condition: Condition, duration_s: float) -> float:
    """Return the lowest rate at which a run has enough samples for the percentile of the limit."""
    if not is_percentile(condition.metric):
        return _LOWEST_RATE
    beyond = 1 - float(condition.metric[1:]) / 100
    return max(_LOWEST_RATE, BEYOND / beyond / duration_s)


def find_rate(
    run_at: Callable[[float], Result],
    condition: Condition,
    first: float,
    lowest: float = _LOWEST_RATE,
) -> Found:
    """Find the highest rate at which the limit holds.

    Doubles or halves the rate from `first` until the limit lies between two rates, then bisects.

    run_at: measures at a rate. An interrupted result ends the search.
    lowest: the lowest rate to try: least_rate().
    """
    results: list[Result] = []
    reasons: dict[float, tuple[str, ...]] = {}  # by rate, why its result is not valid
    ended = False

    def measure(rate: float) -> bool:
        """Run once. Return whether the limit held."""
        nonlocal ended
        result = run_at(rate)
        results.append(result)
        ended = ended or bool(result.observed.get("interrupted"))
        held = is_held(result, rate)
        # At a rate that is too high, only a late client is worth a reason.
        why = result.verdict.reasons if held else late_client(result)
        reasons[rate] = tuple(f"at {rate_text(rate)} messages/s: {reason}" for reason in why)
        return held

    def late_client(result: Result) -> tuple[str, ...]:
        """Return a reason if the client sent too late for the figures to count."""
        worst = late_share(result.latency)
        if worst is None or worst[0] <= LATE_MOST:
            return ()
        _, percent, late_ns, response_ns = worst
        shown = f"{late_ns / 1e6:.1f} of {response_ns / 1e6:.1f} ms at p{percent:g}"
        return (f"the client sent late, by {shown}",)

    def is_held(result: Result, rate: float) -> bool:
        """Return whether the server kept up with the rate, without errors, within the limit."""
        return (
            not result.errors
            and is_achieved(rate, result.echoes, result.duration_s)
            and is_kept_up(
                rate,
                result.duration_s,
                result.observed.get("owed_half", 0),
                result.observed.get("owed", 0),
                result.latency.get("response"),
            )
            and result.main_latency is not None
            and condition.holds(result)
        )

    def holds(rate: float) -> bool:
        """Return whether the limit holds: at once, or in both of two more runs."""
        return measure(rate) or (not ended and measure(rate) and not ended and measure(rate))

    low: float | None = None
    high: float | None = None
    rate = first
    while not ended and (low is None or high is None) and lowest <= rate <= _HIGHEST_RATE:
        if holds(rate):
            low, rate = rate, rate * 2
        else:
            high, rate = rate, rate / 2
    while not ended and low is not None and high is not None and high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        elif not ended:
            high = middle
    held = tried = 0
    while low is not None and not ended:
        held = tried = 0
        while tried < _CONFIRMATIONS and held == tried and not ended:
            held += measure(low)
            tried += 1
        if held == tried:
            break
        # The rate had held by luck: confirm a lower one.
        high = low
        low = low / _PRECISION if low / _PRECISION >= lowest else None
    why = tuple(reason for rate in (low, high) if rate for reason in reasons.get(rate, ()))
    return Found(condition, low, high, held, tried, tuple(results), why)
