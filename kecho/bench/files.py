"""Files of results: whole or not at all, and no surprise after the run."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

__all__ = ["check_writable", "reason_of", "write_whole"]


def check_writable(path: str | None) -> None:
    """Raises what write_whole() would, as far as that can be told before. None, -: nothing."""
    if not path or path == "-":
        return
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    temporary = _temporary(path)
    with open(temporary, "w"):
        os.unlink(temporary)


def write_whole(path: str, content: str) -> None:
    if _is_special(path):
        with open(path, "w") as out:
            out.write(content)
        return
    temporary = _temporary(path)
    try:
        with open(temporary, "w") as out:
            out.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _is_special(path: str) -> bool:
    """/dev/stderr, a pipe: nothing that a file could take the place of."""
    return os.path.exists(path) and not os.path.isfile(path)


def _temporary(path: str) -> str:
    return f"{path}.{os.getpid()}.tmp"


def reason_of(error: OSError | ValueError) -> str:
    """Without the file's name, which whoever says it puts in front."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
