"""ext/common/siphash.h: the hash of tables whose keys strangers choose."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

EXT = Path(__file__).parents[3] / "ext"
SOURCE = """
#include "common/siphash.h"
uint64_t hash(const struct kecho_hash_key *key, uint64_t first, uint64_t second) {
    return kecho_siphash(key, first, second);
}
int draw(struct kecho_hash_key *key) { return kecho_hash_key_draw(key); }
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("siphash") / "siphash.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-I", EXT, "-o", library, "-x", "c", "-"]
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, input=SOURCE, text=True, env=environment, check=True, timeout=60)
    return ctypes.CDLL(str(library))


@pytest.fixture
def siphash(native: ctypes.CDLL) -> Callable[[bytes, int, int], int]:
    """siphash(key, first, second)."""
    native.hash.restype = ctypes.c_uint64
    native.hash.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]
    return lambda key, first, second: int(native.hash(key, first, second))


def test_it_is_siphash(siphash: Callable[[bytes, int, int], int]) -> None:
    """vectors.h of the authors' implementation: the message 00 01 ... 0f."""
    first, second = 0x0706050403020100, 0x0F0E0D0C0B0A0908
    assert siphash(bytes(range(16)), first, second) == 0x3F2ACC7F57C29BDB


def test_keys_are_drawn_and_differ(native: ctypes.CDLL) -> None:
    keys = [ctypes.create_string_buffer(16) for _ in range(2)]
    assert [native.draw(key) for key in keys] == [0, 0]
    assert len({key.raw for key in keys} | {bytes(16)}) == 3


@pytest.mark.parametrize("stride", [1, 1 << 16, 1 << 32, pow(0x9E3779B97F4A7C15, -1, 1 << 64)])
def test_regular_prefixes_make_no_long_chain(
    siphash: Callable[[bytes, int, int], int], stride: int
) -> None:
    """65,536 in as many places: of random ones, eight or nine share the fullest."""
    key = random.Random(3).randbytes(16)
    places = Counter(
        siphash(key, number * stride % (1 << 64), 0) % 65536 for number in range(65536)
    )
    assert max(places.values()) <= 16
