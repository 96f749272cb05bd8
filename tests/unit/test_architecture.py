"""Who may import whom: the rules of ARCHITECTURE.md, read from the sources."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.python_only

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kecho"
NATIVE = ROOT / "ext"


def modules() -> dict[str, Path]:
    """Dotted name below kecho -> file; of a native module its declarations."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py*"))
        if path.suffix in (".py", ".pyi")
    }


def imports(path: Path) -> Iterator[str]:
    """Every module or name that it imports, absolute, wherever the statement stands."""
    package = ["kecho", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of_ours(path: Path) -> set[str]:
    """The modules below kecho that it imports, or from which it imports a name."""
    known = modules()
    found = set()
    for imported in imports(path):
        if imported.split(".")[0] == "kecho":
            below = imported.removeprefix("kecho.")
            found.add(below if below in known else below.rpartition(".")[0] or "__init__")
    return found


def users_of(module: str) -> set[str]:
    return {
        name
        for name, path in modules().items()
        if module in {one.rpartition(".")[2] for one in imports_of_ours(path)}
    }


def native_sources(*suffixes: str) -> list[Path]:
    return [path for path in sorted(NATIVE.rglob("*")) if path.suffix in suffixes]


def part_of(path: Path) -> str:
    """The folder of ext/ that a native source is in."""
    return path.relative_to(NATIVE).parts[0]


def without_comments(path: Path) -> str:
    """Cython source without comments and docstrings."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
    return re.sub(r"#.*", "", text)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports_of_ours(path) for name, path in modules().items()}
    assert set().union(*graph.values()) <= graph.keys()
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_room_imports_itself_by_way_of_others() -> None:
    """A room is a folder of a wing, or a module that is in none."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        known = graph.setdefault(room_of(name), set())
        known |= {room_of(one) for one in imports_of_ours(path)} - {room_of(name)}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def room_of(module: str) -> str:
    folder = module.rpartition(".")[0]
    return folder if folder.count(".") or folder == "system" else module


# The wings, and which others each may know. Modules beside them in kecho/ know none, but for the
# two by which the server is found: `import kecho` and `python -m kecho`.
WINGS = {"system": set(), "drop": {"system"}, "bench": {"system", "drop"}, "server": {"system"}}
DOORS = {"__init__": {"server"}, "__main__": {"server"}}


def wings_known(name: str, path: Path) -> set[str]:
    """The wings that a module imports from; __init__ for what is imported from kecho itself."""
    found = {imported.partition(".")[0] for imported in imports_of_ours(path)}
    return (found & {*WINGS, "__init__"}) - {name.partition(".")[0]}


@pytest.mark.parametrize("name", modules())
def test_a_module_knows_only_the_wings_that_its_own_may_know(name: str) -> None:
    wing = name.partition(".")[0]
    allowed = DOORS.get(name) or WINGS.get(wing, set())
    assert wings_known(name, modules()[name]) <= allowed


def test_the_benchmark_uses_the_dropper_for_time_wait_alone() -> None:
    users = {
        name
        for name, path in modules().items()
        if name.startswith("bench.") and "drop" in wings_known(name, path)
    }
    assert users == {"bench.timewait"}


# Of the server, from what knows nothing of the others to what a person calls.
FLOORS = ["config", "sockets", "run", "server", "foreground", "cli"]


def test_arrows_go_down_from_the_command_to_the_options() -> None:
    for name, path in modules().items():
        parts = name.split(".")
        if parts[0] == "server" and len(parts) > 1 and parts[1] in FLOORS:
            above = FLOORS[FLOORS.index(parts[1]) + 1 :]
            known = imports_of_ours(path)
            assert not [one for one in known for floor in above if f"server.{floor}" in one], name


@pytest.mark.parametrize("native", ["_engine", "_udp"])
def test_only_a_servers_run_knows_the_engine(native: str) -> None:
    assert users_of(native) == {"server.run"}


def test_only_sockmap_knows_bpf() -> None:
    assert users_of("_bpf") == {"server.engines.sockmap"}


def test_only_the_droppers_diag_knows_netlink() -> None:
    assert users_of("_sockdiag") == {"drop.diag"}


def test_only_privileges_and_the_sandbox_know_how_to_give_them_up() -> None:
    assert users_of("_sandbox") == {
        "server.confinement.privileges",
        "server.confinement.sandbox",
    }


def test_only_directories_makes_renames_or_removes_files() -> None:
    changing = re.compile(
        r"\bO_(?:CREAT|TMPFILE)\b|\.(?:unlink|rmdir|write_text|write_bytes|touch|mkfifo|makedirs)\("
        r"|\bos\.(?:replace|rename|mkdir|mknod|link|symlink)\(|\.mkdir\(|\btempfile\b|\bshutil\b"
    )
    users = {name for name, path in modules().items() if changing.search(path.read_text())}
    assert users == {"system.directories"}


def test_what_is_printed_goes_through_one_place() -> None:
    """command escapes what it prints, logs what it writes; a progress bar is made of escapes."""
    printing = re.compile(r"\bprint\(|\bstd(?:out|err)\.write\(|\bprint_exc")
    users = {name for name, path in modules().items() if printing.search(path.read_text())}
    assert users - {"__init__"} == {"command", "drop.progress"}


def test_only_pictures_know_matplotlib() -> None:
    users = {
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == "matplotlib" for imported in imports(path))
    }
    assert users <= {"bench.output.axes", "bench.output.plot"}


def test_native_code_knows_nothing_of_the_package() -> None:
    sources = native_sources(".pyx", ".pxd", ".pxi")
    assert sources
    for path in sources:
        named = re.findall(r"^\s*(?:from|import|cimport)\s+(\S+)", without_comments(path), re.M)
        assert not [one for one in named if one.split(".")[0] == "kecho"], path


@pytest.mark.parametrize("part", ["engine", "udp"])
def test_only_the_face_of_a_native_part_lets_go_of_the_gil(part: str) -> None:
    users = {
        path.name
        for path in native_sources(".pyx", ".pxd", ".pxi")
        if part_of(path) == part and re.search(r"\bwith\s+nogil\b", without_comments(path))
    }
    assert users == {f"{part}.pyx"}


def test_a_native_part_shares_only_kernel_and_common_with_the_others() -> None:
    for path in native_sources(".pyx", ".pxd", ".pxi"):
        named = {one.split(".")[0] for one in cimported(path)}
        own = {part.name for part in NATIVE.iterdir()} - {"kernel", "common", part_of(path)}
        assert not own & named, path


def cimported(path: Path) -> set[str]:
    return set(re.findall(r"^\s*(?:from|cimport)\s+(\S+)", without_comments(path), re.M))


# epoll is the ground on which the others stand; accepting is no engine.
ENGINES = sorted(path.parent.name for path in NATIVE.glob("engine/*/face.pxi"))


def test_each_engine_beside_epoll_is_registered_by_one_line() -> None:
    assert ENGINES
    face = (NATIVE / "engine" / "engine.pyx").read_text()
    assert re.findall(r'^include "engine/(\w+)/face.pxi"$', face, re.M) == ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_beside_epoll_is_known_in_its_folder_alone(engine: str) -> None:
    folder = NATIVE / "engine" / engine
    users = {
        path.relative_to(NATIVE)
        for path in native_sources(".pyx", ".pxd", ".pxi")
        if folder not in path.parents
        and any(one.startswith(f"engine.{engine}.") for one in cimported(path))
    }
    assert not users
    for path in native_sources(".h"):
        assert folder in path.parents or f'"engine/{engine}/' not in path.read_text(), path


def test_no_pair_of_c_files_includes_itself_by_way_of_others() -> None:
    graph: dict[Path, set[Path]] = {}
    for path in native_sources(".c", ".h"):
        named = re.findall(r'^#include "([^"]+)"', path.read_text(), re.M)
        pairs = {(path.parent / name).with_suffix("") for name in named}
        graph.setdefault(path.with_suffix(""), set()).update(pairs - {path.with_suffix("")})
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_nothing_native_takes_the_gil() -> None:
    for path in native_sources(".pyx", ".pxd", ".pxi"):
        assert not re.search(r"\bwith\s+gil\b", without_comments(path)), path
    for path in native_sources(".c", ".h"):
        assert not re.search(r"\bPyGILState_|\bPyEval_RestoreThread", path.read_text()), path


def test_every_function_without_the_gil_raises_nothing() -> None:
    # cdef, up to the closing parenthesis of the parameters, and what stands behind it.
    definition = re.compile(
        r"^[ \t]*cdef\b[^\n(]*?(\w+)\(([^()]|\([^()]*\))*\)([^:\n]*):\s*$", re.M
    )
    found = 0
    for path in native_sources(".pyx", ".pxd", ".pxi"):
        for function in definition.finditer(without_comments(path)):
            if re.search(r"\bnogil\b", function[3]):
                found += 1
                assert re.fullmatch(r"\s*noexcept nogil\s*", function[3]), f"{path}: {function[1]}"
    written = sum(
        len(re.findall(r"\bnogil:", without_comments(path)))
        - len(re.findall(r"\bextern from .*\bnogil:|\bwith nogil:", without_comments(path)))
        for path in native_sources(".pyx", ".pxd", ".pxi")
    )
    assert found == written > 0
