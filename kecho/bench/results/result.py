"""The result of a run, and how far it can be trusted. JSON keeps all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from ...printable import json_text
from . import hdr, reading
from .histogram import Histogram
from .rounds import Round
from .series import Interval
from .together import check_alike

__all__ = ["LATENCIES", "SCHEMA", "Result", "Verdict", "check_results", "dump", "load"]

SCHEMA = "kecho.bench/1"
LATENCIES = ("response", "service", "connect", "first_echo", "lateness")


@dataclass(frozen=True)
class Verdict:
    """Whether the numbers of a run are valid.

    reasons: why they are not what they seem; none if they are valid.
    notes: what to know when reading them.
    """

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether there is no reason against the numbers."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one run, or of several merged.

    started_at: seconds since the epoch.
    duration_s: the measured time, in which messages were sent (of bursts: from each start to the
        last reply). Replies that came later are in the figures.
    connections: how many were established.
    bytes_sent, bytes_received: of messages in the figures.
    errors: counts by kind. first_error: the first one in words.
    partial: the run ended before its time.
    latency: histograms by name. `response` is from the moment a message was due to the last byte of
        its reply; `service` from its sending; `first_echo` the same for a connection's first
        message; `connect` is the time of a connect; `lateness` from due to sent. The mode decides
        which of them there are.
    series: figures over time, by when replies came, within the measured time.
    rounds: of a burst. repeats: the results that this one merges.
    observed: what else is known of the run, by name.
    name: a name for people, such as that of its file; not written to JSON.
    """

    workload: Mapping[str, Any]
    environment: Mapping[str, Any]
    started_at: float
    duration_s: float
    connections: int
    echoes: int
    bytes_sent: int
    bytes_received: int
    errors: Mapping[str, int] = field(default_factory=dict)
    first_error: str | None = None
    partial: bool = False
    verdict: Verdict = Verdict()
    latency: Mapping[str, Histogram] = field(default_factory=dict)
    series: tuple[Interval, ...] = ()
    rounds: tuple[Round, ...] = ()
    repeats: tuple[Result, ...] = ()
    observed: Mapping[str, Any] = field(default_factory=dict)
    name: str = field(default="", compare=False)

    @property
    def rate_per_s(self) -> float:
        """Echoes per second; 0 in mode idle, which has no rate."""
        return self._per_s(self.echoes)

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second in each direction; 0 in mode idle."""
        return self._per_s(self.bytes_received)

    def _per_s(self, amount: int) -> float:
        # Idle connections echo once, after the measured time.
        has_rate = self.workload["mode"] != "idle" and self.duration_s > 0
        return amount / self.duration_s if has_rate else 0.0

    @property
    def error_count(self) -> int:
        """The number of errors of all kinds."""
        return sum(self.errors.values())

    @property
    def main_latency(self) -> str | None:
        """The name of the latency that this mode is about; None if it has none."""
        return next((name for name in ("response", "service") if self.latency.get(name)), None)

    @classmethod
    def merge(cls, results: Sequence[Result], *, simultaneous: bool = False) -> Result:
        """Add up the counts of several results and merge their histograms, exactly.

        The runs were one after the other, and their durations add up; or they were simultaneous,
        on several hosts, and their rates add up. Raises ValueError without a result, or if they
        cannot be combined.
        """
        if not results:
            raise ValueError("there is no result to merge")
        check_results(results)
        latency: dict[str, Histogram] = {}
        errors: Counter[str] = Counter()
        for one in results:
            errors.update(one.errors)
            for name, histogram in one.latency.items():
                latency[name] = latency.get(name, Histogram()) + histogram
        durations = [one.duration_s for one in results]
        return replace(
            results[0],
            started_at=min(one.started_at for one in results),
            duration_s=max(durations) if simultaneous else sum(durations),
            connections=sum(one.connections for one in results),
            echoes=sum(one.echoes for one in results),
            bytes_sent=sum(one.bytes_sent for one in results),
            bytes_received=sum(one.bytes_received for one in results),
            errors=dict(errors),
            first_error=next((one.first_error for one in results if one.first_error), None),
            partial=any(one.partial for one in results),
            verdict=Verdict(
                tuple(dict.fromkeys(why for one in results for why in one.verdict.reasons)),
                tuple(dict.fromkeys(note for one in results for note in one.verdict.notes)),
            ),
            latency=latency,
            series=(),
            observed=_merge_observed([one.observed for one in results]),
            rounds=tuple(one for result in results for one in result.rounds),
            repeats=() if simultaneous else tuple(results),
        )

    # ---- JSON -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "schema": SCHEMA,
            "workload": dict(self.workload),
            "environment": dict(self.environment),
            "started_at": datetime.fromtimestamp(self.started_at, UTC).isoformat(),
            "duration_s": self.duration_s,
            "connections": self.connections,
            "echoes": self.echoes,
            "rate_per_s": self.rate_per_s,
            "bytes_per_s": self.bytes_per_s,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "errors": dict(self.errors),
            "first_error": self.first_error,
            "partial": self.partial,
            "verdict": {
                "valid": self.verdict.valid,
                "reasons": list(self.verdict.reasons),
                "notes": list(self.verdict.notes),
            },
            "latency_ns": {name: one.summary() for name, one in self.latency.items()},
            "observed": dict(self.observed),
            "series": [one.to_dict() for one in self.series],
            "rounds": [] if self.repeats else [one.to_dict() for one in self.rounds],
            "repeats": [one.to_dict() for one in self.repeats],
        }

    def to_json(self) -> str:
        """Return the result as one line of JSON, schema kecho.bench/1.

        Arrays of samples are uint64, little-endian, compressed by zlib, in base64.
        """
        return json_text(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Result:
        """Make a result from what to_dict() returned.

        Raises ValueError, with a reason of one line, for anything else.
        """
        return cls._from_dict(data, reading.Budget())

    @classmethod
    def _from_dict(cls, data: Any, budget: reading.Budget, *, is_repeat: bool = False) -> Result:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a result of schema {SCHEMA}: {str(found)[:40]!r}")
        budget.take_result()
        try:
            if is_repeat and data["repeats"]:
                raise ValueError("a malformed result: a repeat has repeats")
            repeats = tuple(cls._from_dict(one, budget, is_repeat=True) for one in data["repeats"])
            rounds = tuple(Round.from_dict(one, budget) for one in data["rounds"])
            number, text = reading.count, reading.text
            return cls(
                workload=reading.workload(data["workload"]),
                environment=reading.about(data["environment"], "environment"),
                started_at=datetime.fromisoformat(
                    text(data["started_at"], "started_at", most=64)
                ).timestamp(),
                duration_s=reading.amount(data["duration_s"], "duration_s"),
                connections=number(data["connections"], "connections"),
                echoes=number(data["echoes"], "echoes"),
                bytes_sent=number(data["bytes_sent"], "bytes_sent"),
                bytes_received=number(data["bytes_received"], "bytes_received"),
                errors={
                    kind: number(many, "errors")
                    for kind, many in reading.about(data["errors"], "errors").items()
                },
                first_error=None
                if data["first_error"] is None
                else budget.take_text(data["first_error"], "first_error"),
                partial=bool(data["partial"]),
                verdict=Verdict(
                    *(
                        tuple(
                            budget.take_text(one, f"verdict.{kind}")
                            for one in data["verdict"][kind]
                        )
                        for kind in ("reasons", "notes")
                    ),
                ),
                latency={
                    _latency_name(name): _latency_from_summary(one, budget)
                    for name, one in data["latency_ns"].items()
                },
                observed=_observed_from_dict(data["observed"]),
                series=tuple(
                    Interval.from_dict(one, None if is_repeat else budget) for one in data["series"]
                ),
                rounds=rounds or tuple(one for result in repeats for one in result.rounds),
                repeats=repeats,
            )
        except (KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise ValueError(f"a malformed result: {error!r}"[:200]) from None

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Make a result from what to_json() returned.

        Raises ValueError, with a reason of one line, for anything else.
        """
        return cls.from_dict(reading.parse(text))


def check_results(results: Sequence[Result]) -> None:
    """Raise ValueError unless the results can be combined: kecho.bench.results.together."""
    check_alike(
        [one.workload["mode"] for one in results],
        [one.main_latency for one in results],
        [one.name or f"result {number}" for number, one in enumerate(results, 1)],
    )


_ADDED_UP = (
    *("client_cpu_s", "server_cpu_s", "unanswered", "open_s", "lost", "time_wait_cleared"),
    *("late", "duplicates", "reordered", "reconnects", "owed_half", "owed"),
)
_NUMBERS_OBSERVED = {*_ADDED_UP, "others_cpu_share", "stolen_cpu_share", "client_rss_bytes"}


def _merge_observed(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up times and counts, and take the highest of everything else."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in each for name in one):
        values = [one[name] for one in each if one.get(name) is not None]
        if not values:
            merged[name] = None
        elif isinstance(values[0], str):
            merged[name] = ", ".join(dict.fromkeys(map(str, values)))
        elif isinstance(values[0], dict):
            events: Counter[str] = Counter()
            for one in values:
                events.update(one)
            merged[name] = dict(events)
        else:
            merged[name] = sum(values) if name in _ADDED_UP else max(values)
    return merged


def _latency_from_summary(data: Any, budget: reading.Budget) -> Histogram:
    budget.take_histogram(hdr.size_of(reading.text(data["hdr"], "hdr", reading.HISTOGRAM_MOST)))
    return Histogram.from_summary(data)


def _observed_from_dict(data: Any) -> dict[str, Any]:
    for name in _NUMBERS_OBSERVED & reading.about(data, "observed").keys():
        if data[name] is not None:
            reading.amount(data[name], f"observed.{name}")
    return dict(data)


def _latency_name(name: str) -> str:
    if name not in LATENCIES:
        raise ValueError(f"a malformed result: there is no latency {name!r}")
    return name


def dump(results: Sequence[Result], found: Mapping[str, object] | None = None) -> str:
    """Return JSON of one result; of several ``{"schema": ..., "results": [...]}``.

    found: what a search found, stored beside its results.
    """
    if len(results) == 1 and found is None:
        return results[0].to_json()
    document = {"schema": SCHEMA, "results": [one.to_dict() for one in results]}
    return json_text(document if found is None else {**document, "found": found})


def load(text: str | bytes) -> list[Result]:
    """Return the results that dump() wrote.

    Raises ValueError, with a reason of one line, for anything else, and for what would take too
    much memory or time: kecho.bench.results.reading.
    """
    data = reading.parse(text)
    if isinstance(data, dict) and data.get("schema") == SCHEMA and "results" in data:
        budget = reading.Budget()
        return [Result._from_dict(one, budget) for one in reading.steps(data["results"])]
    return [Result.from_dict(data)]
