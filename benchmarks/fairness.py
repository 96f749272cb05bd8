"""Ping-pong connections beside streams that never pause, one for each worker.

    python benchmarks/fairness.py [--streams 2] [--busy 50] [--rounds 5] [--dispatch shared]
        [--engine epoll]

Prints JSON: the ping-pong clients' p50, p99 and rate with and without the streams, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--busy", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--dispatch", default="shared")
    parser.add_argument("--engine", default="epoll")
    options = parser.parse_args()

    server = ("--dispatch", options.dispatch, "--engine", options.engine, "--threads", "2")
    with harness.server(*server) as one:

        def measure(streams: int) -> dict[str, Any]:
            with harness.streams(one.port, streams):
                return harness.pingpong(one.port, options.busy, options.seconds)

        results = harness.interleaved(options.rounds, (0, options.streams), measure)
    figures: dict[str, Any] = {
        "dispatch": options.dispatch,
        "engine": options.engine,
        "busy": options.busy,
    }
    for streams, runs in results.items():
        figures[f"{streams} streams"] = {
            "p50_us": statistics.median(run["p50_ns"] / 1000 for run in runs),
            "p99_us": statistics.median(run["p99_ns"] / 1000 for run in runs),
            "max_us": max(run["max_ns"] / 1000 for run in runs),
            "rate_per_s": statistics.median(run["rate_per_s"] for run in runs),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
