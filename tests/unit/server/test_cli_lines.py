"""What the command says: lines of its log, in either format, addresses and counters in words."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kecho
from kecho import NamedCounts, Stats
from kecho.server import announce
from kecho.server.log_format import JsonFormatter, TextFormatter, configure_logging
from support.clients import connect, echo, wait_for

pytestmark = pytest.mark.python_only


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The logger of the command, put back as it was in the end."""
    logger = logging.getLogger("kecho")
    before = (logger.handlers[:], logger.level, logger.propagate, logging.raiseExceptions)
    yield logger
    logger.handlers[:], level, logger.propagate, logging.raiseExceptions = before
    logger.setLevel(level)


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    one = logging.LogRecord("kecho", level, "cli.py", 1, message, (), None)
    one.__dict__.update(extra)
    return one


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.INFO, "kecho: it happened"),
        (logging.WARNING, "kecho: warning: it happened"),
        (logging.ERROR, "kecho: error: it happened"),
        (logging.DEBUG, "kecho: debug: it happened"),
    ],
)
def test_text_lines_name_the_level_unless_it_is_info(level: int, expected: str) -> None:
    assert TextFormatter().format(record("it happened", level, fields={"a": 1})) == expected


def test_text_lines_fill_in_arguments() -> None:
    one = logging.LogRecord("kecho", logging.INFO, "cli.py", 1, "%d of %s", (3, "them"), None)
    assert TextFormatter().format(one) == "kecho: 3 of them"


def test_json_lines_have_time_level_message_and_fields() -> None:
    line = JsonFormatter().format(
        record("it happened", logging.WARNING, created=1234.5678, fields={"event": "x", "n": [1]})
    )
    assert json.loads(line) == {
        "time": 1234.568,
        "level": "warning",
        "message": "it happened",
        "event": "x",
        "n": [1],
    }


@given(st.text(st.characters() | st.sampled_from('\udcff\n\0"\\%')))
def test_json_lines_survive_any_text(text: str) -> None:
    line = JsonFormatter().format(record(text, fields={"addresses": (text, ("::1", 5))}))
    assert "\n" not in line
    line.encode("ascii")
    assert json.loads(line)["message"] == text
    assert json.loads(line)["addresses"] == [text, ["::1", 5]]


def test_server_on_a_path_of_odd_bytes_is_announced(
    log: logging.Logger,
    start_server: Callable[..., kecho.Server],
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
) -> None:
    server = start_server(uds=os.fsencode(tmp_path) + b"/\xff\n")
    for log_format in ("text", "json"):
        configure_logging("info", log_format)
        # As the interpreter opens it.
        handler = log.handlers[0]
        assert isinstance(handler, logging.StreamHandler)
        with open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as stderr:
            handler.setStream(stderr)
            announce.say_where(server)
    text, _, last = capfdbinary.readouterr().err.partition(b'{"time"')
    assert text.startswith(b"kecho: listening on unix /")
    said = json.loads(b'{"time"' + last)
    assert [os.fsencode(path) for path in said["addresses"]] == [os.fsencode(tmp_path) + b"/\xff\n"]
    assert said["event"] == "listening"


def test_log_level_silences_what_is_below(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("warning", "text")
    log.info("not this")
    log.warning("but this")
    assert capsys.readouterr().err == "kecho: warning: but this\n"


def test_logging_set_up_again_does_not_repeat_lines(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", "text")
    configure_logging("info", "text")
    log.info("once")
    assert capsys.readouterr().err == "kecho: once\n"


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        (("127.0.0.1", 1), False),
        (("127.200.0.1", 1), False),
        (("::1", 1, 0, 0), False),
        ("/run/kecho", False),
        (("0.0.0.0", 1), True),
        (("::", 1, 0, 0), True),
        (("198.51.100.1", 1), True),
        (("fe80::1%eth0", 1, 0, 2), True),
    ],
)
def test_address_that_others_can_reach_is_told(address: object, exposed: bool) -> None:
    assert announce._is_exposed(address) is exposed


def test_summary_of_nothing() -> None:
    summary = announce.summary(Stats(seconds=1.25))
    for part in ("1.2 s", "0 connections accepted", "0 active", "0 echoes", "0 bytes in"):
        assert part in summary
    assert summary.endswith("closed none, errors none")


def test_summary_counts_in_words_and_leaves_zeros_out() -> None:
    summary = announce.summary(
        Stats(
            seconds=10.0,
            accepted=1,
            active=1234,
            echoes=1,
            bytes_received=1_000_000,
            bytes_sent=999,
            closed=NamedCounts({"eof": 5, "reset": 0, "idle": 2}),
            errors=NamedCounts({"accept": 0, "descriptors": 7}),
        )
    )
    for part in ("1 connection accepted", "1,234 active", "1 echo,", "1,000,000 bytes in"):
        assert part in summary
    assert "999 bytes out" in summary
    assert summary.endswith("closed eof=5 idle=2, errors descriptors=7")
    assert "\n" not in summary


def test_summary_has_the_limit_on_connections_and_pauses_of_accepting() -> None:
    summary = announce.summary(Stats(active=9, accept_pauses=3), 10)
    assert "9 active of 10 at most" in summary
    assert "accepting paused 3 times" in summary


def test_line_of_counters_has_the_rate_since_the_one_before(
    log: logging.Logger,
    start_server: Callable[..., kecho.Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start_server()
    configure_logging("info", "json")
    say = announce.say_counters()
    with connect(server) as client:
        for message in (b"abcabcabc", b"defgh"):
            sent = server.stats().bytes_sent + len(message)
            assert echo(client, message) == message
            # What is sent is counted afterwards, and may be seen before it is.
            wait_for(lambda sent=sent: server.stats().bytes_sent == sent, "the count")
            say(server)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["event"] == second["event"] == "stats"
    assert "echoes/s" in first["message"]
    assert first["interval"]["bytes_sent"] == first["stats"]["bytes_sent"] == 9
    assert second["stats"]["bytes_sent"] == 14
    assert second["interval"]["bytes_sent"] == 5
    assert second["interval"]["seconds"] == pytest.approx(
        second["stats"]["seconds"] - first["stats"]["seconds"]
    )
