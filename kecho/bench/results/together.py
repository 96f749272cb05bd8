"""The rule which results may share a picture, a page, a sum or a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_alike", "machine_differences", "machine_of"]

_OF_A_MACHINE = {
    "cpu": "CPU",
    "kernel": "kernel",
    "cpus": "number of CPUs",
    "usable_cpus": "number of CPUs that may be used",
}


def check_alike(
    modes: Sequence[str], latencies: Sequence[str | None], names: Sequence[str]
) -> None:
    """Raise ValueError unless all have the same mode and the same main latency (None: none).

    Times from when a message was due, from the start of a burst and from sending cannot be mixed,
    and neither can the rates that belong to them.
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
    """Return what distinguishes a machine from another one."""
    return tuple(str(environment.get(key, "unknown")) for key in _OF_A_MACHINE)


def machine_differences(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in what the machines differ, with all values: ``kernel: 6.1, 6.18``."""
    found = []
    for title, each in zip(
        _OF_A_MACHINE.values(), zip(*map(machine_of, environments), strict=True), strict=False
    ):
        values = dict.fromkeys(each)
        if len(values) > 1:
            found.append(f"{title}: {', '.join(values)}")
    return found
