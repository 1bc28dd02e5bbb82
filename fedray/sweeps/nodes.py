"""The files of a sweep on nodes that do not see the driver's directory: its place in an object store.

A trial fetches the sweep's own files and what an earlier try of it published, and works in a directory of
its node's cache. The driver fetches what trials published before it reads it.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedray.config.places import Place
from fedray.errors import RunError
from fedray.publishing.fetching import TRIALS, WAIT_S, bring_newer, cached, fetch
from fedray.publishing.objects import Objects, StoreError
from fedray.storage.directory import Lock, holder_of
from fedray.sweeps.outcome import STOPPED
from fedray.sweeps.suggesting import POINTS
from fedray.sweeps.tune import ask_to_end

DRIVER = ".driver"
"""File in the directory of a sweep: a token, by which a process knows that it sees the driver's directory."""

ENDING = "ending"
"""Object at the place of a sweep whose driver asks the trials to end."""

LOOK_S = 3.0
"""Seconds between two looks of a trial for that object."""

EVERY_S = 10.0
"""Seconds between two publications of the driver's own files."""


@dataclass(frozen=True)
class Disk:
    """Where the files of a sweep are, for its driver and for its trials.

    Args:
        path: the driver's directory.
        place: where it is published; None: all nodes see `path`.
        token: what the driver wrote into `DRIVER`.
    """

    path: Path
    place: Place | None = None
    token: str = ""

    @classmethod
    def of_driver(cls, path: Path, place: Place | None) -> "Disk":
        """Return it for the process that drives the sweep."""
        token = secrets.token_hex(8) if place is not None else ""
        if token:
            (path / DRIVER).write_text(token, encoding="ascii")
        return cls(path, place, token)

    @property
    def here(self) -> Path:
        """The sweep's directory on this node."""
        if self.place is None or self._is_drivers():
            return self.path
        return cached(self.place, "nodes")

    def place_of(self, name: str) -> Place | None:
        """Return where a trial is published."""
        return None if self.place is None else self.place.below(TRIALS, name)

    # ── for a trial
    # ──────────────────────────────────────────────────────────────────────────────────────────────

    def bring(self, name: str) -> None:
        """Fetch what a trial needs, and what an earlier try of it published.

        Raises:
            RunError: if the store does not give it.
        """
        if self.place is None:
            return
        objects, folder = Objects(self.place), self.here
        there = folder / TRIALS / name
        there.mkdir(parents=True, exist_ok=True)
        if folder != self.path:
            with Lock(folder, "copy", patience_s=WAIT_S):
                fetch(objects, folder)
        with Lock(there, "trial", patience_s=WAIT_S):
            bring_newer(objects.below(TRIALS, name), there)

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Let a trial on another node know inside when the driver asks it to end."""
        folder = self.here
        if self.place is None or folder == self.path:
            yield
            return
        over, objects = threading.Event(), Objects(self.place)

        def look() -> None:
            while not over.wait(LOOK_S):
                with suppress(StoreError):
                    ask_to_end(folder, objects.find(ENDING) is not None)

        threading.Thread(target=look, name="fedray-ending", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    # ── for the driver
    # ──────────────────────────────────────────────────────────────────────────────────────────────

    def mirror(self, names: Iterable[str]) -> None:
        """Fetch what trials on other nodes have published, so that the driver's directory has it.

        Raises:
            RunError: if the store does not give it.
        """
        if self.place is None:
            return
        trials = Objects(self.place).below(TRIALS)
        for name in names:
            there = self.path / TRIALS / name
            if holder_of(there) is None:  # else it works here
                is_new = not there.exists()
                there.mkdir(exist_ok=True)
                with Lock(there, "trial", patience_s=WAIT_S):
                    found = bring_newer(trials.below(name), there, keeps={STOPPED})
                if is_new and not found:
                    (there / ".lock").unlink(missing_ok=True)
                    there.rmdir()

    def ask_to_end(self, is_ending: bool) -> None:
        """Ask trials on other nodes to end, or no longer."""
        if self.place is not None:
            objects = Objects(self.place)
            with suppress(StoreError):  # then they end with the driver's processes
                objects.put(ENDING, b"") if is_ending else objects.remove(ENDING)

    def _is_drivers(self) -> bool:
        with suppress(OSError):
            return (self.path / DRIVER).read_text(encoding="ascii") == self.token
        return False


class Places(Mapping[str, Path]):
    """Name of each trial → its directory on the node that asks.

    Args:
        disk: where the sweep's files are.
        names: of the trials that are known.
    """

    def __init__(self, disk: Disk, names: Iterable[str]) -> None:
        self.disk, self.names = disk, list(names)

    def __getitem__(self, name: str) -> Path:
        return self.disk.here / TRIALS / name

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Steady:
    """Publishes the driver's own files while trials run: suggested points at once, the rest now and then.

    Args:
        path: the sweep's directory.
        publish: publishes what has changed.
    """

    def __init__(self, path: Path, publish: Callable[[], object]) -> None:
        self.points, self.publish = path / POINTS, publish
        self._size, self._at = -1, 0.0

    def __call__(self) -> None:
        """Publish, if it is time."""
        size = self.points.stat().st_size if self.points.exists() else 0
        if size != self._size or time.monotonic() - self._at >= EVERY_S:
            with suppress(RunError):  # what is wrong is said at the end
                self.publish()
            self._size, self._at = size, time.monotonic()
