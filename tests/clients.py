"""Clients for tests: plain sockets with a deadline on every step."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable

import kecho

DEADLINE_S = 30.0


def connect(server: kecho.Server | int | str, **options: int) -> socket.socket:
    """Connects to a Server, a port of 127.0.0.1, or the path of a Unix socket.

    options: receive_buffer, send_buffer: SO_RCVBUF and SO_SNDBUF, bytes, set before connecting.
    """
    address = server.addresses[0] if isinstance(server, kecho.Server) else server
    if isinstance(address, int):
        address = ("127.0.0.1", address)
    if isinstance(address, str):
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(DEADLINE_S)
    if "receive_buffer" in options:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_buffer"])
    if "send_buffer" in options:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer"])
    try:
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def receive_exactly(client: socket.socket, size: int) -> bytes:
    """Reads `size` bytes, fewer only if the stream ends before."""
    chunks = []
    while size > 0:
        chunk = client.recv(min(size, 1 << 20))
        if not chunk:
            break
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def receive_until_end(client: socket.socket) -> bytes:
    chunks = []
    while chunk := client.recv(1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def echo(client: socket.socket, message: bytes) -> bytes:
    """Sends a message that fits the socket buffers and returns as many bytes as it has."""
    client.sendall(message)
    return receive_exactly(client, len(message))


def reset(client: socket.socket) -> None:
    """Closes with RST: SO_LINGER 0, socket(7)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def transfer(client: socket.socket, data: bytes) -> bytes:
    """Sends all of `data` and half-closes, while reading what comes back until its end."""

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive_until_end(client)
    finally:
        sender.join(DEADLINE_S)


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls until `condition` is true; fails, naming `what`, after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)
