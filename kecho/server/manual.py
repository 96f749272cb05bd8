"""Describe what --help and help(kecho.Server) say of the options beyond one line each."""

from __future__ import annotations

from ..options import describe_options
from .arguments import BENCH
from .config import ServerConfig
from .public import PUBLIC, describe_limits

__all__ = ["ENGINES", "LIMITS", "OPTIONS"]

ENGINES = """\
Engines:
  epoll     threads echo
  io_uring  threads echo with fewer system calls; no busy polling (Linux 6.1)
  sockmap   the kernel echoes; experimental: on a busy machine it may stall connections for
            seconds; TCP only (root, Linux 6.5 with BTF)
  auto      io_uring if it is available, otherwise epoll"""

LIMITS = (
    f"--public sets the limits that are not given: {describe_limits(PUBLIC)}. Behind a proxy all "
    "clients have one address: give --max-connections-per-ip and --rate-limit yourself."
)

OPTIONS = f"""\
{describe_options(ServerConfig)}

bench: int = 0
    {BENCH.help}

{ENGINES}"""
