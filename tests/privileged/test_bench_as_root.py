"""What the benchmark does as root: kernel settings put back, its own TIME_WAIT sockets dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from support.privileges import needs_root
from support.server_process import run_python

pytestmark = [
    pytest.mark.privileged,
    needs_root,
]

DEADLINE_S = 90


def in_a_namespace(script: str, *arguments: str) -> Any:
    """Runs Python in a network namespace of its own; what it prints last, as JSON."""
    begin = """
        import json, os, re, signal, socket, subprocess, sys, time
        from pathlib import Path
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        def bench(*arguments):
            return [sys.executable, "-m", "kecho.bench", *arguments]
    """
    whole = textwrap.dedent(begin) + textwrap.dedent(script)
    finished = subprocess.run(
        [
            "unshare",
            "-n",
            "-m",
            "--propagation",
            "private",
            sys.executable,
            "-c",
            whole,
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_who_could_not_put_back_what_is_roots_is_not_told_of_it(tmp_path: Path) -> None:
    """/run/kecho stays after a tuned run of root's. A run of another user says nothing about it."""
    script = f"""
        import os, sys
        from pathlib import Path
        from kecho.bench.tuning import state_file
        from kecho.bench import cli
        state_file._DIRECTORY = Path({str(tmp_path)!r})  # nobody else may look into it
        arguments = ["--host", "127.0.0.1", "--port", "1"]
        cli.main(arguments)  # has everything imported: Python may be in root's home
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        sys.exit(cli.main(arguments))
    """
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.returncode == 1
    by_root, by_nobody = finished.stderr.splitlines()
    assert by_nobody == by_root
    assert "refused" in by_root


TUNED_RUN = """
    names = ["core/somaxconn", "ipv4/tcp_max_syn_backlog", "ipv4/ip_local_port_range"]
    def values():
        return [Path("/proc/sys/net", name).read_text().split() for name in names]
    before = values()
    ending = sys.argv[1]
    more = {"normal": ["--rounds", "1"], "exception": ["--host", "127.0.0.9", "--port", "9"]}
    arguments = more.get(ending, ["--spawn", "--rounds", "100000"])
    if ending == "normal":
        arguments = ["--spawn", *arguments]
    run = subprocess.Popen(
        bench("--tune", "-c", "5000", *arguments), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)
    first = run.stderr.readline()
    during = values()
    if ending.startswith("SIG"):
        assert during != before, first
        time.sleep(1)
        run.send_signal(getattr(signal, ending))
    said = first + run.communicate(timeout=60)[1]
    left = values()
    if ending == "SIGKILL":
        restored = subprocess.run(bench("--restore"), capture_output=True, text=True)
        said += restored.stdout
    print(json.dumps([before, left, values(), run.returncode, said]))
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        *(("normal", 0), ("exception", 1), ("SIGKILL", -9)),
        *(("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)),
    ],
)
def test_tune_puts_every_value_back(ending: str, status: int) -> None:
    before, left, after, returned, said = in_a_namespace(TUNED_RUN, ending)
    assert after == before, said
    assert returned == status, said
    assert "net.core.somaxconn" in said
    assert (left == before) == (ending != "SIGKILL")
    assert "Traceback" not in said


def test_a_run_drops_its_own_time_wait_sockets_and_no_others() -> None:
    dropped, echoes, errors, ours, others = in_a_namespace("""
        import kecho
        from kecho import bench, drop
        # Otherwise a port may be taken again while its old connection is in TIME_WAIT.
        Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("0")
        with kecho.Server(port=0) as server:
            kept = []
            for _ in range(20):  # closes first: in TIME_WAIT, towards the same port
                with socket.create_connection(("127.0.0.1", server.port)) as client:
                    kept.append(client.getsockname()[1])
                    client.sendall(b"x")
                    client.recv(1)
                    client.shutdown(socket.SHUT_WR)
                    client.recv(1)
            result = bench.run(bench.Workload(
                port=server.port, mode="connect", connections=20, duration=1.5,
                clear_time_wait=True))
            found = drop.find(states=["time-wait"], peer=[f":{server.port}"])
            ports = {one.pair.local.port for one in found}
            print(json.dumps([
                result.observed["time_wait_cleared"], result.echoes, result.error_count,
                len(ports - set(kept)), len(ports & set(kept))]))
    """)
    assert errors == 0
    assert dropped > 0.5 * echoes > 100
    assert ours <= 1  # the probe that looked whether the server echoes
    assert others == 20


def test_a_spawned_server_ends_with_a_client_that_is_killed() -> None:
    assert in_a_namespace("""
        run = subprocess.Popen(bench("--spawn", "--mode", "idle", "-c", "5", "-d", "60"))
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while not children.read_text():
            time.sleep(0.01)
        server = Path("/proc", children.read_text().split()[0])
        time.sleep(1)
        assert server.exists()
        run.kill()
        run.wait()
        end = time.monotonic() + 20
        while server.exists() and time.monotonic() < end:
            time.sleep(0.05)
        print(json.dumps(not server.exists()))
    """)


def test_a_server_at_an_address_that_is_no_loopback_is_found() -> None:
    assert in_a_namespace("""
        subprocess.run(["ip", "address", "add", "10.9.9.9/32", "dev", "lo"], check=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "kecho", "--host", "10.9.9.9", "--port", "0"],
            stderr=subprocess.PIPE, text=True)
        try:
            port = int(re.search("10.9.9.9:([0-9]+)", server.stderr.readline())[1])
            from kecho import bench
            result = bench.run(bench.Workload(
                host="10.9.9.9", port=port, connections=5, rounds=1))
        finally:
            server.terminate()
        print(json.dumps(result.observed["server_cpu_s"] is not None))
    """)


def test_clearing_time_wait_needs_the_capability() -> None:
    # Without it for good, also as root: an ordinary user may not be able to read the checkout.
    finished = subprocess.run(
        [
            *("setpriv", "--inh-caps", "-net_admin", "--bounding-set", "-net_admin"),
            *(sys.executable, "-m", "kecho.bench", "--spawn", "--mode", "connect"),
            *("-d", "0.2", "--clear-time-wait"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert finished.returncode == 1
    assert "--clear-time-wait: needs CAP_NET_ADMIN" in finished.stderr


def test_ports_that_the_kernel_used_again_are_no_limit_to_a_run() -> None:
    opened, echoes, dropped, reasons = in_a_namespace("""
        import kecho
        from kecho import bench
        from kecho.bench import timewait
        timewait._INTERVAL_S = 60  # the kernel is to be faster than the sweep
        # As it does by itself on loopback: a port may be taken again after a second.
        Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("1")
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40399")
        with kecho.Server(port=0) as server:
            result = bench.run(bench.Workload(
                port=server.port, mode="connect", connections=2, duration=4,
                clear_time_wait=True))
        print(json.dumps([result.connections, result.echoes,
            result.observed["time_wait_cleared"], result.verdict.reasons]))
    """)
    assert opened > echoes / 2 > 400
    assert dropped < opened - 400  # otherwise nothing was used again
    assert not [one for one in reasons if "the ports allow" in one]


SWEEPS = """
    from kecho import drop
    from kecho.bench.target import Target
    from kecho.bench.timewait import Sweeper
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    def connect(local=("127.0.0.1", 0)):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(local)
        client.connect(("127.0.0.1", port))
        return client, listener.accept()[0]
    def end(client):
        address, number = client.getsockname()
        cookie = client.getsockopt(socket.SOL_SOCKET, 57, 8)  # SO_COOKIE
        return (socket.inet_aton(address) + bytes(12) + number.to_bytes(2, "big") + cookie)
    target = Target.__new__(Target)
    for name, value in (("family", socket.AF_INET), ("port", port),
                        ("address", socket.inet_aton("127.0.0.1"))):
        object.__setattr__(target, name, value)
    sweeper = Sweeper(target)
    def states():
        return sorted(one.state for one in drop.find(peer=[f":{port}"]))
"""


def test_a_port_that_a_stranger_has_since_taken_is_the_strangers() -> None:
    before, after, freed, dropped = in_a_namespace(
        SWEEPS
        + """
    ours, server = connect()
    kept, local = end(ours), ours.getsockname()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
    server.close()  # a reset: there is no TIME_WAIT of ours
    ours.close()
    stranger, server = connect(local)
    stranger.close()
    server.close()
    before = states()
    sweeper.finish(kept)
    print(json.dumps([before, states(), sweeper.freed, sweeper.dropped]))
    """
    )
    assert before == after == ["time-wait"]
    assert (freed, dropped) == (1, 0)


def test_own_time_wait_is_dropped_by_a_sweep_once_it_is_there() -> None:
    first, last, freed, dropped = in_a_namespace(
        SWEEPS
        + """
    one, one_server = connect()
    two, two_server = connect()
    kept = end(one) + end(two)
    for each in (one, one_server, two):
        each.close()
    sweeper.sweep(kept)
    first = states()
    two_server.close()
    sweeper.finish(b"")
    print(json.dumps([first, states(), sweeper.freed, sweeper.dropped]))
    """
    )
    assert first in (["fin-wait-1"], ["fin-wait-2"])
    assert last == []
    assert (freed, dropped) == (2, 2)


@pytest.mark.slow_under_sanitizers  # which need /proc
def test_without_proc_a_run_is_measured_and_says_what_it_does_not_know() -> None:
    script = f"""
        mount -t tmpfs none /proc && exec '{sys.executable}' -m kecho.bench --spawn \\
            --mode closed -c 5 -d 0.3 --server-pid 1
    """
    finished = subprocess.run(
        [
            "unshare",
            "-m",
            "-n",
            "--propagation",
            "private",
            "sh",
            "-ec",
            "ip link set lo up;" + script,
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0
    assert "this user may not inspect it (--server-pid)" in finished.stdout


def test_a_signal_does_not_wait_for_the_resolution_of_a_name(tmp_path: Path) -> None:
    """A name server that is silent keeps getaddrinfo(3) for 10 s or more."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: dns\n")
    script = f"""
        for name in ("resolv.conf", "nsswitch.conf"):
            source = Path({str(tmp_path)!r}, name)
            subprocess.run(["mount", "--bind", source, f"/etc/{{name}}"], check=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 53))
            silent.settimeout(30)
            command = bench("--host", "echo.example", "--port", "7")
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            silent.recvfrom(1000)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        print(json.dumps([process.returncode, stderr, time.monotonic() - begun]))
    """
    status, stderr, took_s = in_a_namespace(script)
    assert (status, stderr) == (130, "")
    assert took_s < 4
