"""What the command does: lists, drops, drops again, and says what came of it."""

from __future__ import annotations

import errno
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
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
    """pairs: None if the filter says it all; none at all match nothing, and end it."""
    if pairs == []:
        config = replace(config, watch=None, until_empty=False)
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
        except OSError as error:
            return _say_lost(error)


class _KernelError(Exception):
    """An OSError of the netlink socket, as opposed to one of stdout."""

    def __init__(self, cause: OSError, hint: str = "") -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.hint = hint  # how to get the permission, if not by CAP_NET_ADMIN


def _say_lost(error: OSError) -> int:
    """stdout: its reader has enough, or its disk is full."""
    if sys.stdout is not None:
        command.discard(sys.stdout)
    if error.errno != errno.EPIPE:
        command.say_error(PROGRAM, f"standard output: {error.strerror or error}")
    return outcomes.EXIT_NOT_DROPPED


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


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
            ends = command.one_line(str(one.pair.local)), command.one_line(str(one.pair.peer))
            lines.append((one.state, *ends, *queues, timer, process))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    _flush()
    return 0 if found else outcomes.EXIT_NOTHING


class _Run:
    """Dropping: once, until nothing is left, or again and again."""

    def __init__(
        self, config: DropConfig, diag: Diag, pairs: list[Pair] | None, wanted: Filter
    ) -> None:
        self.config, self.diag, self.pairs, self.wanted = config, diag, pairs, wanted
        self.counts: Counter[str] = Counter()
        self.kinds: dict[tuple[str, int | None], Outcome] = {}  # one of each
        self.survivors: set[object] = set()  # what is there still, and has been told
        self.rows: list[dict[str, Any]] = []
        self.row_counts: Counter[str] = Counter()
        self.total = self.untried = 0  # of this pass
        self.is_incomplete = False
        self.lost: OSError | None = None  # of stdout
        self.interrupts = 0
        self.interrupts_to_raise: float = 1

    def run(self) -> int:
        failure: _KernelError | None = None
        with self._orderly_interrupt():
            try:
                self._passes()
            except KeyboardInterrupt:
                self.interrupts += 1
            except _KernelError as error:
                failure = error
            except OSError as error:
                self.lost = error
        interrupted = self.interrupts and self.config.watch is None
        self._report("interrupted: " if interrupted else "stopped: " if self.untried else "")
        if failure is not None:
            return max(_say_system(failure.cause, None, failure.hint), self._status())
        if interrupted:
            raise KeyboardInterrupt
        status = self._status()
        return max(status, _say_lost(self.lost)) if self.lost is not None else status

    @contextmanager
    def _orderly_interrupt(self) -> Iterator[None]:
        """SIGINT ends a pass after its batch, so that the fate of each socket is told; a second
        one, while that is not read, or one between two passes ends it at once."""
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
        self.interrupts += 1
        self.diag.stop()
        if self.interrupts >= self.interrupts_to_raise:
            raise KeyboardInterrupt

    @contextmanager
    def _interrupted_by(self, count: float) -> Iterator[None]:
        """How many SIGINT it takes within `with`. Dropping is never cut off from its outcomes: a
        batch is short, and the kernel's patience bounded."""
        before, self.interrupts_to_raise = self.interrupts_to_raise, count
        try:
            yield
        finally:
            self.interrupts_to_raise = before

    def _passes(self) -> None:
        for number in range(sys.maxsize if self.config.watch is not None else PASSES_MOST):
            if number and self.config.watch is not None:
                time.sleep(self.config.watch)
            with self._interrupted_by(math.inf):
                dropped = self._pass(number)
            if self.interrupts:
                return
            if self.config.watch is not None:
                if {outcomes.EXIT_NO_PERMISSION, outcomes.EXIT_UNSUPPORTED} & {self._status()}:
                    return
                with self._interrupted_by(2):
                    if self.config.json:
                        self._print_json()
                    _flush()
            elif not self.config.until_empty or not dropped:
                return
        self.is_incomplete = True

    def _pass(self, number: int) -> int:
        """One look and what follows from it; how many were dropped."""
        dropped = 0
        before, self.survivors = self.survivors, set()
        with Progress(self.config.quiet or self.config.json) as progress:
            for batch in self._batches(progress):
                self.untried = max(0, self.untried - len(batch))
                news = [one for one in batch if self._is_news(one, number, before)]
                # All of a batch is counted before one is told, which may fail or be interrupted.
                for one in news:
                    self.counts[one.result] += 1
                    self.kinds.setdefault((one.result, one.errno), one)
                dropped += sum(one.result is Result.DROPPED for one in batch)
                progress.advance(len(batch))
                with self._interrupted_by(2):
                    self._tell(news)
        return dropped

    def _is_news(self, one: Outcome, number: int, before: set[object]) -> bool:
        """Not what an earlier pass has told of the same socket."""
        if one.result is Result.GONE:
            # A pass over pairs that an earlier one has dropped is not to say "gone"; nor did
            # anybody ask by a filter for what ended between the look and the drop.
            return number == 0 and (self.pairs is not None or self.total == 1)
        if one.result is Result.DROPPED and not self.config.dry_run:
            return True
        key = (one.socket.identity if one.socket else one.pair, one.result, one.errno)
        self.survivors.add(key)
        return key not in before

    def _tell(self, batch: list[Outcome]) -> None:
        if self.config.json:
            self.rows += [one.to_dict() for one in batch]
            self.row_counts.update(one.result for one in batch)
        elif not self.config.quiet and batch:
            print("\n".join(_line(one, self.config.dry_run) for one in batch))

    def _batches(self, progress: Progress) -> Iterator[list[Outcome]]:
        options: Any = {"listeners": self.config.listeners, "dry": self.config.dry_run}
        try:
            if self.pairs is not None:
                self._start(progress, len(self.pairs))
                wanted = _with_pids(self.wanted, self.config.pid)
                drops = self.diag.drop_pairs(self.pairs, wanted, **options)
            else:
                found = _find(self.config, self.diag, None, self.wanted)
                self._start(progress, len(found))
                drops = self.diag.drop_sockets(found, self.wanted.states, **options)
            yield from drops
        except OSError as error:
            raise _KernelError(error) from None

    def _start(self, progress: Progress, total: int) -> None:
        self.total = self.untried = total
        progress.start(total)

    def _status(self) -> int:
        status = exit_status(self.kinds.values())
        return outcomes.EXIT_NOT_DROPPED if self.is_incomplete and status < 3 else status

    def _print_json(self) -> None:
        counts = {**self.row_counts, **({"not tried": self.untried} if self.untried else {})}
        text = json.dumps({"outcomes": self.rows, "counts": counts})
        self.rows = []
        self.row_counts.clear()
        print(text)

    def _report(self, prefix: str) -> None:
        """The summary, and each kind of failure once."""
        errors = {one.errno for one in self.kinds.values()}
        if errno.EPERM in errors or errno.EACCES in errors:
            command.say_error(PROGRAM, outcomes.NO_PERMISSION)
        if any(one.result is Result.UNSUPPORTED for one in self.kinds.values()):
            command.say_error(PROGRAM, outcomes.CANNOT)
        if self.is_incomplete:
            command.say_error(PROGRAM, f"more came in each of {PASSES_MOST} passes")
        try:
            if self.config.json and (self.config.watch is None or self.rows):
                self._print_json()
            _flush()
        except OSError as error:
            self.lost = error
        if not self.config.quiet and (not self.config.json or self.lost is not None):
            words = {"dropped": "would be dropped"} if self.config.dry_run else {}
            parts = [f"{count:,} {words.get(name, name)}" for name, count in self.counts.items()]
            if self.untried:
                parts.append(f"{self.untried:,} not tried")
            if self.pairs == []:
                parts.append("standard input has no pairs: nothing matches")
            command.say(f"{PROGRAM}: {prefix}{', '.join(parts) or 'nothing matches'}")


def _line(one: Outcome, dry: bool) -> str:
    word = "would drop" if dry and one.result is Result.DROPPED else str(one.result)
    state = f"  {one.socket.state}" if one.socket else ""
    reason = f"  ({one.reason})" if one.reason and one.result is not Result.DROPPED else ""
    return f"{word:9}  {command.one_line(str(one.pair))}{state}{reason}"
