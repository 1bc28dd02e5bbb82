"""A command at a terminal of its own: Ctrl-C reaches its whole process group, as a user's does."""

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

FEDRAY = (sys.executable, "-m", "fedray")


class Terminal:
    """A process with a session, a controlling terminal and a foreground process group.

    Args:
        command: words of the command.
        folder: where it runs.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._mine, theirs = pty.openpty()

        def take() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take
        )
        os.close(theirs)
        self._read, self._is_closed = b"", False
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._below: set[psutil.Process] = set()

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            while not self._is_closed:  # a thread that waits in `read` would keep the terminal open
                if select.select([self._mine], [], [], 0.1)[0]:
                    self._read += os.read(self._mine, 65536)

    @property
    def said(self) -> str:
        """What the terminal has shown, without colours and movements of the cursor."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._read.decode(errors="replace"))
        return "\n".join(re.split(r"[\r\n]+", text))

    def until(self, condition: Callable[[], object], patience_s: float = 240) -> None:
        """Wait; fail if the process ends before, or after `patience_s`."""
        end = time.monotonic() + patience_s
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """Type Ctrl-C: the kernel sends SIGINT to the foreground process group."""
        self._remember()
        os.write(self._mine, b"\x03")

    def write(self, text: str) -> None:
        """Type a text."""
        os.write(self._mine, text.encode())

    def send(self, number: int) -> None:
        """Send a signal to the whole process group, as schedulers of clusters do."""
        self._remember()
        os.killpg(self.process.pid, number)

    def hang_up(self) -> None:
        """Close the terminal: the kernel sends SIGHUP, and refuses what is written afterwards."""
        self._remember()
        self._close()

    def ended(self, within_s: float) -> int:
        """Wait for the end of the process, and of those below it; return its status."""
        try:
            status = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"runs {within_s:.0f} s later:\n{self.said}") from None
        _, left = psutil.wait_procs(self._below, timeout=15)
        for process in left:
            process.kill()
        assert not left, f"left behind: {left}"
        return status

    def kill(self) -> None:
        """End everything."""
        self._remember()
        for process in (*self._below, self.process):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._reader.join()
            os.close(self._mine)

    def _remember(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._below |= set(psutil.Process(self.process.pid).children(recursive=True))
