"""--public: limits for a server that strangers can reach. Each is an option of its own, too."""

from __future__ import annotations

from collections.abc import Mapping

from ..options import describe_size

__all__ = ["PUBLIC", "describe_limits"]

# What each is set to where it is not given.
PUBLIC: Mapping[str, float] = {
    # Longer than a person thinks, or a monitor waits; after it, whoever says nothing has lost its
    # place to somebody who does.
    "idle_timeout": 60.0,
    # Seven retransmissions: longer than a network is usually down.
    "write_timeout": 30.0,
    # A client that vanished is found by its silence at the same time; with a longer idle_timeout
    # by this.
    "keepalive": 60,
    # A sixteenth of 256 descriptors, the least that servers are usually given. Several people
    # behind one NAT, or all of a small test, but no load generator.
    "max_connections_per_ip": 16,
    # 8 MB for an address that does not read, and 1 MB/s of echoes at a round trip of 100 ms.
    "socket_memory": 1 << 19,
    # As many as may be open come back at once, and again after a second or two.
    "rate_limit": 10,
}


def describe_limits(values: Mapping[str, float]) -> str:
    """As the options are called and given: idle-timeout 60, socket-memory 1M."""
    return ", ".join(
        f"{name.replace('_', '-')} "
        f"{describe_size(int(value)) if name == 'socket_memory' else format(value, 'g')}"
        for name, value in values.items()
    )
