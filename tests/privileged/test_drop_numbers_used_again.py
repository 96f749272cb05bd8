"""The dropper and the number of a process: it follows the process, not the number."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.clients import DEADLINE_S
from support.namespaces import Namespace

pytestmark = [pytest.mark.privileged, pytest.mark.python_only]

# Runs in a process namespace of its own, where a number comes again at once: ns_last_pid,
# pid_namespaces(7).
BEGINNING = """
import json, os, socket, subprocess, sys, time

listener = socket.create_server(("127.0.0.1", 0))

def holder():
    '''Another process that holds a connection: (pid, the end here, the pipe that ends it).'''
    until, ends_it = os.pipe()
    client = socket.create_connection(listener.getsockname())
    here, _ = listener.accept()
    here.settimeout(10)
    pid = os.fork()
    if pid == 0:
        os.close(ends_it)
        here.close()
        os.read(until, 1)
        os._exit(0)
    os.close(until)
    client.close()
    return pid, here, ends_it

def end(pid, ends_it):
    os.close(ends_it)
    os.waitpid(pid, 0)

def another_with(number):
    '''Whose number is that of one that has ended.'''
    for _ in range(1000):
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(number - 1))
        found = holder()
        if found[0] == number:
            return found
        end(found[0], found[2])
    sys.exit("the number is not free")

first, here, ends_it = holder()
time.sleep(0.02)  # two clock ticks, by which the start of a process is known
"""


def run_in_a_process_namespace(script: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, which util-linux has")
    if not Path("/proc/sys/kernel/ns_last_pid").exists():
        pytest.skip("this kernel has no ns_last_pid (CONFIG_CHECKPOINT_RESTORE)")
    finished = subprocess.run(
        [*["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"], sys.executable, "-c",
         BEGINNING + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr


WATCHED = """
drop = subprocess.Popen(
    [sys.executable, "-m", "kecho.drop", "--pid", str(first), "--watch", "0.3", "--json"],
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
look = json.loads(drop.stdout.readline())
assert look["counts"] == {"dropped": 1}, look
end(first, ends_it)
_, there, ends_other = another_with(first)
looks = [json.loads(drop.stdout.readline()) for _ in range(3)]
drop.terminate()
said = drop.communicate()[1]
assert [look["counts"] for look in looks] == [{}, {}, {}], looks
assert said.count(f"error: --pid {first}: ") == 1, said
os.close(ends_other)
assert there.recv(1) == b"", "ended by its process alone"
"""


def test_watch_does_not_follow_a_number_to_another_process(inside: Namespace) -> None:
    run_in_a_process_namespace(WATCHED)


NOT_THERE_AT_FIRST = """
end(first, ends_it)
drop = subprocess.Popen(
    [sys.executable, "-m", "kecho.drop", "--pid", str(first), "--watch", "0.3", "--json"],
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
look = json.loads(drop.stdout.readline())
_, there, ends_other = another_with(first)
looks = [look, *(json.loads(drop.stdout.readline()) for _ in range(3))]
drop.terminate()
assert [look["counts"] for look in looks] == [{}] * 4, looks
os.close(ends_other)
assert there.recv(1) == b""
"""


def test_process_that_was_not_there_at_the_first_look_is_not_waited_for(inside: Namespace) -> None:
    run_in_a_process_namespace(NOT_THERE_AT_FIRST)


EXCHANGED_WHILE_READ = """
from kecho.drop import find, process
read = process.inodes_of
def exchanged(pid):
    end(first, ends_it)
    another_with(first)
    found = read(pid)
    assert found, "those of the other one"
    return found
process.inodes_of = exchanged
try:
    sys.exit(f"found {find(pid=first)}")
except ProcessLookupError as error:
    assert error.strerror == f"process {first} has ended"
"""


def test_process_exchanged_while_its_descriptors_are_read_holds_nothing(inside: Namespace) -> None:
    run_in_a_process_namespace(EXCHANGED_WHILE_READ)
