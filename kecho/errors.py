"""What kecho raises beyond the built-in exceptions it derives from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "EngineError",
    "ListenError",
    "ListenerLostError",
    "OptionError",
    "TuningError",
    "naming",
]


class OptionError(ValueError):
    """An option has a value that cannot be used.

    option: its name as the caller wrote it: ``port`` in Python, ``--port`` on the command line,
    ``KECHO_PORT`` in the environment.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, str]]:
        return type(self), (self.option, self.reason)


class ListenError(OSError):
    """The system refused a listening socket: address in use, no permission, unknown host.

    option: the option whose value was refused (``host``, ``port``, ``uds`` or ``fd``).
    errno: the system's error number, or a ``socket.EAI_*`` code for an unknown host.
    """

    def __init__(self, option: str, errno: int | None, reason: str) -> None:
        super().__init__(errno, f"{option}: {reason}")
        self.option = option
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}"

    def __reduce__(self) -> tuple[type[ListenError], tuple[str, int | None, str]]:
        return type(self), (self.option, self.errno, self.reason)


class ListenerLostError(OSError):
    """A listener of a running server was closed from outside (SOCK_DESTROY, as by ``ss -K``), or
    shut down by another process that has it, too. The server has drained and ended.

    addresses: where, as in Server.addresses. errno: None; no call failed.
    """

    def __init__(self, addresses: tuple[object, ...], reason: str) -> None:
        super().__init__(None, reason)
        self.addresses = addresses
        self.reason = reason

    def __str__(self) -> str:
        return self.reason

    def __reduce__(self) -> tuple[type[ListenerLostError], tuple[tuple[object, ...], str]]:
        return type(self), (self.addresses, self.reason)


class EngineError(OSError):
    """The system cannot have the engine that was asked for: a kernel function, or a privilege, is
    missing.

    errno: the system's error number; None where no call failed.
    """

    def __init__(self, errno: int | None, reason: str) -> None:
        super().__init__(errno, f"engine: {reason}")
        self.reason = reason

    def __str__(self) -> str:
        return f"engine: {self.reason}"

    def __reduce__(self) -> tuple[type[EngineError], tuple[int | None, str]]:
        return type(self), (self.errno, self.reason)


class TuningError(OSError):
    """Kernel settings could not be changed, or not be put back; the text says which and why."""


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Has an OSError raised within `with` say which system call was refused."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{call}: {error.strerror or error}") from None
