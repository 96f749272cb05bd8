"""Fuzzing: a target gets one mutated input after the other, within bounds of time and memory.

In a test, by the fixture `fuzz`:

    def read(data: bytes) -> object:  # a function of the module: another process imports it
        return parse(data)

    def test_any_file_is_read_or_refused(fuzz: Fuzz) -> None:
        assert fuzz(read, seeds=[b"1 2"], words=[b"NaN"], refusals=(ValueError,)).accepted

An input fails if the target raises something that is not among `refusals`, takes more than 5 s of
CPU, needs more than 256 MB of data in all (RLIMIT_DATA of the process; Linux 4.7 counts private
mappings), or ends the process. `make check` fuzzes for half a second, `make check-all` for ten
minutes, --fuzz-seconds for as long as it says. --fuzz-seed goes through the same inputs again.
"""

from __future__ import annotations

import base64
import faulthandler
import importlib
import json
import mmap
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import ENOMEM
from pathlib import Path
from typing import Any

import pytest

from kecho.server.confinement.sandbox import IS_SANITIZED

CPU_MOST_S = 50.0 if IS_SANITIZED else 5.0
DATA_MOST_BYTES = 256 << 20  # not under a sanitizer: its shadow memory is data
INPUT_MOST_BYTES = 64 << 10
CORPUS_MOST = 1000
SHORT_S, LONG_S = 5.0 if IS_SANITIZED else 0.5, 600.0
PATIENCE_S = 90  # for a target that waits and takes no CPU

NUMBERS = (
    *(b"0", b"-1", b"1e308", b"5e-324", b"1e-200", b"NaN", b"Infinity", b"-Infinity", b"0x10"),
    *(b"%d" % (1 << bits) for bits in (8, 16, 31, 32, 53, 63, 64, 128)),
    *(b"%d" % ((1 << bits) - 1) for bits in (8, 16, 31, 32, 63, 64)),
    b"9" * 5000,
)
BYTES = (b"\0", b"\n", b"\r\n", b"\x1b[2J", b"\x9b", b"\xff\xfe", b"\xed\xa0\x80", b" ", b"\t")


@dataclass(frozen=True)
class Fuzzed:
    """What came of a run without a failure: how many inputs were taken, and how many refused; the
    CPU time of the slowest."""

    accepted: int
    refused: int
    slowest_s: float


class Fuzz:
    """The fixture: fuzz(target, seeds=...) raises AssertionError with the first input that fails,
    which is kept in `directory`."""

    def __init__(
        self, seconds: float, seed: int, directory: Path, cpu_most_s: float = CPU_MOST_S
    ) -> None:
        self.seconds, self.seed, self.directory = seconds, seed, directory
        self.cpu_most_s = cpu_most_s

    def __call__(
        self,
        target: Callable[[bytes], object],
        *,
        seeds: Sequence[bytes],
        words: Sequence[bytes] = (),
        refusals: tuple[type[BaseException], ...] = (ValueError,),
        most_bytes: int = INPUT_MOST_BYTES,
    ) -> Fuzzed:
        """seeds: inputs that are tried as they are, and mutated; words: what is put into them.

        target: a function of a module, given an input of at most `most_bytes` (a seed may be
        longer). What it returns, if it can be hashed, tells kinds of inputs apart: one of a new
        kind is mutated, too. So is one that is refused in a new place.
        """
        most = max(most_bytes, *map(len, seeds))
        running = self.directory / "fuzzed-input"
        running.write_bytes(bytes(4 + most))
        job = (target.__module__, target.__qualname__, list(seeds), list(words), most)
        bounds = (self.seconds, self.seed, self.cpu_most_s, str(running))
        try:
            finished = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(sys.path)],
                input=pickle.dumps((job, bounds, refusals)),
                capture_output=True,
                timeout=self.seconds + PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            raise self._failed(running, "it waits and does not come back") from None
        said = finished.stderr.decode(errors="backslashreplace")
        if finished.returncode == -signal.SIGPROF:
            raise self._failed(running, f"it takes more than {self.cpu_most_s:g} s\n{said}")
        if finished.returncode != 0:
            raise self._failed(running, f"status {finished.returncode}\n{said[-5000:]}")
        return Fuzzed(**json.loads(finished.stdout.splitlines()[-1]))

    def _failed(self, running: Path, why: str) -> AssertionError:
        raw = running.read_bytes()
        (size,) = struct.unpack_from("=I", raw)
        data = raw[4 : 4 + size]
        kept = self.directory / "failing-input"
        kept.write_bytes(data)
        shown = base64.b85encode(data).decode() if size <= 1000 else f"{data[:300]!r}…"
        return AssertionError(f"--fuzz-seed {self.seed}, {size:,} bytes in {kept}: {why}\n{shown}")


def options(parser: pytest.OptionGroup) -> None:
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        help=f"of each fuzzer: {SHORT_S:g}, with --everything {LONG_S:g}",
    )
    parser.addoption("--fuzz-seed", type=int, help="of all fuzzers: 1, with --everything any")


def seconds_of(config: pytest.Config) -> float:
    """How long each fuzzer runs."""
    asked = config.getoption("--fuzz-seconds")
    return asked if asked is not None else LONG_S if config.getoption("--everything") else SHORT_S


def prepare(items: Sequence[pytest.Item], config: pytest.Config) -> None:
    """Gives tests that fuzz the time that it takes."""
    for item in items:
        if "fuzz" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(seconds_of(config) + 2 * PATIENCE_S))


def make(request: pytest.FixtureRequest, directory: Path) -> Fuzz:
    """What the fixture gives."""
    seed = request.config.getoption("--fuzz-seed")
    if seed is None:
        seed = time.time_ns() & 0xFFFFFFFF if request.config.getoption("--everything") else 1
    return Fuzz(seconds_of(request.config), seed, directory)


# ---- in the process that fuzzes -----------------------------------------------------------------

CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from support import fuzzing
fuzzing.main()
"""


class Mutator:
    """Inputs made of seeds, of words, and of inputs that did something new."""

    def __init__(self, seed: int, corpus: list[bytes], words: Sequence[bytes], most: int) -> None:
        self.random, self.corpus, self.most = random.Random(seed), corpus, most
        self.words = (*words, *NUMBERS, *BYTES)

    def next(self) -> bytes:
        data = bytearray(self.random.choice(self.corpus))
        for _ in range(1 << self.random.randrange(5)):
            self._change(data)
        return bytes(data[: self.most])

    def _change(self, data: bytearray) -> None:
        draw = self.random
        begin = draw.randrange(len(data) + 1)
        end = min(len(data), begin + draw.choice((1, 2, 4, 8, 32, 1024)))
        kind = draw.randrange(9)
        if kind == 0 and data:
            data[begin % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[begin % len(data)] = draw.choice((0, 1, 16, 127, 128, 254, 255))
        elif kind == 2:
            del data[begin:end]
        elif kind == 3:
            data[begin:begin] = draw.choice(self.words)
        elif kind == 4:
            data[begin:end] = draw.choice(self.words)
        elif kind == 5:
            other = draw.choice(self.corpus)
            at = draw.randrange(len(other) + 1)
            data[begin:end] = other[at : at + draw.choice((8, 64, 4096))]
        elif kind == 6 and end > begin:
            times = draw.choice((2, 16, 256, self.most // (end - begin)))
            data[begin:end] = (data[begin:end] * times)[: self.most]
        elif kind == 7:
            number = draw.choice((0, 1, 2, 4, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)))
            data[begin : begin + 4] = struct.pack(draw.choice("<>") + "I", number)
        else:
            data[begin:begin] = draw.randbytes(draw.choice((1, 2, 4, 16)))


def place_of(error: BaseException) -> tuple[object, ...]:
    frames = traceback.extract_tb(error.__traceback__)
    return type(error), *((one.filename, one.lineno) for one in frames[-2:])


def kind_of(result: object) -> object:
    try:
        hash(result)
    except TypeError:
        return type(result)
    return result


def main() -> None:
    """Fuzzes as standard input says; the current input stands in a file, whatever happens."""
    job, bounds, refusals = pickle.load(sys.stdin.buffer)
    (module, name, seeds, words, most), (seconds, seed, cpu_most_s, path) = job, bounds
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    with open(path, "r+b") as file:
        running = mmap.mmap(file.fileno(), 0)
    faulthandler.register(signal.SIGPROF, chain=True)
    if not IS_SANITIZED:
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_MOST_BYTES, DATA_MOST_BYTES))
    corpus = list(seeds)
    mutator = Mutator(seed, corpus, words, most)
    seen: set[object] = set()
    counts = {"accepted": 0, "refused": 0}
    slowest_s = 0.0
    first, until = iter(seeds), time.monotonic() + seconds
    while (data := next(first, None)) is not None or time.monotonic() < until:
        data = mutator.next() if data is None else data
        running[4 : 4 + len(data)] = data
        running[:4] = struct.pack("=I", len(data))
        signal.setitimer(signal.ITIMER_PROF, cpu_most_s)
        begun_s = time.process_time()
        try:
            kind = kind_of(target(data))
            counts["accepted"] += 1
        except refusals as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) == ENOMEM:
                raise
            kind = place_of(error)
            counts["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest_s = max(slowest_s, time.process_time() - begun_s)
        if kind not in seen and len(seen) < CORPUS_MOST:
            seen.add(kind)
            corpus.append(data)
    print(json.dumps({**counts, "slowest_s": slowest_s}))
