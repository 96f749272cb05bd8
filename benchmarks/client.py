"""Does the benchmark client cost anything? One client thread of kecho.bench, with verification,
beside the barest C client (peers/pingpong.c), in turn against the same server."""

from __future__ import annotations

import argparse
import json
import statistics

from harness import interleaved, pingpong, server

from kecho import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=10)
    chosen = parser.parse_args()
    with server("--threads", "1") as running:

        def measure(client: str) -> float:
            if client == "pingpong":
                figures = pingpong(running.port, chosen.connections, chosen.seconds, chosen.length)
                return float(figures["rate_per_s"])
            workload = bench.Workload(
                port=running.port,
                mode="closed",
                connections=chosen.connections,
                length=chosen.length,
                duration=chosen.seconds,
                threads=1,
            )
            result = bench.run(workload, server_pid=running.pid)
            if result.errors:
                raise RuntimeError(str(result.first_error))
            return result.rate_per_s

        rates = interleaved(chosen.rounds, ("pingpong", "kecho.bench"), measure)
    ratios = [
        ours / bare for bare, ours in zip(rates["pingpong"], rates["kecho.bench"], strict=True)
    ]
    print(
        json.dumps(
            {
                "connections": chosen.connections,
                "length_bytes": chosen.length,
                "rate_per_s": {name: round(statistics.median(of)) for name, of in rates.items()},
                "ratios": [round(one, 3) for one in ratios],
                "median_ratio": round(statistics.median(ratios), 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
