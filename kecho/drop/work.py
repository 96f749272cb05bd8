"""What the command does: lists, drops, drops again, and says what came of it."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Any

from .. import command
from . import outcome as outcomes
from .config import PASSES_MOST, DropConfig
from .filters import Filter
from .outcome import Outcome, Result, exit_status
from .pairs import Pair
from .process import holders, inodes_of
from .progress import Progress
from .sockets import Diag, Socket, is_unavailable

__all__ = ["PROGRAM", "work"]

PROGRAM = "kecho.drop"


def work(config: DropConfig, pairs: list[Pair] | None, wanted: Filter) -> int:
    try:
        diag = Diag(config.netns)
    except OSError as error:
        return _say_system(error, config.netns)
    with diag:
        try:
            if config.list:
                return _list(config, diag, pairs, wanted)
            return _Run(config, diag, pairs, wanted).run()
        except _KernelError as error:
            return _say_system(error.cause, None, error.hint)


class _KernelError(Exception):
    """An OSError of the netlink socket, as opposed to one of stdout."""

    def __init__(self, cause: OSError, hint: str = "") -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.hint = hint  # how to get the permission, if not by CAP_NET_ADMIN


def _say_system(error: OSError, netns: str | None, hint: str = "") -> int:
    text = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES):
        if netns:
            hint = f"--netns {netns} needs CAP_SYS_ADMIN: use sudo"
        hint = hint or outcomes.NO_PERMISSION
        command.say_error(PROGRAM, f"{text}: {hint}")
        return outcomes.EXIT_NO_PERMISSION
    if netns and error.errno in (errno.ENOENT, errno.EINVAL):
        command.say_error(PROGRAM, f"--netns: {command.one_line(text)}")
        return command.EXIT_USAGE
    if is_unavailable(error):
        command.say_error(PROGRAM, f"{text}: {outcomes.NO_SOCK_DIAG}")
        return outcomes.EXIT_UNSUPPORTED
    command.say_error(PROGRAM, text)
    return outcomes.EXIT_NOT_DROPPED


def _with_pids(wanted: Filter, pids: Sequence[str]) -> Filter:
    """The filter, with the sockets that these processes hold now."""
    if not pids:
        return wanted
    inodes: set[int] = set()
    for pid in pids:
        try:
            inodes |= inodes_of(int(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended, and holds nothing
        except OSError as error:
            raise _KernelError(
                OSError(error.errno, f"--pid {pid}: its descriptors cannot be read"),
                "another user's processes need CAP_SYS_PTRACE: use sudo",
            ) from None
    values = {described.name: getattr(wanted, described.name) for described in fields(wanted)}
    return Filter(**{**values, "inodes": frozenset(inodes)})


def _find(config: DropConfig, diag: Diag, pairs: list[Pair] | None, wanted: Filter) -> list[Socket]:
    try:
        return diag.find(
            _with_pids(wanted, config.pid),
            pairs=pairs,
            listeners=config.listeners or (config.list and "listen" in wanted.states),
        )
    except OSError as error:
        raise _KernelError(error) from None


def _list(config: DropConfig, diag: Diag, pairs: list[Pair] | None, wanted: Filter) -> int:
    found = _find(config, diag, pairs, wanted)
    held = holders(one.inode for one in found if one.inode)
    if config.json:
        rows = []
        for one in found:
            row = {name: value for name, value in one._asdict().items() if name != "identity"}
            row["uid"] = one.owner
            holder = held.get(one.inode)
            row["process"] = holder._asdict() if holder else None
            rows.append(row)
        print(json.dumps({"sockets": rows}))
    elif not config.quiet and found:
        lines = [("STATE", "LOCAL", "PEER", "RECV-Q", "SEND-Q", "TIMER", "PROCESS")]
        for one in found:
            holder = held.get(one.inode)
            timer = "-" if one.timer == "off" else f"{one.timer} {one.expires_ms / 1000:.1f}s"
            if one.retransmissions:
                timer += f" ({one.retransmissions})"
            process = f"{holder.pid}/{command.one_line(holder.name)}" if holder else "-"
            queues = str(one.receive_queue), str(one.send_queue)
            ends = str(one.pair.local), str(one.pair.peer)
            lines.append((one.state, *ends, *queues, timer, process))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    return 0 if found else outcomes.EXIT_NOTHING


class _Run:
    """Dropping: once, until nothing is left, or again and again."""

    def __init__(
        self, config: DropConfig, diag: Diag, pairs: list[Pair] | None, wanted: Filter
    ) -> None:
        self.config, self.diag, self.pairs, self.wanted = config, diag, pairs, wanted
        self.counts: Counter[str] = Counter()
        self.seen: dict[tuple[str, int | None], Outcome] = {}
        self.rows: list[dict[str, Any]] = []
        self.is_incomplete = False
        self.is_interrupted = False
        self.is_dropping = False

    def run(self) -> int:
        with self._orderly_interrupt():
            try:
                self._passes()
            except KeyboardInterrupt:
                self.is_interrupted = True
        interrupted = self.is_interrupted and self.config.watch is None
        self._report("interrupted: " if interrupted else "")
        if interrupted:
            raise KeyboardInterrupt
        return self._status()

    @contextmanager
    def _orderly_interrupt(self) -> Iterator[None]:
        """SIGINT ends a pass after its batch, so that the fate of each socket is told; a second
        one, or one between two passes, ends it at once."""
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or before is not signal.default_int_handler:
            yield  # it is ignored, or another's
            return
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_dropping or self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        self.diag.stop_soon()

    def _passes(self) -> None:
        for number in range(sys.maxsize if self.config.watch is not None else PASSES_MOST):
            if number and self.config.watch is not None:
                time.sleep(self.config.watch)
            dropped = self._pass(number)
            self.is_dropping = False
            if self.is_interrupted:
                return
            if self.config.watch is not None:
                if {outcomes.EXIT_NO_PERMISSION, outcomes.EXIT_UNSUPPORTED} & {self._status()}:
                    return
                if self.config.json:
                    self._print_json()
                sys.stdout.flush()
            elif not self.config.until_empty or not dropped:
                return
        self.is_incomplete = True

    def _pass(self, number: int) -> int:
        """One look and what follows from it; how many were dropped."""
        dropped = 0
        with Progress(self.config.quiet or self.config.json) as progress:
            for one in self._outcomes(progress):
                self.is_dropping = True
                progress.advance()
                # A later pass over pairs that the first has dropped is not to say "gone".
                if one.result is Result.GONE and number and self.counts[Result.DROPPED]:
                    continue
                self.counts[one.result] += 1
                self.seen.setdefault((one.result, one.errno), one)
                dropped += one.result is Result.DROPPED
                if self.config.json:
                    self.rows.append(one.to_dict())
                elif not self.config.quiet:
                    progress.say(_line(one, self.config.dry_run))
        return dropped

    def _outcomes(self, progress: Progress) -> Iterator[Outcome]:
        options: Any = {"listeners": self.config.listeners, "dry": self.config.dry_run}
        try:
            if self.pairs is not None:
                progress.start(len(self.pairs))
                wanted = _with_pids(self.wanted, self.config.pid)
                yield from self.diag.drop_pairs(self.pairs, wanted, **options)
                return
            found = _find(self.config, self.diag, None, self.wanted)
            progress.start(len(found))
            for one in self.diag.drop_sockets(found, **options):
                # Nobody asked for a socket that ended between the look and the drop.
                if one.result is not Result.GONE or len(found) == 1:
                    yield one
        except OSError as error:
            raise _KernelError(error) from None

    def _status(self) -> int:
        status = exit_status(self.seen.values())
        return outcomes.EXIT_NOT_DROPPED if self.is_incomplete and status < 3 else status

    def _print_json(self) -> None:
        print(json.dumps({"outcomes": self.rows, "counts": dict(self.counts)}))
        self.rows = []
        self.counts.clear()

    def _report(self, prefix: str) -> None:
        """The summary, and each kind of failure once."""
        errors = {one.errno for one in self.seen.values()}
        if errno.EPERM in errors or errno.EACCES in errors:
            command.say_error(PROGRAM, outcomes.NO_PERMISSION)
        if any(one.result is Result.UNSUPPORTED for one in self.seen.values()):
            command.say_error(PROGRAM, outcomes.CANNOT)
        if self.is_incomplete:
            command.say_error(PROGRAM, f"more came in each of {PASSES_MOST} passes")
        if self.config.json:
            if self.config.watch is None or self.rows:
                self._print_json()
        elif not self.config.quiet and sys.stderr is not None:
            words = {"dropped": "would be dropped"} if self.config.dry_run else {}
            parts = [f"{count:,} {words.get(name, name)}" for name, count in self.counts.items()]
            print(f"{PROGRAM}: {prefix}{', '.join(parts) or 'nothing matches'}", file=sys.stderr)


def _line(one: Outcome, dry: bool) -> str:
    word = "would drop" if dry and one.result is Result.DROPPED else str(one.result)
    state = f"  {one.socket.state}" if one.socket else ""
    reason = f"  ({one.reason})" if one.reason and one.result is not Result.DROPPED else ""
    return f"{word:9}  {one.pair}{state}{reason}"
