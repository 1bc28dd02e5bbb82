"""A directory that is published: after each checkpoint, what has changed in it, as the next generation.

    scan the files → put the new contents → check that no other process publishes → put the manifest → tidy up

The manifest makes a generation current, in a single PUT; until then the earlier one is whole. Its objects go
with the publication after the next, so that a reader can finish. `published.json` in the directory says which
generation it came from, and what is in the store.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

from fedray.config.places import Place
from fedray.durable import as_mapping, on_disk, read_mapping, replace, shown
from fedray.errors import RunError
from fedray.publishing.claims import Claim
from fedray.publishing.manifest import CONTENTS, MANIFEST, NOTHING, Entry, Manifest
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.objects import PIECE, Objects, StoreError

logger = logging.getLogger(__name__)

PUBLISHED = "published.json"
"""File in a directory: where it is published, which generation, and the objects of that one and the last."""

APART = ("trials", "report")
"""Folders that are not a part of a directory: trials are published by themselves, reports made again."""

PAUSE_S = 30.0
"""Seconds after a failure in which nothing is tried again, so that an outage does not hold the run up."""

PATIENCE_S = 60.0
"""Seconds that the last publication waits for a store that does not answer."""


@dataclass(frozen=True)
class Known:
    """What `published.json` says.

    Args:
        place: where the directory is published.
        generation: its number; 0: none.
        id: of the generation; empty: none.
        pending: id of a generation that was being published when this was written.
        files: name → size and SHA-256, in the generation.
        before: SHA-256 of the objects of the generation before.
        is_partial: whether files were being fetched when this was written, or some were left out.
    """

    place: str
    generation: int = 0
    id: str = ""
    pending: str = ""
    files: Mapping[str, Entry] | None = None
    before: tuple[str, ...] = ()
    is_partial: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Known | None":
        """Read it from a directory; None if there is none.

        Raises:
            RunError: if it is damaged.
        """
        tree = read_mapping(folder / PUBLISHED)
        if tree is None:
            return None
        try:
            files = {name: Entry(int(size), str(digest)) for name, (size, digest) in tree["files"].items()}
            return cls(
                str(tree["place"]),
                int(tree["generation"]),
                str(tree["id"]),
                str(tree["pending"]),
                files,
                tuple(tree["before"]),
                bool(tree["is_partial"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise RunError(
                f"{folder / PUBLISHED}: is damaged: {error!r}; `fedray resume ADDRESS` fetches a copy"
            ) from None

    def write(self, folder: Path) -> None:
        """Write it into a directory."""
        files = {name: [entry.size, entry.sha256] for name, entry in (self.files or {}).items()}
        tree = {**self.__dict__, "files": files}
        with on_disk(folder / PUBLISHED):
            replace(folder / PUBLISHED, as_mapping(tree))

    def is_of(self, manifest: Manifest) -> bool:
        """Tell whether the directory is at least as new as a generation."""
        return manifest.id in (self.id, self.pending) and not self.is_partial


class Publisher:
    """A context that publishes a directory, as the only process that does.

    On leaving, what is left is published, with patience. An error of the block matters more than one of the
    store, which is then logged.

    Args:
        folder: the directory.
        place: where it is published.
        objects: of the place; None: as its address says.
        waits: whether to wait for another process that may be dead.

    Raises:
        RunError: on entering, if another process publishes there, or has published what the directory lacks;
            on leaving, if the store did not take everything.
        StoreError: on entering, if the store does not answer.
    """

    def __init__(
        self, folder: Path, place: Place, *, objects: Objects | None = None, waits: bool = True
    ) -> None:
        self.folder, self.place = folder, place
        self.objects = objects or Objects(place)
        self._claim = Claim(self.objects, waits=waits)
        self._known = Known(str(place))
        self._hashed: dict[str, tuple[tuple[int, int, int], Entry]] = {}
        self._retry_at = 0.0
        self.problem: str | None = None
        """Why the last publication failed; None: it did not."""

    def __enter__(self) -> Self:
        self._claim.__enter__()
        try:
            self._begin()
        except BaseException:
            self._claim.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._publish_last(PATIENCE_S if error is None else PATIENCE_S / 4)
        except RunError as problem:
            if error is None:
                raise
            logger.warning("%s", problem)
        finally:
            self._claim.__exit__(kind, error, trace)

    def publish(self) -> bool:
        """Publish what has changed; tell whether the store has all of it now.

        A store that does not answer is a warning: the next call that is `PAUSE_S` later tries again.

        Raises:
            RunError: if another process has taken over, or a file cannot be read.
        """
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._publish()
        except StoreError as error:
            if self.problem is None:
                logger.warning("%s; the run continues, and its files are published later", error)
            self.problem, self._retry_at = str(error), time.monotonic() + PAUSE_S
            return False
        if self.problem is not None:
            logger.warning("%s has all files again", self.place)
        self.problem, self._retry_at = None, 0.0
        return True

    def _begin(self) -> None:
        known, current = Known.read(self.folder), read_manifest(self.objects)
        if known is None or known.place != str(self.place):
            known = Known(str(self.place))
        if current is not NOTHING and not known.is_of(current):
            raise RunError(
                f"{self.place}: holds generation {current.generation}, which {shown(self.folder)} lacks"
            )
        last = known.before if current.id == known.id else _contents(known.files or {})
        before = tuple(sorted(set(last) - current.contents)) if current is not NOTHING else ()
        self._known = Known(str(self.place), current.generation, current.id, "", current.files, before)
        self._known.write(self.folder)
        kept = current.contents | set(before)
        for one in self.objects.listed(CONTENTS):  # of a publication that was cut
            if one.name not in kept:
                self.objects.remove(f"{CONTENTS}/{one.name}")

    def _publish(self) -> None:
        known = self._known
        files = self._scan()
        if files == known.files and known.id:
            return
        there = _contents(known.files or {}) | set(known.before)
        for name, entry in list(files.items()):
            if entry.sha256 not in there:
                try:
                    files[name] = self._put(name, entry)
                except FileNotFoundError:  # removed meanwhile
                    del files[name]
                    continue
                there.add(files[name].sha256)
        self._claim.check()
        current = read_manifest(self.objects)
        if current.id not in (known.id, known.pending):
            raise RunError(f"{self.place}: another process has published generation {current.generation}")
        following = current.next(files)
        self._known = dataclasses.replace(
            known, generation=current.generation, id=current.id, pending=following.id
        )
        self._known.write(self.folder)  # if this process dies now, the directory is known to be as new
        self.objects.put(MANIFEST, following.write())
        gone = set(known.before) - following.contents
        before = sorted(_contents(known.files or {}) - following.contents)
        self._known = Known(known.place, following.generation, following.id, "", files, tuple(before))
        self._known.write(self.folder)
        for digest in sorted(gone - set(before)):
            with suppress(StoreError):  # the next process that publishes here removes it
                self.objects.remove(f"{CONTENTS}/{digest}")

    def _put(self, name: str, entry: Entry) -> Entry:
        """Put the contents of a file; return them, which may be newer than those that were scanned."""
        path = self.folder / name
        if entry.size <= PIECE:
            contents = path.read_bytes()[: entry.size]
            entry = Entry(len(contents), sha256(contents).hexdigest())
            self.objects.put(f"{CONTENTS}/{entry.sha256}", contents)
        else:
            self.objects.put(f"{CONTENTS}/{entry.sha256}", path, entry.size)
            if _digest(path, entry.size) != entry.sha256:
                raise StoreError(f"{path}: has changed while it was published")
        return entry

    def _scan(self) -> dict[str, Entry]:
        """Return the files of the directory; those that have not changed are not read again."""
        found = {}
        for name in names_of(self.folder):
            with suppress(FileNotFoundError):  # removed meanwhile
                stat = os.stat(self.folder / name)
                mark = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
                if name not in self._hashed or self._hashed[name][0] != mark:
                    entry = Entry(stat.st_size, _digest(self.folder / name, stat.st_size))
                    self._hashed[name] = (mark, entry)
                found[name] = self._hashed[name][1]
        return found

    def _publish_last(self, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        pause_s = 1.0
        while True:
            self._retry_at = 0.0
            if self.publish():
                return
            if time.monotonic() + pause_s > until:
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)
        missing = [
            name for name, entry in self._scan().items() if (self._known.files or {}).get(name) != entry
        ]
        size = sum((self.folder / name).stat().st_size for name in missing)
        raise StoreError(
            f"{self.problem}. {len(missing)} files ({size / 1e6:.1f} MB) of {shown(self.folder)} are not "
            f"published; nothing is lost. `fedray resume {shown(self.folder)}` sends them"
        )


def is_published(folder: Path) -> bool:
    """Tell whether all files of a directory were published."""
    known = Known.read(folder)
    if known is None or known.is_partial or not known.id:
        return False
    files = {}
    for name in names_of(folder):
        size = (folder / name).stat().st_size
        files[name] = Entry(size, _digest(folder / name, size))
    return files == known.files


def _contents(files: Mapping[str, Entry]) -> set[str]:
    return {entry.sha256 for entry in files.values()}


def names_of(folder: Path) -> Iterator[str]:
    """Yield the names of the files that are published. Hidden ones are of this process alone."""
    for path, folders, files in os.walk(folder):
        inner = Path(path).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if inner == Path():
            folders[:] = [name for name in folders if name not in APART]
        for name in sorted(files):
            if not name.startswith(".") and not (inner == Path() and name == PUBLISHED):
                yield (inner / name).as_posix()


def _digest(path: Path, size: int) -> str:
    """Return the SHA-256 of the first bytes of a file."""
    found = sha256()
    with open(path, "rb") as file:
        while size > 0 and (piece := file.read(min(PIECE, size))):
            found.update(piece)
            size -= len(piece)
    return found.hexdigest()
