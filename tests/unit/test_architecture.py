"""Who may know whom: the layers of ARCHITECTURE.md, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.python_only

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kecho"
NATIVE = ROOT / "ext"

# What a module may import from the package; a module that is not named here, of the others.
ALLOWED = {
    "directories": set(),
    "errors": set(),
    "printable": set(),
    "_version": set(),
    "stats": set(),
    "cgroups": set(),
    "cpus": {"cgroups"},
    "tuning": set(),
    "limits": {"tuning"},
    "tuned": {"errors", "tuning", "tuning_state", "uninterrupted"},
    "tuning_state": {"directories", "errors"},
    "uninterrupted": set(),
    "options": {"errors"},
    "command": {"journal", "null", "options", "printable"},
    "journal": set(),
    "null": set(),
    "background": set(),
    "names": {"background"},
    "addresses": {"errors", "names"},
    "listen_unix": {"directories", "errors", "options", "privileges"},
    "logs": {"printable"},
    "access": {"errors"},
    "netstat": set(),
    "seldom": set(),
    "busy_poll": {"config", "cpus"},
    "kernel": set(),
    "steering": {"config", "cpus", "listen", "listen_udp"},
    "watch": {"addresses", "config", "inherited", "netstat", "seldom", "tuning"},
    "public": {"options"},
    "socket_memory": {"cgroups", "config", "tuning"},
    "config": {"access", "errors", "options", "public"},
    "inherited": {"errors"},
    "listen": {
        *{"addresses", "errors", "config", "inherited", "listen_unix", "socket_memory", "tuning"},
    },
    "listen_udp": {"addresses", "errors", "config", "listen"},
    "run": {
        *{"access", "addresses", "errors", "config", "listen_udp", "listen_unix", "stats", "cpus"},
        *{"socket_memory", "steering"},
        *{"busy_poll", "cgroups", "io_uring", "sockmap", "tuning", "watch", "_engine", "_udp"},
    },
    "io_uring": {"config", "errors", "kernel"},
    "sockmap": {"config", "errors", "kernel", "tuning", "_bpf"},
    "server": {"addresses", "errors", "config", "stats", "run"},
    "foreground": {"errors", "config", "names", "stats", "server"},
    "privileges": {"errors", "_sandbox"},
    "sandbox": {"directories", "_sandbox"},
    "systemd": set(),
    "confine": {"null", "options", "privileges", "sandbox"},
    "cli": {
        *{"addresses", "errors", "options", "config", "command", "stats", "tuning"},
        *{"confine", "journal", "logs", "printable", "privileges", "public", "systemd"},
        *{"server", "foreground", "_version"},
    },
    "__main__": {"cli"},
    **{
        f"drop.{name}": set()
        for name in (
            *("__init__", "__main__", "api", "devices", "ending", "filters", "lines", "netns"),
            *("outcome", "pairs", "process", "progress", "ranges", "states", "table"),
        )
    },
    "drop.sockets": {"_sockdiag"},
    "drop.config": {"options"},
    "drop.failure": {"command"},
    "drop.listing": {"command", "printable"},
    "drop.place": {"command"},
    "drop.search": {"command"},
    "drop.work": {"command", "printable"},
    "drop.cli": {"errors", "options", "command", "_version"},
    "__init__": {"errors", "config", "stats", "server", "foreground", "_version"},
}


def modules() -> dict[str, Path]:
    """Dotted name below kecho -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module or name that it imports, absolute, wherever the statement stands."""
    package = ["kecho", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of_ours(name: str, path: Path) -> set[str]:
    """The modules directly below kecho that it imports, or names of kecho/__init__.py."""
    return {
        imported.split(".")[1] if "." in imported else "__init__"
        for imported in imports(name, path)
        if imported.split(".")[0] == "kecho"
    }


def native_sources(*suffixes: str) -> list[Path]:
    return [path for path in sorted(NATIVE.rglob("*")) if path.suffix in suffixes]


def without_comments(path: Path) -> str:
    """Cython source without comments and docstrings."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
    return re.sub(r"#.*", "", text)


# Of the benchmark: what a module imports from kecho.bench. From the rest of the package each may
# import the modules that know nothing of a server.
BENCH = {
    "bench.__init__": {"histogram", "result", "runner", "target", "workload"},
    "bench.__main__": {"cli"},
    "bench.workload": set(),
    "bench.histogram": set(),
    "bench.environment": set(),
    "bench.target": {"workload"},
    "bench.procfs": set(),
    "bench.place": set(),
    "bench.series": {"result"},
    "bench.signals": set(),
    "bench.files": set(),
    "bench.witness": {"procfs", "target"},
    "bench.reading": {"workload"},
    "bench.amounts": set(),
    "bench.together": set(),
    "bench.result": {"histogram", "reading", "together"},
    "bench.pace": {"histogram"},
    "bench.verdict": {"amounts", "histogram", "pace", "result", "witness", "workload"},
    "bench.crew": {"target", "workload"},
    "bench.probe": {"crew", "target", "workload"},
    "bench.processes": {"crew", "signals", "target", "workload"},
    "bench.runner": {
        *{"crew", "environment", "histogram", "preflight", "processes", "result", "target"},
        *{"probe", "procfs", "series", "signals", "timewait", "verdict"},
        *{"witness", "workload"},
    },
    "bench.preflight": {"workload"},
    "bench.timewait": {"target"},
    "bench.report": {"amounts", "histogram", "result"},
    "bench.plot": {"amounts", "histogram", "result", "together"},
    "bench.condition": {"result"},
    "bench.compare": {"amounts", "condition", "result", "together"},
    "bench.search": {"amounts", "condition", "pace", "result", "verdict"},
    "bench.page": {"plot", "report", "result", "together"},
    "bench.spawn": set(),
    "bench.progress": {"amounts", "runner"},
    "bench.subcommands": {"compare", "condition", "files", "page", "plot", "reading", "result"},
    "bench.delivery": {"files", "reading", "report", "result", "search", "subcommands"},
    "bench.cli": {
        *{"amounts", "condition", "delivery", "place", "preflight", "progress", "report", "result"},
        *{"runner", "search", "signals", "spawn", "subcommands", "target", "workload"},
    },
}
FOR_BENCH = {
    *{
        "errors",
        "options",
        "background",
        "cgroups",
        "command",
        "cpus",
        "directories",
        "names",
        "printable",
        "tuning",
        "limits",
        "tuned",
        "netstat",
    },
    "_version",
}


@pytest.mark.parametrize("name", BENCH)
def test_a_module_of_the_benchmark_imports_only_from_the_layers_below_it(name: str) -> None:
    found = set(imports(name, modules()[name]))
    own = {one.split(".")[2] for one in found if re.match(r"kecho\.bench\.", one)}
    more = {"bench.crew": {"_loadgen"}, "bench.timewait": {"drop"}}.get(name, set())
    assert own <= BENCH[name]
    assert imports_of_ours(name, modules()[name]) <= FOR_BENCH | {"bench"} | more


@pytest.mark.parametrize("name", ALLOWED)
def test_a_module_imports_only_from_the_layers_below_it(name: str) -> None:
    of_its_own = {"drop"} if name.startswith("drop.") else set()
    assert imports_of_ours(name, modules()[name]) <= ALLOWED[name] | of_its_own


def test_every_module_has_its_layer() -> None:
    assert modules().keys() == ALLOWED.keys() | BENCH.keys()


@pytest.mark.parametrize("native", ["_engine", "_udp"])
def test_only_a_servers_run_knows_the_engine(native: str) -> None:
    users = {name for name, path in modules().items() if native in imports_of_ours(name, path)}
    assert users == {"run"}


def test_only_sockmap_knows_bpf() -> None:
    users = {name for name, path in modules().items() if "_bpf" in imports_of_ours(name, path)}
    assert users == {"sockmap"}


def test_only_the_droppers_sockets_know_netlink() -> None:
    users = {name for name, path in modules().items() if "_sockdiag" in imports_of_ours(name, path)}
    assert users == {"drop.sockets"}


def test_only_privileges_and_the_sandbox_know_how_to_give_them_up() -> None:
    users = {name for name, path in modules().items() if "_sandbox" in imports_of_ours(name, path)}
    assert users == {"privileges", "sandbox"}


def test_only_directories_makes_renames_or_removes_files() -> None:
    changing = re.compile(
        r"\bO_(?:CREAT|TMPFILE)\b|\.(?:unlink|rmdir|write_text|write_bytes|touch|mkfifo|makedirs)\("
        r"|\bos\.(?:replace|rename|mkdir|mknod|link|symlink)\(|\.mkdir\(|\btempfile\b|\bshutil\b"
    )
    users = {name for name, path in modules().items() if changing.search(path.read_text())}
    assert users == {"directories"}


def test_what_is_printed_goes_through_one_place() -> None:
    """command escapes what it prints, logs what it writes; a progress bar is made of escapes."""
    printing = re.compile(r"\bprint\(|\bstd(?:out|err)\.write\(|\bprint_exc")
    users = {name for name, path in modules().items() if printing.search(path.read_text())}
    assert users - {"__init__"} == {"command", "drop.progress"}


def test_only_plot_knows_matplotlib() -> None:
    users = {
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == "matplotlib" for imported in imports(name, path))
    }
    assert users <= {"bench.plot"}


def test_bench_does_not_know_the_server() -> None:
    for name, path in modules().items():
        if name.startswith("bench."):
            of_the_server = {
                "__init__",
                "server",
                "run",
                "foreground",
                "Server",
                "serve",
                "_engine",
                "_udp",
            }
            assert not imports_of_ours(name, path) & of_the_server, name


def test_native_code_knows_nothing_of_the_package() -> None:
    sources = native_sources(".pyx", ".pxd")
    assert sources
    for path in sources:
        named = re.findall(r"^\s*(?:from|import|cimport)\s+(\S+)", without_comments(path), re.M)
        assert not [one for one in named if one.split(".")[0] == "kecho"], path


@pytest.mark.parametrize("part", ["engine", "udp"])
def test_only_the_face_of_a_native_part_lets_go_of_the_gil(part: str) -> None:
    users = {
        path.name
        for path in native_sources(".pyx", ".pxd")
        if path.parent.name == part and re.search(r"\bwith\s+nogil\b", without_comments(path))
    }
    assert users == {f"{part}.pyx"}


def test_a_native_part_shares_only_kernel_and_common_with_the_others() -> None:
    for path in native_sources(".pyx", ".pxd"):
        named = re.findall(r"^\s*(?:from|cimport)\s+(\w+)", without_comments(path), re.M)
        own = {part.name for part in NATIVE.iterdir()} - {"kernel", "common", path.parent.name}
        assert not own & set(named), path


def test_nothing_native_takes_the_gil() -> None:
    for path in native_sources(".pyx", ".pxd"):
        assert not re.search(r"\bwith\s+gil\b", without_comments(path)), path
    for path in native_sources(".c", ".h"):
        assert not re.search(r"\bPyGILState_|\bPyEval_RestoreThread", path.read_text()), path


def test_every_function_without_the_gil_raises_nothing() -> None:
    # cdef, up to the closing parenthesis of the parameters, and what stands behind it.
    definition = re.compile(
        r"^[ \t]*cdef\b[^\n(]*?(\w+)\(([^()]|\([^()]*\))*\)([^:\n]*):\s*$", re.M
    )
    found = 0
    for path in native_sources(".pyx", ".pxd"):
        for function in definition.finditer(without_comments(path)):
            if re.search(r"\bnogil\b", function[3]):
                found += 1
                assert re.fullmatch(r"\s*noexcept nogil\s*", function[3]), f"{path}: {function[1]}"
    written = sum(
        len(re.findall(r"\bnogil:", without_comments(path)))
        - len(re.findall(r"\bextern from .*\bnogil:|\bwith nogil:", without_comments(path)))
        for path in native_sources(".pyx", ".pxd")
    )
    assert found == written > 0
