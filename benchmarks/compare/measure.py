"""Runs a scenario: its servers beside each other, visited in turn, in another order each round."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from kecho import bench
from kecho.bench.results.condition import metric_of
from kecho.bench.runner import Progress

from .cap import capped
from .contestants import Contestant, available
from .serving import Serving, StartError, cpu_ns, kernel_threads_ns, serving
from .validity import ESCAPES_CAP, Explained, are_enough, explained, invalid_because
from .workloads import Scenario

__all__ = ["Measured", "Placement", "Run", "measure", "of_both"]

_WARM_UP_S = 0.2
_MOST_CLIENT_THREADS = 4


@dataclass(frozen=True)
class Placement:
    """Which CPUs are whose. `shared`: of scenarios where client and server are on the same."""

    server: tuple[int, ...]
    client: tuple[int, ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, cpus: Sequence[int]) -> Placement:
        """ValueError with fewer than two: they would only wait for each other."""
        if len(cpus) < 2:
            raise ValueError("client and server need a CPU each, and there is one")
        return cls((cpus[0],), tuple(cpus[1 : 1 + _MOST_CLIENT_THREADS]), tuple(cpus[:2]))


@dataclass(frozen=True)
class Run:
    """One contestant's turn. turn: its place in the round. failure: why there is no result.

    server_ns, echoes: the server's CPU time, and the echoes that it was for; they leave out what it
    took to open the connections. Of in-kernel contestants kernel_ns is in it, otherwise None.
    escapes_cap: the others were held to a part of a CPU, and this one not.
    """

    contestant: str
    round: int
    turn: int
    result: bench.Result | None = None
    failure: str | None = None
    server_ns: int = 0
    kernel_ns: int | None = None
    echoes: int = 0
    set_aside: tuple[Explained, ...] = ()
    escapes_cap: bool = False

    def invalid_because(self, metric: str) -> list[str]:
        if self.result is None:
            return [self.failure or "it was not measured"]
        found = invalid_because(metric, self.result, self.set_aside)
        if metric != "cpu" and self.escapes_cap:
            found.append(ESCAPES_CAP)
        if metric == "cpu" and not found and (not self.echoes or not self.server_ns):
            return ["the server's CPU time was not seen"]
        return found

    def value(self, metric: str) -> float | None:
        """Times in ns, the rate in echoes/s; None if it has none."""
        if self.result is None:
            return None
        if metric == "cpu":
            return self.server_ns / self.echoes if self.echoes else None
        try:
            return metric_of(self.result, metric)
        except ValueError:
            return None

    def is_valid(self, metric: str) -> bool:
        return self.value(metric) is not None and not self.invalid_because(metric)


def of_both(runs: Sequence[Run], *names: str) -> dict[str, list[Run]]:
    """Their runs in the rounds that each of them was in: what is compared was measured in turn."""
    rounds = set.intersection(
        *({run.round for run in runs if run.contestant == name} for name in names)
    )
    return {
        name: [run for run in runs if run.contestant == name and run.round in rounds]
        for name in names
    }


@dataclass(frozen=True)
class Measured:
    """is_capped: the servers were held to half a CPU."""

    scenario: Scenario
    runs: tuple[Run, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    is_capped: bool = False
    interrupted: bool = False

    @property
    def title(self) -> str:
        return self.scenario.title + (", server on half a CPU" if self.is_capped else "")

    def of(self, contestant: str) -> list[Run]:
        return [run for run in self.runs if run.contestant == contestant]


def measure(
    scenario: Scenario,
    placement: Placement,
    *,
    rounds: int,
    seconds: float,
    seed: int,
    more_rounds: int = 0,
    peers: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """more_rounds: at most, after the others, of those by whom a goal cannot be told yet. What an
    interruption left of it is marked so."""
    found, absent = available(scenario.contestants, peers)
    commands: dict[str, list[str]] = {}
    runs: list[Run] = []
    interrupted = False
    server_cpus = placement.shared if scenario.shares_cpus else placement.server
    with ExitStack() as stack:
        hold = _cap(stack, scenario, placement, say)
        stack.enter_context(_on(_client_cpus(scenario, placement)))
        servers: list[tuple[Contestant, Serving]] = []
        try:
            for one in found:
                commands[one.name] = one.command_line(scenario.backlog, len(server_cpus))
                try:
                    with ExitStack() as starting:
                        server = starting.enter_context(serving(commands[one.name], server_cpus))
                        if hold is not None:
                            hold(server.pid)
                        stack.push(starting.pop_all())
                except (StartError, OSError) as error:
                    absent[one.name] = f"it did not start: {error}"
                else:
                    servers.append((one, server))
                    _warm_up(scenario, one, server, placement)
            for number, turn, one, server in _turns(
                scenario, servers, rounds, seed, more_rounds, runs
            ):
                say(f"{scenario.name}: round {number + 1}, {one.name}")
                run = _visit(scenario, one, server, placement, seconds, number, turn)
                runs.append(replace(run, escapes_cap=hold is not None and one.in_kernel))
                if run.result is not None and run.result.observed.get("interrupted"):
                    interrupted = True
                    break
        except KeyboardInterrupt:  # between two runs
            interrupted = True
    return Measured(scenario, tuple(runs), absent, commands, hold is not None, interrupted)


def _cap(
    stack: ExitStack, scenario: Scenario, placement: Placement, say: Callable[[str], None]
) -> Callable[[int], None] | None:
    """What holds a server to half a CPU, where the client would be the limit otherwise."""
    if not scenario.limits_server or len(placement.client) > 1:
        return None
    try:
        return stack.enter_context(capped())
    except OSError as error:
        say(f"{scenario.name}: servers get a whole CPU, as the client does: {error}")
        return None


def _turns(
    scenario: Scenario,
    servers: Sequence[tuple[Contestant, Serving]],
    rounds: int,
    seed: int,
    more_rounds: int = 0,
    runs: Sequence[Run] = (),
) -> Iterator[tuple[int, int, Contestant, Serving]]:
    """Everybody once a round, in an order of its own: nobody always follows the same one. Then, in
    more_rounds, those who are to be measured again, as `runs` have it by then."""
    draw = random.Random(f"{seed} {scenario.name}")
    rounds, more_rounds = (min(n, scenario.most_rounds or n) for n in (rounds, more_rounds))
    for number in range(rounds + more_rounds):
        again = None if number < rounds else _wanted_again(scenario, runs)
        order = [one for one in servers if again is None or one[0].name in again]
        draw.shuffle(order)
        for turn, (one, server) in enumerate(order):
            yield number, turn, one, server


def _wanted_again(scenario: Scenario, runs: Sequence[Run]) -> set[str]:
    """Both sides of each goal for which there are too few valid runs. Not where one side has none
    at all: what spoils every run is not chance."""
    names: set[str] = set()
    for goal in scenario.goals:
        both = of_both(runs, goal.subject, goal.reference)
        valid = {name: sum(run.is_valid(goal.metric) for run in both[name]) for name in both}
        if all(valid.values()) and not all(
            are_enough(valid[name], len(both[name])) for name in both
        ):
            names |= both.keys()
    return names


def _client_cpus(scenario: Scenario, placement: Placement) -> tuple[int, ...]:
    return placement.shared if scenario.shares_cpus else placement.client


@contextmanager
def _on(cpus: Sequence[int]) -> Iterator[None]:
    """This thread, which only looks on, shall not do so on the server's CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _workload(
    scenario: Scenario, one: Contestant, server: Serving, placement: Placement, **changes: Any
) -> bench.Workload:
    cpus = _client_cpus(scenario, placement)
    options = {**scenario.bench, **one.bench, **changes}
    return bench.Workload(port=server.port, threads=len(cpus), cpus=cpus, **options)


def _warm_up(scenario: Scenario, one: Contestant, server: Serving, placement: Placement) -> None:
    """The first clients touch pages that later ones find there. What goes wrong shows later."""
    changes: dict[str, Any] = {"rounds": 1} if scenario.is_burst else {"duration": _WARM_UP_S}
    try:
        bench.run(_workload(scenario, one, server, placement, **changes), server_pid=server.pid)
    except (OSError, ValueError):
        pass


class _Meter:
    """The server's CPU time and echoes between the first and the last look within the main phase:
    what it takes to accept 10,000 connections is no part of an echo."""

    def __init__(self, phase: str, pid: int, in_kernel: bool) -> None:
        self._phase, self._pid, self._in_kernel = phase, pid, in_kernel
        self._looks: list[tuple[int, int, int]] = []

    def look(self, progress: Progress) -> None:
        if progress.phase == self._phase:
            del self._looks[1:]
            kernel_ns = kernel_threads_ns() if self._in_kernel else 0
            self._looks.append((cpu_ns(self._pid), kernel_ns, progress.echoes))

    def between(self) -> tuple[int, int, int] | None:
        """Process, kernel threads, echoes; None if there was not enough to see."""
        if len(self._looks) < 2:
            return None
        first, last = self._looks
        if last[2] <= first[2]:
            return None
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]


def _visit(
    scenario: Scenario,
    one: Contestant,
    server: Serving,
    placement: Placement,
    seconds: float,
    number: int,
    turn: int,
) -> Run:
    run = {"contestant": one.name, "round": number, "turn": turn}
    if server.has_ended:
        return Run(**run, failure="the server has ended")
    changes = {} if scenario.is_burst else {"duration": seconds}
    meter = _Meter(scenario.bench["mode"], server.pid, one.in_kernel)
    begun_s, begun_ns = time.monotonic(), cpu_ns(server.pid)
    kernel_begun_ns = kernel_threads_ns() if one.in_kernel else 0
    try:
        result = bench.run(
            _workload(scenario, one, server, placement, **changes),
            server_pid=server.pid,
            on_progress=None if scenario.is_burst else meter.look,
        )
    except (OSError, ValueError) as error:  # nothing to measure, or not from here
        return Run(**run, failure=str(error).splitlines()[0] if str(error) else repr(error))
    took_s = time.monotonic() - begun_s
    whole_ns = cpu_ns(server.pid) - begun_ns
    whole_kernel_ns = kernel_threads_ns() - kernel_begun_ns if one.in_kernel else 0
    # A burst is all accepts: there it is the whole run.
    server_ns, kernel_ns, echoes = meter.between() or (whole_ns, whole_kernel_ns, result.echoes)
    return Run(
        **run,
        result=result,
        server_ns=max(0, server_ns + kernel_ns),
        kernel_ns=max(0, kernel_ns) if one.in_kernel else None,
        echoes=echoes,
        set_aside=explained(
            result,
            seconds=took_s,
            cpus=os.cpu_count() or 1,
            server_ns=whole_ns + whole_kernel_ns,
            kernel_ns=whole_kernel_ns if one.in_kernel else None,
            client_cpus=len(_client_cpus(scenario, placement)),
            shares_cpus=scenario.shares_cpus,
            overflows=scenario.overflows,
        ),
    )
