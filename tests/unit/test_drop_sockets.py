"""Filters, outcomes and exit statuses, with a kernel whose answers the test chooses."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import _sockdiag
from kecho.drop import Diag, Result, cli, parse_pairs, work
from kecho.drop.filters import Filter, make_filter, parse_range
from kecho.drop.outcome import exit_status
from kecho.drop.states import NAMES, parse_state

NUMBERS = {name: number for number, name in NAMES.items()}


def identity(family: int, local: str, lport: int, peer: str, pport: int, cookie: int) -> bytes:
    source, target = (socket.inet_pton(family, one).ljust(16, b"\0") for one in (local, peer))
    return struct.pack("!BHH16s16s", family, lport, pport, source, target) + struct.pack(
        "=IQ", 0, cookie
    )


def row(
    state: str, local: str, lport: int, peer: str, pport: int, *, cookie: int = 7, inode: int = 5
) -> _sockdiag.Row:
    family = int(socket.AF_INET6 if ":" in local else socket.AF_INET)
    key = identity(family, local, lport, peer, pport, cookie)
    ends = (local, lport, peer, pport)
    return (family, NUMBERS[state], *ends, 0, cookie, 0, 0, 0, 0, 0, 0, inode, key)


class Kernel:
    """Shows the rows that it was given; the error of a cookie is what destroy answers."""

    def __init__(self, *rows: _sockdiag.Row, errors: dict[int, int] | None = None) -> None:
        self.rows, self.errors = list(rows), errors or {}
        self.asked: list[bytes] = []
        self.survive = False

    def dump(
        self, family: int, states: int, local_port: int = 0, peer_port: int = 0
    ) -> list[_sockdiag.Row]:
        return [
            one
            for one in self.rows
            if one[0] == family
            and states >> one[1] & 1
            and local_port in (0, one[3])
            and peer_port in (0, one[5])
        ]

    def destroy(self, identities: list[bytes]) -> list[int]:
        assert 0 < len(identities) <= _sockdiag.MOST_AT_ONCE
        self.asked += identities
        answers = []
        for one in identities:
            (cookie,) = struct.unpack("=Q", one[-8:])
            answers.append(self.errors.get(cookie, 0))
            if answers[-1] in (0, _sockdiag.UNANSWERED) and not self.survive:
                self.rows = [each for each in self.rows if each[-1] != one]
        return answers

    def states(self, identities: list[bytes]) -> list[int]:
        now = {one[-1]: one[1] for one in self.rows}
        return [now.get(one, -errno.ENOENT) for one in identities]

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


A = ("127.0.0.1", 1000, "127.0.0.1", 80)
PAIR_A = "127.0.0.1:1000 127.0.0.1:80"


def drop_pairs(kernel: Kernel, text: str = PAIR_A, wanted: Filter | None = None) -> list[Result]:
    diag = Diag(handle=kernel)
    batches = diag.drop_pairs(parse_pairs(text), wanted or Filter())
    return [one.result for batch in batches for one in batch]


# ---- what is destroyed --------------------------------------------------------------------------


def test_pair_that_shows_as_v4_mapped_is_the_same_pair() -> None:
    kernel = Kernel(row("established", "::ffff:127.0.0.1", 1000, "::ffff:127.0.0.1", 80))
    assert drop_pairs(kernel) == [Result.DROPPED]
    assert len(kernel.asked) == 1


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
    kernel.states = lambda identities: [answer] * len(identities)  # type: ignore[method-assign]
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


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (":80", ("1.2.3.4", 80), ("1.2.3.4", 81)),
        ("80", ("::1", 80), ("::1", 8)),
        ("80-90", ("::1", 90), ("::1", 91)),
        (":80-90", ("::1", 80), ("::1", 79)),
        ("10.0.0.0/8", ("10.255.0.1", 1), ("11.0.0.1", 1)),
        ("10.0.0.0/8:80", ("10.255.0.1", 80), ("10.255.0.1", 81)),
        ("127.0.0.1", ("127.0.0.1", 9), ("127.0.0.2", 9)),
        ("::ffff:127.0.0.1", ("127.0.0.1", 9), ("::1", 9)),
        ("::1", ("::1", 9), ("127.0.0.1", 9)),
        ("[::1]:80", ("::1", 80), ("::1", 81)),
        ("[fe80::]/10:80-81", ("fe80::5", 81), ("2001::5", 81)),
        ("fe80::/10", ("fe80::5", 81), ("2001::5", 81)),
        ("*:80", ("::1", 80), ("::1", 81)),
    ],
)
def test_range_holds_what_it_says(
    text: str, inside: tuple[str, int], outside: tuple[str, int]
) -> None:
    assert parse_range(text).holds(*inside)
    assert not parse_range(text).holds(*outside)


@pytest.mark.parametrize(
    "text",
    ["", "*", ":", ":0", ":65536", ":9-8", ":1-", "10.0.0.1/8", "10.0.0.0/33", "::ffff:1.2.3.0/24",
     "[::1", "[1.2.3.4]:5", "[::1]5", "x", "1.2.3.4:", "-", "--", "1.2.3.4/", "[::1]/129"],
)  # fmt: skip
def test_wrong_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_range(text)


@given(st.one_of(st.text(), st.text("0123456789abcdef:.[]/*-%\0")))
def test_any_text_is_a_range_or_an_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_range(text).holds("127.0.0.1", 80)


def test_states_go_by_the_names_of_ss_and_netstat() -> None:
    assert parse_state("TIME_WAIT") == parse_state("time-wait") == {"time-wait"}
    assert parse_state("FIN_WAIT1") == parse_state("FIN-WAIT-1") == {"fin-wait-1"}
    assert parse_state("ESTAB") == {"established"}
    assert parse_state("connected") - parse_state("synchronized") == {"syn-sent"}
    assert "listen" not in parse_state("connected")
    with pytest.raises(ValueError, match="time-wait"):
        parse_state("wait")


def test_socket_without_owner_is_not_roots() -> None:
    kernel = Kernel(row("time-wait", *A, inode=0), row("established", *A, cookie=8))
    found = Diag(handle=kernel).find(make_filter(uids=[0]))
    assert [one.state for one in found] == ["established"]


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def run_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(kernel: Kernel, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(work, "Diag", lambda netns: Diag(handle=kernel))
        try:
            status = cli.main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return (status, *capsys.readouterr())

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("errors", "status", "word"),
    [
        ({}, 0, "1 dropped"),
        ({7: errno.ENOENT}, 1, "1 gone"),
        ({7: errno.EINVAL}, 3, "1 refused"),
        ({7: errno.EPERM}, 4, "CAP_NET_ADMIN"),
        ({7: errno.EOPNOTSUPP}, 5, "CONFIG_INET_DIAG_DESTROY"),
        ({7: errno.EOPNOTSUPP}, 5, "Linux 6.0"),
    ],
)
def test_status_says_what_became_of_it(
    run_with: Run, errors: dict[int, int], status: int, word: str
) -> None:
    for arguments in (PAIR_A.split(), ["--peer", ":80"], [PAIR_A]):
        code, _, said = run_with(Kernel(row("established", *A), errors=errors), *arguments)
        assert code == status
        assert word in said


def test_nothing_that_matches_is_status_1(run_with: Run) -> None:
    assert run_with(Kernel(), "--peer", ":80")[0] == 1
    assert run_with(Kernel(), *PAIR_A.split())[0] == 1
    assert run_with(Kernel(), "--list", "--peer", ":80")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["-4"], ["-6", "-q"], ["-4", "-6"], ["-4", "-6", "--list"],
        ["--list"], ["--state", "x"], ["--peer", ":0"], ["--local", "["],
        ["--pid", "x"], ["--uid", "-1"], ["--watch", "0"], ["127.0.0.1:1"], ["--nonsense"],
        ["127.0.0.1:1", "[::1]:2"], ["--netns", "../x", "--peer", ":1"], ["--listeners"], ["-q"],
        ["--peer", "*"], ["--peer", "0.0.0.0/0"], ["--peer", "::/0", "--local", ":1-65535"],
        ["--peer", ":80", "--peer", "0.0.0.0/0"], ["-"],
        ["--list", "--dry-run", "--peer", ":1"], ["--peer"], ["--until-empty"], ["--json"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_one_line_and_asks_for_nothing(
    run_with: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    kernel = Kernel(row("established", *A), row("listen", "0.0.0.0", 80, "0.0.0.0", 0))
    status, out, said = run_with(kernel, *arguments)
    assert (status, out, kernel.asked) == (2, "", [])
    assert said.startswith("kecho.drop: error: ")
    assert said.count("\n") == 1


def test_listener_is_left_by_a_filter_that_matches_it(run_with: Run) -> None:
    kernel = Kernel(row("listen", "0.0.0.0", 80, "0.0.0.0", 0))
    assert run_with(kernel, "--local", ":80")[0] == 1
    assert run_with(kernel, "--state", "listen")[0] == 1
    assert run_with(kernel, "0.0.0.0:80", "0.0.0.0:*")[0] == 3
    assert kernel.asked == []
    assert run_with(kernel, "--state", "listen", "--listeners")[0] == 0
    assert len(kernel.asked) == 1


def test_json_has_each_outcome(run_with: Run) -> None:
    kernel = Kernel(row("established", *A), errors={7: errno.EPERM})
    status, out, _ = run_with(kernel, "--json", "--peer", ":80")
    (outcome,) = json.loads(out)["outcomes"]
    assert status == 4
    assert (outcome["local"], outcome["result"], outcome["errno"]) == (
        "127.0.0.1:1000",
        "refused",
        "EPERM",
    )


def test_until_empty_is_bounded(run_with: Run) -> None:
    kernel = Kernel(row("established", *A))
    kernel.survive = True
    status, _, said = run_with(kernel, "--until-empty", "-q", "--peer", ":80")
    assert status == 3
    assert len(kernel.asked) == 100
    assert "100 passes" in said


def test_until_empty_tells_each_survivor_once(run_with: Run) -> None:
    listener = row("listen", "0.0.0.0", 80, "0.0.0.0", 0)
    kernel = Kernel(row("established", *A), listener)
    pairs = [*PAIR_A.split(), "0.0.0.0:80", "0.0.0.0:*"]
    status, out, said = run_with(kernel, "--until-empty", *pairs)
    assert (status, out.count("\n")) == (3, 2)
    assert "1 dropped, 1 protected\n" in said


def test_watch_tells_each_socket_once_however_it_is_printed(run_with: Run) -> None:
    for form in ([], ["--json"]):
        kernel = Kernel(row("established", *A))
        look, looks = kernel.dump, iter(range(8))

        def dump(*asked: int, look: Any = look, looks: Any = looks) -> list[_sockdiag.Row]:
            if next(looks, None) is None:
                raise KeyboardInterrupt
            return look(*asked)

        kernel.dump = dump  # type: ignore[method-assign,assignment]
        status, out, _ = run_with(kernel, "--watch", "0.001", *form, *PAIR_A.split())
        assert status == 0
        assert out.count("127.0.0.1:1000") == 1


@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.EIO])
def test_error_of_the_kernel_does_not_hide_what_was_dropped(run_with: Run, error: int) -> None:
    count = 3 * _sockdiag.MOST_AT_ONCE
    rows = [row("time-wait", "127.0.0.1", 1 + i, "127.0.0.1", 80, cookie=i) for i in range(count)]
    for form in ([], ["--json"]):
        kernel = Kernel(*rows)
        destroy = kernel.destroy

        def fails(
            identities: list[bytes], kernel: Kernel = kernel, destroy: Any = destroy
        ) -> list[int]:
            if kernel.asked:
                raise OSError(error, "SOCK_DESTROY: no")
            answers: list[int] = destroy(identities)
            return answers

        kernel.destroy = fails  # type: ignore[method-assign]
        status, out, said = run_with(kernel, *form, "--state", "time-wait")
        assert status == 3
        assert "SOCK_DESTROY: no" in said
        if form:
            assert json.loads(out)["counts"] == {"dropped": 128, "not tried": 256}
        else:
            assert "stopped: 128 dropped, 256 not tried" in said
            assert out.count("\n") == 128


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EPROTONOSUPPORT])
def test_kernel_without_sock_diag_is_status_5(run_with: Run, error: int) -> None:
    kernel = Kernel()

    def fails(*_: object) -> list[_sockdiag.Row]:
        raise OSError(error, "SOCK_DIAG_BY_FAMILY: no")

    kernel.dump = fails  # type: ignore[method-assign,assignment]
    status, _, said = run_with(kernel, "--peer", ":80")
    assert status == 5
    assert "tcp_diag" in said


def test_no_outcome_is_status_1() -> None:
    assert exit_status([]) == 1


# ---- the native parsers -------------------------------------------------------------------------


def message(kind: int, sequence: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload


def test_acks_are_told_apart_by_their_number() -> None:
    datagram = b"".join(
        message(2, number, struct.pack("=i", -error) + bytes(16))
        for number, error in ((12, errno.ENOENT), (9, errno.EPERM), (10, 0), (13, errno.EOPNOTSUPP))
    )
    answers = _sockdiag.parse_answers(datagram, 10, 4)
    assert answers == [0, _sockdiag.UNANSWERED, -errno.ENOENT, -errno.EOPNOTSUPP]


@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_datagram_is_read_within_its_bounds(data: bytes, kind: int) -> None:
    assert len(_sockdiag.parse_answers(data, 0, 128)) == 128
    for datagram in (data, message((2, 3, 20, 4)[kind], 1, data)):
        try:
            ended, rows = _sockdiag.parse_dump(datagram, 1)
        except OSError:
            continue
        assert len(rows) <= len(datagram) // 72
        assert isinstance(ended, bool)


def test_socket_of_another_family_is_a_bad_message() -> None:
    for family in (0, 1, 16, 255):
        datagram = message(20, 1, bytes([family]) + bytes(71))
        with pytest.raises(OSError, match="SOCK_DIAG_BY_FAMILY") as caught:
            _sockdiag.parse_dump(datagram, 1)
        assert caught.value.errno == errno.EBADMSG


def test_state_that_is_asked_for_is_told_by_its_number() -> None:
    found = message(20, 7, bytes([2, NUMBERS["time-wait"]]) + bytes(70))
    short, gone = message(20, 8, bytes(12)), message(2, 9, struct.pack("=i", -errno.ENOENT))
    answers = _sockdiag.parse_answers(found + short + gone, 7, 4)
    assert answers == [6, -errno.EBADMSG, -errno.ENOENT, _sockdiag.UNANSWERED]


def test_identity_without_a_cookie_is_never_sent() -> None:
    handle = _sockdiag.Handle()
    key = identity(int(socket.AF_INET), "127.0.0.1", 1, "127.0.0.1", 2, (1 << 64) - 1)
    with pytest.raises(ValueError, match="cookie"):
        handle.destroy([key])
    with pytest.raises(ValueError, match="identity"):
        handle.destroy([key[:-1]])
    with pytest.raises(ValueError, match="128"):
        handle.destroy([key] * 129)
    with pytest.raises(ValueError, match="cookie"):
        handle.states([key])
    handle.close()
    handle.close()
    with pytest.raises(ValueError, match="closed"):
        handle.dump(2, 1)
