"""HdrHistogram's compressed V2 encoding of a histogram, in base64.

Source of the format: the reference implementation, https://github.com/HdrHistogram/HdrHistogram
(AbstractHistogram.java). decode() and size_of() raise ValueError, with a reason of one line, for
anything that is not in this encoding, with the range and the digits of our buckets.
"""

from __future__ import annotations

import base64
import struct
import zlib
from array import array
from collections.abc import Iterable

from .buckets import COUNTS_LENGTH, HIGHEST, LOWEST, SIGNIFICANT_DIGITS

__all__ = ["decode", "encode", "size_of"]

# The low byte of the word size, 0x10, marks counts of variable length, which V2 always has.
_COOKIE = 0x1C849303 | 0x10
_COMPRESSED_COOKIE = 0x1C849304 | 0x10
_WORD_SIZE_BITS = 0xF0  # readers of V2 ignore them
_OUTER = struct.Struct(">II")  # cookie, length of what follows
_HEADER = struct.Struct(">IIiiqqd")
_WORD_BYTES = 9  # of a 64-bit count, at most: eight times 7 bits, then 8
_LONGEST_PAYLOAD = _HEADER.size + COUNTS_LENGTH * _WORD_BYTES


def encode(indices: Iterable[int], counts: Iterable[int]) -> str:
    """Encode counts above 0, given with the indices of their buckets in ascending order."""
    encoded = bytearray()
    following = 0  # the index after the last one written
    for index, count in zip(indices, counts, strict=True):
        zeros = index - following
        if zeros:
            # One zero is written as 0, several as their negative number.
            _put(encoded, -zeros if zeros > 1 else 0)
        _put(encoded, count)
        following = index + 1
    header = _HEADER.pack(_COOKIE, len(encoded), 0, SIGNIFICANT_DIGITS, LOWEST, HIGHEST, 1.0)
    compressed = zlib.compress(header + encoded)
    outer = _OUTER.pack(_COMPRESSED_COOKIE, len(compressed))
    return base64.b64encode(outer + compressed).decode("ascii")


def decode(text: str) -> tuple[array[int], list[int]]:
    """Return the indices of the buckets with samples, and their counts."""
    return _counts_of(_payload_of(text))


def size_of(text: str) -> int:
    """Return how many bytes decode() would read: a few for each bucket with samples.

    The time and memory that decode() takes are in proportion to it.
    """
    return len(_payload_of(text))


def _put(target: bytearray, number: int) -> None:
    """Append a number as ZigZag LEB128: nine bytes at most, the ninth without continuation bit."""
    word = number << 1 if number >= 0 else (-number << 1) - 1
    for _ in range(_WORD_BYTES - 1):
        if word < 0x80:
            target.append(word)
            return
        target.append(word & 0x7F | 0x80)
        word >>= 7
    target.append(word)


def _payload_of(text: str) -> bytes:
    """Return the encoded counts of a histogram, after a check of its headers."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"a histogram is not base64: {error}") from None
    payload = _decompress(data)
    if len(payload) < _HEADER.size:
        raise ValueError("a histogram's header is truncated")
    cookie, length, offset, digits, lowest, highest, ratio = _HEADER.unpack_from(payload)
    if cookie & ~_WORD_SIZE_BITS != _COOKIE & ~_WORD_SIZE_BITS:
        raise ValueError(f"a histogram has cookie {cookie:#x}, that of V2 is {_COOKIE:#x}")
    if (lowest, highest, digits) != (LOWEST, HIGHEST, SIGNIFICANT_DIGITS):
        raise ValueError(
            f"a histogram of {lowest} to {highest} with {digits} digits; only those of "
            f"{LOWEST} to {HIGHEST} with {SIGNIFICANT_DIGITS} are supported"
        )
    if offset != 0 or ratio != 1.0:
        raise ValueError("a histogram is shifted or scaled, which is not supported")
    if length != len(payload) - _HEADER.size:
        raise ValueError(
            f"a histogram has {len(payload) - _HEADER.size} bytes of counts, not the {length} "
            "that it says"
        )
    return payload[_HEADER.size :]


def _counts_of(data: bytes) -> tuple[array[int], list[int]]:
    """Return indices and counts from what _put() wrote."""
    indices, counts = array("H"), []
    index = word = shift = 0
    for byte in data:
        if shift == 7 * (_WORD_BYTES - 1):
            word |= byte << shift
        elif byte & 0x80:
            word |= (byte & 0x7F) << shift
            shift += 7
            continue
        else:
            word |= byte << shift
        # ZigZag: an odd word is negative and stands for several zeros, 0 for one zero.
        if word & 1:
            index += (word >> 1) + 1
        else:
            if word and index < COUNTS_LENGTH:
                indices.append(index)
                counts.append(word >> 1)
            index += 1
        if index > COUNTS_LENGTH:
            raise ValueError(f"a histogram has more than {COUNTS_LENGTH} counts")
        word = shift = 0
    if shift:
        raise ValueError("a histogram's last count is truncated")
    return indices, counts


def _decompress(data: bytes) -> bytes:
    """Return the decompressed payload. Decompress no more than a valid histogram can have."""
    if len(data) < _OUTER.size:
        raise ValueError("a histogram's outer header is truncated")
    cookie, length = _OUTER.unpack_from(data)
    if cookie & ~_WORD_SIZE_BITS != _COMPRESSED_COOKIE & ~_WORD_SIZE_BITS:
        raise ValueError(
            f"a histogram has cookie {cookie:#x}, that of compressed V2 is {_COMPRESSED_COOKIE:#x}"
        )
    if length != len(data) - _OUTER.size:
        raise ValueError(
            f"a histogram has {len(data) - _OUTER.size} compressed bytes, not the {length} "
            "that it says"
        )
    stream = zlib.decompressobj()
    try:
        payload = stream.decompress(data[_OUTER.size :], _LONGEST_PAYLOAD + 1)
    except zlib.error as error:
        raise ValueError(f"a histogram cannot be decompressed: {error}") from None
    if len(payload) > _LONGEST_PAYLOAD:
        raise ValueError(f"a histogram is longer than {_LONGEST_PAYLOAD} bytes")
    if not stream.eof:
        raise ValueError("a histogram's compressed data is truncated")
    if stream.unused_data:
        raise ValueError("a histogram's compressed data is followed by more")
    return payload
