"""Busy connections beside idle ones: does the idle crowd cost time or memory?

    python benchmarks/idle.py [--idle 10000] [--busy 50] [--rounds 5] [--dispatch shared]
        [--engine epoll]

Two servers run side by side, one of them with the idle connections; the busy clients visit them
in turn. Prints JSON: p99 with and without, their ratio round by round, and the growth of the
server's resident memory for each idle connection.
"""

from __future__ import annotations

import argparse
import json
import statistics

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--busy", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--dispatch", default="shared")
    parser.add_argument("--engine", default="epoll")
    options = parser.parse_args()
    server_options = (
        *("--dispatch", options.dispatch, "--engine", options.engine),
        *("--backlog", "4096"),
    )
    with harness.server(*server_options) as empty, harness.server(*server_options) as crowded:
        for one in (empty, crowded):  # the first clients touch pages that later ones find there
            harness.pingpong(one.port, options.busy, 1)
        before = crowded.rss_bytes()
        with harness.idle_connections(crowded.port, options.idle):
            after = crowded.rss_bytes()
            results = harness.interleaved(
                options.rounds,
                (empty, crowded),
                lambda one: harness.pingpong(one.port, options.busy, options.seconds),
            )
    p99 = {one: [run["p99_ns"] / 1000 for run in results[one]] for one in results}
    ratios = [b / a for a, b in zip(p99[empty], p99[crowded], strict=True)]
    figures = {
        "dispatch": options.dispatch,
        "engine": options.engine,
        "idle": options.idle,
        "busy": options.busy,
        "p99_us_without": p99[empty],
        "p99_us_with": p99[crowded],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "rate_per_s_without": statistics.median(run["rate_per_s"] for run in results[empty]),
        "rate_per_s_with": statistics.median(run["rate_per_s"] for run in results[crowded]),
        "rss_bytes_per_idle_connection": round((after - before) / options.idle, 1),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
