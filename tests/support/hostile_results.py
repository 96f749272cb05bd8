"""Files of results whose author means harm: seeds for fuzzers, and attacks on time and memory."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from kecho.bench import Histogram, Verdict
from kecho.bench.results.buckets import COUNTS_LENGTH
from kecho.bench.results.rounds import Round
from kecho.bench.results.series import Interval
from support.faultless_run import result

# An apostrophe takes six characters on a page; beside an emoji each takes four bytes of memory.
LONG_TEXT = "'" * 4094 + "\U0001f600"
CONTROLS = "\x1b]0;x\x07\x1b[2J\r\n\x7f\x9b31m\u202e\u2028"


def document() -> dict[str, Any]:
    """A result with everything in it, as JSON has it."""
    made: dict[str, Any] = json.loads(
        result(
            errors={"reset": 2},
            first_error="reset: connection 1",
            partial=True,
            verdict=Verdict(("why",), ("note",)),
            series=(Interval.of(0.0, 1.0, 5, 320, Histogram.of([5, 6])),),
            rounds=(Round((1, 2), (3, 0), (4, 5)),),
            observed={"lost": None},
        ).to_json()
    )
    return made


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def full_histogram() -> str:
    """Of a hundred characters, with a sample in every bucket."""
    return Histogram(dict.fromkeys(range(COUNTS_LENGTH), 1)).encode()


def histogram_of(payload: bytes) -> str:
    """Of these counts, encoded, or of whatever they are."""
    header = struct.pack(">IIiiqqd", 0x1C849313, len(payload), 0, 3, 1, 3_600_000_000_000, 1.0)
    compressed = zlib.compress(header + payload, 9)
    return base64.b64encode(struct.pack(">II", 0x1C849314, len(compressed)) + compressed).decode()


def changed(**changes: Any) -> bytes:
    return json.dumps({**document(), **changes}).encode()


def with_repeats(*changes: dict[str, Any]) -> bytes:
    one = document()
    return json.dumps({**one, "repeats": [{**one, **change} for change in changes]}).encode()


def many(count: int, **changes: Any) -> bytes:
    return json.dumps(
        {**document(), "rounds": [], "repeats": [{**document(), **changes}] * count}
    ).encode()


NAMES = ("connect_ns", "first_echo_ns", "response_ns")


def attacks() -> dict[str, bytes]:
    """Small ones."""
    one = document()
    return {
        "denormal durations": with_repeats(*[{"duration_s": 5e-324}] * 4),
        "tiny durations": with_repeats(*[{"duration_s": 1e-200, "echoes": n} for n in range(4)]),
        "not a number": with_repeats(*[{"duration_s": float("nan")}] * 4),
        "infinity": with_repeats(*[{"duration_s": float("inf")}] * 4),
        "counts beyond all numbers": with_repeats(*[{"echoes": 10**400}] * 4),
        "deep within": json.dumps(one).encode().replace(b'"lost": null', b'"x": ' + b"[" * 9999),
        "many digits": json.dumps(one).encode().replace(b'"lost": null', b'"x": ' + b"9" * 5000),
        "many samples": json.dumps(
            {**one, "rounds": [dict.fromkeys(NAMES, packed(bytes(8 << 20)))] * 3}
        ).encode(),
        "controls": json.dumps(
            {
                **one,
                "errors": {CONTROLS: 1},
                "first_error": CONTROLS,
                "verdict": {"reasons": [CONTROLS], "notes": [CONTROLS]},
                "environment": {CONTROLS: CONTROLS, "kernel": CONTROLS},
                "observed": {"address": CONTROLS},
                "workload": {**one["workload"], "host": CONTROLS},
            }
        ).encode(),
    }


def large_attacks() -> dict[str, Callable[[], bytes]]:
    """Those that take long to be read, or would without bounds; each is made when it is called."""
    one, hdr = document(), full_histogram()
    latencies = {name: {"hdr": hdr} for name in ("response", "service", "connect", "first_echo")}
    few = {"service": {"hdr": Histogram.of([1, 2, 3]).encode()}}
    interval = {"start_s": 0, "duration_s": 1, "echoes": 1, "bytes": 1, "hdr": hdr}
    short = {**interval, "hdr": few["service"]["hdr"]}
    samples = packed(bytes(range(256)) * 43_600)
    steps = [
        {
            **one,
            "latency_ns": few,
            "environment": {"cpu": number},
            "rounds": [],
            "workload": {**one["workload"], "connections": number + 1},
        }
        for number in range(1000)
    ]
    return {
        "as full histograms as may be": lambda: many(30, latency_ns=latencies, series=[]),
        "as full intervals as may be": lambda: changed(series=[interval] * 123),
        "as many repeats as may be": lambda: many(6000, latency_ns=few, series=[]),
        "as many intervals as may be": lambda: many(280, latency_ns=few, series=[short] * 300),
        "as many samples as may be": lambda: changed(rounds=[dict.fromkeys(NAMES, samples)]),
        "as many rounds as may be": lambda: changed(rounds=one["rounds"] * 100_000),
        "as many results as may be": lambda: json.dumps(
            {"schema": one["schema"], "results": steps}
        ).encode(),
        "as many texts as may be": lambda: changed(
            verdict={"reasons": [LONG_TEXT] * 128, "notes": [LONG_TEXT] * 127}
        ),
        "many texts": lambda: changed(verdict={"reasons": [LONG_TEXT] * 4000, "notes": []}),
        "full histograms": lambda: many(150, latency_ns=latencies),
        "full intervals": lambda: changed(series=[interval] * 1500),
        "many repeats": lambda: many(3000, echoes=5),
        "many results": lambda: json.dumps(
            {"schema": one["schema"], "results": [one] * 3000}
        ).encode(),
        "a huge list": lambda: (
            b'{"schema":"kecho.bench/1","results":[' + b"[]," * 2_000_000 + b"0]}"
        ),
        "a huge object": lambda: (
            b'{"schema":"kecho.bench/1","results":{'
            + b",".join(b'"%d":{"a":1}' % number for number in range(500_000))
            + b"}}"
        ),
        "objects up to the bound": lambda: b"[" + b'{"a":1},' * 262_000 + b"0]",
        "deep lists": lambda: b"[" * 500_000,
        "deep objects": lambda: b'{"":' * 500_000,
        "wide text": lambda: json.dumps(
            {**one, "first_error": "\U0001f600" + "x" * (15 << 20)}, ensure_ascii=False
        ).encode(),
        "too large": lambda: b" " * (25 << 20),
    }
