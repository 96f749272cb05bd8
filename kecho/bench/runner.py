"""Runs a workload: finds the server, opens, measures, and judges."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import OptionError
from . import environment, preflight, probe, signals
from .crew import Crew, Report, Snapshot, shares_of
from .probe import FirstConnection
from .processes import ProcessCrew
from .procfs import exists
from .results import verdict
from .results.histogram import Histogram
from .results.result import Result
from .results.rounds import Round
from .results.series import Interval, Series
from .target import Target
from .timewait import Sweeper
from .witness import Observation, Witness, pid_listening_at
from .workload import Workload

__all__ = ["Progress", "run"]

_SETTLE_S = 0.02  # from the begin of the threads to the instant that they begin at
_SETTLE_S_PER_THREAD = 0.0002
_LOOK_S = 0.1
_INTERVAL_S = 1.0
_STOP_S = 5.0
_COUNTS_OBSERVED = ("late", "duplicates", "reordered", "reconnects", "owed_half", "owed")
_LATENCY_OF_MODE = {"closed": "service", "open": "response", "connect": "response"}


@dataclass(frozen=True)
class Progress:
    """How far a run is: done of 1; rate and p99 of the last interval, None if not known yet."""

    phase: str
    done: float
    connections: int
    echoes: int
    errors: int
    rate_per_s: float | None
    p99_ns: int | None


def run(
    workload: Workload,
    *,
    server_pid: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Runs the workload once.

    server_pid: the server's process, for the verdict; looked for if the server is on this host.
    on_progress: called about ten times a second.

    An interruption (KeyboardInterrupt) ends the run early: what was measured is returned, marked
    partial; a second one, two seconds later or more, is raised. Raises TargetError if there is no
    server to measure, OptionError if the limits of this process or the ports do not allow so many
    connections, OSError if the client itself cannot go on.
    """
    if server_pid is not None and not exists(server_pid):
        raise OptionError("server_pid", f"there is no process {server_pid}")
    preflight.check_sources(workload)
    seed = random.SystemRandom().getrandbits(32)
    target, first = probe.find(workload, seed)
    try:
        ports = _check_limits(workload, target)
        if server_pid is None:
            server_pid = target.pid or pid_listening_at(target)
        crew = _crew(workload, target, seed, first)
    finally:
        if first is not None:
            first.socket.close()  # nothing if it has been taken over
    with signals.heard() as ending:
        try:
            conductor = _Conductor(workload, crew, target, server_pid, on_progress)
            ending.interrupt = conductor.interrupt  # until the caller has the result
            return conductor.conduct(ports)
        finally:
            crew.close()


def _crew(
    workload: Workload, target: Target, seed: int, first: FirstConnection | None
) -> Crew | ProcessCrew:
    shares = shares_of(workload)
    try:
        if workload.processes > 1:
            given = None if first is None else (first.socket.fileno(), first.connect_ns)
            return ProcessCrew(workload, target, shares, seed, given)
        given = None if first is None else (first.socket.detach(), first.connect_ns)
        return Crew(workload, target, shares[0], seed, given)
    except ValueError as error:
        raise OptionError("source", str(error)) from None


def _check_limits(workload: Workload, target: Target) -> int:
    """How many connections the ports allow at once (0: any number). Raises OptionError."""
    for problem in preflight.problems(workload, is_local=target.is_local):
        if problem.fatal:
            raise OptionError("connections", str(problem))
    preflight.check_cpus(workload)
    budget = preflight.port_budget(workload)
    if budget and workload.total_connections > budget:
        raise OptionError(
            "connections",
            f"{workload.total_connections} are more than the {budget} ports towards one server "
            "(net.ipv4.ip_local_port_range): --source 127.0.0.0/8",
        )
    return budget


class _Conductor:
    """One run, from its first connect to its result."""

    def __init__(
        self,
        workload: Workload,
        crew: Crew | ProcessCrew,
        target: Target,
        server_pid: int | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._workload = workload
        self._crew = crew
        self._target = target
        self._witness = Witness(target, server_pid, crew.pids())
        self._on_progress = on_progress
        self._latency = _LATENCY_OF_MODE.get(workload.mode)
        self._sweeper = Sweeper(target) if workload.clear_time_wait and target.port else None
        self._interrupted = False
        self._series = Series()
        self._rounds: list[Round] = []
        self._last = Snapshot()
        self._last_at_s = 0.0
        self._rate: float | None = None
        self._p99_ns: int | None = None
        self._open_s = 0.0

    def conduct(self, ports: int) -> Result:
        started_at = time.time()
        is_burst = self._workload.mode == "burst"
        measured_s = self._run_bursts() if is_burst else self._run_steadily()
        observation = self._witness.observe()
        if self._sweeper is not None:
            self._sweeper.finish(self._crew.take_ends())
        return self._result(self._crew.report(), started_at, measured_s, observation, ports)

    def interrupt(self) -> None:
        """Ends the run soon; what has been measured until then is its result."""
        self._interrupted = True
        self._crew.stop()

    # ---- phases ---------------------------------------------------------------------------------

    def _run_bursts(self) -> float:
        """Seconds from the instants of the measured bursts to their last replies."""
        total_s = 0.0
        warmup_ends_s = time.monotonic() + self._workload.warmup
        while time.monotonic() < warmup_ends_s and not self._interrupted:
            self._burst(False, 0.0)
        for number in range(self._workload.rounds):
            if self._interrupted or self._crew.ended:
                break
            start_ns = self._burst(True, number / self._workload.rounds)
            one = Round.from_samples(self._crew.samples())
            self._rounds.append(one)
            total_s += max(one.response_ns, default=0) / 1e9
            self._note_burst(start_ns, one, total_s)
            if self._sweeper is not None:
                self._sweeper.finish(self._crew.take_ends())
        return total_s

    def _note_burst(self, start_ns: int, one: Round, total_s: float) -> None:
        answered = [ns for ns in one.response_ns if ns]
        took_s = max(answered, default=0) / 1e9
        histogram = Histogram.of(answered)
        size = len(answered) * self._workload.length
        self._series.append(Interval.of(total_s - took_s, took_s, len(answered), size, histogram))
        if answered:
            self._rate = len(answered) / took_s
            self._p99_ns = histogram.percentile(99)

    def _burst(self, measured: bool, done: float) -> int:
        start_ns = self._soon_ns()
        self._crew.begin("burst", start_ns, measured)
        self._wait("burst", lambda: done)
        return start_ns

    def _run_steadily(self) -> float:
        """Seconds from the begin of the measurement to when the last client stopped sending. What
        is waited for after that is in the figures, and the time it takes is not."""
        workload = self._workload
        begun_s = time.monotonic()
        if workload.mode != "connect":
            self._crew.begin("open")
            self._wait("opening", lambda: 0.0)
            self._open_s = time.monotonic() - begun_s
        if self._interrupted or self._crew.ended:
            return 0.0
        start_ns = self._soon_ns()
        measure_ns = start_ns + round(workload.warmup * 1e9)
        end_ns = measure_ns + round(workload.duration * 1e9)
        self._crew.begin("run", start_ns, measure_ns, end_ns)
        span_ns = end_ns - start_ns
        self._last_at_s = measure_ns / 1e9
        self._wait(
            workload.mode,
            lambda: min(1.0, max(0.0, (time.monotonic_ns() - start_ns) / span_ns)),
            (measure_ns, end_ns),
        )
        snapshot = self._crew.snapshot(self._latency)
        ended_ns = min(end_ns, snapshot.ended_ns or time.monotonic_ns())
        self._note_interval(snapshot, ended_ns / 1e9, measure_ns, last=True)
        return max(0.0, (ended_ns - measure_ns) / 1e9)

    def _soon_ns(self) -> int:
        settle_s = _SETTLE_S + _SETTLE_S_PER_THREAD * self._workload.total_threads
        if self._workload.processes > 1:
            settle_s += 0.1
        return time.monotonic_ns() + round(settle_s * 1e9)

    def _wait(
        self, phase: str, done: Callable[[], float], measured: tuple[int, int] | None = None
    ) -> None:
        """Until the phase has ended; an interruption ends it soon, a second one is raised.

        measured: begin and end of the measured time, which is split into intervals.
        """
        deadline_s = None
        while True:
            try:
                if self._crew.wait(self._until_look_s(measured)):
                    return
                if self._sweeper is not None and self._sweeper.is_due():
                    self._sweeper.sweep(self._crew.take_ends())
                if self._on_progress is not None or measured is not None:
                    self._look(phase, done(), measured)
            except KeyboardInterrupt:  # a caller's own handler raised it
                if self._interrupted:
                    raise
                self.interrupt()
            if self._interrupted:
                self._crew.stop()  # once more: a phase may have begun since
                deadline_s = deadline_s or time.monotonic() + _STOP_S
                if time.monotonic() > deadline_s:
                    return

    # ---- what is seen meanwhile -----------------------------------------------------------------

    def _until_look_s(self, measured: tuple[int, int] | None) -> float:
        """At the end of the measured time, and often before and after it."""
        left_s = _LOOK_S if measured is None else measured[1] / 1e9 - time.monotonic()
        return min(_LOOK_S, left_s) if left_s > 0 else _LOOK_S

    def _look(self, phase: str, done: float, measured: tuple[int, int] | None) -> None:
        now_s = time.monotonic()
        is_last = False
        due = measured is not None and now_s - self._last_at_s >= _INTERVAL_S
        if measured is not None and now_s >= (end_s := measured[1] / 1e9):
            # Nothing is sent any more: a rate over what follows would be that of the client.
            due = is_last = self._last_at_s < end_s
            now_s = end_s
        snapshot = self._crew.snapshot(self._latency if due else None)
        if due and measured is not None:
            self._note_interval(snapshot, now_s, measured[0], last=is_last)
        if self._on_progress is not None:
            counters = snapshot.counters
            self._on_progress(
                Progress(
                    phase,
                    done,
                    counters["open_now"],
                    counters["replies"],
                    sum(snapshot.errors.values()),
                    self._rate,
                    self._p99_ns,
                )
            )

    def _note_interval(
        self, snapshot: Snapshot, now_s: float, measure_ns: int, last: bool = False
    ) -> None:
        start_s = max(self._last_at_s, measure_ns / 1e9)
        duration_s = now_s - start_s
        if duration_s <= 0 or (last and duration_s < _LOOK_S and self._series):
            self._last_at_s = max(self._last_at_s, now_s)
            return
        difference = Histogram(snapshot.latency) - Histogram(self._last.latency)
        echoes = snapshot.counters["echoes"] - self._last.counters["echoes"]
        received = snapshot.counters["bytes_received"] - self._last.counters["bytes_received"]
        self._series.append(
            Interval.of(start_s - measure_ns / 1e9, duration_s, echoes, received, difference)
        )
        self._rate = echoes / duration_s
        self._p99_ns = difference.percentile(99) if difference else None
        self._last, self._last_at_s = snapshot, now_s

    # ---- the result -----------------------------------------------------------------------------

    def _result(
        self,
        report: Report,
        started_at: float,
        duration_s: float,
        observation: Observation,
        ports: int,
    ) -> Result:
        workload = self._workload
        errors: dict[str, int] = {}
        totals: dict[str, int] = {}
        for one in report.threads:
            for kind, count in one["errors"].items():
                errors[kind] = errors.get(kind, 0) + count
            for name, value in one.items():
                if name != "errors":
                    totals[name] = totals.get(name, 0) + value
        latency = {name: Histogram(counts) for name, counts in report.histograms.items()}
        cleared = self._sweeper.dropped if self._sweeper is not None else 0
        freed = self._sweeper.freed if self._sweeper is not None else 0
        judged = verdict.judge(
            workload,
            duration_s=duration_s,
            echoes=totals["echoes"],
            errors=errors,
            latency=latency,
            threads=report.threads,
            observation=observation,
            ports=ports,
            opened=totals["opened"] - freed,
            port_hold_s=preflight.port_hold_s(is_loopback=self._target.is_loopback),
            server_is_local=self._target.is_local,
        )
        ended_early = self._interrupted or bool(self._crew.ended) or self._is_short(duration_s)
        if ended_early:
            early = "the run ended before its time"
            judged = replace(judged, reasons=(early, *self._crew.ended, *judged.reasons))
        return Result(
            workload=workload.to_dict(),
            environment=environment.describe(),
            started_at=started_at,
            duration_s=duration_s,
            connections=totals["opened"],
            echoes=totals["echoes"],
            bytes_sent=totals["bytes_sent"],
            bytes_received=totals["bytes_received"],
            errors=errors,
            first_error=_describe_error(report.first_errors, workload),
            partial=ended_early,
            verdict=judged,
            latency=latency,
            series=self._series.intervals(),
            rounds=tuple(self._rounds),
            observed={
                "address": self._target.name,
                "client_cpu_s": round(observation.client_cpu_s, 3),
                "server_cpu_s": observation.server_cpu_s and round(observation.server_cpu_s, 3),
                "others_cpu_share": observation.others_share and round(observation.others_share, 4),
                "stolen_cpu_share": round(observation.stolen_share, 4),
                "syn_events": observation.syn_events,
                "client_rss_bytes": report.rss_bytes,
                "unanswered": totals["unanswered"],
                "open_s": round(self._open_s, 6),
                "lost": _lost(workload, totals),
                **{name: totals[name] for name in _COUNTS_OBSERVED},
                "time_wait_cleared": cleared,
                "interrupted": self._interrupted,
            },
        )

    def _is_short(self, duration_s: float) -> bool:
        """The clients came back before their time: they had lost every connection."""
        return self._workload.mode != "burst" and duration_s < 0.999 * self._workload.duration


def _lost(workload: Workload, totals: dict[str, int]) -> int | None:
    """Connections of idle, datagrams of UDP."""
    if workload.mode == "idle":
        return totals["opened"] - totals["open_now"]
    return totals["lost"] if workload.udp else None


def _describe_error(found: list[dict[str, Any]], workload: Workload) -> str | None:
    """The earliest error, in one line."""
    if not found:
        return None
    first = min(found, key=lambda one: int(one["at_ns"]))
    text = f"{first['kind']}: connection {first['connection']}"
    if "expected" in first:
        text += (
            f", message {first['sequence']}, byte {first['offset']} of {workload.length}: "
            f"0x{first['found']:02x} came instead of 0x{first['expected']:02x}"
        )
    elif first["kind"] in ("short", "timeout", "closed", "reset", "extra"):
        text += (
            f", message {first['sequence']}, after {first['offset']} of {workload.length} bytes "
            "of the reply"
        )
    if first["errno"]:
        text += f" ({os.strerror(first['errno'])})"
    return text
