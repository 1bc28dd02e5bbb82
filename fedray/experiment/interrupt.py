"""What SIGTERM, SIGINT and SIGHUP do while a run, a sweep or a training works.

The first signal ends the work in good order: the round in progress is dropped, complete rounds are on disk,
and the MLflow runs end as KILLED. The second signal ends the process at once.

    with signals() as stop:
        for … :
            with stop.cuts():       a signal that comes here raises here
                report = server.step()
            write(report)           a signal that comes here waits for the next `cuts` or `check`
            stop.check()

SIGINT raises KeyboardInterrupt; SIGTERM and SIGHUP raise SystemExit with status 128 + their number.
`fedray stop` leaves a file in the directory; `Stop.look` takes it for a SIGTERM that came after the round.

A command handles the signals from its first to its last line (`rllib_pruner.commands.run_app`). There they
raise at once; the run, sweep or training inside decides with `signals` where they may.
"""

import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fedray.durable import shown
from fedray.storage.directory import is_asked_to_stop
from fedray.tracking import sender

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

INTERRUPTS = (KeyboardInterrupt, SystemExit)
"""Exceptions that interrupt a run which can be resumed: a signal, or `sys.exit` in a callback."""

_active: "Stop | None" = None


class Stop:
    """Whether a signal has asked this process to end; made by `signals`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.handled: list[signal.Signals] = []
        self._raises_now = self._is_end = False

    @contextmanager
    def cuts(self) -> Iterator[None]:
        """Let a signal raise anywhere inside. The caller must be able to drop the work in progress."""
        self.check()
        with self._raising(True):
            yield

    @contextmanager
    def ends(self) -> Iterator[None]:
        """Let Ctrl-C end the block in good order: nothing is interrupted that has an end of its own."""
        self._is_end = True
        try:
            with self.cuts():
                yield
        except KeyboardInterrupt:
            self.signal = None
        finally:
            self._is_end = False

    @contextmanager
    def _raising(self, now: bool) -> Iterator[None]:
        before, self._raises_now = self._raises_now, now
        try:
            yield
        finally:
            self._raises_now = before

    def look(self, folder: Path) -> None:
        """Count `fedray stop` of a directory as a SIGTERM."""
        if self.signal is None and is_asked_to_stop(folder):
            self.signal = signal.SIGTERM
            logger.warning("`fedray stop %s`: ending after the round in progress", shown(folder))

    def check(self) -> None:
        """Raise if a signal has come.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after the others; the status is 128 + the signal's number, as shells have it.
        """
        if self.signal is not None:
            raise self.error

    @property
    def error(self) -> BaseException:
        """The exception of the signal that has come."""
        assert self.signal is not None
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + self.signal)

    def handle(self) -> None:
        """Become the handler of `handled`, again after Ray has put its own before it.

        Ray's prints a trace and ends the process 3 s later.
        """
        for number in self.handled:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Be the handler of the signals."""
        if self.signal is not None:
            _end_at_once(number)
        self.signal = signal.Signals(number)
        if self.signal == signal.SIGHUP:
            _leave_terminal()
        if not self._is_end:
            with suppress(OSError):
                # not by logging or print, which may be in the middle of a line
                os.write(2, f"\n{self.signal.name}: ending; a second signal ends at once\n".encode())
        if self._raises_now:
            raise self.error

    def explains(self, error: BaseException) -> bool:
        """Tell whether an error is not the signal's own, and came after it.

        It is due to the signal then: Ray's processes may have received it too, and an import that was
        interrupted leaves half a module.
        """
        if self.signal is None:
            return False
        own = self.error
        return not isinstance(error, type(own)) or getattr(error, "code", 0) != getattr(own, "code", 0)


@contextmanager
def signals(is_command: bool = False) -> Iterator[Stop]:
    """Handle the signals inside; restore their handlers at the end.

    A handler that the user has installed stays, and so does a signal that is ignored (`nohup`). Nothing is
    handled outside the main thread, nor in a worker of Ray, where signals mean something else. Inside another
    `signals` it is that one, and a signal waits for `cuts` or `check` again.

    Args:
        is_command: afterwards only the end of the process follows: a signal ends it at once, without a word.
    """
    global _active
    if threading.current_thread() is not threading.main_thread() or _is_ray_worker():
        yield Stop()
        return
    if _active is not None:
        with _active._raising(False):
            yield _active
        return
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.handled = [number for number, handler in before.items() if _is_default(handler)]
    _active = stop
    sender.hurried = lambda: stop.signal is not None
    try:
        stop.handle()
        yield stop
    except BaseException as error:
        if stop.explains(error):
            raise stop.error from error
        raise
    finally:
        _active = None
        sender.hurried = sender.never
        for number in stop.handled:
            signal.signal(number, _exit_at_once if is_command else before[number])


def handle_again() -> None:
    """Handle the signals as before Ray started in this process; outside `signals` nothing changes."""
    if _active is not None and threading.current_thread() is threading.main_thread():
        _active.handle()


def _is_default(handler: Callable[[int, FrameType | None], Any] | int | None) -> bool:
    """Tell whether a handler is a default: Python's or Ray's."""
    by_ray = (getattr(handler, "__module__", None) or "").startswith("ray.")
    return handler in (signal.SIG_DFL, signal.default_int_handler) or by_ray


def _is_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    return (
        ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    )


def _leave_terminal() -> None:
    """Let streams that were the terminal lead nowhere: one that has hung up refuses to be written."""
    for stream in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    """Be the handler of a signal while a command leaves, where the interpreter would print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or in the middle of a write
            stream.flush()
    os._exit(128 + number)


def _end_at_once(number: int) -> None:
    """End the process as the signal does by default; where a user sits at a prompt, only the call."""
    if number == signal.SIGINT and (hasattr(sys, "ps1") or "ipykernel" in sys.modules):
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
