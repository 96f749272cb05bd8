"""Define --public: limits for a server that strangers can reach. Each is also an option."""

from __future__ import annotations

from collections.abc import Mapping

from ..options import describe_size

__all__ = ["PUBLIC", "describe_limits"]

# The value of each option that is not given.
PUBLIC: Mapping[str, float] = {
    # Longer than a person thinks or a monitor waits. Then a silent client gives way to others.
    "idle_timeout": 60.0,
    # Seven retransmissions: longer than most network failures.
    "write_timeout": 30.0,
    # Finds clients that have vanished. Matters if idle_timeout is set to more than this.
    "keepalive": 60,
    # A sixteenth of 256 descriptors, a low limit for servers. Enough for several people behind one
    # NAT or for a small test, but not for a load generator.
    "max_connections_per_ip": 16,
    # An address that reads nothing costs 8 MB. A stream gets 1 MB/s at a round trip of 100 ms.
    "socket_memory": 1 << 19,
    # A client that reconnects all its connections gets them back within two seconds.
    "rate_limit": 10,
}


def describe_limits(values: Mapping[str, float]) -> str:
    """Write limits as options are given: idle-timeout 60, socket-memory 1M."""
    return ", ".join(
        f"{name.replace('_', '-')} "
        f"{describe_size(int(value)) if name == 'socket_memory' else format(value, 'g')}"
        for name, value in values.items()
    )
