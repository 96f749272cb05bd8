"""A run against which nothing is to be said: what the benchmark's client and witness saw of it, and
its result."""

from __future__ import annotations

from typing import Any

from kecho.bench import Histogram, Result, Workload
from kecho.bench.witness import Observation

QUIET = Observation(
    seconds=2.0,
    cpus=2,
    client_cpu_s=0.5,
    server_cpu_s=0.5,
    server_threads=2,
    others_share=0.0,
    stolen_share=0.0,
    syn_events={},
)
THREAD = {
    "running_ns": 2 * 10**9,
    "cpu_ns": 10**9,
    **dict.fromkeys(
        (
            *(
                "waited_ns",
                "queued_ns",
                "away_ns",
                "between_ns",
                "unanswered",
                "unended",
                "reconnects",
            ),
            *("carried_in_ns", "carried_out_ns", "owed_half", "owed"),
        ),
        0,
    ),
}


def result(times_ns: list[int] | None = None, **changes: Any) -> Result:
    times_ns = list(range(1000, 3000)) if times_ns is None else times_ns
    defaults: dict[str, Any] = {
        "workload": Workload(mode="closed", connections=1).to_dict(),
        "environment": {"kernel": "6.1", "usable_cpus": 2, "kecho": "0"},
        "started_at": 1_700_000_000.25,
        "duration_s": 2.0,
        "connections": 1,
        "echoes": len(times_ns),
        "bytes_sent": 64 * len(times_ns),
        "bytes_received": 64 * len(times_ns),
        "latency": {"service": Histogram.of(times_ns)},
    }
    return Result(**{**defaults, **changes})
