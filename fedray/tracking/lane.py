"""The thread that makes all calls to MLflow, so that a run never waits for a server."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

THREAD = "fedray-mlflow"
"""Name of the thread."""


class Lane:
    """One thread that makes calls in order. A caller that waits for one may stop waiting.

    An executor of the standard library would do, but would also keep the interpreter from ending as long
    as a server does not answer.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future = Future[Any]()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """Let the thread end after the calls that it has."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
