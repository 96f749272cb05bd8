"""What is measured, between whom, and what kecho is to reach: the table of `make compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METRICS", "SCENARIOS", "Goal", "Scenario"]

# name -> (title, whether more is better). All but cpu are kecho.bench's.
METRICS = {
    "rate": ("echoes/s", True),
    "cpu": ("server CPU per echo", False),
    "mean": ("mean", False),
    "p50": ("p50", False),
    "p99": ("p99", False),
    "max": ("max", False),
}
_BACKLOG_AMPLE = 4096
_MOST_BURST_ROUNDS = 4


@dataclass(frozen=True)
class Goal:
    """metric of subject / metric of reference <= limit; >= limit where more is better."""

    subject: str
    reference: str
    metric: str
    limit: float

    def is_met_by(self, ratio: float) -> bool:
        return ratio >= self.limit if METRICS[self.metric][1] else ratio <= self.limit


@dataclass(frozen=True)
class Scenario:
    """bench: options of kecho.bench's Workload, but for port, threads and duration.

    reference: whom the others are divided by. shares_cpus: client and server are on the same CPUs,
    two of them, by intention; otherwise the server has the first CPU and the client the others.
    limits_server: it asks how much a server can do, which a client on no more CPUs does not find
    out (see cap.py). most_rounds: it takes long.
    """

    name: str
    title: str
    contestants: tuple[str, ...]
    reference: str
    metrics: tuple[str, ...]
    bench: Mapping[str, Any]
    goals: tuple[Goal, ...] = ()
    backlog: int = _BACKLOG_AMPLE
    shares_cpus: bool = False
    limits_server: bool = False
    most_rounds: int | None = None

    @property
    def is_burst(self) -> bool:
        return self.bench["mode"] == "burst"

    @property
    def overflows(self) -> bool:
        """The burst is larger than the accept queue by intention."""
        return self.is_burst and self.bench["connections"] > self.backlog


_OTHERS = ("asyncio", "uvloop", "go", "tokio")
_ALL = (
    *("kecho", "kecho, no sandbox", "kecho io_uring", "kecho sockmap", "kecho busy-poll"),
    *("epoll_echo", "uring_echo", *_OTHERS),
)
# From rotating addresses, ports in TIME_WAIT are no limit.
_SOURCES = {"source": ("127.0.0.0/8",)}


def _throughput(name: str, title: str, **bench: Any) -> Scenario:
    beside = (
        ("kecho", "epoll_echo"),
        ("kecho, no sandbox", "epoll_echo"),
        ("kecho io_uring", "kecho"),
    )
    goals = tuple(
        Goal(subject, peer, metric, 1.0)
        for subject, peer in (*beside, *(("kecho", other) for other in _OTHERS))
        for metric in ("rate", "cpu")
    )
    metrics = ("rate", "cpu") if bench["mode"] == "stream" else ("rate", "cpu", "p50", "p99")
    return Scenario(name, title, _ALL, "epoll_echo", metrics, bench, goals, limits_server=True)


def _burst(backlog: int) -> Scenario:
    return Scenario(
        f"burst{backlog}",
        f"burst of 1000, 10 rounds, backlog {backlog}",
        ("kecho", "kecho io_uring", "kecho sockmap", "epoll_echo", "user_echo_server"),
        "user_echo_server",
        ("mean", "p50", "max", "cpu"),
        {"mode": "burst", "connections": 1000, "rounds": 10, **_SOURCES},
        backlog=backlog,
        limits_server=True,
        most_rounds=_MOST_BURST_ROUNDS,
    )


_EVERY = (
    Scenario(
        "one",
        "1 connection, closed, 64 B",
        (
            *("kecho", "kecho, spinning client", "kecho io_uring", "kecho sockmap"),
            "kecho busy-poll",
            *("kecho busy-poll, spinning client", "epoll_echo", "user_echo_server"),
        ),
        "kecho",
        ("p50", "p99", "rate", "cpu"),
        {"mode": "closed", "connections": 1},
        (
            Goal("kecho sockmap", "kecho", "p50", 0.20),
            Goal("kecho sockmap", "kecho", "p99", 0.15),
            Goal("kecho io_uring", "kecho", "p50", 1.0),
            Goal("kecho busy-poll", "kecho", "p50", 0.40),
            Goal("kecho busy-poll, spinning client", "kecho busy-poll", "p50", 0.45),
        ),
    ),
    Scenario(
        "two",
        "2 clients x 1 connection on 2 cores, closed, 64 B",
        ("kecho shared", "kecho percpu"),
        "kecho shared",
        ("p50", "p99", "rate", "cpu"),
        {"mode": "closed", "connections": 2},
        (Goal("kecho percpu", "kecho shared", "p50", 0.60),),
        shares_cpus=True,
    ),
    _throughput("closed50", "50 connections, closed, 64 B", mode="closed", connections=50),
    _throughput("closed1000", "1000 connections, closed, 64 B", mode="closed", connections=1000),
    _throughput(
        "closed10000",
        "10,000 connections, closed, 64 B",
        mode="closed",
        connections=10_000,
        warmup=0.5,  # to send so many first messages takes a while, without a look at replies
        **_SOURCES,
    ),
    _throughput(
        "stream", "stream, 4 connections, 512 B, deep", mode="stream", connections=4, length=512
    ),
    _throughput("connect", "connect, one echo, close", mode="connect", connections=50, **_SOURCES),
    _burst(128),
    _burst(4096),
)
SCENARIOS = {one.name: one for one in _EVERY}
