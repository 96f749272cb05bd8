"""python -m benchmarks.compare: see `make help` and benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kecho.bench import environment
from kecho.bench.results.compare import REPEATS_LEAST
from kecho.system import sysctl
from kecho.system.cpus import usable_cpus

from . import pictures, table
from .contestants import PEERS, ROOT
from .measure import Measured, Placement, measure
from .summary import goals
from .workloads import SCENARIOS

_ROUNDS, _SECONDS = 6, 2.0
_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make compare ARGS=",
        description="Echo servers side by side: every workload interleaved, judged by kecho.bench.",
    )
    parser.add_argument(
        "--only",
        metavar="WORKLOAD",
        action="append",
        choices=SCENARIOS,
        help=f"one of {', '.join(SCENARIOS)}; may be given again",
    )
    parser.add_argument("--rounds", type=_count, default=_ROUNDS, help=f"by default {_ROUNDS}")
    parser.add_argument(
        "--more-rounds",
        type=_count_or_zero,
        metavar="N",
        help="at most, of those by whom a goal cannot be told yet, for want of valid runs; by "
        f"default as many, with {REPEATS_LEAST} rounds and more",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=_SECONDS, help=f"of a run; by default {_SECONDS:g}"
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        metavar="LIST",
        help=f"of {','.join(PEERS)}; by default all that can be built; none: kecho alone",
    )
    parser.add_argument("--seed", type=int, help="of the order within rounds; by default random")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIRECTORY"
    )
    parser.add_argument(
        "--write-readme", action="store_true", help="also put the summary into benchmarks/README.md"
    )
    return parser


def _count(text: str, least: int = 1) -> int:
    number = int(text)
    if not least <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{number} is not between {least} and 1000")
    return number


def _count_or_zero(text: str) -> int:
    return _count(text, least=0)


def _seconds(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and 0.1 <= number <= 3600):
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600 seconds")
    return number


def _peers(text: str) -> tuple[str, ...]:
    names = () if text in ("", "none") else tuple(text.split(","))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    about = _about(chosen)
    try:
        placement = Placement.of(usable_cpus())
        chosen.results.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    sysctl.raise_descriptor_limit()  # the servers inherit it
    every: list[Measured] = []
    names = chosen.only or SCENARIOS
    try:
        for name in names:
            every.append(_measure_one(name, chosen, placement, about["seed"]))
            if every[-1].interrupted:
                break
    except KeyboardInterrupt:  # while a peer was built
        pass
    about["partial"] = len(every) < len(names) or every[-1].interrupted
    try:
        _write(every, about, chosen)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return _INTERRUPTED if about["partial"] else 0


def _measure_one(
    name: str, chosen: argparse.Namespace, placement: Placement, seed: int
) -> Measured:
    measured = measure(
        SCENARIOS[name],
        placement,
        rounds=chosen.rounds,
        more_rounds=_more_rounds(chosen),
        seconds=chosen.seconds,
        seed=seed,
        peers=chosen.peers,
        say=_say,
    )
    for absent, why in measured.absent.items():
        print(f"{name}: without {absent}: {why}", file=sys.stderr)
    for one in goals(measured):
        print(f"{name}: {_goal_line(one)}", file=sys.stderr)
    return measured


def _more_rounds(chosen: argparse.Namespace) -> int:
    """With fewer than are enough for an interval, it is only to be looked at."""
    if chosen.more_rounds is None:
        return int(chosen.rounds) if chosen.rounds >= REPEATS_LEAST else 0
    return int(chosen.more_rounds)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _goal_line(one: Any) -> str:
    goal = one.goal
    return (
        f"{goal.metric} of {goal.subject} / {goal.reference}: {table.ratio_text(one.ratio)}, "
        f"goal {goal.limit:.2f}: {one.text}"
    )


def _about(chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": environment.describe(),
        "rounds": chosen.rounds,
        "seconds": chosen.seconds,
        "seed": random.SystemRandom().getrandbits(32) if chosen.seed is None else chosen.seed,
    }


def _write(every: Sequence[Measured], about: dict[str, Any], chosen: argparse.Namespace) -> None:
    if not any(measured.runs for measured in every):
        raise ValueError("nothing was measured")
    directory: Path = chosen.results
    text = table.markdown(every, about)
    (directory / "compare.json").write_text(json.dumps(table.to_dict(every, about)))
    (directory / "compare.md").write_text(text)
    print(text, end="")
    where = about["environment"]
    footer = f"{about['date']}, Linux {where['kernel']}, {where['cpu']}, kecho {where['kecho']}"
    for measured in every:
        if not any(run.result for run in measured.runs):
            continue
        try:
            pictures.draw(measured, directory / f"{measured.scenario.name}.png", footer)
        except ImportError:
            print("compare: no pictures without matplotlib: make .venv/.plot", file=sys.stderr)
            break
    print(f"compare: written to {directory}", file=sys.stderr)
    if chosen.write_readme and about["partial"]:
        print("compare: not finished, benchmarks/README.md is left as it was", file=sys.stderr)
    elif chosen.write_readme:
        table.write_readme(ROOT / "benchmarks" / "README.md", every, about)


if __name__ == "__main__":
    sys.exit(main())
