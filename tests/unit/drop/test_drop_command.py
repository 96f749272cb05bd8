"""The dropper's command: outcomes, exit statuses, usage, with a kernel that the test chooses."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from kecho.drop import Diag, _sockdiag, cli, diag, failure
from kecho.drop.outcome import exit_status
from support.chosen_kernel import PAIR_A, A, Kernel, row


@pytest.fixture
def run_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(kernel: Kernel, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(failure, "Diag", lambda netns: Diag(handle=kernel))
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


def test_one_that_was_dropped_does_not_hide_one_that_was_gone(run_with: Run) -> None:
    gone = "127.0.0.1:1001 127.0.0.1:80"
    code, _, said = run_with(Kernel(row("established", *A)), PAIR_A, gone)
    assert code == 1
    assert "1 gone, 1 dropped" in said


def test_nothing_that_matches_is_status_1(run_with: Run) -> None:
    assert run_with(Kernel(), "--peer", ":80")[0] == 1
    assert run_with(Kernel(), *PAIR_A.split())[0] == 1
    assert run_with(Kernel(), "--list", "--peer", ":80")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["-4"], ["-6", "-q"], ["-4", "-6"], ["--not-peer", ":80"],
        ["--not-local", ":1", "--not-peer", ":80", "-4"], ["--state", "x"], ["--state", "estab,"],
        ["--peer", ":0"], ["--local", "["],
        ["--pid", "x"], ["--pid", "0"], ["--uid", "-1"], ["--watch", "0"], ["127.0.0.1:1"],
        ["--nonsense"],
        ["127.0.0.1:1", "[::1]:2"], ["--netns", "pid:x", "--peer", ":1"], ["--listeners"], ["-q"],
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


@pytest.mark.parametrize("more", [[], ["-4"], ["-4", "-6"], ["--json"]], ids=str)
def test_list_alone_lists_all_but_listeners(
    run_with: Run, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    kernel = Kernel(row("established", *A), row("listen", "0.0.0.0", 80, "0.0.0.0", 0))
    with open(os.devnull) as null:
        for given in (null, None):
            monkeypatch.setattr("sys.stdin", given)
            status, out, said = run_with(kernel, "--list", *more)
            assert (status, said) == (0, "")
            assert "established" in out
            assert "listen" not in out


def test_json_of_many_batches_is_one_document(
    run_with: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diag, "TOLD_AT_ONCE", 10)
    there = [row("established", "10.0.0.1", 1 + i, "10.0.0.9", 22, cookie=i) for i in range(300)]
    pairs = [f"10.0.0.1:{1 + i} 10.0.0.9:22" for i in range(325)]
    status, out, said = run_with(Kernel(*there), "--json", *pairs)
    told = json.loads(out)
    assert (status, said) == (1, "")
    assert told["counts"] == {"gone": 25, "dropped": 300}
    assert {one["local"] for one in told["outcomes"]} == {pair.split()[0] for pair in pairs}
    assert len(told["outcomes"]) == 325


def test_what_is_left_out_is_not_dropped(run_with: Run) -> None:
    rows = [row("established", "127.0.0.1", 1 + i, "10.0.0.9", 22, cookie=i) for i in range(3)]
    kernel = Kernel(*rows)
    mine = ("--not-local", ":2", "--not-peer", "10.0.0.8", "--not-peer", "10.0.1.0/24")
    status, out, _ = run_with(kernel, "--state", "established", *mine)
    assert (status, out.count("dropped")) == (0, 2)
    assert [one[3] for one in kernel.rows] == [2]
    pair = "127.0.0.1:2 10.0.0.9:22"
    assert run_with(kernel, "--not-peer", "10.0.0.9", pair)[0] == 3
    assert len(kernel.rows) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["127.0.0.1:1000->127.0.0.1:80"],
        ["127.0.0.1:1000->127.0.0.1:80", "(ESTABLISHED)"],
        ["ESTAB 0 0 127.0.0.1:1000 127.0.0.1:80"],
        ["ESTAB", "0", "0", "127.0.0.1:1000", "127.0.0.1:80"],
        ["tcp", "0", "0", "127.0.0.1:1000", "127.0.0.1:80", "ESTABLISHED", "7/py"],
        ["127.0.0.1:1000->127.0.0.1:80", "127.0.0.1:80->127.0.0.1:1000"],
        ["127.0.0.1:1000->127.0.0.1:80", "127.0.0.1:80", "127.0.0.1:1000"],
        ["127.0.0.1:1000 127.0.0.1:80 127.0.0.1:80 127.0.0.1:1000"],
    ],
    ids=" ".join,
)
def test_line_of_another_tool_may_be_given_as_words(run_with: Run, words: list[str]) -> None:
    kernel = Kernel(row("established", *A))
    _, _, said = run_with(kernel, *words)
    assert "1 dropped" in said
    assert kernel.rows == []


@pytest.mark.parametrize(
    ("peer", "is_hinted"),
    [("[2001:db8::111:2222:3]:80", True), ("[2001:db8::11:2222:3]:80", False),
     ("[2001:db8::1111:2222:3]:80", False)],
)  # fmt: skip
def test_pair_that_is_gone_and_fills_netstats_column_is_told_of_its_wide_option(
    run_with: Run, peer: str, is_hinted: bool
) -> None:
    status, out, _ = run_with(Kernel(), "[::1]:1", peer)
    assert status == 1
    assert ("netstat -W" in out) == is_hinted


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


@pytest.mark.parametrize(
    "error", [MemoryError("no"), ValueError("no"), RuntimeError("no")], ids=repr
)
def test_failure_of_any_class_does_not_hide_what_was_dropped(
    run_with: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    for form in ([], ["--json"]):
        monkeypatch.setattr("sys.stdout", Broken())
        kernel = Kernel(row("established", *A))
        status, _, said = run_with(kernel, *form, "--peer", ":80")
        assert (status, kernel.rows) == (3, [])
        assert form or "kecho.drop: 1 dropped" in said
        assert f"{type(error).__name__}: " in said


def test_those_whose_fate_is_unknown_are_not_told_as_not_tried(run_with: Run) -> None:
    rows = [row("time-wait", "127.0.0.1", 1 + i, "127.0.0.1", 80, cookie=i) for i in range(300)]
    for form in ([], ["--json"]):
        kernel = Kernel(*rows)
        destroy = kernel.destroy

        def fails(
            identities: list[bytes], kernel: Kernel = kernel, destroy: Any = destroy
        ) -> list[int]:
            answers: list[int] = destroy(identities)
            if len(kernel.rows) < 128:
                raise MemoryError
            return answers

        kernel.destroy = fails  # type: ignore[method-assign]
        status, out, said = run_with(kernel, *form, "--state", "time-wait")
        assert status == 3
        if form:
            counts = {"dropped": 128, "of unknown fate": 128, "not tried": 44}
            assert json.loads(out)["counts"] == counts
        else:
            assert "stopped: 128 dropped, 128 of unknown fate, 44 not tried" in said


def test_second_look_that_fails_does_not_hide_what_was_dropped(run_with: Run) -> None:
    one = ("127.0.0.1", 1001, "127.0.0.1", 80)
    kernel = Kernel(row("established", *A), row("fin-wait-1", *one, cookie=8))
    look = kernel.dump

    def fails(*asked: int) -> list[_sockdiag.Row]:
        if kernel.asked:
            raise OSError(errno.ENOBUFS, "SOCK_DIAG_BY_FAMILY: no")
        return look(*asked)

    kernel.dump = fails  # type: ignore[method-assign,assignment]
    status, out, said = run_with(kernel, "--peer", ":80")
    assert (status, said) == (3, "kecho.drop: 1 dropped, 1 refused\n")
    assert "it may still be there (SOCK_DIAG_BY_FAMILY: no)" in out


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
