"""What a file of results may hold: checked here, whoever wrote it. ValueErrors of one line."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .workload import Workload

__all__ = ["MOST_SAMPLES", "amount", "count", "pack", "parse", "text", "unpack", "workload"]

MOST_SAMPLES = 1 << 25  # of all rounds of a file: some 16 bytes of memory for each


def parse(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None


def workload(data: Any) -> dict[str, Any]:
    """As Workload checks it; what it has beside that, of another version, is left out."""
    known = {one.name for one in fields(Workload)}
    given = {name: value for name, value in data.items() if name in known}
    given["source"] = tuple(given["source"])
    given["cpus"] = tuple(given.get("cpus", ()))  # of files from before there was such an option
    checked = Workload(**given).to_dict()
    for name in ("mode", "connections", "threads"):
        if checked[name] != given[name]:
            raise ValueError(f"a malformed result: {name} is {_shown(given[name])}")
    return checked


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a malformed result: {_shown(value)} is no text")
    return value


def count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"a malformed result: {_shown(value)} is no count")
    return value


def amount(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise ValueError(f"a malformed result: {_shown(value)} is no amount")
    return float(value)


def pack(numbers: Sequence[int]) -> str:
    data = array("Q", numbers)
    if data.itemsize != 8:
        raise ValueError("unsigned long long is not 8 bytes")
    return base64.b64encode(zlib.compress(_little_endian(data).tobytes())).decode()


def unpack(text: str, room: list[int]) -> tuple[int, ...]:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(text, validate=True), 8 * room[0] + 1)
    except zlib.error as error:
        raise ValueError(f"samples cannot be decompressed: {error}") from None
    if len(data) > 8 * room[0]:
        raise ValueError(f"more than {MOST_SAMPLES} samples")
    if not stream.eof or stream.unused_data or len(data) % 8:
        raise ValueError("samples are truncated, or followed by more")
    room[0] -= len(data) // 8
    return tuple(_little_endian(array("Q", data)))


def _little_endian(numbers: array[int]) -> array[int]:
    """To little-endian, or back; the machine's own order is nearly always that."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
