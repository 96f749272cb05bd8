"""How a process gives up what it will not need again: ext/sandbox/sandbox.pyx.

Each function acts on the calling thread, and on the threads that it starts from then on. None of
it can be undone. Each raises OSError that names the system call.
"""

IS_SANITIZED: bool
PERMITTED_CALLS: frozenset[int]
PERMITTED_CALLS_OF_A_FILE: frozenset[int]
PERMITTED_CALLS_OF_DATAGRAMS: frozenset[int]
PERMITTED_CALLS_OF_FLOWS: frozenset[int]

def load_unwinder() -> None:
    """Loads what pthread_exit() would otherwise open a file for."""

def set_no_new_privileges() -> None:
    """execve() gives this thread no privileges any more."""

def leave_session_keyring() -> None:
    """For a new one, which is empty. Nothing changes where the kernel has none, or refuses it."""

def drop_bounding_set() -> None:
    """No execve() gives these capabilities back. Without CAP_SETPCAP, nothing changes."""

def drop_capabilities() -> None:
    """Empties the effective, permitted, inheritable and ambient sets."""

def landlock_abi() -> int:
    """The version of Landlock that this kernel has."""

def restrict_access(abi: int, removable_fd: int) -> None:
    """No access to files, no TCP port bound, as far as this version knows how.

    removable_fd: a directory beneath which files may be removed, or -1.
    """

def filter_program(
    *, for_a_file: bool, for_datagrams: bool, for_flows: bool, for_rings: bool
) -> bytes:
    """What filter_calls() has the kernel run: struct sock_filter, one after the other."""

def filter_calls(
    *, for_a_file: bool, for_datagrams: bool, for_flows: bool, for_rings: bool
) -> None:
    """Only the system calls of policy.h from now on; EPERM for any other."""
