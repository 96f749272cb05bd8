"""The positional TARGET of the command, and the address that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from kecho.bench import Workload, run
from support.server_process import run_python

SHORT = ["-c", "3", "--rounds", "1", "--json", "-"]


def bench(*arguments: str) -> tuple[dict[str, object], str]:
    finished = run_python("-m", "kecho.bench", *arguments)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), finished.stderr


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
@pytest.mark.parametrize("form", ["{host}:{port}", "tcp://{host}:{port}", ":{port}"])
def test_a_target_is_measured(start_server: Callable[..., kecho.Server], form: str) -> None:
    port = start_server().port
    result, said = bench(form.format(host="127.0.0.1", port=port), *SHORT)
    assert result["echoes"] == 3
    assert result["observed"]["address"] == f"tcp 127.0.0.1:{port}"  # type: ignore[index]
    assert said.startswith(f"burst: tcp 127.0.0.1:{port}, ")


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
def test_an_ipv6_target_is_measured_and_a_port_may_be_an_option(
    start_server: Callable[..., kecho.Server],
) -> None:
    port = start_server(host="::1").port
    for words in ([f"[::1]:{port}"], ["::1", "--port", str(port)]):
        result, said = bench(*words, *SHORT)
        assert result["echoes"] == 3
        assert said.startswith(f"burst: tcp [::1]:{port}, ")


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
def test_the_address_behind_a_name_stands_in_the_result(
    start_server: Callable[..., kecho.Server],
) -> None:
    port = start_server().port
    result, said = bench(f"localhost:{port}", *SHORT)
    assert result["observed"]["address"] == f"tcp 127.0.0.1:{port}"  # type: ignore[index]
    assert said.startswith(f"burst: tcp localhost:{port} at 127.0.0.1:{port}, ")


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
def test_a_unix_target_is_measured(
    start_server: Callable[..., kecho.Server], tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    start_server(uds=path)
    assert bench(f"unix:{path}", *SHORT)[0]["echoes"] == 3


@pytest.mark.parametrize("mode", ["burst", "closed"])
def test_an_abstract_socket_is_measured(
    start_server: Callable[..., kecho.Server], mode: str
) -> None:
    name = "@kecho-bench-target"
    start_server(uds=name)
    result = run(Workload(uds=name, mode=mode, connections=3, duration=0.1))
    assert not result.errors
    assert result.echoes >= 3
    assert result.observed["address"] == f"unix {name}"


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
def test_a_server_of_ones_own_may_have_an_abstract_socket() -> None:
    result, _ = bench("--spawn=--uds @kecho-bench-spawned", *SHORT)
    assert result["echoes"] == 3


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
def test_a_udp_target_is_measured(start_server: Callable[..., kecho.Server]) -> None:
    port = start_server(udp=True, udp_rate=0).port
    result, _ = bench(f"udp://127.0.0.1:{port}", "-c", "2", "-d", "0.2", "--json", "-")
    assert result["workload"]["udp"] is True  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["10.0.0.1:7", "--host", "10.0.0.2"], "--host contradicts TARGET '10.0.0.1:7'"),
        (["10.0.0.1:7", "--port", "8"], "--port contradicts TARGET"),
        (["10.0.0.1", "--uds", "/run/x"], "--uds contradicts TARGET"),
        (["unix:/run/x", "--host", "10.0.0.1"], "--host contradicts TARGET"),
        (["unix:/run/x", "--port", "7"], "--port contradicts TARGET 'unix:/run/x'"),
        ([":7", "--uds", "/run/x"], "--uds contradicts TARGET ':7'"),
        (["--uds", "/run/x", "--port", "7"], "--uds: cannot be combined with --port"),
        (["tcp://10.0.0.1", "--udp"], "--udp contradicts TARGET 'tcp://10.0.0.1'"),
        (["udp://10.0.0.1", "--no-udp"], "--udp contradicts TARGET"),
        (["10.0.0.1:70000"], "--port: must be between 1 and 65535 (got 70000)"),
        (["/run/x"], "TARGET must be a host or unix:PATH (got '/run/x')"),
        (["10.0.0.1", "--spawn"], "--spawn: cannot be combined with TARGET"),
        (["10.0.0.1", "10.0.0.2"], "unrecognized arguments: 10.0.0.2"),
    ],
)
def test_what_is_no_target_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    finished = run_python("-m", "kecho.bench", *arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1
