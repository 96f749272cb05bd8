"""The run of a workload: finds the server, opens connections, measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OptionError
from . import preflight, probe, signals
from .crew import Crew, Snapshot, new_seed, shares_of
from .outcome import Course, result_of
from .probe import FirstConnection
from .processes import ProcessCrew
from .procfs import exists
from .results.histogram import Histogram
from .results.result import Result
from .results.rounds import Round
from .results.series import Interval, Series
from .target import Target
from .timewait import Sweeper
from .witness import Witness, pid_listening_at
from .workload import Workload

__all__ = ["Progress", "run"]

_SETTLE_S = 0.02  # from starting the threads to the time at which they all begin
_SETTLE_S_PER_THREAD = 0.0002
_LOOK_S = 0.1
_INTERVAL_S = 1.0
_STOP_S = 5.0
_LATENCY_OF_MODE = {"closed": "service", "open": "response", "connect": "response"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    done: a share, 0 to 1. rate_per_s, p99_ns: of the last interval; None if not known yet.
    """

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
    """Run the workload once and return its result.

    server_pid: the server's process, for the verdict. By default it is searched for, if the server
        is on this host.
    on_progress: called about ten times a second.

    SIGINT (KeyboardInterrupt) ends the run early: the result has what was measured, and is marked
    partial. A second SIGINT, at least two seconds later, is raised. Raises TargetError if there is
    no server to measure, OptionError if the limits of this process or the ports do not allow so
    many connections, OSError if the client itself cannot go on.
    """
    if server_pid is not None and not exists(server_pid):
        raise OptionError("server_pid", f"there is no process {server_pid}")
    preflight.check_sources(workload)
    seed = new_seed()
    target, first = probe.find(workload, seed)
    try:
        ports = _check_limits(workload, target)
        if server_pid is None:
            server_pid = target.pid or pid_listening_at(target)
        crew = _crew(workload, target, seed, first)
    finally:
        if first is not None:
            first.socket.close()  # does nothing if a client has taken it over
    with signals.heard() as ending:
        try:
            conductor = _Conductor(workload, crew, target, server_pid, on_progress)
            ending.interrupt = conductor.interrupt  # until the caller has the result
            return conductor.conduct(ports)
        finally:
            crew.close()


def _crew(
    workload: Workload, target: Target, seed: bytes, first: FirstConnection | None
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
    """Return how many connections the ports allow at once; 0: any number.

    Raises OptionError if the limits do not allow this workload.
    """
    for problem in preflight.problems(workload, is_local=target.is_local):
        if problem.fatal:
            raise OptionError("connections", str(problem))
    preflight.check_cpus(workload)
    budget = preflight.port_budget(workload)
    if budget and workload.total_connections > budget:
        raise OptionError(
            "connections",
            f"{workload.total_connections} connections need as many ports, and there are {budget} "
            "towards one server (net.ipv4.ip_local_port_range): use --source 127.0.0.0/8",
        )
    return budget


class _Conductor:
    """Conduct one run, from its first connect to its result."""

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
        """Run the workload. ports: as _check_limits() returns it."""
        started_at = time.time()
        is_burst = self._workload.mode == "burst"
        measured_s = self._run_bursts() if is_burst else self._run_steadily()
        observation = self._witness.observe()
        if self._sweeper is not None:
            self._sweeper.finish(self._crew.take_ends())
        report = self._crew.report()
        course = Course(
            started_at=started_at,
            duration_s=measured_s,
            open_s=self._open_s,
            ports=ports,
            ports_freed=self._sweeper.freed if self._sweeper is not None else 0,
            time_wait_cleared=self._sweeper.dropped if self._sweeper is not None else 0,
            interrupted=self._interrupted,
            ended=self._crew.ended,
            series=self._series.intervals(),
            rounds=tuple(self._rounds),
        )
        return result_of(self._workload, self._target, report, course, observation)

    def interrupt(self) -> None:
        """End the run soon. What has been measured until then is its result."""
        self._interrupted = True
        self._crew.stop()

    # ---- phases ---------------------------------------------------------------------------------

    def _run_bursts(self) -> float:
        """Run the bursts. Return the sum of the seconds from each start to its last reply."""
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
        """Run any other mode. Return the seconds in which clients sent within the measured time.

        The figures include replies that come later, but not the time spent waiting for them.
        """
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
        """Wait until the phase has ended. An interruption ends it soon, a second one is raised.

        measured: start and end of the measured time, which is split into intervals.
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
            except KeyboardInterrupt:  # raised by a handler of the caller's
                if self._interrupted:
                    raise
                self.interrupt()
            if self._interrupted:
                self._crew.stop()  # again: a phase may have begun since the last call
                deadline_s = deadline_s or time.monotonic() + _STOP_S
                if time.monotonic() > deadline_s:
                    return

    # ---- progress and intervals -----------------------------------------------------------------

    def _until_look_s(self, measured: tuple[int, int] | None) -> float:
        """Return how long to wait: until the next look, or until the measured time ends."""
        left_s = _LOOK_S if measured is None else measured[1] / 1e9 - time.monotonic()
        return min(_LOOK_S, left_s) if left_s > 0 else _LOOK_S

    def _look(self, phase: str, done: float, measured: tuple[int, int] | None) -> None:
        now_s = time.monotonic()
        is_last = False
        due = measured is not None and now_s - self._last_at_s >= _INTERVAL_S
        if measured is not None and now_s >= (end_s := measured[1] / 1e9):
            # Nothing is sent after the end: a rate over later time would mean nothing.
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
