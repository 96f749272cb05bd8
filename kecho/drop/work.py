"""What the command does: lists, drops, drops again, and says what came of it."""

from __future__ import annotations

import errno
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from .. import command
from ..printable import json_text
from . import outcome as outcomes
from .config import PASSES_MOST, DropConfig
from .ending import Ending
from .failure import Absent, Failure, of_kernel
from .filters import Filter
from .listing import flush, list_sockets, say_lost
from .outcome import Outcome, Result, exit_status
from .pairs import Pair
from .place import Place
from .progress import Progress
from .search import PROGRAM, Search

__all__ = ["PROGRAM", "work"]


def work(config: DropConfig, pairs: Collection[Pair] | None, wanted: Filter, ending: Ending) -> int:
    """pairs: None if the filter says it all; none at all match nothing, and end it."""
    if pairs is not None and not pairs:
        config = replace(config, watch=None, until_empty=False)
    search, place = Search(config, pairs, wanted), Place(config.netns)
    try:
        if not config.list:
            return _Run(config, place, search, ending).run()
        with place.open() as diag:
            search.check_devices(diag)
            return list_sockets(config, search.find(diag))
    except Failure as failure:
        command.say_error(PROGRAM, failure.text)
        return failure.status


class _Run:
    """Dropping: once, until nothing is left, or again and again."""

    def __init__(
        self,
        config: DropConfig,
        place: Place,
        search: Search,
        ending: Ending,
    ) -> None:
        self.config, self.place, self.search, self.ending = config, place, search, ending
        self.diag = place.open()
        self.is_absent = False  # at the last look: the network namespace, or a device to leave out
        self.counts: Counter[str] = Counter()
        self.kinds: dict[tuple[str, int | None], Outcome] = {}  # one of each
        self.survivors: set[object] = set()  # what is there still, and has been told
        self.row_counts: Counter[str] = Counter()
        self.has_rows = False  # of a JSON document that has been begun
        self.total = self.untried = 0  # of this pass
        self.is_incomplete = False
        self.lost: OSError | None = None  # of stdout
        self.failure: Exception | None = None  # any other

    def run(self) -> int:
        """A signal ends a pass after its batch, so that the fate of each socket is told; a second
        one, while that is not read, or one between two passes ends it at once."""
        self.ending.stop = lambda: self.diag.stop()
        # Dropping is never cut off from its outcomes: a batch is short, and the kernel's patience
        # bounded.
        try:
            self.search.check_devices(self.diag)
            with self.ending.raises_from(math.inf):
                return self._run()
        finally:
            self.diag.close()

    def _run(self) -> int:
        is_cut = False
        try:
            self._passes()
        except KeyboardInterrupt:
            is_cut = self.ending.count > 1  # the first one only ends what waits
            self.ending.count = max(1, self.ending.count)  # it may be somebody else's
        except OSError as error:
            self.lost = error
        except Exception as error:  # whatever it is, what was dropped before it is told
            self.failure = error
        is_cut = is_cut or self._is_rest_cut()
        is_interrupted = is_cut or (self.config.watch is None and self.ending.count > 0)
        prefix = "interrupted: " if is_interrupted else "stopped: " if self.untried else ""
        with self.ending.raises_from(self.ending.count + 2):
            self._say_summary(prefix, is_cut)
        status = self._status()
        if isinstance(self.failure, Failure):
            command.say_error(PROGRAM, self.failure.text)
            status = max(status, self.failure.status)
        elif self.failure is not None:
            status = max(status, outcomes.EXIT_NOT_DROPPED)
            text = "".join(traceback.format_exception(self.failure))
            command.show(PROGRAM, text, to_stderr=True)
        elif is_interrupted:
            if is_cut and sys.stdout is not None:
                command.discard(sys.stdout)
            raise KeyboardInterrupt
        return status if self.lost is None else max(status, say_lost(self.lost))

    def _is_rest_cut(self) -> bool:
        """Prints what is left to print; whether a signal has cut it off, as nobody reads it."""
        try:
            with self.ending.raises_from(max(2, self.ending.count + 1)):
                if self.config.json and (self.config.watch is None or self.has_rows):
                    self._print_json()
                flush()
        except KeyboardInterrupt:
            return True
        except OSError as error:
            self.lost = error
        except Exception as error:
            self.failure = self.failure or error
        return False

    def _passes(self) -> None:
        for number in range(sys.maxsize if self.config.watch is not None else PASSES_MOST):
            if (
                number
                and self.config.watch is not None
                and not self._is_there_after(self.config.watch)
            ):
                continue
            dropped = self._pass(number)
            if self.ending.count:
                return
            if self.config.watch is not None:
                if {outcomes.EXIT_NO_PERMISSION, outcomes.EXIT_UNSUPPORTED} & {self._status()}:
                    return
                with self.ending.raises_from(2):
                    if self.config.json:
                        self._print_json()
                    flush()
            elif not self.config.until_empty or not dropped:
                return
        self.is_incomplete = True

    def _is_there_after(self, wait_s: float) -> bool:
        """Waits; whether the namespace is there then, and the devices that are to be left out.
        Nothing keeps it alive meanwhile."""
        if not self.place.is_own:
            self.diag.close()
        with self.ending.raises_from(1):
            if self.ending.count:
                raise KeyboardInterrupt
            time.sleep(wait_s)
        try:
            if not self.place.is_own:
                self.diag = self.place.open()
            self.search.check_devices(self.diag)
        except Absent as failure:
            if not self.is_absent:
                until = "nothing is dropped until it is there again"
                command.say_error(PROGRAM, f"{failure.text}; {until}")
            self.is_absent = True
            return False
        self.is_absent = False
        if self.ending.count:  # while there was no handle to stop
            self.diag.stop()
        return True

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
                with self.ending.raises_from(2):
                    self._tell(news)
        return dropped

    def _is_news(self, one: Outcome, number: int, before: set[object]) -> bool:
        """Not what an earlier pass has told of the same socket."""
        if one.result is Result.GONE:
            # A pass over pairs that an earlier one has dropped is not to say "gone"; nor did
            # anybody ask by a filter for what ended between the look and the drop.
            return number == 0 and (self.search.pairs is not None or self.total == 1)
        if one.result is Result.DROPPED and not self.config.dry_run:
            return True
        key = (one.socket.identity if one.socket else one.pair, one.result, one.errno)
        self.survivors.add(key)
        return key not in before

    def _tell(self, batch: list[Outcome]) -> None:
        if self.config.json:
            self._print_rows(batch)
        elif not self.config.quiet and batch:
            command.put("\n".join(_line(one, self.config.dry_run) for one in batch))

    def _batches(self, progress: Progress) -> Iterator[list[Outcome]]:
        options: Any = {"listeners": self.config.listeners, "dry": self.config.dry_run}
        if self.search.pairs is not None:
            self._start(progress, len(self.search.pairs))
            wanted = self.search.filter_now()
            drops = self.diag.drop_pairs(self.search.pairs, wanted, **options)
        else:
            found = self.search.find(self.diag)
            self._start(progress, len(found))
            wanted = self.search.wanted
            drops = self.diag.drop_sockets(found, wanted.states, wanted.idle_ms, **options)
        try:
            yield from drops
        except OSError as error:
            raise of_kernel(error) from None

    def _start(self, progress: Progress, total: int) -> None:
        self.total = self.untried = total
        progress.start(total)

    def _status(self) -> int:
        status = exit_status(self.kinds.values())
        return outcomes.EXIT_NOT_DROPPED if self.is_incomplete and status < 3 else status

    def _print_rows(self, batch: list[Outcome]) -> None:
        """As they come: there may be millions."""
        if batch:
            begun = ", " if self.has_rows else '{"outcomes": ['
            self.has_rows = True
            self.row_counts.update(one.result for one in batch)
            rows = ", ".join(json_text(one.to_dict()) for one in batch)
            command.put(begun + rows, end="")

    def _print_json(self) -> None:
        """The end of the document."""
        begun = "" if self.has_rows else '{"outcomes": ['
        counts = json_text({**self.row_counts, **self._open_counts()})
        self.has_rows = False
        self.row_counts.clear()
        command.put(f'{begun}], "counts": {counts}}}')

    def _open_counts(self) -> dict[str, int]:
        """Of this pass, those without an outcome."""
        unknown = self.diag.unaccounted
        counts = {"of unknown fate": unknown, "not tried": self.untried - unknown}
        return {name: count for name, count in counts.items() if count > 0}

    def _say_summary(self, prefix: str, is_cut: bool) -> None:
        """What became of all, and each kind of failure once."""
        errors = {one.errno for one in self.kinds.values()}
        if errno.EPERM in errors or errno.EACCES in errors:
            command.say_error(PROGRAM, outcomes.NO_PERMISSION)
        if any(one.result is Result.UNSUPPORTED for one in self.kinds.values()):
            command.say_error(PROGRAM, outcomes.CANNOT)
        if self.is_incomplete:
            command.say_error(PROGRAM, f"more came in each of {PASSES_MOST} passes")
        is_printed = self.config.json and self.lost is None and not is_cut
        if not self.config.quiet and not is_printed:
            words = {"dropped": "would be dropped"} if self.config.dry_run else {}
            parts = [f"{count:,} {words.get(name, name)}" for name, count in self.counts.items()]
            parts += [f"{count:,} {name}" for name, count in self._open_counts().items()]
            if self.search.pairs is not None and not self.search.pairs:
                parts.append("standard input has no pairs: nothing matches")
            if not parts and self.failure is None:
                parts.append("nothing matches")
            if parts:
                command.say(f"{PROGRAM}: {prefix}{', '.join(parts)}")


def _line(one: Outcome, dry: bool) -> str:
    word = "would drop" if dry and one.result is Result.DROPPED else str(one.result)
    state = f"  {one.socket.state}" if one.socket else ""
    text = one.reason
    if one.result is Result.DROPPED:  # by a dry run, too
        text = outcomes.SUBFLOW if one.socket and one.socket.is_mptcp else ""
    reason = f"  ({text})" if text else ""
    return f"{word:9}  {command.one_line(str(one.pair))}{state}{reason}"
