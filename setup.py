"""The extension modules; everything static is in pyproject.toml.

Switches (environment): KECHO_SANITIZE=address|thread, KECHO_DEBUG=1,
KECHO_ANNOTATE=1 (HTML under build/annotate), KECHO_WERROR=1 (warnings are errors).
Each is a kind of build with its own generated C, so that switching rebuilds nothing.
"""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("KECHO_SANITIZE", "")
DEBUG = os.environ.get("KECHO_DEBUG") == "1"
ANNOTATE = os.environ.get("KECHO_ANNOTATE") == "1"
WERROR = os.environ.get("KECHO_WERROR") == "1"

if SANITIZE not in ("", "address", "thread"):
    sys.exit(f"setup.py: KECHO_SANITIZE is 'address' or 'thread', not {SANITIZE!r}")

# Python's own flags come first: -fwrapv hides signed overflow from UBSan,
# -DNDEBUG disables assert(). Both are undone where bugs are looked for.
CHECKED = ["-g3", "-fno-omit-frame-pointer", "-fno-wrapv", "-UNDEBUG"]
if SANITIZE == "address":
    kind = "asan"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    optimise = ["-O1", *CHECKED, *sanitizers]
elif SANITIZE == "thread":
    kind = "tsan"
    sanitizers = ["-fsanitize=thread"]
    optimise = ["-O1", *CHECKED, *sanitizers]
else:
    kind = "debug" if DEBUG else "annotate" if ANNOTATE else "werror" if WERROR else "release"
    sanitizers = []
    # _FORTIFY_SOURCE, a default of some distributions, warns without optimisation.
    optimise = ["-O0", *CHECKED, "-U_FORTIFY_SOURCE"] if DEBUG else ["-O2", "-g"]

WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if WERROR else [])]
GENERATED = Path("build", kind, "cython")


def sources(directory):
    return sorted(str(p) for p in Path(directory).glob("*") if p.suffix in (".pyx", ".c"))


def extension(name, files):
    return Extension(
        name,
        files,
        include_dirs=["ext"],
        depends=["setup.py", *sorted(str(p) for p in Path("ext").rglob("*.[hp]*"))],
        extra_compile_args=["-std=gnu11", "-fvisibility=hidden", *WARNINGS, *optimise],
        extra_link_args=["-pthread", *sanitizers],
    )


def generate(extensions):
    """Cythonize; a performance hint (a lost noexcept or nogil, say) is an error."""
    # Cython follows the .pyx and .pxd files, not the directives below.
    stale = Path("setup.py").stat().st_mtime
    if any(c.stat().st_mtime < stale for c in GENERATED.rglob("*.c")):
        shutil.rmtree(GENERATED)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            modules = cythonize(
                extensions,
                include_path=["ext"],
                build_dir=str(GENERATED),
                annotate=ANNOTATE,
                # Debuggers and sanitizers then name lines of the .pyx.
                emit_linenums=kind in ("debug", "asan", "tsan"),
                compiler_directives={
                    "language_level": 3,
                    "boundscheck": False,
                    "cdivision": True,
                    "embedsignature": True,
                    "freethreading_compatible": True,
                    "initializedcheck": False,
                    "wraparound": False,
                },
            )
    finally:
        sys.stderr.write(messages.getvalue())
    if "performance hint:" in messages.getvalue():
        shutil.rmtree(GENERATED)  # or the next run would find it up to date
        sys.exit("setup.py: Cython gave the performance hints above, which are errors here")
    return modules


WINGS = {
    "server": ["engine", "udp", "bpf", "sandbox"],
    "bench": ["loadgen"],
    "drop": ["sockdiag"],
}
modules = [
    extension(f"kecho.{wing}._{name}", sources(f"ext/{name}"))
    for wing, names in WINGS.items()
    for name in names
]
if SANITIZE:
    # Built by the same commands as the engine: if its planted bugs are
    # reported, the engine's would be.
    modules.append(extension("canary", ["tests/sanitizers/canary.pyx"]))

setup(ext_modules=generate(modules))
