"""How long a call to a client actor may take before the actor counts as hung.

    limit = max(floor, factor · size of the call · slowest seconds per size so far)

Calls are measured by kind, since a question to clients takes other times than their training.
"""

import time
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

SLEPT_S = 5.0
"""Seconds, at most, that a clock advances between two looks at it."""


class Size(NamedTuple):
    """What the time of a call follows: its kind, and how many clients and examples it has."""

    kind: str
    clients: int
    examples: int


@dataclass
class Patience:
    """Limits of calls, learned from the calls that were answered.

    Args:
        factor: how often a call may take the time that the slowest one so far suggests; None waits for ever.
        floor_s: seconds that every call may take.
        first_s: seconds for a call of a kind that was never answered.
    """

    factor: float | None = 10.0
    floor_s: float = 30.0
    first_s: float = 600.0
    _slowest: dict[str, tuple[float, float]] = field(default_factory=dict)

    def limit_s(self, size: Size, losses: int = 0) -> float:
        """Return the seconds for a call; twice as many for each time that its actor was lost."""
        if self.factor is None:
            return inf
        if size.kind not in self._slowest:
            return self.first_s * 2.0**losses
        by_client, by_example = self._slowest[size.kind]
        expected_s = max(by_client * size.clients, by_example * size.examples)
        return max(self.floor_s, self.factor * expected_s) * 2.0**losses

    def learn(self, size: Size, seconds: float) -> None:
        """Take in the seconds of a call that was answered."""
        by_client, by_example = self._slowest.get(size.kind, (0.0, 0.0))
        self._slowest[size.kind] = (
            max(by_client, seconds / max(1, size.clients)),
            max(by_example, seconds / max(1, size.examples)),
        )


class Clock:
    """A clock that stops while this process is stopped: its actors may have been stopped with it."""

    def __init__(self) -> None:
        self._seen, self._seconds = time.monotonic(), 0.0

    def now(self) -> float:
        """Return the seconds so far."""
        seen = time.monotonic()
        self._seconds += min(seen - self._seen, SLEPT_S)
        self._seen = seen
        return self._seconds
