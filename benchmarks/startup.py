"""How long from exec to the first client served?

    python benchmarks/startup.py [--runs 20] [-- OPTION...]

Each run starts `python -m kecho --port 0`, connects as soon as the port is printed, and has one
byte echoed, which proves that the connection was accepted. Two runs more warm the file cache.
Prints JSON: the median, the fastest and the slowest run.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from collections.abc import Sequence

import harness

WARM_UP_RUNS = 2


def one_run(server_options: Sequence[str]) -> float:
    """Seconds until the byte is back."""
    started = time.perf_counter()
    with harness.server(*server_options) as one:
        with socket.create_connection(("127.0.0.1", one.port), 30) as client:
            client.sendall(b"x")
            client.recv(1)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("server_options", nargs="*", metavar="OPTION")
    options = parser.parse_args()
    runs = [one_run(options.server_options) for _ in range(WARM_UP_RUNS + options.runs)]
    times_ms = [1000 * seconds for seconds in runs[WARM_UP_RUNS:]]
    figures = {
        "runs": options.runs,
        "median_ms": round(statistics.median(times_ms), 1),
        "min_ms": round(min(times_ms), 1),
        "max_ms": round(max(times_ms), 1),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
