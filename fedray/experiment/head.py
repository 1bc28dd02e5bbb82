"""The head of a cluster, asked while a run or a sweep works: does it still answer?

Ray ends a process 60 s after its head was lost, in the middle of what it does, with a line of its own. Before
that, calls to Ray wait for the head and nothing can interrupt them. So it is asked first, with a deadline.
"""

import time
from collections.abc import Callable

from fedray.errors import RunError
from fedray.experiment.cluster import leave_ray
from fedray.experiment.reaching import answers, connected_address
from fedray.federation.crew import Head

ASK_EVERY_S = 4.0
"""Seconds between two questions."""
LOST_S = 30.0
"""Seconds without an answer, after which the head counts as lost; Ray waits 60 s for it."""


class ClusterHead(Head):
    """The head of the cluster to which this process is connected.

    Args:
        is_over: tells that a signal has come, which also ends the head: then it is not waited for.
    """

    def __init__(self, is_over: Callable[[], bool] = lambda: False) -> None:
        self.is_over = is_over
        self.address = connected_address()
        self.is_lost = False
        self._asked_at = time.monotonic()

    def check(self, *, now: bool = False) -> None:
        """Ask the head, unless it was asked a moment ago; wait for its answer, at most `LOST_S` seconds.

        Args:
            now: ask it in any case, since the next call to Ray would wait for it.

        Raises:
            RunError: if it has not answered, now or earlier.
        """
        began = time.monotonic()
        if self.address is None or (not now and not self.is_lost and began - self._asked_at < ASK_EVERY_S):
            return
        while not self.answers() and not self.is_lost:
            if self.is_over():
                return
            if time.monotonic() - began > LOST_S:
                self.is_lost = True
                leave_ray(1)
            time.sleep(1.0)
        if self.is_lost:
            raise RunError(
                f"the head of the Ray cluster at {self.address!r} did not answer for {LOST_S:.0f} s: it is "
                "lost, or it hangs. Start the cluster again, give the address of another one, or continue "
                "without Ray: clients.actors=0"
            )
        self._asked_at = time.monotonic()

    def answers(self) -> bool:
        """Tell whether the head answers within five seconds, and was not lost before."""
        return not self.is_lost and (self.address is None or answers(self.address))
