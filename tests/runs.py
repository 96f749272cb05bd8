"""What the benchmark's client and witness saw of a run against which nothing is to be said."""

from __future__ import annotations

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
        ("waited_ns", "queued_ns", "away_ns", "between_ns", "unanswered", "unended"), 0
    ),
}
