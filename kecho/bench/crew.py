"""The clients of one process: one thread for each, which begin and end together."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..system import background
from . import _loadgen
from .sources import link_of
from .target import Target
from .workload import Workload

__all__ = ["SAMPLE_BYTES", "Crew", "Report", "Share", "Snapshot", "first_message", "shares_of"]

SAMPLE_BYTES = 24  # for each connection: _loadgen.Client.samples()
_STOP_S = 5.0  # the native client takes one second
LATENCIES = _loadgen.LATENCIES


@dataclass(frozen=True)
class Share:
    """The share of the workload that one client thread runs."""

    first_number: int  # of its first connection
    connections: int
    index: int  # of this thread, among all client threads of the run
    total: int  # how many client threads the run has


@dataclass
class Snapshot:
    """What some clients have counted so far, added up."""

    ended_ns: int = 0  # when the last client stopped sending; 0: none has stopped
    counters: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)  # of one latency, by bucket

    def add(self, other: Snapshot) -> None:
        """Add what other clients have counted."""
        self.ended_ns = max(self.ended_ns, other.ended_ns)
        self.counters.update(other.counters)
        self.errors.update(other.errors)
        self.latency.update(other.latency)


@dataclass
class Report:
    """What a crew has measured: histograms as counts by bucket, counters of each thread."""

    histograms: dict[str, Counter[int]] = field(default_factory=dict)
    threads: list[dict[str, Any]] = field(default_factory=list)
    first_errors: list[dict[str, Any]] = field(default_factory=list)
    rss_bytes: int = 0

    def add(self, other: Report) -> None:
        """Add what another crew has measured."""
        for name, counts in other.histograms.items():
            self.histograms.setdefault(name, Counter()).update(counts)
        self.threads += other.threads
        self.first_errors += other.first_errors
        self.rss_bytes += other.rss_bytes


def shares_of(workload: Workload) -> list[list[Share]]:
    """Return the shares of the threads of each process, as equal as possible."""
    total = workload.total_threads
    bounds = [workload.total_connections * index // total for index in range(total + 1)]
    shares = [
        Share(bounds[index], bounds[index + 1] - bounds[index], index, total)
        for index in range(total)
    ]
    cuts = [total * index // workload.processes for index in range(workload.processes + 1)]
    return [shares[begin:end] for begin, end in pairwise(cuts)]


def _client(workload: Workload, target: Target, share: Share, seed: bytes) -> _loadgen.Client:
    family_bytes = len(target.address)
    sources = [one.packed for one in workload.source_addresses()]
    if any(len(one) != family_bytes for one in sources):
        raise ValueError(f"the source addresses are not of the family of {target.name}")
    links = {link_of(one) for one in workload.source_addresses()} | {target.scope}
    if len(links - {0}) > 1:
        raise ValueError(f"the source addresses and {target.name} are on different links")
    return _loadgen.Client(
        mode=_loadgen.MODES.index(workload.mode),
        family=target.family,
        address=target.address,
        port=target.port,
        scope=max(links),  # used by link-local addresses alone: ipv6(7)
        sources=b"".join(sources),
        first_number=share.first_number,
        connections=share.connections,
        connects_at_once=max(1, workload.connects_at_once // share.total),
        seed=seed,
        length=workload.length,
        depth=workload.deepest,
        timeout_ns=round(workload.timeout_s * 1e9),
        interval_ns=1e9 / workload.rate if workload.rate else 0.0,
        schedule_first=share.index,
        schedule_step=share.total,
        datagrams=workload.udp,
        line=workload.line,
        verify=workload.verify,
        spin=workload.spin,
        close_by_reset=workload.close == "rst",
        reconnect=workload.reconnect,
        keep_ends=workload.clear_time_wait,
    )


def new_seed() -> bytes:
    """Return what the messages of a run depend on. A server is sent a part of it."""
    return os.urandom(_loadgen.SEED_BYTES)


def first_message(workload: Workload, seed: bytes) -> bytes:
    """Return the first message of connection 0."""
    return _loadgen.payload(seed, 0, 0, workload.length, workload.line)


class Crew:
    """Run the same phase on every client at once, one phase at a time."""

    def __init__(
        self,
        workload: Workload,
        target: Target,
        shares: list[Share],
        seed: bytes,
        first: tuple[int, int] | None = None,
    ) -> None:
        """Make the clients.

        first: a descriptor for connection 0, on which the first message has been echoed, and how
            long its connect took, in ns. The crew takes the descriptor over.
        """
        self._clients = [_client(workload, target, share, seed) for share in shares]
        if first is not None:
            self._clients[0].adopt(*first)
        # Each thread has one CPU, in turn: so a connection keeps its CPU.
        self._cpus = [
            {workload.cpus[share.index % len(workload.cpus)]} if workload.cpus else None
            for share in shares
        ]
        self._threads: list[threading.Thread] = []
        self._left = 0  # threads that have not finished the phase
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._finished.set()
        self._errors: list[BaseException] = []

    ended: Sequence[str] = ()  # client processes that have ended: only ProcessCrew has any

    def pids(self) -> list[int]:
        """Return the pids of further client processes."""
        return []

    def begin(self, phase: str, *arguments: int) -> None:
        """Begin a phase on every client.

        phase: ``open``, ``run`` or ``burst``, with the arguments of that method of the native
            client.
        """
        self._errors = []
        self._left = len(self._clients)
        self._finished.clear()
        self._threads = [
            threading.Thread(
                target=self._work, args=(getattr(client, phase), arguments, cpus), daemon=True
            )
            for client, cpus in zip(self._clients, self._cpus, strict=True)
        ]
        for started, thread in enumerate(self._threads):
            try:
                background.start(thread)
            except OSError:
                self._forget(self._threads[started:])
                raise

    def _forget(self, threads: list[threading.Thread]) -> None:
        """Treat threads that could not be started as ended, and stop the others."""
        self._threads = [one for one in self._threads if one not in threads]
        for _ in threads:
            self._note_end()
        self.stop()

    def _work(
        self, phase: Callable[..., None], arguments: tuple[int, ...], cpus: set[int] | None
    ) -> None:
        try:
            if cpus is not None:
                os.sched_setaffinity(0, cpus)  # 0: the calling thread alone
            phase(*arguments)
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._note_end()

    def _note_end(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._finished.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the phase. Return True when it has ended.

        Raises OSError if a client could not go on.
        """
        # Not Thread.join(): after an interruption, that of Python 3.11 takes a running thread for
        # one that has ended.
        if not self._finished.wait(seconds):
            return False
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._errors:
            raise self._errors[0]
        return True

    def stop(self) -> None:
        """End the phase soon."""
        for client in self._clients:
            client.stop()

    def close(self) -> None:
        """End the current phase, if there is one, and close every connection."""
        self.stop()
        with suppress(OSError):
            self.wait(_STOP_S)
        for client in self._clients:
            # A client that is still busy closes its connections when it is collected.
            with suppress(RuntimeError):
                client.close()

    def samples(self) -> bytes:
        """Return the samples of the last burst, by connection: _loadgen.Client.samples()."""
        return b"".join(client.samples() for client in self._clients)

    def take_ends(self) -> bytes:
        """Return what _loadgen.Client.take_ends() returns, for all clients."""
        return b"".join(client.take_ends() for client in self._clients)

    def snapshot(self, latency: str | None) -> Snapshot:
        """Return what has been counted so far. latency: whose histogram to include."""
        result = Snapshot()
        for client in self._clients:
            counters: dict[str, Any] = client.counters()
            result.errors.update(counters.pop("errors"))
            result.ended_ns = max(result.ended_ns, counters.pop("ended_ns"))
            result.counters.update(counters)
            if latency is not None:
                result.latency.update(client.histogram(latency))
        return result

    def report(self) -> Report:
        """Return what has been measured, after the last phase."""
        histograms: dict[str, Counter[int]] = {}
        for name in LATENCIES:
            counts: Counter[int] = Counter()
            for client in self._clients:
                counts.update(client.histogram(name))
            if counts:
                histograms[name] = counts
        return Report(
            histograms,
            [dict(client.counters()) for client in self._clients],
            [error for client in self._clients if (error := client.first_error()) is not None],
            _rss_bytes(),
        )


def _rss_bytes() -> int:
    """Return this process's resident memory; 0 if it is not known: proc_pid_status(5)."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
