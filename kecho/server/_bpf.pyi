"""The kernel's echo: ext/bpf/bpf.pyx."""

def offset_of(btf: bytes, structure: str, member: str) -> int:
    """Where a member of one of the kernel's structures lies, in bytes. Raises LookupError."""

def function_id(btf: bytes, function: str) -> int:
    """By which a program calls one of the kernel's functions. Raises LookupError."""

def open_echo(btf: bytes, capacity: int) -> tuple[int, ...]:
    """Loads the programs; returns the descriptors of their maps, and of the filter that is for each
    socket: (sockets, flows, board, ring, filter), which are the caller's.

    btf: /sys/kernel/btf/vmlinux. capacity: connections that it can have at once.
    Raises LookupError for what btf has not, OSError that names the command of bpf(2); its
    attribute verifier_log is what the kernel says about the program, if it refused that.
    """
