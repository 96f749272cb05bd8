"""Plants faults in the code, one at a time, and runs the tests, which should notice each.

    make mutants [ARGS="[--tests DIRECTORY] [--again] [NAME...]"]

The faults are the tables of the .toml files beside this file: `name`; `text`, a piece of the code
under kecho/ or ext/ that is found there once; `replacement`; `suspects`, the test modules that
should notice. Each is built in a copy of the checkout under build/mutants. The suspects run first,
and what `make check` runs in parallel only if all of them pass.

A test has noticed a fault if it fails twice with it and passes three times without it. Results are
kept in build/mutants, those of each directory of tests by themselves: a second run goes on where
the first was ended. The exit status is 1 if a fault was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "mutants"
TREE = BUILT / "tree"
COPIED = (
    "kecho",
    "ext",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)
JOBS = str(3 * len(os.sched_getaffinity(0)))
PASSES_WITHOUT = 3
MOST_FAILURES = 4  # of one run; whoever comes after them may have noticed, too
NO_TESTS = 5  # pytest's exit status
BROKEN = (3, 4)  # those of an internal error and of wrong usage
DEADLINE_S = 1500  # for one run of the tests


@dataclass(frozen=True)
class Fault:
    name: str
    text: str
    replacement: str
    suspects: tuple[str, ...]

    def path(self) -> Path:
        """The file with the text, from the top. Raises LookupError unless it is found once."""
        found = [
            path.relative_to(ROOT)
            for directory in ("kecho", "ext")
            for path in sorted((ROOT / directory).rglob("*.*"))
            if path.suffix in (".py", ".pyx", ".pxd", ".c", ".h")
            for _ in range(path.read_text().count(self.text))
        ]
        if len(found) != 1:
            raise LookupError(f"{self.name}: its text is found {len(found)} times")
        return found[0]


def faults() -> list[Fault]:
    """All of them. Raises LookupError for a text that is not found once, KeyError for a field that
    is missing."""
    found = [
        Fault(one["name"], one["text"], one["replacement"], tuple(one["suspects"]))
        for file in sorted(Path(__file__).parent.glob("*.toml"))
        for one in tomllib.loads(file.read_text())["fault"]
    ]
    for fault in found:
        fault.path()
    return found


def build() -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "2"],
        cwd=TREE,
        check=True,
        stdout=subprocess.DEVNULL,
    )


class Tests:
    """The tests of one checkout, run on the code of another."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout

    def modules(self, names: tuple[str, ...]) -> list[str]:
        return [
            str(path)
            for name in names
            for path in sorted((self.checkout / "tests").rglob(f"{name}.py"))
        ]

    def failing(self, code: Path, tests: list[str], *options: str) -> list[str]:
        """The tests that fail, by their pytest node ids; those that cannot be collected, too."""
        report = BUILT / "report.jsonl"
        report.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "pytest", "-p", "failing_tests"),
            *("-q", "--no-header", "-m", "not alone and not outside"),
            *("-c", str(self.checkout / "pyproject.toml"), "--rootdir", str(self.checkout)),
            *options,
            *tests,
        ]
        environment = os.environ | {
            "PYTHONPATH": f"{code}:{Path(__file__).parent}",
            "KECHO_TEST_REPORT": str(report),
        }
        with open(BUILT / "output.txt", "a") as output:
            try:
                status = subprocess.run(
                    command,
                    cwd=code,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=DEADLINE_S,
                ).returncode
            except subprocess.TimeoutExpired:
                return ["(the tests did not end)"]
        if status in BROKEN:
            raise RuntimeError(f"pytest ended with status {status}: see {BUILT}/output.txt")
        if not report.exists():
            # pytest-timeout ends the whole process of a test that hangs.
            return [] if status in (0, NO_TESTS) else [f"(pytest ended with status {status})"]
        return list(dict.fromkeys(json.loads(line) for line in report.read_text().splitlines()))

    def by_whom_noticed(self, fault: Fault) -> str | None:
        """The test that notices the fault, which the code of TREE has; None: it is missed."""
        parallel = ("-n", JOBS, "--dist", "worksteal", f"--maxfail={MOST_FAILURES}")
        suspects = self.modules(fault.suspects)
        for tests in ([suspects] if suspects else []) + [[str(self.checkout / "tests")]]:
            for test in self.failing(TREE, tests, *parallel):
                one = [str(self.checkout / test)]
                if self.failing(TREE, one) and not any(
                    self.failing(ROOT, one) for _ in range(PASSES_WITHOUT)
                ):
                    return test
        return None


def planted(chosen: list[Fault]) -> Iterator[Fault]:
    """Each fault in turn, while it is built in TREE."""
    if TREE.exists():
        shutil.rmtree(TREE)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, TREE / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            TREE.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, TREE / name)
    for fault in chosen:
        target = TREE / fault.path()
        before = target.read_text()
        target.write_text(before.replace(fault.text, fault.replacement))
        try:
            build()
            yield fault
        finally:
            target.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="of a fault; by default all")
    parser.add_argument(
        "--tests",
        metavar="DIRECTORY",
        type=Path,
        action="append",
        help="a checkout whose tests are run on this code; may be given again (default: this one)",
    )
    parser.add_argument("--again", action="store_true", help="forget the results there are")
    options = parser.parse_args()
    every = faults()
    if unknown := {*options.names} - {fault.name for fault in every}:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    chosen = [fault for fault in every if not options.names or fault.name in options.names]
    checkouts = [path.resolve() for path in options.tests or [ROOT]]

    BUILT.mkdir(parents=True, exist_ok=True)
    kept = BUILT / "results.json"
    results: dict[str, dict[str, str | None]] = {}
    if kept.exists() and not options.again:
        results = json.loads(kept.read_text())
    is_missing = [
        fault
        for fault in chosen
        if any(fault.name not in results.get(str(path), {}) for path in checkouts)
    ]
    for fault in planted(is_missing) if is_missing else ():
        for path in checkouts:
            of_these = results.setdefault(str(path), {})
            if fault.name in of_these:
                continue
            by_whom = of_these[fault.name] = Tests(path).by_whom_noticed(fault)
            verdict = "MISSED" if by_whom is None else f"caught  by {by_whom}"
            print(f"{path.name}: {fault.name}: {verdict}", flush=True)
            kept.write_text(json.dumps(results, indent=1))

    status = 0
    for path in checkouts:
        of_these = results.get(str(path), {})
        missed = [fault.name for fault in chosen if of_these[fault.name] is None]
        status |= bool(missed)
        print(f"{path}: {len(chosen) - len(missed)} of {len(chosen)} caught")
        for name in missed:
            print(f"  missed: {name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
