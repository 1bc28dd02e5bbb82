"""Whether the process that signed a lock lives: on this machine the system tells, on others its beats do.

    signature     process, host, machine (the boot of its system) and start, in the lock's file
    beat          while it works, a thread of the process sets the file's time every few seconds

A file system without locks between hosts lets a second host lock the file; then the beats keep it out. Their
age is measured by the clock of the file system, so the clocks of the hosts may differ.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

BEAT_S = 5.0
"""Seconds between two beats."""

SILENT_S = 60.0
"""After so many seconds without a beat, a process of another host counts as dead."""


def signature() -> dict[str, Any]:
    """Return the signature of this process."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "id": uuid4().hex,
    }


def sign(file: FileIO, who: Mapping[str, Any]) -> None:
    """Write a signature into a lock's file; a full disk does not matter here."""
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(who).encode() + b"\n")


def signed(file: FileIO) -> dict[str, Any] | None:
    """Return who signed a lock's file; None if nobody did, or it cannot be read."""
    try:
        found = json.loads(os.pread(file.fileno(), 1000, 0))
        return found if {"pid", "host", "since"} <= found.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def erase(file: FileIO) -> None:
    """Remove the signature: nobody has to wait for the beats to be old."""
    with suppress(OSError):
        file.truncate(0)


def lives(who: Mapping[str, Any], file: FileIO, folder: Path, *, locks: bool) -> bool:
    """Tell whether the process that signed a lock lives, although the system grants the lock.

    Args:
        who: its signature.
        file: of the lock.
        folder: where the file is; a probe is written there for a moment.
        locks: whether the file system has locks: of a process of this machine they tell the truth.
    """
    if is_of_this_machine(who):
        started = None if locks else _started(int(who["pid"]))
        return started is not None and who.get("started", started) == started
    return age_s(file, folder) < SILENT_S


def silent_s(file: FileIO) -> float:
    """Return the seconds since the last beat, by this host's clock."""
    return time.time() - os.fstat(file.fileno()).st_mtime


def is_of_this_machine(who: Mapping[str, Any]) -> bool:
    """Tell whether a process that signed ran on this machine, since it booted."""
    return who.get("machine") == _machine() if "machine" in who else who["host"] == socket.gethostname()


def has_ended(who: Mapping[str, Any]) -> bool:
    """Tell whether a process that signed ran on this host, and is gone; False for a process elsewhere.

    A container of this machine may not see the process, and has another host name.
    """
    if not is_of_this_machine(who) or who["host"] != socket.gethostname():
        return False
    started = _started(int(who["pid"]))
    return started is None or who.get("started", started) != started


def age_s(file: FileIO, folder: Path) -> float:
    """Return the seconds since the last beat, by the clock of the file system."""
    probe = folder / f".{uuid4().hex}.probe"
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        with suppress(OSError):
            probe.unlink()
    return now - os.fstat(file.fileno()).st_mtime


@cache
def _machine() -> str:
    """Return the id of this boot of this machine; all containers of a machine have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when a process of this machine started; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return text.rpartition(")")[2].split()[19]  # in clock ticks since the boot
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "?"


class Beats:
    """A thread that keeps a lock's file young until `stop`, and notices when another process has signed it.

    Args:
        file: of the lock; it stays open until `stop` has returned.
        who: the signature of this process.
    """

    def __init__(self, file: FileIO, who: Mapping[str, Any]) -> None:
        self._file, self._who = file, who
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.taken_by: dict[str, Any] | None = None
        """The process that took the lock from this one, which was silent for too long."""
        self._beat_at = time.monotonic()
        self._thread.start()

    def sign(self) -> None:
        """Write the signature again, which has changed, unless the lock was taken over."""
        found = signed(self._file)
        if found is not None and found.get("id") == self._who["id"]:
            sign(self._file, self._who)

    def taken(self) -> dict[str, Any] | None:
        """Return the process that took the lock from this one, if any; it looks if the last beat is old.

        A process that was suspended may come here before its thread beats.
        """
        if time.monotonic() - self._beat_at > 2 * BEAT_S and not self._ended.is_set():
            self._look()
        return self.taken_by

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._look()
            if self.taken_by is not None:
                return
            with suppress(OSError):  # the file system may be away for a while
                os.utime(self._file.fileno())

    def _look(self) -> None:
        found = signed(self._file)
        if found is not None and found.get("id") != self._who["id"]:
            self.taken_by = found
        self._beat_at = time.monotonic()
