"""Is what the engine does for speed worth it? The engine as it is, beside one without it.

    python benchmarks/gains.py [VARIANT ...] [--rounds 7] [--seconds 1.5] [--pin]

A variant is a copy of the sources in build/gains/ with a few words replaced (VARIANTS), so that the
engine itself needs no switches. Prints JSON: for each workload the median ratio of rate and p50 to
the engine as it is (least, median, most), paired and interleaved, and so of the server's CPU time,
sleeps and the network's TCP segments per message.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from kecho import bench

Changes = tuple[tuple[str, str, str], ...]  # (file, what stands there, what is to stand there)

_SHARED, _ONE = ("--threads", "2"), ("--threads", "1")
_POLLING = ("--threads", "1", "--busy-poll", "auto")
_STREAM = {"mode": "stream", "connections": 4, "length": 512}
_CONNECT = {"mode": "connect", "connections": 50, "length": 64, "source": "127.0.0.0/8"}
_PING_PONG = {"mode": "closed", "connections": 1, "length": 64}
_FIFTY = {"mode": "closed", "connections": 50, "length": 64}
_DEEP = {"mode": "closed", "connections": 4, "length": 64, "depth": 8}


@dataclass(frozen=True)
class Variant:
    changes: Changes
    options: tuple[str, ...]
    workloads: tuple[dict[str, Any], ...]


def _buffer(size_bytes: int) -> Variant:
    changes = (("ext/engine/layout.h", "BUFFER_BYTES 65536", f"BUFFER_BYTES {size_bytes}"),)
    return Variant(changes, _ONE, (_STREAM, _FIFTY))


def _reads(reads: int) -> Variant:
    changes = (("ext/engine/turns.pxd", "READS_PER_TURN = 4", f"READS_PER_TURN = {reads}"),)
    return Variant(changes, _ONE, (_STREAM,))


def _quick_ack(on: int) -> Variant:
    changes = (
        (
            "ext/engine/accepting/accept.pxd",
            "    count_opened(worker)\n",
            f"    on = {on}\n    setsockopt(fd, 6, 12, &on, sizeof(on))  # TCP_QUICKACK\n"
            "    count_opened(worker)\n",
        ),
    )
    return Variant(changes, _ONE, (_CONNECT, _FIFTY))


VARIANTS = {
    "no recv after accept": Variant(
        (
            (
                "ext/engine/accepting/accept.pxd",
                "READS_PER_TURN if worker.is_draining else 1)",
                "READS_PER_TURN) if worker.is_draining else SERVED_ALL",
            ),
        ),
        _SHARED,
        (_CONNECT,),
    ),
    "oneshot": Variant(
        (
            (
                "ext/kernel/epoll.pxd",
                "        EPOLLET\n",
                "        EPOLLET\n        EPOLLONESHOT\n",
            ),
            (
                "ext/engine/epoll/events.pxd",
                "EPOLLET, EPOLLIN,",
                "EPOLLET, EPOLLONESHOT, EPOLLIN,",
            ),
            (
                "ext/engine/epoll/events.pxd",
                "event.events = event_mask(awaited)",
                "event.events = event_mask(awaited) & ~<uint32_t>EPOLLET | EPOLLONESHOT",
            ),
            (
                "ext/engine/turns.pxd",
                "        if ownership_release(connection):\n            return\n        served",
                "        connection_arm(worker, connection)\n"
                "        if ownership_release(connection):\n            return\n        served",
            ),
        ),
        _SHARED,
        (_PING_PONG, _FIFTY),
    ),
    "buffers of 16 KiB": _buffer(1 << 14),
    "buffers of 256 KiB": _buffer(1 << 18),
    "no second read in a turn": _reads(1),
    "16 reads in a turn": _reads(16),
    "TCP_QUICKACK on": _quick_ack(1),
    "TCP_QUICKACK off": _quick_ack(0),
    "no TCP_NODELAY": Variant(
        (
            (
                "kecho/server/sockets/listen.py",
                "one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)",
                "one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)",
            ),
        ),
        _ONE,
        (_PING_PONG, _DEEP, _STREAM),
    ),
    "no sched_yield": Variant(
        (("ext/engine/epoll/busy_poll.pxd", "            sched_yield()", "            pass"),),
        _POLLING,
        (_PING_PONG, _FIFTY),
    ),
}


def apply(name: str, changes: Changes, tree: Path) -> None:
    for file, old, new in changes:
        text = (tree / file).read_text()
        if old not in text:
            raise SystemExit(f"{name}: {file} has no {old!r}")
        (tree / file).write_text(text.replace(old, new))


def built(name: str, changes: Changes) -> Path:
    """A tree of its own with these changes, compiled."""
    tree = harness.ROOT / "build" / "gains" / re.sub(r"\W+", "-", name)
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(harness.ROOT / part, tree)
    for part in ("ext", "kecho"):
        shutil.copytree(harness.ROOT / part, tree / part)
    apply(name, changes, tree)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True)
    return tree


def switches(pid: int) -> int:
    """Times that its threads went to sleep: proc_pid_status(5)."""
    return sum(
        int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.M)[0])
        for status in Path(f"/proc/{pid}/task").glob("*/status")
    )


def cpu_us(pid: int) -> float:
    """What it has used of CPUs: proc_pid_stat(5)."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * 1e6 / os.sysconf("SC_CLK_TCK")


def segments() -> int:
    """TCP segments sent by this network: proc_pid_net(5)."""
    names, counts = [
        line.split()
        for line in Path("/proc/self/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    ]
    return int(counts[names.index("OutSegs")])


def measured(
    tree: Path, options: tuple[str, ...], workload: dict[str, Any], chosen: argparse.Namespace
) -> dict[str, float]:
    """One run against a server from `tree`; with --pin the server on one CPU, the client on the
    others."""
    cpus = sorted(os.sched_getaffinity(0))
    here = os.getcwd()
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cpus)
        stack.callback(os.chdir, here)
        os.chdir(tree)
        if chosen.pin:
            os.sched_setaffinity(0, cpus[:1])
        server = stack.enter_context(harness.server("--backlog", "1024", *options))
        if chosen.pin:
            os.sched_setaffinity(0, cpus[1:])
        before = switches(server.pid), segments(), cpu_us(server.pid)
        result = bench.run(
            bench.Workload(
                port=server.port, duration=chosen.seconds, threads=1, warmup=0.2, **workload
            ),
            server_pid=server.pid,
        )
        if result.errors:
            raise RuntimeError(str(result.first_error))
        after = switches(server.pid), segments(), cpu_us(server.pid)
    figures = {"rate": result.rate_per_s}
    messages = result.rate_per_s * (chosen.seconds + 0.2)
    figures["sleeps_per_message"] = (after[0] - before[0]) / messages
    figures["server_cpu_us_per_message"] = (after[2] - before[2]) / messages
    figures["segments_per_message"] = (after[1] - before[1]) / messages
    for kind in ("service", "response"):
        if kind in result.latency:
            figures["p50_us"] = result.latency[kind].percentile(50) / 1000
            figures["p99_us"] = result.latency[kind].percentile(99) / 1000
            break
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--pin", action="store_true")
    chosen = parser.parse_args()
    as_is = built("as it is", ())
    for name in chosen.variants or VARIANTS:
        variant = VARIANTS[name]
        tree = built(name, variant.changes)
        for workload in variant.workloads:
            runs = harness.interleaved(
                chosen.rounds,
                (as_is, tree),
                lambda one, of=variant, load=workload: measured(one, of.options, load, chosen),
            )
            figures: dict[str, Any] = {"variant": name, **workload}
            for key in runs[as_is][0]:
                pairs = list(zip(runs[as_is], runs[tree], strict=True))
                medians = [statistics.median(run[key] for run in runs[one]) for one in runs]
                figures[key] = [round(one, 3) for one in medians]
                if all(ours[key] for ours, _ in pairs):
                    ratios = sorted(theirs[key] / ours[key] for ours, theirs in pairs)
                    figures[f"{key}_ratio"] = [
                        round(one, 3) for one in (ratios[0], statistics.median(ratios), ratios[-1])
                    ]
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
