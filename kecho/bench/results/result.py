"""What a run measured, and how far it is to be trusted; to and from JSON without loss."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from ...printable import json_text
from . import hdr, reading
from .histogram import Histogram
from .together import check_alike

__all__ = [
    "LATENCIES",
    "SCHEMA",
    "Interval",
    "Result",
    "Round",
    "Verdict",
    "check_results",
    "dump",
    "load",
]

SCHEMA = "kecho.bench/1"
LATENCIES = ("response", "service", "connect", "first_echo", "lateness")


@dataclass(frozen=True)
class Verdict:
    """reasons: why the numbers are not what they seem; notes: what to know when reading them."""

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Interval:
    """A stretch of a run: begin and length in s, from the begin of the measurement.

    hdr: its histogram, encoded, which takes a hundredth of the memory; of() takes one that is not.
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
        return cls(start_s, duration_s, echoes, size, latency.encode())

    @property
    def latency(self) -> Histogram:
        return Histogram.decode(self.hdr)

    def joined(self, following: Interval) -> Interval:
        return Interval.of(
            self.start_s,
            following.start_s + following.duration_s - self.start_s,
            self.echoes + following.echoes,
            self.bytes + following.bytes,
            self.latency + following.latency,
        )


@dataclass(frozen=True)
class Round:
    """A burst: for each connection, in their order, ns; 0 where it did not get so far.

    Arrays of uint64, from whatever sequences.
    """

    connect_ns: Sequence[int]
    first_echo_ns: Sequence[int]
    response_ns: Sequence[int]

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not isinstance(getattr(self, name), array):
                object.__setattr__(self, name, array("Q", getattr(self, name)))

    @classmethod
    def from_samples(cls, samples: bytes) -> Round:
        """From uint64 triples in the machine's byte order: _loadgen.Client.samples()."""
        numbers = array("Q", samples)
        return cls(numbers[0::3], numbers[1::3], numbers[2::3])


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or several merged.

    latency: by name; `response` from the moment a message was due to its last byte, `service`
        from send, `connect`, `first_echo` (send to reply, of a connection's first message),
        `lateness` (due to send). Which of them there are depends on the mode.
    duration_s: of the measured time, in which messages were sent (of bursts: from their instants
        to their last replies). Replies that came later belong to it.
    connections: established. rate_per_s: echoes a second. bytes_per_s: each way. Connections that
        are only held (mode idle) have neither: both are 0.
    series: by when replies came, within the measured time.
    errors: by kind. first_error: the first one in words.
    partial: the run ended before its time.
    name: what a person calls it, such as its file; not part of what is written.
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
        return self._per_s(self.echoes)

    @property
    def bytes_per_s(self) -> float:
        return self._per_s(self.bytes_received)

    def _per_s(self, amount: int) -> float:
        # Connections that were held are asked once, after the time.
        has_rate = self.workload["mode"] != "idle" and self.duration_s > 0
        return amount / self.duration_s if has_rate else 0.0

    @property
    def error_count(self) -> int:
        return sum(self.errors.values())

    @property
    def main_latency(self) -> str | None:
        """The latency that this mode is about; None if it has none."""
        return next((name for name in ("response", "service") if self.latency.get(name)), None)

    @classmethod
    def merge(cls, results: Sequence[Result], *, simultaneous: bool = False) -> Result:
        """Counts added up and histograms merged exactly.

        The runs came one after the other, so that their durations add up, or were simultaneous
        (several hosts), so that their rates do. ValueError without a result, or if they cannot
        be combined.
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
            "series": [
                {
                    "start_s": one.start_s,
                    "duration_s": one.duration_s,
                    "echoes": one.echoes,
                    "bytes": one.bytes,
                    "hdr": one.hdr,
                }
                for one in self.series
            ],
            "rounds": [
                {
                    "connect_ns": reading.pack(one.connect_ns),
                    "first_echo_ns": reading.pack(one.first_echo_ns),
                    "response_ns": reading.pack(one.response_ns),
                }
                for one in self.rounds
                if not self.repeats  # each repeat has its own
            ],
            "repeats": [one.to_dict() for one in self.repeats],
        }

    def to_json(self) -> str:
        """Schema kecho.bench/1, one line. Sample arrays are base64 of zlib of uint64, LE."""
        return json_text(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Result:
        """ValueError, with a reason of one line, for what to_dict() did not make."""
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
            rounds = tuple(_round_from_dict(one, budget) for one in data["rounds"])
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
                else text(data["first_error"], "first_error"),
                partial=bool(data["partial"]),
                verdict=Verdict(
                    tuple(text(one, "verdict.reasons") for one in data["verdict"]["reasons"]),
                    tuple(text(one, "verdict.notes") for one in data["verdict"]["notes"]),
                ),
                latency={
                    _latency_name(name): _latency_from_summary(one, budget)
                    for name, one in data["latency_ns"].items()
                },
                observed=_observed_from_dict(data["observed"]),
                series=tuple(
                    _interval_from_dict(one, None if is_repeat else budget)
                    for one in data["series"]
                ),
                rounds=rounds or tuple(one for result in repeats for one in result.rounds),
                repeats=repeats,
            )
        except (KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise ValueError(f"a malformed result: {error!r}"[:200]) from None

    @classmethod
    def from_json(cls, text: str) -> Result:
        """ValueError, with a reason of one line, for what to_json() did not make."""
        return cls.from_dict(reading.parse(text))


def check_results(results: Sequence[Result]) -> None:
    """ValueError unless they can be combined: kecho.bench.results.together."""
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
    """Times and counts added up, of the rest the highest."""
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


def _round_from_dict(data: Any, budget: reading.Budget) -> Round:
    one = Round(*(reading.unpack(data[name], budget) for name in Round.__dataclass_fields__))
    if not len(one.connect_ns) == len(one.first_echo_ns) == len(one.response_ns):
        raise ValueError("a malformed result: a round's times are of different numbers")
    return one


def _latency_from_summary(data: Any, budget: reading.Budget) -> Histogram:
    budget.take_histogram(hdr.size_of(reading.text(data["hdr"], "hdr", reading.HISTOGRAM_MOST)))
    return Histogram.from_summary(data)


def _interval_from_dict(data: Any, budget: reading.Budget | None) -> Interval:
    """budget: None where nobody looks at its histogram, as at a repeat's."""
    interval = Interval(
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
    """One result as it is; several as ``{"schema": ..., "results": [...]}``.

    found: what a search came to, kept beside its results.
    """
    if len(results) == 1 and found is None:
        return results[0].to_json()
    document = {"schema": SCHEMA, "results": [one.to_dict() for one in results]}
    return json_text(document if found is None else {**document, "found": found})


def load(text: str | bytes) -> list[Result]:
    """What dump() wrote. ValueError, with a reason of one line, for anything else, and for what
    would take too much memory or time: kecho.bench.results.reading."""
    data = reading.parse(text)
    if isinstance(data, dict) and data.get("schema") == SCHEMA and "results" in data:
        budget = reading.Budget()
        return [Result._from_dict(one, budget) for one in reading.steps(data["results"])]
    return [Result.from_dict(data)]
