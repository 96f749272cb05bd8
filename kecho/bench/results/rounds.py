"""The rounds of a burst: the times of each connection in each of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import reading

__all__ = ["Round"]


@dataclass(frozen=True)
class Round:
    """The times of one burst in ns, in the order of its connections.

    A time is 0 for a step that the connection did not reach. Each field is stored as an array of
    uint64, whatever sequence it is given as.
    """

    connect_ns: Sequence[int]
    first_echo_ns: Sequence[int]
    response_ns: Sequence[int]

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not isinstance(getattr(self, name), array):
                object.__setattr__(self, name, array("Q", getattr(self, name)))

    @classmethod
    def from_samples(cls, samples: bytes) -> Round:
        """Make a round from what _loadgen.Client.samples() returns."""
        numbers = array("Q", samples)
        return cls(numbers[0::3], numbers[1::3], numbers[2::3])

    def to_dict(self) -> dict[str, str]:
        """Return the round for JSON: each field packed."""
        return {name: reading.pack(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, data: Any, budget: reading.Budget) -> Round:
        """Make a round from what to_dict() returned. Raise ValueError if it is malformed."""
        one = cls(*(reading.unpack(data[name], budget) for name in cls.__dataclass_fields__))
        if not len(one.connect_ns) == len(one.first_echo_ns) == len(one.response_ns):
            raise ValueError("a malformed result: a round's times are of different numbers")
        return one
