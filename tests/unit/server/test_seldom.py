"""kecho.server.seldom: a remote client does not decide how much is logged."""

from __future__ import annotations

from itertools import pairwise

from kecho.server.seldom import LONGEST_S, Seldom


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(clock: Clock, seldom: Seldom, seconds: int, *, every: int = 1) -> list[int]:
    """When a line was due, in seconds from now, of what occurs so often; looked at each second."""
    begun_s = clock.now_s
    due = []
    for second in range(seconds):
        clock.now_s = begun_s + second
        if seldom.tell("it", 3 if second % every == 0 else 0) is not None:
            due.append(second)
    return due


def test_what_lasts_is_told_less_and_less_often_and_then_once_an_hour() -> None:
    clock = Clock()
    due = lines_of(clock, Seldom(clock), 24 * 3600)
    assert due[:12] == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047]
    assert all(later - earlier == LONGEST_S for earlier, later in pairwise(due[13:]))
    assert len(due) < 36


def test_no_pace_of_a_client_makes_it_more_often() -> None:
    for every in (1, 2, 59, 61, 600, 1799, 3599):
        clock = Clock()
        assert len(lines_of(clock, Seldom(clock), 24 * 3600, every=every)) < 40, every


def test_nothing_is_left_out_of_what_is_told() -> None:
    clock = Clock()
    seldom = Seldom(clock)
    told = []
    for second in range(1000):
        clock.now_s = 1000.0 + second
        told.append(seldom.tell("it", 7 if second < 100 else 0))
    counts = [one for one in told if one is not None]
    assert sum(count for count, _ in counts) == 700
    assert [passed_s for _, passed_s in counts] == [1, 1, 2, 4, 8, 16, 32, 64]


def test_no_bursts_and_pauses_make_it_more_often() -> None:
    days = 3
    for pause_h in (1, 2, 6, 13):
        for exponent in range(2, 13):
            clock = Clock()
            seldom = Seldom(clock)
            lines = 0
            while clock.now_s < 1000 + days * 24 * 3600:
                lines += len(lines_of(clock, seldom, 2**exponent))
                clock.now_s += pause_h * LONGEST_S
            assert lines <= 36 * days, (pause_h, exponent)


def test_what_comes_back_is_told_at_once_and_after_half_a_day_as_if_new() -> None:
    clock = Clock()
    seldom = Seldom(clock)
    lines_of(clock, seldom, 10_000)
    clock.now_s += LONGEST_S - 1
    first = lines_of(clock, seldom, 4)
    assert len(first) <= 1
    clock.now_s += LONGEST_S
    assert lines_of(clock, seldom, 4) == [0]
    clock.now_s += 13 * LONGEST_S
    assert lines_of(clock, seldom, 4) == [0, 1, 3]


def test_kinds_do_not_delay_each_other_and_are_so_many_at_most() -> None:
    clock = Clock()
    seldom = Seldom(clock)
    assert sum(seldom.tell(kind, 1) is not None for kind in range(1000)) == 256
    assert seldom.tell(255, 1) is None
    clock.now_s += LONGEST_S
    assert sum(seldom.tell(kind, 1) is not None for kind in range(1000, 2000)) == 256


def test_what_does_not_occur_is_not_told() -> None:
    clock = Clock()
    seldom = Seldom(clock)
    assert seldom.tell("it", 0) is None
    assert seldom.tell("it", 1, 60.0) == (1, 60.0)
    assert seldom.tell("it", 0) is None
