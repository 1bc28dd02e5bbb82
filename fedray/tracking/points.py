"""The points of a run that a store lacks: sent in batches, each point once."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from fedray.tracking.sender import Refused
from fedray.tracking.sent import SentPoints

MOST_IN_A_CALL = 1000
"""MLflow's limit for the metrics of one call."""

Row = tuple[int, str, float, int]
"""Step, key, value, and time in milliseconds."""


@dataclass(frozen=True)
class Group:
    """Metrics of one step that are always sent in one call, so that a store has all of them or none."""

    step: int
    metrics: Mapping[str, float]


class Points:
    """Groups that wait, and what the store is known to have. `add` is for the run, the rest for the thread.

    Args:
        log: sends rows in one call.
        steps_of: returns the steps for which the store has a key.
        sent: the points that may be on their way.

    Attributes:
        count: points that were sent and taken.
        latest: key → its last step in the store, when the run was opened.
    """

    def __init__(
        self,
        log: Callable[[Sequence[Row]], None],
        steps_of: Callable[[str], set[int]],
        sent: SentPoints,
    ) -> None:
        self.count = 0
        self.latest: dict[str, int] = {}
        self._log, self._steps_of, self._sent = log, steps_of, sent
        self._waiting: deque[Group] = deque()
        self._ours: dict[str, set[int]] = {}
        self._steps: dict[str, set[int]] = {}
        self._tried: list[Group] = []
        self._lacking: list[Group] = []
        self._lock = threading.Lock()

    def add(self, group: Group) -> bool:
        """Queue a group; tell whether `send` must be called, which sends all groups that wait by then."""
        with self._lock:
            self._waiting.append(group)
            return len(self._waiting) == 1

    def send(self) -> None:
        """Send all groups that wait, as many in a call as MLflow takes. May be called again after an error.

        Raises:
            Refused: if the store will never take some of them; the others have been sent.
        """
        refused: Refused | None = None
        while batch := self._tried or self._next():
            try:
                self._take(batch)
            except Refused as error:
                refused = error
            self._done(batch)
        if refused is not None:
            raise refused

    def _next(self) -> list[Group]:
        """Return the groups of the next call: at most one of each step, since they may overlap."""
        batch: list[Group] = []
        size = 0
        with self._lock:
            for group in self._waiting:
                size += len(group.metrics)
                if batch and (size > MOST_IN_A_CALL or batch[-1].step == group.step):
                    break
                batch.append(group)
        return batch

    def _take(self, batch: list[Group]) -> None:
        if self._tried:
            # the answer was lost, the call perhaps not; a call is carried out as a whole or not at all
            last = self._lacking[-1]
            is_there = last.step in self._steps_of(next(iter(last.metrics)))
        else:
            unsent = [Group(group.step, self._unsent(group)) for group in batch]
            self._lacking = [group for group in unsent if not self._is_there(group)]
            self._has(unsent)
            is_there = not self._lacking
        rows = list(chain.from_iterable(self._rows(group) for group in self._lacking))
        if not is_there:
            self._tried = batch
            self._log(rows)
        self.count += len(rows)
        for group in self._lacking:
            self._sent.forget(group.step, group.metrics)

    def _unsent(self, group: Group) -> dict[str, float]:
        return {
            key: value for key, value in group.metrics.items() if group.step not in self._ours.get(key, ())
        }

    def _is_there(self, group: Group) -> bool:
        """Tell whether the store has a group, from one of its keys."""
        if not group.metrics:
            return True
        key = next((key for key in group.metrics if key in self._steps), next(iter(group.metrics)))
        last = self.latest.get(key)
        if last is None or last < group.step:
            return False
        if last == group.step:
            return True
        if key not in self._steps:
            self._steps[key] = self._steps_of(key)
        return group.step in self._steps[key]

    def _rows(self, group: Group) -> list[Row]:
        return [(group.step, *point) for point in self._sent.sending(group.step, group.metrics)]

    def _has(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for key in group.metrics:
                self._ours.setdefault(key, set()).add(group.step)

    def _done(self, batch: Sequence[Group]) -> None:
        self._tried = []
        with self._lock:
            for _ in batch:
                self._waiting.popleft()
