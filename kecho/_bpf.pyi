"""The kernel's echo: ext/bpf/bpf.pyx."""

def offset_of(btf: bytes, structure: str, member: str) -> int:
    """Where a member of one of the kernel's structures lies, in bytes. Raises LookupError."""

def open_echo(btf: bytes, capacity: int) -> tuple[int, int, int, int]:
    """Loads and attaches the program; returns the descriptors of its maps, which are the caller's:
    (sockets, flows, board, ring).

    btf: /sys/kernel/btf/vmlinux. capacity: connections that it can have at once.
    Raises LookupError for what btf has not, OSError that names the command of bpf(2); its
    attribute verifier_log is what the kernel says about the program, if it refused that.
    """
