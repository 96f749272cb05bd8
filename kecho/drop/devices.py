"""Network devices by name and by index, in the namespace of a descriptor: netdevice(7)."""

from __future__ import annotations

import errno
import fcntl
import re
import struct

__all__ = ["LONGEST_NAME", "Devices", "as_name", "check_name"]

SIOCGIFNAME, SIOCGIFINDEX = 0x8910, 0x8933
_REMEMBERED_MOST = 10_000
LONGEST_NAME = 15  # bytes: IFNAMSIZ less the closing NUL
# Of an index without a device, ss prints "if3"; "3" is what getnameinfo(3) makes of it.
_INDEX = re.compile(r"(?:if)?([1-9][0-9]{0,9})", re.ASCII)
# dev_valid_name() in net/core/dev.c: "/", ":" and the kernel's white space, 0xA0 among it.
_REFUSED = frozenset(b"/:\0\t\n\v\f\r \xa0")


def as_name(raw: bytes) -> str:
    """A name is bytes: those that are no UTF-8 become surrogates, so that none is lost."""
    return raw.decode("utf-8", "surrogateescape")


def check_name(text: str) -> str:
    """The text, if a device may be called so. Raises ValueError."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = b""
    if not 0 < len(raw) <= LONGEST_NAME or _REFUSED & set(raw):
        raise ValueError(f"{text[:50]!a} is not the name of an interface")
    return text


class Devices:
    """Remembers what it was told until forget(): devices come, go and are renamed.

    fd: any socket; ioctl(2) answers for its network namespace.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._names: dict[int, str] = {}
        self._indices: dict[str, int | None] = {}

    def forget(self) -> None:
        self._names.clear()
        self._indices.clear()

    def name(self, index: int) -> str:
        """Of the device with this index; "if3", as ss prints it, where there is none."""
        if index not in self._names:
            try:
                reply = fcntl.ioctl(self._fd, SIOCGIFNAME, struct.pack("16sI20x", b"", index))
                self._names[index] = as_name(reply[:16].partition(b"\0")[0])
            except OSError:
                self._names[index] = f"if{index}"
        return self._names[index]

    def is_called(self, index: int, text: str) -> bool:
        """Whether index() of the text is this one. Of a text that somebody else has written: to ask
        for a device by a name that there is not has the kernel look for a module of that name
        (dev_load() in net/core/dev_ioctl.c). Raises ValueError for what is no name, and OSError."""
        is_name = self.name(index) == check_name(text)
        number = _INDEX.fullmatch(text)
        if number is None:
            return is_name
        # Only this index is worth asking for, however many others somebody has written.
        return (is_name or int(number[1]) == index) and self.index(text) == index

    def index(self, text: str) -> int | None:
        """What name() prints, back: a device's name first, and only without such a device "if3"
        or "3" for an index. A device may be called "5", and sockets outlive theirs. None: neither.
        Raises ValueError for what is no name, and OSError."""
        if text not in self._indices:
            if len(self._indices) == _REMEMBERED_MOST:
                self._indices.clear()
            raw = check_name(text).encode("utf-8", "surrogateescape")
            try:
                reply = fcntl.ioctl(self._fd, SIOCGIFINDEX, struct.pack("16s24x", raw))
                self._indices[text] = struct.unpack_from("=i", reply, 16)[0]
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                number = _INDEX.fullmatch(text)
                self._indices[text] = int(number[1]) if number else None
        return self._indices[text]
