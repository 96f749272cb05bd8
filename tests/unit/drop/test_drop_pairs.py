"""Text to pairs: what netstat and ss print, what nobody should, and everything in between."""

from __future__ import annotations

import contextlib
import ipaddress
import pickle
import sys
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kecho.drop import Endpoint, Pair, PairError, parse_pairs
from kecho.drop.pairs import as_pair, canonical, parse_pair
from kecho.drop.table import PairTable

pytestmark = pytest.mark.python_only

V4 = Pair(Endpoint("127.0.0.1", 36986), Endpoint("127.0.0.1", 12345))
V6 = Pair(Endpoint("::1", 80), Endpoint("::1", 9))
V4_LISTENER = Pair(Endpoint("0.0.0.0", 80), Endpoint("0.0.0.0", 0))
V6_LISTENER = Pair(Endpoint("::", 80), Endpoint("::", 0))

addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
scopes = st.one_of(
    st.just(""),
    st.from_regex(r"[a-z][a-z0-9.@-]{0,14}", fullmatch=True),
    st.binary(min_size=1, max_size=15)
    .filter(lambda name: not set(name) & set(b"/:\0\t\n\v\f\r \xa0"))
    .map(lambda name: name.decode("utf-8", "surrogateescape")),
)
ports = st.integers(1, 65535)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("127.0.0.1:36986 127.0.0.1:12345", V4),
        ("\t127.0.0.1:36986\t 127.0.0.1:12345 \r", V4),
        ("127.0.0.1:36986 127.0.0.1:12345 # why", V4),
        ("[::ffff:127.0.0.1]:36986 127.0.0.1:12345", V4),
        ("::ffff:127.0.0.1:36986 ::ffff:7f00:1:12345", V4),
        ("[::1]:80 [::1]:9", V6),
        ("::1:80 0:0:0:0:0:0:0:1:9", V6),
    ],
)
def test_what_netstat_and_ss_print_is_read(text: str, pair: Pair) -> None:
    assert parse_pairs(text) == [pair]
    assert parse_pairs(text.encode()) == [pair]


@pytest.mark.parametrize("name", ["a#b", "#", "]", "[a]", "%", "\udcff", "5"])
@pytest.mark.parametrize("form", ["[fe80::1%{}]:80", "[fe80::1]%{}:80", "fe80::1%{}:80"])
def test_scope_may_hold_what_a_device_may_be_called(form: str, name: str) -> None:
    line = f"{form.format(name)} [fe80::2]:9  # why"
    assert parse_pairs(line)[0].local == Endpoint("fe80::1", 80, name)
    assert parse_pairs(line.encode("utf-8", "surrogateescape")) == parse_pairs(line)


@pytest.mark.parametrize("form", ["[fe80::1%eth0]:80", "[fe80::1]%eth0:80", "fe80::1%eth0:80"])
def test_scope_is_kept(form: str) -> None:
    assert parse_pairs(f"{form} [fe80::2]:9")[0].local == Endpoint("fe80::1", 80, "eth0")


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("ESTAB 0      0      127.0.0.1:36986          127.0.0.1:12345 ", V4),
        ('ESTAB 0 0 127.0.0.1:36986 127.0.0.1:12345 users:(("a b",pid=1,fd=5))', V4),
        ("tcp   TIME-WAIT 0 0  [::ffff:127.0.0.1]:36986 127.0.0.1:12345", V4),
        ("0      0               127.0.0.1:36986          127.0.0.1:12345       ", V4),
        ("FIN-WAIT-1 0 1 [::1]:80 [::1]:9 ino:0 sk:45da24 cgroup:/ <->", V6),
        ("SYN-SENT 0 1 [fe80::1]%eth0:80 [fe80::2]:9",
         Pair(Endpoint("fe80::1", 80, "eth0"), Endpoint("fe80::2", 9))),
        ("LISTEN 0 128 *:80 *:*", V6_LISTENER),
        ("tcp        0      0 127.0.0.1:36986      127.0.0.1:12345         ESTABLISHED 1/a b", V4),
        ("tcp6       0      0 ::1:80                  ::1:9                   TIME_WAIT   -", V6),
        ("tcp6 0 0 :::80 :::* LISTEN 1/x off (0.00/0/0)", V6_LISTENER),
        ("py 1 root 4u IPv4 49 0t0 TCP 127.0.0.1:36986->127.0.0.1:12345 (ESTABLISHED)", V4),
        ("py 1 root 4u IPv6 49 0t0  TCP [::1]:80->[::1]:9 (FIN_WAIT1)", V6),
        ("127.0.0.1:36986->127.0.0.1:12345", V4),
        ("127.0.0.1:36986->127.0.0.1:12345 (ESTABLISHED)", V4),
        ("py 1 root 3u IPv4 49 0t0 TCP *:80 (LISTEN)",
         V4_LISTENER),
        ("py 1 root 3u IPv6 49 0t0 TCP [::1]:80 (LISTEN)",
         Pair(Endpoint("::1", 80), Endpoint("::", 0))),
        ("established  127.0.0.1:36986  127.0.0.1:12345  0  0  on 0.2s (1)  1/py", V4),
        ("10.0.0.1%a->b:40001->10.0.0.2:9",
         Pair(Endpoint("10.0.0.1", 40001, "a->b"), Endpoint("10.0.0.2", 9))),
        ("10.0.0.1%a->b:40001 10.0.0.2:9",
         Pair(Endpoint("10.0.0.1", 40001, "a->b"), Endpoint("10.0.0.2", 9))),
    ],
)  # fmt: skip
def test_whole_line_of_another_tool_is_read(line: str, pair: Pair) -> None:
    assert parse_pairs(f"  {line}\n") == parse_pairs(line.encode()) == [pair]
    assert as_pair(line) == pair


@pytest.mark.parametrize(
    "line",
    [
        "sh 1 root 5w REG 254,0 0 281 /x IPv4 1 0t0 TCP 127.0.0.1:22->127.0.0.1:9 (ESTABLISHED)",
        "sh 1 root 5w REG 254,0 0 281 TCP 127.0.0.1:2222->127.0.0.1:9 (ESTABLISHED)",
        "sh 1 root 5w REG 254,0 0 281 x TCP 127.0.0.1:2222->127.0.0.1:9 (ESTABLISHED)",
        "sh 1 2 root 5w IPv4 254,0 0 TCP TCP 127.0.0.1:2222->127.0.0.1:9 (ESTABLISHED)",
        "sh 1 root cwd unknown x IPv4 1 0t0 TCP 127.0.0.1:2222->127.0.0.1:9 (ESTABLISHED)",
        "x IPv4 1 0t0 TCP *:80 (LISTEN)",
    ],
)
def test_name_of_a_file_is_no_line_of_lsof(line: str) -> None:
    with pytest.raises(PairError):
        parse_pairs(line)


@pytest.mark.parametrize(
    "unit",
    ["a", "1 ", ":", ":1", "->", ":1->", " TCP ", " IPv4 TCP", "tcp 0 0 ", "x:1 x:1 ", "0: "],
)
def test_line_of_any_kind_is_read_in_time_that_grows_with_its_length(unit: str) -> None:
    line = (unit * 65536)[:65535] + "\n"
    with contextlib.suppress(PairError):
        parse_pairs(line * 20)


@pytest.mark.skipif(sys.byteorder != "little", reason="/proc/net/tcp is as the machine stores it")
@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("  2: 0100007F:907A 0100007F:3039 01 00000000:00000000 00:00000000 00000000 0 0 4 1", V4),
        (
            "10: 00000000000000000000000001000000:0050 00000000000000000000000001000000:0009 06 0",
            V6,
        ),
        ("3: 0000000000000000FFFF00000100007F:907A 0000000000000000FFFF00000100007F:3039 01 0", V4),
        (
            "0: 00000000:0050 00000000:0000 0A 0",
            Pair(Endpoint("0.0.0.0", 80), Endpoint("0.0.0.0", 0)),
        ),
    ],
)
def test_line_of_proc_is_read(line: str, pair: Pair) -> None:
    assert parse_pairs(line) == [pair]


@pytest.mark.parametrize(
    "header",
    [
        "State Recv-Q Send-Q      Local Address:Port        Peer Address:Port Process",
        "Netid State  Recv-Q Send-Q      Local Address:Port        Peer Address:Port Process",
        "Recv-Q Send-Q      Local Address:Port        Peer Address:Port Process",
        "Active Internet connections (w/o servers)",
        "Proto Recv-Q Send-Q Local Address           Foreign Address         State",
        "COMMAND   PID USER   FD   TYPE   DEVICE SIZE/OFF NODE NAME",
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when",
        "STATE        LOCAL            PEER             RECV-Q  SEND-Q  TIMER  PROCESS",
    ],
)
def test_header_of_another_tool_is_passed_over(header: str) -> None:
    assert parse_pairs(f"{header}\n{V4}\n") == [V4]


@pytest.mark.parametrize("protocol", ["udp", "udp6", "mptcp", "u_str", "raw"])
def test_line_of_what_is_no_tcp_socket_is_refused(protocol: str) -> None:
    with pytest.raises(PairError, match=f"line 1: {protocol}: only TCP"):
        parse_pairs(f"{protocol}   UNCONN 0 0 127.0.0.1:36986 127.0.0.1:12345\n{V4}")


def test_peer_of_a_listener_is_port_0() -> None:
    assert parse_pairs("0.0.0.0:80 0.0.0.0:*")[0].peer == Endpoint("0.0.0.0", 0)
    assert parse_pairs("*:80 *:*")[0].peer == Endpoint("::", 0)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("127.0.0.1:0 127.0.0.1:1", "'0'"),
        ("127.0.0.1:70000 127.0.0.1:1", "70000"),
        ("127.0.0.1:+1 127.0.0.1:1", "port"),
        ("127.0.0.1:٣ 127.0.0.1:1", "port"),
        ("127.0.0.1:http 127.0.0.1:1", "netstat -n"),
        ("127.0.0.1:* 127.0.0.1:1", "port"),
        ("127.0.0.1:1 127.0.0.1:*", "port"),
        ("127.0.0.1:1 [::1]:1", "families"),
        ("127.0.0.1:1", "two"),
        ("127.0.0.1:1 127.0.0.1:2 127.0.0.1:3", "not 3"),
        ("rubbish rubbish", "no port"),
        ("localhost:1 localhost:2", "not an address"),
        ("127.1:1 127.1:2", "not an address"),
        ("[127.0.0.1]:1 127.0.0.1:2", "IPv6"),
        ("[::1:80 [::1]:9", "ADDRESS"),
        ("[::1%]:80 [::1]:9", "interface"),
        ("127.0.0.1:1\0 127.0.0.1:2", "NUL"),
        ("é:1 é:2", "not an address"),
        ("1" * (10 << 20), "characters"),
        ("# a comment\0", "NUL"),
        ("2001:db8:aaaa:bbbb:ccc::80 ::1:2", "netstat -W"),
        ("2001:db8:aaaa:bbbb:c:80 2001:db8:aaaa:bbbb:c:1", "netstat -W"),
    ],
)
def test_wrong_line_is_named_and_nothing_is_given(line: str, word: str) -> None:
    with pytest.raises(PairError, match=r"^line 3: ") as caught:
        parse_pairs(f"{V4}\n\n{line}\n{V4}\n")
    assert word in str(caught.value)
    assert len(str(caught.value)) < 300
    assert pickle.loads(pickle.dumps(caught.value)).line == 3


def test_blank_lines_comments_and_repeats_are_passed_over() -> None:
    assert parse_pairs(f"\n  \n# {V6}\n{V4}\r\n{V4}\n{V6}") == [V4, V6]
    assert parse_pairs("") == []


def test_comment_and_blank_line_may_be_of_any_length() -> None:
    long = 10_000
    text = f"{'#' * long}\n{' ' * long}\n{V4}{' ' * long}# {'x' * long}\n"
    assert parse_pairs(text) == [V4]
    assert parse_pairs(text.encode()) == [V4]


def test_memory_does_not_grow_with_lines_that_are_passed_over() -> None:
    text = b"##\n" * 100_000
    tracemalloc.start()
    try:
        assert parse_pairs(text) == []
        assert tracemalloc.get_traced_memory()[1] < len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("end", "most_bytes"), [("10.0.{}.{}:80", 36), ("[fe80::{}:{}]:80", 60)])
def test_table_of_pairs_takes_a_few_bytes_for_each(end: str, most_bytes: int) -> None:
    count = 5000
    some = [parse_pair(f"{end.format(i >> 8, i & 255)} {end.format(1, 2)}") for i in range(count)]
    tracemalloc.start()
    try:
        table = PairTable(some)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == count
    assert taken <= most_bytes * count + 10_000


def is_v4(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.version == 4 or address.ipv4_mapped is not None


@given(addresses, addresses, scopes, ports, ports)
@example("::", "::ffff:1.2.3.4", "", 1, 65535)
def test_every_printed_pair_is_read_back(
    local: str, peer: str, scope: str, local_port: int, peer_port: int
) -> None:
    ends = (f"{local}%{scope}" if scope else local, local_port, peer, peer_port)
    if is_v4(local) != is_v4(peer):
        with pytest.raises(PairError, match="families"):
            as_pair(ends)
        return
    pair = as_pair(ends)
    assert parse_pairs(str(pair)) == [pair]
    mapped = getattr(ipaddress.ip_address(local), "ipv4_mapped", None)
    canonical = ipaddress.ip_address(pair.local.address)
    assert canonical == (mapped or ipaddress.ip_address(local))


@given(st.one_of(st.text(), st.binary(), st.text("0123456789abcdef:.[]%*# \t\r\n\0")))
@example("[::1]%eth0:1 [::1]:2")
@example(b"\xff\xfe:1 :2")
def test_any_input_is_pairs_or_names_a_line(text: str | bytes) -> None:
    line, pairs = 1, []
    try:
        pairs = parse_pairs(text)
    except PairError as error:
        line = error.line
    lines = text.count("\n") if isinstance(text, str) else text.count(b"\n")
    assert 1 <= line <= lines + 1
    assert parse_pairs("\n".join(map(str, pairs))) == pairs


pairs = st.builds(
    lambda ends, scopes: Pair(Endpoint(ends[0], 7, scopes[0]), Endpoint(ends[1], 9, scopes[1])),
    st.one_of(
        *(st.tuples(*2 * [st.ip_addresses(v=v).map(str).map(canonical)]) for v in (4, 6))
    ).filter(lambda ends: is_v4(ends[0]) == is_v4(ends[1])),
    st.tuples(scopes, scopes),
)


@given(st.lists(pairs, max_size=8), pairs)
@settings(max_examples=40)
def test_table_holds_each_pair_once_in_their_order(some: list[Pair], other: Pair) -> None:
    table = PairTable([*some, *some])
    assert list(table) == list(dict.fromkeys(some))
    assert len(table) == len(set(some))
    assert all(one in table for one in some)
    assert (other in table) == (other in some)


def test_table_that_grows_many_times_loses_none() -> None:
    some = [Pair(Endpoint("10.0.0.1", 1 + i), Endpoint("10.0.0.2", 2)) for i in range(5000)]
    assert list(PairTable(some)) == some


@given(st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=20)), max_size=5))
def test_any_tuple_is_a_pair_or_an_error(values: list[object]) -> None:
    with pytest.raises(PairError):
        as_pair([*values, b""])
    try:
        pair = as_pair(values)
    except PairError:
        return
    assert as_pair(str(pair)) == pair
