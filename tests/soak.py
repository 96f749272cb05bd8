"""Soak: servers that live and die amid storms, and one client that compares every byte throughout.

    python tests/soak.py [--minutes 10] [--seed N] [--engine epoll]
    make soak MINUTES=10 SEED=N ARGS='--engine io_uring'

One server after the other on the same port, with random options, each for some seconds to a
minute, amid random storms (support/storms.py), and stopped by SIGTERM at a random moment, at times
twice. Meanwhile a stream is compared byte by byte, and a ping-pong client is timed; both may be cut
off by a stop and by nothing else. As root all of this is in a network namespace of its own, where
half-open connections can be made, too.

Ends with one line of JSON on stdout, and a summary on stderr. Status 1 at the first violation, with
the seed; 130 when interrupted. The seed gives the same options, storms and times, not the same
interleaving.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from support.clients import wait_for
from support.namespaces import Namespace
from support.server_process import ServerProcess
from support.storms import Storm, descriptors, prepare_half_open, rss_bytes

STALL_MS = 10_000
STOP_DEADLINE_S = 30.0
RSS_GROWTH_MOST = 1.5  # over one life, after its first storm: what 64 KiB buffers leave behind
STORMS = {  # kind: how many at most, on a machine with two CPUs
    "resets": 20_000,
    "half-open": 20_000,
    "loris": 2_000,
    "silent": 200,
}


@dataclass
class Figures:
    """What happened, all lives together."""

    lives: int = 0
    aborts: int = 0
    storms: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    resets: int = 0
    stream_bytes: int = 0
    stream_ends: Counter[str] = field(default_factory=Counter)
    echoes: int = 0
    p99_ms: list[float] = field(default_factory=list)
    max_ms: float = 0
    rss_kib: list[tuple[int, int]] = field(default_factory=list)  # of each life: first, last
    descriptors: list[tuple[int, int]] = field(default_factory=list)


class Interruption:
    """Ctrl-C, seen between two steps, so that nothing is started and forgotten. In a terminal the
    server gets it, too, and what follows from that is no violation."""

    def __init__(self) -> None:
        self.came = False

    def catch(self) -> None:
        signal.signal(signal.SIGINT, self._come)

    def _come(self, number: int, frame: object) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one is obeyed at once

    def look(self) -> None:
        if self.came:
            raise KeyboardInterrupt


interruption = Interruption()


class Life:
    """One server, from its start to its last counters."""

    def __init__(
        self, chance: random.Random, port: int, figures: Figures, kinds: list[str], engine: str
    ) -> None:
        self.chance = chance
        self.figures = figures
        self.kinds = kinds
        self.options = [*self._choose(port), "--engine", engine]

    def _choose(self, port: int) -> list[str]:
        options = [
            *("--port", str(port), "--log-format=json", "--graceful-timeout=2"),
            *("--dispatch", ("shared", "percpu")[self.figures.lives % 2]),
            *("--threads", str(self.chance.choice([1, 2, 2, 4]))),
            *("--backlog", str(self.chance.choice([1, 16, 128, 4096]))),
        ]
        if self.chance.random() < 0.3:
            options += ["--idle-timeout", str(self.chance.choice([2, 5]))]
        if self.chance.random() < 0.3:
            options += ["--max-connections", str(self.chance.choice([50, 1000]))]
        return options

    def run(self, seconds: float) -> int:
        """Returns the port. Raises AssertionError on a violation."""
        with ServerProcess(self.options) as server, contextlib.ExitStack() as stack:
            server.wait_until_listening()
            idle = descriptors(server.pid)
            stream = stack.enter_context(Storm("stream", server.port))
            ping = stack.enter_context(Storm("ping", server.port))
            self._storms(server, stream, ping, seconds, idle)
            self._stop(server, stream, ping)
            return server.port

    def _storms(
        self, server: ServerProcess, stream: Storm, ping: Storm, seconds: float, idle: int
    ) -> None:
        end_s = time.monotonic() + seconds
        rss: list[int] = []
        self.last: list[Storm] = []
        while time.monotonic() < end_s:
            with contextlib.ExitStack() as stack:
                raging = [
                    stack.enter_context(self._storm(server.port))
                    for _ in range(self.chance.randint(1, 3))
                ]
                until_s = min(end_s, time.monotonic() + self.chance.uniform(1, 6))
                while time.monotonic() < until_s and not all(one.is_over for one in raging):
                    self._alive(server, stream, ping)
                    time.sleep(0.05)
                if time.monotonic() >= end_s and self.chance.random() < 0.5:
                    self.last = raging  # the stop comes amid it
                    stack.pop_all()
                    break
                for one in raging:
                    self._count(one)
            self._alive(server, stream, ping)
            wait_for(
                lambda: descriptors(server.pid) <= idle + 2,
                f"the server's descriptors are {idle} and the two clients' again",
                deadline_s=60,
            )
            rss.append(rss_bytes(server.pid) >> 10)
            self.figures.descriptors.append((idle + 2, descriptors(server.pid)))
        if rss:
            self.figures.rss_kib.append((rss[0], rss[-1]))
            # A few storms may each be the largest so far; then it has to level off.
            assert rss[-1] <= RSS_GROWTH_MOST * max(rss[: len(rss) // 2 + 1]), f"RSS in KiB: {rss}"

    def _storm(self, port: int) -> Storm:
        kind = self.chance.choice(self.kinds)
        self.figures.storms[kind] += 1
        most = STORMS[kind]
        return Storm(kind, port, self.chance.randint(most // 20, most), self.chance.uniform(1, 8))

    def _count(self, storm: Storm) -> None:
        assert storm.stop()["connections" if storm.kind != "half-open" else "syns"] >= 0

    @staticmethod
    def _alive(server: ServerProcess, stream: Storm, ping: Storm) -> None:
        interruption.look()
        status = server.process.poll()
        assert status is None, f"the server ended with status {status}"
        assert not stream.is_over, f"the stream ended before the stop: {stream.wait()}"
        assert not ping.is_over, f"the ping-pong client ended before the stop: {ping.wait()}"

    def _stop(self, server: ServerProcess, stream: Storm, ping: Storm) -> None:
        how = self.chance.choice(["whole", "drain", "drain", "abort"])
        found: dict[str, Any] | None = None
        if how == "whole":  # the stream comes to its end first, and has to be whole
            found = stream.stop()
            assert found["end"] == "whole", f"the stream: {found}"
        self._end_of_ping(ping.stop())
        server.send(signal.SIGTERM)
        if how == "abort":
            time.sleep(self.chance.uniform(0, 0.05))
            server.send(signal.SIGTERM)
            self.figures.aborts += 1
        status = server.wait(STOP_DEADLINE_S)
        assert status == 0, f"status {status}"
        if found is None:
            found = stream.wait(30)
        self.figures.stream_bytes += found["bytes"]
        self.figures.stream_ends[found["end"]] += 1
        for one in self.last:
            with one:
                self._count(one)
        stats = json.loads(server.stderr.splitlines()[-1])["stats"]
        assert stats["active"] == 0, f"counters: {stats}"
        assert stats["accepted"] == sum(stats["closed"].values()), f"counters: {stats}"
        assert stats["bytes_sent"] <= stats["bytes_received"], f"counters: {stats}"
        assert not sum(stats["errors"].values()), f"counters: {stats}"
        self.figures.connections += stats["accepted"]
        self.figures.resets += stats["closed"]["reset"]

    def _end_of_ping(self, found: dict[str, Any]) -> None:
        assert not found["cut"], "the ping-pong client was cut off before the stop"
        assert found["echoes"], "the ping-pong client had no answer"
        self.figures.echoes += found["echoes"]
        self.figures.p99_ms.append(found["p99_ms"])
        self.figures.max_ms = max(self.figures.max_ms, found["max_ms"])
        assert found["max_ms"] < STALL_MS, f"the ping-pong client waited: {found}"


def soak(seed: int, minutes: float, figures: Figures, kinds: list[str], engine: str) -> None:
    """Lives until the time is over; figures.lives is the number of the present one."""
    end_s = time.monotonic() + 60 * minutes
    port = 0
    while (left_s := end_s - time.monotonic()) > 0:
        chance = random.Random(f"{seed} {figures.lives}")
        interruption.look()
        figures.lives += 1
        life = Life(chance, port, figures, kinds, engine)
        seconds = min(left_s, chance.uniform(2, min(60, max(10, 6 * minutes))))
        say(f"{figures.lives}: {seconds:.0f} s, {' '.join(life.options)}")
        try:
            port = life.run(seconds)
        except BaseException:
            for one in getattr(life, "last", []):
                one.__exit__()
            raise


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def report(figures: Figures, seed: int, seconds: float, violation: str | None) -> None:
    p99 = sorted(figures.p99_ms) or [0.0]
    rss = figures.rss_kib or [(0, 0)]
    found = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "violation": violation,
        "lives": figures.lives,
        "restarts": max(0, figures.lives - 1),
        "aborts": figures.aborts,
        "storms": dict(figures.storms),
        "connections": figures.connections,
        "resets": figures.resets,
        "bytes_verified": figures.stream_bytes,
        "stream_ends": dict(figures.stream_ends),
        "ping_pong": {
            "echoes": figures.echoes,
            "p99_ms_median": p99[len(p99) // 2],
            "p99_ms_worst": p99[-1],
            "max_ms": figures.max_ms,
        },
        "rss_kib_first_and_last": rss,
        "descriptors_left": max((now - due for due, now in figures.descriptors), default=0),
    }
    print(json.dumps(found), flush=True)
    say(
        f"{seconds:.0f} s, {figures.lives} servers ({figures.aborts} aborted), "
        f"{figures.connections:,} connections, {figures.resets:,} resets"
    )
    say(f"storms: {' '.join(f'{kind}={count}' for kind, count in figures.storms.items())}")
    say(f"{figures.stream_bytes:,} bytes of the stream came back and are right")
    say(f"ping-pong p99 {p99[len(p99) // 2]} ms (worst {p99[-1]}), longest {figures.max_ms} ms")
    say(f"RSS grew by {max(last - first for first, last in rss):,} KiB at most within a life")
    if violation not in (None, "interrupted"):
        say(f"FAILED in life {figures.lives}: {violation}")
        say(f"the same again: make soak SEED={seed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--engine", default="epoll")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    kinds = [kind for kind in STORMS if kind != "half-open"]
    figures, violation, status = Figures(), None, 0
    began_s = time.monotonic()
    interruption.catch()
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0 and shutil.which("ip"):
            with contextlib.suppress(OSError):
                namespace = Namespace()
                stack.callback(namespace.close)
                namespace.run("ip", "link", "set", "lo", "up")
                prepare_half_open(namespace.run)
                stack.enter_context(namespace)
                kinds.append("half-open")
        without = "" if "half-open" in kinds else ", without half-open connections: that takes root"
        say(f"SEED={seed}, {options.minutes:g} minutes{without}")
        try:
            soak(seed, options.minutes, figures, kinds, options.engine)
        except KeyboardInterrupt:
            violation, status = "interrupted", 130
        except Exception as error:
            violation, status = f"{type(error).__name__}: {error}", 1
            if interruption.came:
                violation, status = "interrupted", 130
    report(figures, seed, time.monotonic() - began_s, violation)
    return status


if __name__ == "__main__":
    sys.exit(main())
