"""The thread that makes all calls to MLflow: in order, each until the store has taken it.

A run adds calls and never waits for one. While the store fails, the first call is tried again after pauses
that grow from FIRST_PAUSE_S to MOST_PAUSE_S; the others stay in the queue behind it. So a call must be
idempotent: it may be made again after an answer that was lost.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable

THREAD = "fedray-mlflow"
"""Name of the thread."""
FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 30.0
"""Seconds between two tries of a call: at first, and at most."""
URGENT_PAUSE_S = 1.0
"""The longest pause in seconds while the run waits for the thread."""
GRACE_S = 3.0
"""Seconds for which a run waits, at its end, for a store that fails at once; a server may be restarting."""
HURRY_S = 3.0
"""Seconds for which a process that was asked to end still waits for a store."""

Call = Callable[[], object]


def never() -> bool:
    """Return False."""
    return False


hurried: Callable[[], bool] = never
"""Whether this process was asked to end; `fedray.experiment.interrupt` sets it."""

_silent = False
"""Whether a store gave no answer for `HURRY_S` since then: the process does not wait for it a second time."""


class Refused(Exception):
    """The store answers that it will never take this call."""


class _Hurry:
    """How long a wait may still take once this process was asked to end."""

    def __init__(self) -> None:
        self._since: float | None = None

    def left_s(self, now: float, is_answered: bool) -> float:
        """Return the seconds; infinite before. The store has answered in this wait if `is_answered`."""
        global _silent
        if not hurried():
            _silent = False
            return math.inf
        self._since = self._since or now
        left = 0.0 if _silent else self._since + HURRY_S - now
        _silent = _silent or (left <= 0 and not is_answered)
        return left


class Sender:
    """One thread and its queue.

    An executor of the standard library would do, but would also keep the interpreter from ending as long as a
    server does not answer.

    Args:
        failed: called in the thread with the first error of an outage, and with each call that was refused.
        answered: called in the thread when the store has answered again.
    """

    def __init__(self, failed: Callable[[Exception], None], answered: Callable[[], None]) -> None:
        self._failed, self._answered = failed, answered
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_urgent = False
        self._failures = 0
        self._since = time.monotonic()
        self.refused = False
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    @property
    def is_closed(self) -> bool:
        """Whether the owner has stopped waiting."""
        return self._is_closed

    def add(self, call: Call) -> None:
        """Queue a call. Does not wait."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()

    def beat(self) -> None:
        """Tell that the store has answered a part of a call. Calls of several requests do."""
        self._since = time.monotonic()

    def wait(self, answer_s: float, most_s: float, *, grace_s: float = GRACE_S) -> str | None:
        """Wait until the queue is empty; return None then, and otherwise why not.

        Args:
            answer_s: seconds without an answer after which the wait ends.
            most_s: seconds after which it ends in any case.
            grace_s: seconds for which a store that fails at once is tried again.
        """
        started, hurry = time.monotonic(), _Hurry()
        with self._changed:
            self._since, before = started, self._failures
            self._is_urgent = True
            self._changed.notify_all()
            try:
                while self._calls:
                    now = time.monotonic()
                    if self._failures > before and now - started >= grace_s:
                        return "fails"
                    left = min(self._since + answer_s, started + most_s) - now
                    left = min(left, hurry.left_s(now, self._since > started))
                    if left <= 0:
                        took_s = now - self._since if now - started < most_s else most_s
                        took_s = max(took_s, HURRY_S) if _silent else took_s
                        return f"did not answer within {took_s:.0f} s"
                    self._changed.wait(min(left, 0.1))
            finally:
                self._is_urgent = False
        return None

    def close(self) -> bool:
        """Stop: the thread ends after the call that it is making. Tell whether the queue was empty."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            return not self._calls

    def unless_closed(self, call: Call) -> None:
        """Make a call, in the thread, unless the owner has stopped waiting."""
        with self._changed:
            if not self._is_closed:
                call()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Refused as error:
                self.refused = True
                self._failed(error)
            except Exception as error:
                if self._failures == 0 and not self._is_closed:
                    self._failed(error)
                self._pause()
                continue
            self._took()

    def _next(self) -> Call | None:
        with self._changed:
            while not self._calls and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._calls[0]

    def _took(self) -> None:
        with self._changed:
            was_failing, self._failures = self._failures > 0, 0
            self._calls.popleft()
            self.beat()
            self._changed.notify_all()
        if was_failing:
            self._answered()

    def _pause(self) -> None:
        """Wait before the next try: at once, and then after short pauses, while the run waits at its end."""
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self._failures, 20), MOST_PAUSE_S)
        started = time.monotonic()
        with self._changed:
            self._failures += 1
            self._changed.notify_all()
            was_urgent = self._is_urgent
            while not self._is_closed and (was_urgent or not self._is_urgent):
                longest_s = min(pause_s, URGENT_PAUSE_S) if self._is_urgent else pause_s
                left_s = started + longest_s - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(left_s)
