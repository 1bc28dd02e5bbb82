"""The directory of a run, sweep or training: how it is created, and which process holds it.

`take` and `take_next` make a new one; of several that try at once, one gets it. `Lock` keeps a second process
out of one that is in use, and ends with its process, however that dies (`heartbeat`). `holder_of` tells which
process has it, and `ask_to_stop` asks that process to end.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedray.durable import fences, on_disk, shown
from fedray.errors import ConfigError, RunError
from fedray.storage import heartbeat

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The file whose lock says that a process works in the directory."""

STOP = ".stop"
"""A file that asks the process that works in the directory to end after its round."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_held: dict[tuple[int, str], "_Held"] = {}
_guard = threading.Lock()


@dataclass(frozen=True)
class _Held:
    """A lock that this process has."""

    who: dict[str, Any]
    beats: heartbeat.Beats


def check_free(path: Path) -> None:
    """Raise ConfigError unless `path` is free for a run; writes nothing."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{shown(path)} is not empty: a run needs an empty directory; choose another one with --out"
            )
    except OSError as error:
        raise _refused(path, error) from None


def take(path: Path, inner: str, what: str) -> None:
    """Create a directory with one folder in it, or take an empty one.

    Args:
        path: the directory.
        inner: name of the folder; the process that creates it has the directory.
        what: the directory's kind, for the message.

    Raises:
        ConfigError: if there is something in it, another took it first, or it cannot be made.
    """
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / inner).mkdir()  # fails for the second of two that start at once
    except FileExistsError:
        raise ConfigError(
            f"{shown(path)} is another {what}'s directory: choose a new one with --out"
        ) from None
    except OSError as error:
        raise _refused(path, error) from None


def take_next(folder: Path, stem: str, inner: str, what: str, taken: Collection[str] = ()) -> Path:
    """Create the first of `folder/stem-001`, `-002`, … that does not exist. Concurrent callers get one each.

    Args:
        folder: where it is made.
        stem: of its name.
        inner: as for `take`.
        what: as for `take`.
        taken: names that are passed over: they exist elsewhere.

    Raises:
        ConfigError: if none can be made.
    """
    while True:
        path = numbered(folder, stem, taken)
        try:
            take(path, inner, what)
            return path
        except ConfigError:
            if not path.exists():  # it was not taken: it cannot be made
                raise


def numbered(folder: Path, stem: str, taken: Collection[str] = ()) -> Path:
    """Return the first of `folder/stem-001`, `-002`, … that does not exist; creates nothing."""
    number = 1
    try:
        while (path := folder / f"{stem}-{number:03d}").exists() or path.name in taken:
            number += 1
    except OSError as error:
        raise _refused(folder, error) from None
    return path


def _refused(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{shown(path)}: cannot be made: {error.strerror}; choose another with --out")


class Lock:
    """A context that lets one process at a time work in a directory, also over NFS and across hosts.

    It ends with its process, however that dies. A process of another host whose lock does not reach this one
    is kept out as long as it beats (`heartbeat`).

    Args:
        path: the directory.
        what: the directory's kind, for the message.
        patience_s: seconds to wait for a process that is about to end.

    Raises:
        RunError: on entering, if another process works there: with its id, host and start time.
    """

    def __init__(self, path: Path, what: str = "run", patience_s: float = 0.0) -> None:
        self.path, self.what, self.patience_s = path, what, patience_s
        self._file: FileIO | None = None
        self._key = _key(path)

    def __enter__(self) -> Self:
        until = time.monotonic() + self.patience_s
        while True:
            holder = self._try()
            if holder is None:
                return self
            if time.monotonic() >= until:
                raise RunError(
                    f"{shown(self.path)}: this {self.what} is still running ({holder}); wait for its end, "
                    "or stop it"
                )
            time.sleep(0.2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _guard:
            mine = _held.pop(self._key, None)
            file, self._file = self._file, None
            if file is not None and mine is not None:
                mine.beats.stop()
                with file:  # its close ends the lock
                    if mine.beats.taken_by is None:
                        _forget_stop(self.path)
                        heartbeat.erase(file)

    def _try(self) -> str | None:
        """Take the lock, or return who has it."""
        with _guard:
            # a POSIX lock is the process's: it grants a second one, and the first close ends both
            if self._key in _held:
                return _described(_held[self._key].who)
            with on_disk(self.path):
                file = FileIO(self.path / LOCK, "a+")
            holder = self._holder(file)
            if holder is not None:
                file.close()
                return holder
            me = heartbeat.signature()
            heartbeat.sign(file, me)
            _held[self._key] = _Held(me, heartbeat.Beats(file, me))
            self._file = file
            _forget_stop(self.path)  # it was meant for an earlier process
            return None

    def _holder(self, file: FileIO) -> str | None:
        """Lock a file; return who has it, None if this process does now."""
        has_locks = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                who = heartbeat.signed(file)
                return "by another process" if who is None else _described(who)
            has_locks = False
        who = heartbeat.signed(file)
        try:
            if who is not None and heartbeat.lives(who, file, self.path, locks=has_locks):
                return f"{_described(who)}{_last_sign(who, file)}"
        except (OSError, TypeError, ValueError) as error:
            file.close()
            raise RunError(f"{self.path}: cannot be written: {error}") from error
        if who is not None and not heartbeat.is_of_this_machine(who):
            logger.warning(
                "%s: %s has given no sign of life for %.0f s: taken over",
                shown(self.path),
                _described(who),
                heartbeat.silent_s(file),
            )
        return None


def _last_sign(who: Mapping[str, Any], file: FileIO) -> str:
    if heartbeat.is_of_this_machine(who):
        return ""
    ago = max(0.0, heartbeat.silent_s(file))
    return (
        f"; last sign of life {ago:.0f} s ago: a process of another host counts as dead after "
        f"{heartbeat.SILENT_S:.0f} s"
    )


def check_held(path: Path) -> None:
    """Refuse to write into a directory that another process took from this one, which was silent for long.

    Raises:
        RunError: with the other process.
    """
    mine = _held.get(_key(path))
    taken_by = mine.beats.taken() if mine is not None else None
    if taken_by is not None:
        raise RunError(
            f"{shown(path)}: {_described(taken_by)} has taken it over, since this process gave no sign of "
            f"life for {heartbeat.SILENT_S:.0f} s; nothing more is written"
        )


def _check_above(path: Path) -> None:
    """Refuse to write a file of a run, a sweep or a training that another process took from this one.

    Raises:
        RunError: as `check_held`.
    """
    if any(held.beats.taken() is not None for held in tuple(_held.values())):
        for folder in path.absolute().parents:
            check_held(folder)


fences.append(_check_above)


def _key(path: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(path)


def _described(who: Mapping[str, Any]) -> str:
    return f"process {who['pid']} on {who['host']}, since {who['since']}"


# ── from another process
# ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Holder:
    """The process that works in a directory.

    Args:
        pid: its id; on this host as the system says it, elsewhere as the process wrote it.
        host: its host; empty if unknown.
        since: when it took the directory, `2026-01-31 12:00:00 UTC`; empty if unknown.
        actors: client actors that lived after its last round; None if it has not said.
    """

    pid: int
    host: str
    since: str
    actors: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether it runs on this host, so that a signal reaches it."""
        return self.host == socket.gethostname()

    @property
    def described(self) -> str:
        """The process in words."""
        return _described(
            {"pid": self.pid, "host": self.host or "an unknown host", "since": self.since or "?"}
        )


def holder_of(path: Path) -> Holder | None:
    """Return the process that works in a directory; None if none does. It only looks: it takes no lock."""
    with _guard:
        # closing the file here would end this process's own lock
        mine = _held.get(_key(path))
        if mine is not None:
            return Holder(mine.who["pid"], mine.who["host"], mine.who["since"], mine.who.get("actors"))
        try:
            with FileIO(path / LOCK) as file:
                return _holder_of(file)
        except OSError:
            return None


def _holder_of(file: FileIO) -> Holder | None:
    """Return who has a lock's file, by the system, or by its beats."""
    pid, who = _locked_by(file), heartbeat.signed(file)
    try:
        if pid is None:
            beats = who is not None and not heartbeat.is_of_this_machine(who)
            if who is None or not beats or abs(heartbeat.silent_s(file)) > heartbeat.SILENT_S:
                return None
            return Holder(int(who["pid"]), str(who["host"]), str(who["since"]), who.get("actors"))
        if who is None:
            return Holder(pid, "", "")
        here = who["host"] == socket.gethostname() and pid > 0
        own = pid if here else int(who["pid"])
        return Holder(own, str(who["host"]), str(who["since"]), who.get("actors"))
    except (ValueError, TypeError):
        return None if pid is None else Holder(pid, "", "")


def _locked_by(file: FileIO) -> int | None:
    """Return the id of the process that has a file's lock; None if it is free, or cannot be locked here."""
    linux = sys.platform.startswith("linux")
    layout = "hhqqi" if linux else "qqihh"  # struct flock
    start, length, pid = 0, 0, 0
    asked = (
        struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, start, length, pid)
        if linux
        else struct.pack(layout, start, length, pid, fcntl.F_WRLCK, os.SEEK_SET)
    )
    found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked)[: struct.calcsize(layout)])
    kind, holder = (found[0], found[4]) if linux else (found[3], found[2])
    return None if kind == fcntl.F_UNLCK else int(holder)


def note_actors(path: Path, actors: int) -> None:
    """Write into the lock of a directory, if this process has it, how many client actors live."""
    with _guard:
        mine = _held.get(_key(path))
        if mine is not None and mine.who.get("actors") != actors:
            mine.who["actors"] = actors
            mine.beats.sign()


def ask_to_stop(path: Path) -> None:
    """Ask the process that works in a directory, on whatever host, to end after its round in progress.

    Raises:
        RunError: if the directory cannot be written.
    """
    with on_disk(path / STOP):
        (path / STOP).touch()


def is_asked_to_stop(path: Path) -> bool:
    """Tell whether the process that works in a directory is asked to end."""
    return (path / STOP).exists()


def _forget_stop(path: Path) -> None:
    with suppress(OSError):
        if (path / STOP).exists():
            (path / STOP).unlink(missing_ok=True)
