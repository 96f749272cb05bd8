"""Print what a running server has to say: where it listens, its counters, its end."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
from collections.abc import Callable, Mapping

from ..command import plural
from ..options import describe_size
from ..system import sysctl
from .public import PUBLIC, describe_limits
from .server import Server
from .settings import CommandConfig
from .sockets.addresses import describe_addresses
from .stats import Stats, UdpCounters
from .systemd import Notifier

__all__ = [
    "log_fields",
    "say_counters",
    "say_descriptors",
    "say_stopping",
    "say_where",
    "summary",
]

_DESCRIPTORS_TO_COME = 8  # those of the server itself, once it listens

log = logging.getLogger("kecho")


def log_fields(message: str, event: str, **fields: object) -> None:
    """Print a message. In JSON it has these fields as well."""
    log.info(message, extra={"fields": {"event": event, **fields}})


def say_descriptors(config: CommandConfig) -> None:
    """Warn if the descriptors do not suffice for max_connections.

    Call it when the server is open and serves no client yet: how many it needs for itself depends
    on more than the options.
    """
    limit = sysctl.descriptor_limit()
    left = max(0, limit - sysctl.open_descriptors() - _DESCRIPTORS_TO_COME)
    log.debug("descriptors: at most %d, some %d connections", limit, left)
    if config.max_connections is not None and config.max_connections > left:
        log.warning(
            "max-connections: %d are more than the %d that RLIMIT_NOFILE = %d leaves; further "
            "clients wait in the accept queue",
            config.max_connections,
            left,
            limit,
        )


def say_where(server: Server) -> None:
    """Print where the server listens and how it serves."""
    config = server.config
    exposed = any(_is_exposed(address) for address in server.addresses)
    udp = server.udp_addresses
    engine = f", engine {server.engine}" if config.engine != "epoll" else ""
    limits = {name: getattr(config, name) for name in PUBLIC} if config.public else {}
    public = f", public: {describe_limits(limits)}" if limits else ""
    memory = server.socket_memory
    sockets = f", sockets {describe_size(memory)} each" if memory is not None else ""
    log_fields(
        f"listening on {describe_addresses(server.addresses)}"
        f"{', ' + describe_addresses(udp, 'udp') if udp else ''}"
        f"{', reachable from other hosts' if exposed else ''}"
        f" ({_backlogs(server)}dispatch {config.dispatch}{engine}{public},"
        f" buffers {describe_size(server.max_buffer_memory)}{sockets},"
        f" {plural(server.threads, 'thread')})",
        "listening",
        addresses=server.addresses,
        udp_addresses=udp,
        exposed=exposed,
        backlog=min(server.backlogs, default=None),
        dispatch=config.dispatch,
        engine=server.engine,
        threads=server.threads,
        max_buffer_memory=server.max_buffer_memory,
        socket_memory=server.socket_memory,
        public=limits or None,
        pid=os.getpid(),
    )
    if exposed and not config.bounds_clients:
        log.warning(
            "other hosts can reach it, and one client can keep every place, by connections that "
            "are idle: --public sets limits (or --idle-timeout, --max-connections-per-ip, --allow)"
        )


def _backlogs(server: Server) -> str:
    """Name the smallest and the largest backlog. That of an inherited Unix socket is unknown."""
    known = server.backlogs
    if not known:
        return ""
    return f"backlog {' to '.join(map(str, dict.fromkeys((min(known), max(known)))))}, "


def _is_exposed(address: object) -> bool:
    return (
        not isinstance(address, str)
        and not ipaddress.ip_address(
            address[0].partition("%")[0]  # type: ignore[index]
        ).is_loopback
    )


def say_stopping(server: Server, notifier: Notifier) -> Callable[[int], None]:
    """Return a function that prints what a signal does."""
    signals_seen: list[int] = []

    def say(number: int) -> None:
        if not signals_seen:
            notifier.stopping()
        signals_seen.append(number)
        name = signal.Signals(number).name
        if len(signals_seen) == 1:
            timeout = server.config.graceful_timeout
            again = "SIGTERM" if number == signal.SIGHUP else "again"
            log_fields(
                f"{name}: draining for at most {timeout:g} s; {again} to stop at once", "draining"
            )
        elif len(signals_seen) == 2:
            log_fields(f"{name}: stopping at once", "aborting")

    return say


def say_counters() -> Callable[[Server], None]:
    """Return a function that prints the counters, and the rate since it was last called."""
    earlier: list[Stats] = []

    def say(server: Server) -> None:
        now = server.stats()
        interval = now - earlier[0] if earlier else now
        earlier[:] = [now]
        rate = interval.echoes / interval.seconds if interval.seconds > 0 else 0.0
        log_fields(
            f"{summary(now, server.config.max_connections)}; "
            f"{rate:,.0f} echoes/s over {interval.seconds:.1f} s",
            "stats",
            stats=now.to_dict(),
            interval=interval.to_dict(),
        )

    return say


def summary(stats: Stats, most: int | None = None) -> str:
    """Describe the counters in one line. most: the limit on connections."""
    errors = {name: count for name, count in stats.errors.items() if count}
    closed = {name: count for name, count in stats.closed.items() if count}
    refused = {name: count for name, count in stats.refused.items() if count}
    parts = [
        f"{stats.seconds:.1f} s",
        f"{plural(stats.accepted, 'connection')} accepted",
        f"{stats.active:,} active" + (f" of {most:,} at most" if most is not None else ""),
        f"{plural(stats.echoes, 'echo', 'echoes')}",
        f"{stats.bytes_received:,} bytes in",
        f"{stats.bytes_sent:,} bytes out",
        f"closed {_counts(closed)}",
        f"errors {_counts(errors)}",
    ]
    if refused:
        parts.append(f"refused {_counts(refused)}")
    if stats.accept_pauses:
        parts.append(f"accepting paused {plural(stats.accept_pauses, 'time')}")
    if stats.dropped_syns:
        parts.append(f"{plural(stats.dropped_syns, 'SYN')} dropped")
    if stats.udp is not None:
        parts.append(_udp_summary(stats.udp))
    return parts[0] + ": " + ", ".join(parts[1:])


def _udp_summary(udp: UdpCounters) -> str:
    refused = {name: count for name, count in udp.refused.items() if count}
    errors = {name: count for name, count in udp.errors.items() if count}
    return (
        f"udp {udp.received:,} in, {udp.sent:,} out, {udp.dropped:,} dropped, "
        f"refused {_counts(refused)}, errors {_counts(errors)}"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in counts.items()) or "none"
