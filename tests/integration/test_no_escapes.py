"""No control character reaches a terminal: what a file, a server, a process or the user says is
written with escapes. (A device: tests/privileged/test_drop_devices.py.)"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from kecho import command
from kecho.bench.output import report
from kecho.bench.results.result import load
from kecho.printable import json_text, one_line, printable
from kecho.server.logs import PatientHandler
from support.clients import DEADLINE_S
from support.hostile_results import CONTROLS, attacks

pytestmark = pytest.mark.python_only

ESCAPES = r"\x1b]0;x\x07\x1b[2J\r\n\x7f\x9b31m\u202e\u2028"


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        timeout=DEADLINE_S,
        **options,  # type: ignore[call-overload]
    )


def assert_harmless(raw: bytes) -> None:
    text = raw.decode()
    assert not [one for one in text if not one.isprintable() and one != "\n"], text


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A file of results, whose name does harm as well."""
    path = tmp_path / f"a{CONTROLS}.json"
    path.write_bytes(attacks()["controls"])
    return path


# ---- files --------------------------------------------------------------------------------------


def test_verdict_error_and_names_of_a_file_are_compared_as_escapes(hostile: Path) -> None:
    finished = run("kecho.bench", "compare", str(hostile), str(hostile))
    assert finished.returncode == 0
    assert_harmless(finished.stdout)
    assert f"A is NOT VALID: {ESCAPES}\n".encode() in finished.stdout


def test_a_report_shows_what_a_file_says_as_escapes(hostile: Path) -> None:
    text = report.text(load(hostile.read_bytes())[0])
    assert_harmless(text.encode())
    for line in (f"  because   {ESCAPES}", f"  note      {ESCAPES}", f"first error {ESCAPES}"):
        assert f"\n{line}\n" in text
    assert f"errors      1 {ESCAPES}\n" in text


def test_a_page_and_a_picture_have_no_control_characters(hostile: Path, tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:  # not imported: numpy begins threads
        pytest.skip("needs matplotlib")
    page = tmp_path / "page.html"
    finished = run("kecho.bench", "report", str(hostile), str(hostile), "-o", str(page))
    assert finished.returncode == 0, finished.stderr
    assert_harmless(finished.stderr)
    assert_harmless(page.read_bytes())
    picture = tmp_path / "picture.svg"
    finished = run("kecho.bench", "plot", str(hostile), "-o", str(picture))
    assert finished.returncode == 0, finished.stderr
    assert_harmless(finished.stderr)
    assert_harmless(picture.read_bytes())


@pytest.mark.parametrize("arguments", [["compare", "{}", "{}"], ["report", "{}", "-o", "{}.html"]])
def test_an_error_names_a_file_with_escapes(tmp_path: Path, arguments: list[str]) -> None:
    path = str(tmp_path / CONTROLS)
    finished = run("kecho.bench", *(one.format(path) for one in arguments))
    assert finished.returncode == 1
    assert_harmless(finished.stderr)
    assert finished.stderr.count(b"\n") == 1
    assert ESCAPES.encode() in finished.stderr


# ---- what the user says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["kecho", "--port", CONTROLS],
        ["kecho", CONTROLS],
        ["kecho", "--uds", f"/nowhere/{CONTROLS}"],
        ["kecho", "--user", CONTROLS],
        ["kecho", "--host", CONTROLS],
        ["kecho.bench", "--uds", f"/nowhere/{CONTROLS}"],
        ["kecho.bench", "--mode", CONTROLS],
        ["kecho.bench", "--spawn", f"--port '{CONTROLS}'"],
        ["kecho.bench", "--json", f"/nowhere/{CONTROLS}"],
        ["kecho.drop", CONTROLS, CONTROLS],
        ["kecho.drop", "--list", "--peer", CONTROLS],
        ["kecho.drop", "--list", "--netns", CONTROLS],
        ["kecho.drop", "--list", "--netns", f"/nowhere/{CONTROLS}"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]) if CONTROLS not in arguments[1] else "word",
)
def test_what_the_user_gave_is_echoed_in_an_error_of_one_harmless_line(
    arguments: list[str],
) -> None:
    finished = run(*arguments, stdin=subprocess.DEVNULL)
    assert finished.returncode
    assert_harmless(finished.stdout + finished.stderr)
    assert finished.stderr.count(b"\n") == 1


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_configuration_is_printed_with_escapes(log_format: str) -> None:
    uds = f"/x/{CONTROLS}"
    finished = run("kecho", "--print-config", f"--log-format={log_format}", "--uds", uds)
    assert finished.returncode == 0
    assert_harmless(finished.stdout)
    if log_format == "json":
        assert json.loads(finished.stdout)["uds"]["value"] == uds


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_servers_log_names_its_socket_with_escapes(tmp_path: Path, log_format: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kecho", "--uds", CONTROLS, "--log-format", log_format],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        lines = b""
        while b"listening" not in lines:
            lines += process.stderr.readline()
    finally:
        process.terminate()
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert_harmless(lines + said)


# ---- servers ------------------------------------------------------------------------------------


@pytest.fixture
def liar() -> Iterator[str]:
    """host:port of a server that answers with control characters."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall((CONTROLS * 10).encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("probe", ["--probe", "--no-probe"])
def test_a_servers_reply_is_no_control_character_in_an_error(liar: str, probe: str) -> None:
    finished = run(
        *("kecho.bench", liar, "--mode", "closed", "-c", "1", "-d", "0.1", "--timeout", "1", probe)
    )
    assert finished.returncode == 1
    assert_harmless(finished.stdout + finished.stderr)


# ---- processes ----------------------------------------------------------------------------------


def test_a_process_with_controls_in_its_name_is_listed_with_escapes() -> None:
    script = r"""
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, b"a\x1b]0;b\x07\r\x9bc", 0, 0, 0)
with socket.create_server(("127.0.0.1", 0)) as one:
    print(one.getsockname()[1], flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for more in ([], ["--json"]):
            listed = run("kecho.drop", "--list", "--listeners", "--local", f":{port}", *more)
            assert listed.returncode == 0, listed.stderr
            assert_harmless(listed.stdout)
            assert str(process.pid).encode() in listed.stdout
        assert rb"\u001b" in listed.stdout
    finally:
        process.communicate(timeout=DEADLINE_S)


# ---- the place that prints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "print_it", [command.say, command.put, lambda text: command.show("x", text)]
)
def test_every_way_to_print_escapes(
    print_it: Callable[[str], object], capsys: pytest.CaptureFixture[str]
) -> None:
    print_it(f"a{CONTROLS}b")
    captured = capsys.readouterr()
    assert_harmless((captured.out + captured.err).encode())
    assert r"\x1b[2J" in captured.out + captured.err


def test_a_log_line_is_escaped_by_its_handler(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        handler = PatientHandler(stream)
        handler.emit(logging.makeLogRecord({"msg": f"from {CONTROLS}"}))
        handler.close()
    assert_harmless((tmp_path / "log").read_bytes())


def test_a_defect_is_told_with_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise RuntimeError(CONTROLS)

    assert command.run("x", fail, []) == 1
    said = capsys.readouterr().err
    assert_harmless(said.encode())
    assert said.startswith("Traceback")


def test_what_is_meant_stays_as_it_is() -> None:
    assert printable("µ\t…\n日本") == "µ\t…\n日本"
    assert one_line("a\tb\nc") == r"a\tb\nc"
    assert json.loads(json_text({"\x7f": CONTROLS})) == {"\x7f": CONTROLS}
    assert_harmless(json_text({"\x7f": CONTROLS}).encode())
