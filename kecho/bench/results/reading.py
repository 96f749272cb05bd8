"""Checks of a file of results, which may be damaged or hostile.

Every function raises ValueError, with a reason of one line, for what is not allowed. The limits
below keep the reading of a file, and reporting, comparing or drawing it, within 5 s of CPU and 256
MB of memory; tests/unit/bench/test_results_fuzzed.py checks that.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..workload import Workload

__all__ = [
    *("HISTOGRAM_MOST", "MOST_BYTES", "Budget", "about", "amount", "count", "pack", "parse"),
    *("steps", "text", "unpack", "workload"),
]

MOST_BYTES = 16 << 20  # of a file
HISTOGRAM_MOST = 1 << 19  # characters of an encoded histogram
_MOST_VALUES = 1 << 19  # commas, brackets and braces; a hundred bytes of memory each, at most
_MOST_RESULTS = 10_000  # including repeats
_MOST_SAMPLES = 1 << 22  # of all rounds of a file: 8 bytes of memory each
_MOST_HISTOGRAM_BYTES = 1 << 22  # decompressed; each takes 0.5 µs and 18 bytes of memory
_MOST_STEPS = 1000  # results, not counting repeats
_MOST_TEXT = 4096  # characters, of a reason or an error
_MOST_TEXTS = 1 << 20  # characters of all of them; each takes 60 bytes on a page
_MOST_ABOUT = 64 << 10  # characters of a description, such as that of the environment
_DEEPEST = 32

# Any float other than 0 is between the first two. A measured amount is between the other two, as
# clocks have a resolution of a nanosecond, and shares of CPU are above a millionth.
_LEAST, _MOST = 1e-12, 1e30
_LEAST_AMOUNT, _MOST_AMOUNT = 1e-9, 1e12
_MOST_INTEGER = 1 << 64


@dataclass
class Budget:
    """What a file may still use of the limits."""

    samples: int = _MOST_SAMPLES
    histogram_bytes: int = _MOST_HISTOGRAM_BYTES
    results: int = _MOST_RESULTS
    characters: int = _MOST_TEXTS

    def take_result(self) -> None:
        """Count one result."""
        self.results -= 1
        if self.results < 0:
            raise ValueError(f"more than {_MOST_RESULTS:,} results")

    def take_text(self, value: object, name: str) -> str:
        """Return a reason or an error, and count its characters."""
        checked = text(value, name)
        self.characters -= len(checked)
        if self.characters < 0:
            raise ValueError(f"reasons and errors of more than {_MOST_TEXTS:,} characters")
        return checked

    def take_histogram(self, size: int) -> None:
        """Count one histogram. size: hdr.size_of()."""
        self.histogram_bytes -= size
        if self.histogram_bytes < 0:
            raise ValueError(
                f"histograms of more than {_MOST_HISTOGRAM_BYTES:,} bytes, decompressed"
            )


def parse(data: str | bytes) -> Any:
    """Parse JSON. Every number in it has to be finite and of a plausible size."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    try:
        parsed = json.loads(raw.decode())
        _check_numbers(parsed, 0)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except _Implausible as error:
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.keys)
        raise ValueError(
            f"a malformed result: {name.removeprefix('.')[:100]} is {error.shown}"
        ) from None
    return parsed


class _Implausible(Exception):
    """A number that cannot have been measured, with the keys that lead to it."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.shown = shown
        self.keys: list[object] = []


def _check_numbers(data: Any, depth: int) -> None:
    """Raise _Implausible if a number in the data cannot have been measured."""
    if isinstance(data, float):
        if data != 0 and not _LEAST <= abs(data) <= _MOST:  # or not a number
            raise _Implausible(f"{data!r}, which cannot have been measured")
    elif isinstance(data, int):
        if not -_MOST_INTEGER < data < _MOST_INTEGER:
            raise _Implausible("an integer beyond 64 bits")
    elif isinstance(data, (dict, list)):
        if depth == _DEEPEST:
            raise RecursionError
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            if not isinstance(value, str):
                try:
                    _check_numbers(value, depth + 1)
                except _Implausible as error:
                    error.keys.insert(0, key)
                    raise


def workload(data: Any) -> dict[str, Any]:
    """Return the options of a workload, checked by Workload.

    Options of other versions, which Workload does not have, are dropped.
    """
    known = {one.name for one in fields(Workload)}
    given = {name: value for name, value in data.items() if name in known}
    for name, value in given.items():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, str):
                text(one, name)
    given["source"] = tuple(given["source"])
    given["cpus"] = tuple(given.get("cpus", ()))  # older files do not have it
    checked = Workload(**given).to_dict()
    for name in ("mode", "connections", "threads"):
        if checked[name] != given[name]:
            raise ValueError(f"a malformed result: {name} is {_shown(given[name])}")
    return checked


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"


def text(value: object, name: str, most: int = _MOST_TEXT) -> str:
    """Return a text of at most `most` characters."""
    if not isinstance(value, str):
        raise ValueError(f"a malformed result: {name} is {_shown(value)}, not a text")
    if len(value) > most:
        raise ValueError(f"a malformed result: {name} has more than {most:,} characters")
    return value


def about(value: Any, name: str) -> dict[str, Any]:
    """Return a small object that describes a run to people."""
    if not isinstance(value, dict) or len(repr(value)) > _MOST_ABOUT:
        raise ValueError(
            f"a malformed result: {name} is not an object of at most {_MOST_ABOUT:,} characters"
        )
    return value


def steps(value: object) -> list[Any]:
    """Return the results of a sweep, a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError("a malformed result: 'results' is not a list of results")
    if len(value) > _MOST_STEPS:
        raise ValueError(f"more than {_MOST_STEPS:,} results")
    return value


def count(value: object, name: str) -> int:
    """Return a number of things: an integer, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"a malformed result: {name} is {_shown(value)}, not a count")
    return value


def amount(value: object, name: str) -> float:
    """Return a measured amount: 0, or between a billionth and a million millions."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (value == 0 or _LEAST_AMOUNT <= value < _MOST_AMOUNT):  # type: ignore[operator]
        raise ValueError(f"a malformed result: {name} is {_shown(value)}, not an amount")
    return float(value)  # type: ignore[arg-type]


def pack(numbers: Sequence[int]) -> str:
    """Compress numbers of 64 bits, little-endian, and encode them in base64."""
    data = array("Q", numbers)
    if data.itemsize != 8:
        raise ValueError("unsigned long long is not 8 bytes")
    return base64.b64encode(zlib.compress(_little_endian(data).tobytes())).decode()


def unpack(text: str, budget: Budget) -> array[int]:
    """Return the numbers that pack() compressed."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(text, validate=True), 8 * budget.samples + 1)
    except zlib.error as error:
        raise ValueError(f"samples cannot be decompressed: {error}") from None
    if len(data) > 8 * budget.samples:
        raise ValueError(f"more than {_MOST_SAMPLES:,} samples")
    if not stream.eof or stream.unused_data or len(data) % 8:
        raise ValueError("samples are truncated, or followed by more")
    budget.samples -= len(data) // 8
    return _little_endian(array("Q", data))


def _little_endian(numbers: array[int]) -> array[int]:
    """Convert between the machine's byte order and little-endian."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
