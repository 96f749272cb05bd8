"""Names of processes, which ss and netstat write as they are: none is a pair."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kecho.drop import Pair, PairError, parse_pairs

pytestmark = pytest.mark.python_only

# What lines and pairs are made of, so that the ends of a name that passes are found.
PARTS = [
    *("\n", " ", "\t", "\r", "x", "#", "# ", " #", '"', "(", ")", "))", "->", "users:((", "tcp "),
    *("*:1", "*:1 *:*", "*:22 *:*", "*:1->*:*", "(LISTEN)", "0 0 ", "0: ", "A ", "a ", "close "),
    *(",pid=1,fd=1", ",pid=1,fd=1))\n", '",pid=1,fd=1)', '",pid=1,fd=1))', "::1:1", "1/", "- "),
]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.characters()), max_size=8).map("".join)


def names(most_bytes: int) -> st.SearchStrategy[str]:
    return texts.filter(lambda text: "\0" not in text).map(
        lambda text: text.encode("utf-8", "ignore")[:most_bytes].decode("utf-8", "surrogateescape")
    )


holders = st.lists(
    st.tuples(names(15), st.sampled_from([1, 12345]), st.sampled_from([3, 44])),
    min_size=1,
    max_size=4,
)
ENDS = "127.0.0.1:36986         127.0.0.1:12345"
LISTENER = "127.0.0.1:24001         0.0.0.0:*"


def pairs_or_none(text: str) -> set[Pair]:
    with contextlib.suppress(PairError):
        return set(parse_pairs(text))
    return set()


def of_ss(begin: str, held: list[tuple[str, int, int]], end: str) -> str:
    users = ",".join(f'("{name}",pid={pid},fd={fd})' for name, pid, fd in held)
    return f"{begin} users:({users}){end}\n"


@given(
    st.lists(holders, min_size=1, max_size=3),
    st.sampled_from([f"ESTAB 0 0 {ENDS}", f"0 0 {ENDS}", f"tcp LISTEN 0 128 {LISTENER}"]),
    st.sampled_from(["", " uid:1000 ino:5 sk:1 cgroup:/a <->", " timer:(on,1sec,0)"]),
)
@settings(max_examples=300)
@example([[("\n*:8022 *:* #", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example([[("\n*:80->*:* (", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example([[("\n*:22 *:* # ", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example([[("\n0 0 *:22 *:* ", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example([[("\na *:1 *:* 0 0 ", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example([[("\n*:22 *:*\n#", 12345, 3)]], f"ESTAB 0 0 {ENDS}", "")
@example(
    [[("", 1, 3), (",pid=1,fd=1))\n#", 1, 3), ("\n*:22 *:*\n#", 1, 3)]], f"ESTAB 0 0 {ENDS}", ""
)
def test_no_name_in_lines_of_ss_is_a_pair(
    lines: list[list[tuple[str, int, int]]], begin: str, end: str
) -> None:
    text = "".join(of_ss(begin, held, end) for held in lines)
    assert pairs_or_none(text) <= set(parse_pairs(begin))
    # What grep leaves of it that looks for the number of the process.
    rest = text.removesuffix("\n").rpartition("\n")[2]
    if not rest.startswith(begin):
        assert pairs_or_none(rest) == set()


@given(
    st.lists(st.tuples(names(64), st.sampled_from([1, 99, 12345])), min_size=1, max_size=3),
    st.sampled_from([f"{ENDS}         ESTABLISHED", f"{LISTENER}               LISTEN     "]),
    st.sampled_from(["", " off (0.00/0/0)"]),
)
@settings(max_examples=300)
@example([("x\n*:8022 *:*", 12345)], f"{ENDS}         ESTABLISHED", "")
@example([("\n*:8022 *:* # x", 1)], f"{ENDS}         ESTABLISHED", "")
@example([("\n\n0 0 *:8022 *:*", 1)], f"{ENDS}         ESTABLISHED", "")
@example([("\ntcp 0 0 *:1 *:*", 1)], f"{ENDS}         ESTABLISHED", "")
def test_no_name_in_lines_of_netstat_is_a_pair(
    programs: list[tuple[str, int]], begin: str, end: str
) -> None:
    begin = f"tcp        0      0 {begin}"
    # As net-tools 2.10 does: PROGNAME_WIDTH.
    cut = [f"{pid}/{name.rpartition('/')[2]}"[:20] for name, pid in programs]
    text = "".join(f"{begin} {program:<20}{end}\n" for program in cut)
    assert pairs_or_none(text) <= set(parse_pairs(begin))


@pytest.mark.parametrize(
    "line",
    [
        f'ESTAB 0 0 {ENDS} users:(("a # b",pid=1,fd=5))',
        f'ESTAB 0 0 {ENDS} users:(("a"b",pid=1,fd=5),("",pid=2,fd=3)) uid:1 ino:5 cgroup:/a b <->',
        f'ESTAB 0 0 {ENDS} users:(("a",pid=1,tid=2,fd=5))',
        f'ESTAB 0 0 {ENDS} users:(("a",pid=1,proc_ctx=u:r:t:s0,fd=5,sock_ctx=u:r:t:s0))',
        f'tcp        0      0 {ENDS} ESTABLISHED 1000       4711       12/a "b" # c',
        f"tcp        0      0 {ENDS} TIME_WAIT   -                    timewait (1.2/0/0)",
    ],
)
def test_name_that_breaks_no_line_is_passed_over(line: str) -> None:
    assert parse_pairs(f"{line}\n{line}") == parse_pairs("127.0.0.1:36986 127.0.0.1:12345")


def test_rest_of_a_name_is_said_with_what_to_do() -> None:
    with pytest.raises(PairError, match=r"line 1: a quotation mark .* ss -tn prints no names"):
        parse_pairs(f'ESTAB 0 0 {ENDS} users:(("a\n*:22 *:*\n#",pid=1,fd=1))')
    with pytest.raises(PairError, match=r"line 2: .* netstat -tn prints no names"):
        parse_pairs(f"tcp 0 0 {ENDS} ESTABLISHED 1/a\n*:22 *:*")
    with pytest.raises(PairError, match=r"line 1: .* ss -tn prints no names"):
        parse_pairs('*:22 *:* # ",pid=12345,fd=3))')


def of_lsof(command: str) -> str:
    return f"{command} 9 root 4u IPv4 49 0t0 TCP 127.0.0.1:36986->127.0.0.1:12345 (ESTABLISHED)"


def test_line_of_a_command_that_looks_like_a_comment_is_not_passed_over() -> None:
    with pytest.raises(PairError, match=r'line 2: .* begins with "#"; a comment needs "# "'):
        parse_pairs(f"{of_lsof('py')}\n{of_lsof('#evil')}")
    assert parse_pairs(f"# {of_lsof('py')}\n#127.0.0.1:1->127.0.0.1:2 (CLOSED)\n") == []
    assert len(parse_pairs(f"{of_lsof('a#')} # why")) == 1


@pytest.mark.parametrize("state", ["(", '(",pid=1,fd=3))', "(LISTEN)x", "(established)"])
def test_state_of_lsof_is_a_word_in_parentheses(state: str) -> None:
    with pytest.raises(PairError):
        parse_pairs(f"127.0.0.1:36986->127.0.0.1:12345 {state}")


@pytest.mark.parametrize(
    "unit",
    ['("a",pid=1,fd=1),', '("",pid=1,fd=3),', '("a",pid=1,', '("a",pid=1,proc_ctx=', '"', " #"],
)
def test_names_are_read_in_time_that_grows_with_their_length(unit: str) -> None:
    for begin in (f"ESTAB 0 0 {ENDS} users:(", "127.0.0.1:36986 127.0.0.1:12345 "):
        line = f"{begin}{unit * 65536}"[:65535] + "\n"
        assert all(pairs_or_none(line) <= pairs_or_none(ENDS) for _ in range(10))
