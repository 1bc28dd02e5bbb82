"""Ends a run, a sweep, a trial or a training from another terminal, in good order.

    ask → the process sees `.stop` in its directory after its round → it ends as after SIGTERM

The file reaches a process on any host that shares the directory, and a trial inside Ray. `now` sends SIGINT
to a process of this host: its round in progress is dropped.
"""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedray.durable import shown
from fedray.errors import ConfigError, RunError
from fedray.overview.summary import is_training, summary
from fedray.publishing.fetching import is_readable_copy
from fedray.storage.directory import Holder, ask_to_stop, holder_of

LOOK_S = 0.2
"""Seconds between two looks at a directory whose process is to end."""


@dataclass(frozen=True)
class Asked:
    """A process that was asked to end.

    Args:
        path: its directory.
        what: sweep, trial (of a running sweep), training or run.
        holder: the process.
    """

    path: Path
    what: str
    holder: Holder

    def ended(self, wait_s: float) -> bool:
        """Wait until the process has left the directory; tell whether it has."""
        until = time.monotonic() + wait_s
        while (now := holder_of(self.path)) is not None and _same(now, self.holder):
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK_S)
        return True


def stop(path: Path, *, now: bool = False) -> Asked:
    """Ask the process that works in a directory to end.

    Args:
        path: of a run, a sweep, a trial or a training.
        now: drop the round in progress; else it is completed first.

    Raises:
        ConfigError: if nothing works there, or `now` cannot be.
        RunError: if the directory cannot be written, or the process may not be signalled.
    """
    what = kind_of(path)
    holder = holder_of(path)
    if holder is None:
        raise ConfigError(_not_running(path, what))
    if is_readable_copy(path):
        raise ConfigError(
            f"{shown(path)}: {holder.described} works in a directory of its own node and sees no request in "
            f"the store: run `fedray stop DIR` with that directory on {holder.host or 'its host'}"
        )
    if what == "trial" and now:
        raise ConfigError(
            f"--now: {shown(path)} is a trial of a running sweep, which ends after its round; leave out --now"
        )
    above = path.parent.parent
    if what == "training" and path.parent.name == "trials" and holder_of(above) is not None:
        raise ConfigError(
            f"{shown(path)} is one of several trainings that run together, which end together: fedray stop "
            f"{shown(above)}"
        )
    if not now:
        ask_to_stop(path)
    else:
        _interrupt(path, holder)
    return Asked(path, what, holder)


def kind_of(path: Path) -> str:
    """Tell what a directory is of: a sweep, a run, a training, or a trial whose sweep is running.

    Raises:
        ConfigError: if it is neither.
    """
    if (path / "sweep.yaml").is_file():
        return "sweep"
    if is_training(path):
        return "training"
    if not (path / "config.yaml").is_file() and holder_of(path) is None:
        raise ConfigError(f"{shown(path)} is not the directory of a run or a sweep: it has no config.yaml")
    above = path.parent.parent
    is_trial = path.parent.name == "trials" and (above / "sweep.yaml").is_file()
    return "trial" if is_trial and holder_of(above) is not None else "run"


def _not_running(path: Path, what: str) -> str:
    if what == "sweep":
        return f"{shown(path)} does not run: nothing to stop; `fedray resume {shown(path)}` resumes the sweep"
    if what == "training":
        return f"{shown(path)} does not run: there is nothing to stop"
    found = summary(path)
    after = "" if found.round is None else f" (after round {found.round} of {found.rounds})"
    return f"{shown(path)} does not run: it is {found.status}{after}, and there is nothing to stop"


def _interrupt(path: Path, holder: Holder) -> None:
    """Send SIGINT to the process of a directory, and to no other.

    Raises:
        ConfigError: if it runs on another host.
        RunError: if this user may not signal it.
    """
    if not holder.is_here:
        raise ConfigError(
            f"--now: {shown(path)} runs on {holder.host or 'another host'}, where no signal reaches it; "
            "leave out --now: it then ends after its round"
        )
    try:
        with suppress(ProcessLookupError):  # it has just ended
            if not hasattr(os, "pidfd_open"):
                os.kill(holder.pid, signal.SIGINT)
                return
            process = os.pidfd_open(holder.pid)
            try:
                if holder_of(path) == holder:  # the id is still that of the process with the lock
                    signal.pidfd_send_signal(process, signal.SIGINT)
            finally:
                os.close(process)
    except OSError as error:
        raise RunError(f"{shown(path)}: {holder.described} cannot be signalled: {error.strerror}") from None


def _same(one: Holder, other: Holder) -> bool:
    return (one.pid, one.host) == (other.pid, other.host)
