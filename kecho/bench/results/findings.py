"""What is found about a run while it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from .result import Verdict

__all__ = ["NEEDS_LONG_S", "SATURATED", "Findings"]

SATURATED = 0.95  # of a CPU
NEEDS_LONG_S = 0.2  # clock ticks of 10 ms say nothing about shorter runs


@dataclass
class Findings:
    """Collect the reasons and notes of a verdict, in order."""

    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def reason(self, text: str) -> None:
        """Add a reason why the numbers are not valid."""
        self.reasons.append(text)

    def note(self, text: str) -> None:
        """Add what to know when reading the numbers."""
        self.notes.append(text)

    def add(self, text: str, *, is_reason: bool) -> None:
        """Add a reason, or else a note."""
        (self.reasons if is_reason else self.notes).append(text)

    def verdict(self) -> Verdict:
        """Return the verdict on the run."""
        return Verdict(tuple(self.reasons), tuple(self.notes))
