"""The time budget of a sweep: seconds in which its trials may run, over all its sessions."""

import time
from math import inf
from pathlib import Path

from fedray.records import Record, Shape
from fedray.storage.run_files import RunFiles

SPENT = "spent.json"
"""File in the directory of a sweep with a time budget: the seconds that its trials have run."""

_SPENT = Record(SPENT, Shape({"spent_s": float}), "or remove it: then the time budget begins anew")

EVERY_S = 5.0
"""Seconds between two notes of the time spent; a killed driver forgets as many at most."""


class Budget:
    """How long the trials of a sweep have run and may run.

    Args:
        path: the sweep's directory.
        limit_s: seconds; None: no limit.
    """

    def __init__(self, path: Path, limit_s: float | None) -> None:
        self.files, self.limit_s = RunFiles(path), limit_s
        self.before_s = float((_SPENT.read(path) or {"spent_s": 0.0})["spent_s"])
        self._since: float | None = None
        self._noted = self.before_s
        self.is_over = False
        """Whether the sweep has been found to be at its end."""

    @property
    def spent_s(self) -> float:
        """Seconds that the trials have run in all sessions."""
        return self.before_s + (0.0 if self._since is None else time.monotonic() - self._since)

    @property
    def left_s(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return inf if self.limit_s is None else self.limit_s - self.spent_s

    def check(self, running: int) -> bool:
        """Tell whether the time is over; note the time spent now and then.

        Args:
            running: trials that run now; the time begins with the first.
        """
        if self._since is None and running:
            self._since = time.monotonic()
        if self.spent_s - self._noted >= EVERY_S:
            self.note()
        self.is_over = self.is_over or self.left_s <= 0
        return self.is_over

    def note(self) -> None:
        """Write the time spent into the sweep's directory."""
        if self.limit_s is not None or self.before_s:
            self._noted = self.spent_s
            self.files.write_json(SPENT, {"spent_s": round(self._noted, 3)})


def lacks_note(path: Path, limit_s: float | None) -> bool:
    """Tell whether a sweep with a time budget whose trials have made rounds has no note of the time spent."""
    return limit_s is not None and not (path / SPENT).exists() and any(path.glob("trials/*/rounds.jsonl"))
