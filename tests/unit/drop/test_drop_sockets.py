"""Which sockets are destroyed, and filters, with a kernel whose answers the test chooses."""

from __future__ import annotations

import errno
from itertools import chain

import pytest

from kecho.drop import Diag, Result, _sockdiag, parse_pairs
from kecho.drop.filters import Filter, make_filter
from kecho.drop.states import parse_state
from support.chosen_kernel import NUMBERS, PAIR_A, A, Kernel, row


def drop_pairs(kernel: Kernel, text: str = PAIR_A, wanted: Filter | None = None) -> list[Result]:
    diag = Diag(handle=kernel)
    batches = diag.drop_pairs(parse_pairs(text), wanted or Filter())
    return [one.result for batch in batches for one in batch]


# ---- what is destroyed --------------------------------------------------------------------------


def test_pair_that_shows_as_v4_mapped_is_the_same_pair() -> None:
    kernel = Kernel(row("established", "::ffff:127.0.0.1", 1000, "::ffff:127.0.0.1", 80))
    assert drop_pairs(kernel) == [Result.DROPPED]
    assert len(kernel.asked) == 1


def test_address_that_begins_like_a_v4_mapped_one_is_left_as_it_is() -> None:
    ends = ("::ffff:0:102:304", 1000, "::ffff:0:102:305", 80)
    kernel = Kernel(row("established", *ends), row("listen", *ends[:2], "::", 0))
    looked = Diag(handle=kernel).find(make_filter(not_peer=["10.0.0.0/8"]), listeners=True)
    assert [one.local_address for one in looked] == [ends[0]] * 2
    assert not any(one.is_mapped for one in looked)
    assert drop_pairs(kernel, "[::ffff:0:102:304]:1000 [::ffff:0:102:305]:80") == [Result.DROPPED]


@pytest.mark.parametrize(
    "other",
    [
        ("127.0.0.1", 1001, "127.0.0.1", 80),
        ("127.0.0.1", 1000, "127.0.0.1", 81),
        ("127.0.0.2", 1000, "127.0.0.1", 80),
        ("127.0.0.1", 80, "127.0.0.1", 1000),
    ],
)
def test_neighbour_of_a_pair_is_not_asked_for(other: tuple[str, int, str, int]) -> None:
    kernel = Kernel(row("established", *other), row("listen", "127.0.0.1", 1000, "0.0.0.0", 0))
    assert drop_pairs(kernel) == [Result.GONE]
    assert kernel.asked == []


def test_pair_that_does_not_match_the_filter_is_protected() -> None:
    kernel = Kernel(row("established", *A))
    assert drop_pairs(kernel, wanted=make_filter(states=["time-wait"])) == [Result.PROTECTED]
    assert kernel.asked == []


def test_many_are_destroyed_in_batches_and_none_is_lost() -> None:
    count = 3 * _sockdiag.MOST_AT_ONCE + 1
    rows = [
        row("time-wait", "127.0.0.1", 1000 + i, "127.0.0.1", 80, cookie=i) for i in range(count)
    ]
    kernel = Kernel(*rows, errors={5: errno.ENOENT, 300: errno.EPERM})
    diag = Diag(handle=kernel)
    outcomes = list(chain(*diag.drop_sockets(diag.find(Filter()))))
    assert len(outcomes) == count
    assert {one.pair.local.port: one.result for one in outcomes if one.errno} == {
        1005: Result.GONE,
        1300: Result.REFUSED,
    }


@pytest.mark.parametrize(
    ("state", "error", "survives", "result"),
    [
        ("established", 0, False, Result.DROPPED),
        ("established", errno.ENOENT, True, Result.GONE),
        ("established", errno.EPERM, True, Result.REFUSED),
        ("established", errno.EINVAL, True, Result.REFUSED),
        ("time-wait", errno.EOPNOTSUPP, True, Result.UNSUPPORTED),
        ("fin-wait-1", 0, False, Result.DROPPED),
        ("fin-wait-1", 0, True, Result.REFUSED),
        ("established", _sockdiag.UNANSWERED, False, Result.DROPPED),
        ("established", _sockdiag.UNANSWERED, True, Result.REFUSED),
    ],
)
def test_answer_of_the_kernel_decides(
    state: str, error: int, survives: bool, result: Result
) -> None:
    kernel = Kernel(row(state, *A), errors={7: error})
    kernel.survive = survives
    assert drop_pairs(kernel) == [result]


def test_orphan_that_went_on_closing_was_refused() -> None:
    kernel = Kernel(row("fin-wait-1", *A))
    destroy = kernel.destroy

    def moves_on(identities: list[bytes]) -> list[int]:
        answers = destroy(identities)
        kernel.rows.append(row("time-wait", *A, inode=0))
        return answers

    kernel.destroy = moves_on  # type: ignore[method-assign]
    assert drop_pairs(kernel) == [Result.REFUSED]


@pytest.mark.parametrize(
    ("asked", "wanted", "result"),
    [
        (None, Filter(), Result.PROTECTED),  # as find() saw it
        (make_filter(states=["syn-recv"]), None, Result.PROTECTED),
        (make_filter(states=["bucket", "estab"]), None, Result.DROPPED),
        (Filter(), None, Result.DROPPED),
    ],
)
def test_socket_that_went_on_to_another_state_is_what_was_asked_for_or_is_left(
    asked: Filter | None, wanted: Filter | None, result: Result
) -> None:
    kernel = Kernel(row("syn-recv", *A))
    diag = Diag(handle=kernel)
    found = diag.find(asked or wanted or Filter())
    kernel.rows = [row("established", *A)]  # the same cookie
    ((outcome,),) = diag.drop_sockets(found, asked.states if asked else None)
    assert outcome.result is result
    assert outcome.socket is not None
    assert outcome.socket.state == "established"
    assert bool(kernel.asked) == (result is Result.DROPPED)


def test_state_is_asked_for_before_each_batch_not_before_the_first() -> None:
    count = 3 * _sockdiag.MOST_AT_ONCE
    rows = [row("syn-recv", "127.0.0.1", 80, "127.0.0.1", 1000 + i, cookie=i) for i in range(count)]
    kernel = Kernel(*rows)
    diag = Diag(handle=kernel)
    drops = diag.drop_sockets(diag.find(Filter()))
    assert {one.result for one in next(drops)} == {Result.DROPPED}
    kernel.rows = [(*one[:1], NUMBERS["established"], *one[2:]) for one in kernel.rows]
    assert {one.result for batch in drops for one in batch} == {Result.PROTECTED}
    assert len(kernel.asked) == _sockdiag.MOST_AT_ONCE


def test_connection_that_became_a_listener_is_protected() -> None:
    kernel = Kernel(row("established", *A))
    diag = Diag(handle=kernel)
    found = diag.find(Filter())
    kernel.rows = [row("listen", *A)]
    ((outcome,),) = diag.drop_sockets(found, ())
    assert (outcome.result, kernel.asked) == (Result.PROTECTED, [])


@pytest.mark.parametrize("answer", [_sockdiag.UNANSWERED, 0, 99])
def test_socket_whose_state_is_not_told_is_left(answer: int) -> None:
    kernel = Kernel(row("established", *A))
    kernel.states = lambda identities, idle_ms=0: [answer] * len(identities)  # type: ignore[method-assign]
    assert drop_pairs(kernel) == [Result.REFUSED]
    assert kernel.asked == []


def test_one_of_several_listeners_that_was_not_hit_is_refused_not_gone() -> None:
    kernel = Kernel(row("listen", "0.0.0.0", 80, "0.0.0.0", 0), errors={7: errno.ENOENT})
    diag = Diag(handle=kernel)
    found = diag.find(Filter(), listeners=True)
    ((outcome,),) = diag.drop_sockets(found, listeners=True)
    assert outcome.result is Result.REFUSED


def test_nothing_is_dropped_after_stop() -> None:
    count = 2 * _sockdiag.MOST_AT_ONCE
    rows = [row("time-wait", "127.0.0.1", 1 + i, "127.0.0.1", 80, cookie=i) for i in range(count)]
    kernel = Kernel(*rows)
    diag = Diag(handle=kernel)
    drops = diag.drop_sockets(diag.find(Filter()))
    assert len(next(drops)) == _sockdiag.MOST_AT_ONCE
    diag.stop()
    assert list(drops) == list(diag.drop_sockets(diag.find(Filter()))) == []
    assert len(kernel.asked) == _sockdiag.MOST_AT_ONCE


# ---- filters ------------------------------------------------------------------------------------


def test_states_go_by_the_names_of_ss_and_netstat() -> None:
    assert parse_state("TIME_WAIT") == parse_state("time-wait") == {"time-wait"}
    assert parse_state("FIN_WAIT1") == parse_state("FIN-WAIT-1") == {"fin-wait-1"}
    assert parse_state("ESTAB") == {"established"}
    assert parse_state("connected") - parse_state("synchronized") == {"syn-sent"}
    assert "listen" not in parse_state("connected")
    assert parse_state("TIME_WAIT,fin-wait-2") == {"time-wait", "fin-wait-2"}
    for wrong in ("wait", "time-wait,", ",", "time-wait, estab"):
        with pytest.raises(ValueError, match="time-wait"):
            parse_state(wrong)


def test_socket_without_owner_is_not_roots() -> None:
    kernel = Kernel(row("time-wait", *A, inode=0), row("established", *A, cookie=8))
    found = Diag(handle=kernel).find(make_filter(uids=[0]))
    assert [one.state for one in found] == ["established"]
