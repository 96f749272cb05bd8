"""A directory in which somebody has planted modules that Python, or kecho, might import."""

from __future__ import annotations

from pathlib import Path

# kecho itself, what it imports of the standard library, early and late, and what may be installed.
NAMES = (
    *(
        "argparse",
        "array",
        "bisect",
        "codecs",
        "collections",
        "contextlib",
        "ctypes",
        "dataclasses",
    ),
    *("encodings", "enum", "errno", "fcntl", "functools", "gettext", "inspect", "ipaddress"),
    *("json", "locale", "logging", "math", "multiprocessing", "os", "pathlib", "pickle"),
    *("platform", "random", "re", "resource", "select", "selectors", "shlex", "shutil", "signal"),
    *("site", "socket", "ssl", "statistics", "string", "struct", "subprocess", "tempfile"),
    *("textwrap", "threading", "traceback", "types", "typing", "uuid", "warnings", "weakref"),
    *("zlib", "kecho", "rich", "matplotlib", "_engine", "_sockdiag", "usercustomize"),
)


def plant(directory: Path) -> Path:
    """Each module, when it is imported, leaves a file in there with its name; the file."""
    trace = directory / "imported"
    text = f"with open({str(trace)!r}, 'a') as file:\n    file.write(__name__ + '\\n')\n"
    for name in NAMES:
        path = directory / f"{name}.py"
        if name == "kecho":
            path = directory / name / "__init__.py"
            path.parent.mkdir()
        path.write_text(text)
    return trace
