"""Whatever several clients do, in any order: what comes back is what was sent.

PROPERTY_EXAMPLES=2000 tries so many sequences of steps instead of a few.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import note, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import kecho
from kecho.server.confinement.sandbox import IS_SANITIZED
from support.clients import DEADLINE_S, connect, random_bytes, reset, wait_for

pytestmark = pytest.mark.engines(sanitized=True)

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "20" if IS_SANITIZED else "60"))

MOST_AT_ONCE = 4 << 20  # bytes sent and not yet received: sockets may hold them, or not
SOURCE = random_bytes(MOST_AT_ONCE)

# With less to receive into, the kernel goes on by retransmission timers: 200 ms a step.
buffers = st.none() | st.integers(min_value=4096, max_value=32_768)
sizes = st.integers(min_value=1, max_value=200_000) | st.sampled_from([1, 65535, 65536, 65537])


class Connection:
    """A client, and what its stream must be: SOURCE over and over, from an offset of its own."""

    def __init__(self, server: kecho.Server, offset: int, options: dict[str, int]) -> None:
        self.socket = connect(server, **options)
        self.offset = offset
        self.sent = 0
        self.received = 0
        self.half_closed = False

    def _expected(self, position: int, size: int) -> bytes:
        start = (self.offset + position) % len(SOURCE)
        piece = SOURCE[start : start + size]
        return piece + SOURCE[: size - len(piece)]

    def send(self, size: int) -> int:
        """Sends what fits now of `size` further bytes; returns how much did."""
        self.socket.setblocking(False)
        size = min(size, MOST_AT_ONCE - (self.sent - self.received))
        before = self.sent
        with contextlib.suppress(BlockingIOError):
            while size > self.sent - before:
                left = size - (self.sent - before)
                self.sent += self.socket.send(self._expected(self.sent, left))
        return self.sent - before

    def receive(self, size: int) -> bool:
        """Reads what is there now, at most `size`; False when the stream has ended."""
        self.socket.setblocking(False)
        try:
            chunk = self.socket.recv(size)
        except BlockingIOError:
            return True
        assert self.received + len(chunk) <= self.sent, "more has come back than was sent"
        assert chunk == self._expected(self.received, len(chunk)), f"wrong from {self.received} on"
        self.received += len(chunk)
        return bool(chunk)

    def receive_all(self) -> None:
        """Waits for everything that was sent."""
        while self.received < self.sent:
            readable = select.select([self.socket], [], [], DEADLINE_S)[0]
            assert readable, f"stalled after {self.received} of {self.sent} bytes"
            assert self.receive(1 << 18), f"ended after {self.received} of {self.sent} bytes"

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)
        self.half_closed = True

    def receive_end(self) -> None:
        self.receive_all()
        self.socket.settimeout(DEADLINE_S)
        assert self.socket.recv(1) == b"", "more has come back than was sent"


class Echo(RuleBasedStateMachine):
    """One server and its clients. A client reads only when a step says so."""

    connections = Bundle("connections")

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__()
        self.server = kecho.Server(threads=2, **options)
        self.server.start()
        self.living: list[Connection] = []
        self.opened = 0
        self.ended = 0  # by a half-close, everything having been read

    def _forget(self, connection: Connection) -> None:
        self.living.remove(connection)

    @initialize(target=connections)
    def connect_first(self) -> Connection:
        return self.connect(0, None, None)

    @rule(
        target=connections,
        offset=st.integers(min_value=0, max_value=len(SOURCE) - 1),
        receive_buffer=buffers,
        send_buffer=buffers,
    )
    def connect(
        self, offset: int, receive_buffer: int | None, send_buffer: int | None
    ) -> Connection:
        given = {"receive_buffer": receive_buffer, "send_buffer": send_buffer}
        options = {name: size for name, size in given.items() if size is not None}
        connection = Connection(self.server, offset, options)
        self.living.append(connection)
        self.opened += 1
        return connection

    @rule(connection=connections, size=sizes)
    def send(self, connection: Connection, size: int) -> None:
        if not connection.half_closed:
            note(f"sent {connection.send(size)}")

    @rule(connection=connections)
    def send_what_fits(self, connection: Connection) -> None:
        if not connection.half_closed:
            note(f"sent {connection.send(MOST_AT_ONCE)}")

    @rule(connection=connections, pieces=st.lists(st.integers(1, 5000), min_size=2, max_size=20))
    def send_pieces(self, connection: Connection, pieces: list[int]) -> None:
        if not connection.half_closed:
            note(f"sent {[connection.send(size) for size in pieces]}")

    @rule(connection=connections)
    def send_urgent(self, connection: Connection) -> None:
        if connection.half_closed or connection.socket.family == socket.AF_UNIX:
            return
        connection.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            byte = connection._expected(connection.sent, 1)
            connection.sent += connection.socket.send(byte, socket.MSG_OOB)

    @rule(connection=connections, size=sizes)
    def read_some(self, connection: Connection, size: int) -> None:
        alive = connection.receive(size)
        assert alive or (connection.half_closed and connection.received == connection.sent)

    @rule(connection=connections)
    def read_everything(self, connection: Connection) -> None:
        connection.receive_all()

    @rule(connection=connections)
    def half_close(self, connection: Connection) -> None:
        if not connection.half_closed:
            connection.half_close()

    @rule(connection=consumes(connections))
    def read_to_the_end(self, connection: Connection) -> None:
        if not connection.half_closed:
            connection.half_close()
        connection.receive_end()
        connection.socket.close()
        self.ended += 1
        self._forget(connection)

    @rule(connection=consumes(connections))
    def reset(self, connection: Connection) -> None:
        reset(connection.socket)
        self._forget(connection)

    @rule(connection=consumes(connections))
    def close_abruptly(self, connection: Connection) -> None:
        connection.socket.close()
        self._forget(connection)

    @invariant()
    def counters_are_plausible(self) -> None:
        stats = self.server.stats()
        assert stats.accepted <= self.opened
        assert stats.errors.total == 0

    def teardown(self) -> None:
        try:
            for connection in self.living:
                if not connection.half_closed:
                    connection.half_close()
            for connection in self.living:
                connection.receive_end()
                self.ended += 1
            wait_for(lambda: self.server.stats().accepted == self.opened, "all were accepted")
            wait_for(lambda: self.server.stats().active == 0, "all have ended")
        finally:
            for connection in self.living:
                connection.socket.close()
            stats = self.server.stop()
        assert stats.active == 0
        assert stats.accepted == stats.closed.total == self.opened
        assert stats.closed["eof"] >= self.ended
        assert stats.closed["eof"] + stats.closed["reset"] == self.opened
        assert stats.errors.total == 0
        assert stats.bytes_sent <= stats.bytes_received
        if not stats.closed["reset"]:
            assert stats.bytes_sent == stats.bytes_received


def run(options: dict[str, object]) -> None:
    run_state_machine_as_test(
        lambda: Echo(options),
        settings=settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None),
    )


def test_any_sequence_of_steps_is_echoed_over_tcp(dispatch: str, engine: str) -> None:
    run({"port": 0, "dispatch": dispatch, "engine": engine})


def test_any_sequence_of_steps_is_echoed_over_a_unix_socket(dispatch: str, tmp_path: Path) -> None:
    run({"uds": tmp_path / "s", "dispatch": dispatch})
