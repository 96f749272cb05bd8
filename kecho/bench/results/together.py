"""Which results may share a picture, a page, a sum or a comparison. One rule for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_alike", "machine_of", "unlike_machines"]

_OF_A_MACHINE = {
    "cpu": "CPU",
    "kernel": "kernel",
    "cpus": "number of CPUs",
    "usable_cpus": "number of CPUs that may be used",
}


def check_alike(
    modes: Sequence[str], latencies: Sequence[str | None], names: Sequence[str]
) -> None:
    """Raises ValueError unless all are of one mode, and their times of one latency (None: none).

    A time from when a message was due, from a burst's instant and from send are three things, and
    so are the rates that go with them.
    """
    for values, said in ((modes, "is of mode {}"), (latencies, "measured {} times")):
        known = [(value, name) for value, name in zip(values, names, strict=True) if value]
        for value, name in known:
            first, first_name = known[0]
            if value != first:
                raise ValueError(
                    f"{first_name} {said.format(first)}, {name} {said.format(value)}: they "
                    "cannot be combined"
                )


def machine_of(environment: Mapping[str, Any]) -> tuple[str, ...]:
    """What a machine is told from another one by."""
    return tuple(str(environment.get(key, "unknown")) for key in _OF_A_MACHINE)


def unlike_machines(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what the machines differ, with the values there are: ``kernel: 6.1, 6.18``."""
    found = []
    for title, each in zip(
        _OF_A_MACHINE.values(), zip(*map(machine_of, environments), strict=True), strict=False
    ):
        values = dict.fromkeys(each)
        if len(values) > 1:
            found.append(f"{title}: {', '.join(values)}")
    return found
