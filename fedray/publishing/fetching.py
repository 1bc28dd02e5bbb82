"""A published directory on any node: fetched, every file checked, brought up to date.

fetch(objects, folder)      the current generation becomes the contents of a directory
working_copy(address)       a directory below runs/ in which `resume` continues
readable_copy(address)      a directory in the cache, without checkpoints and models, for reports
refresh(folder, storage)    a directory whose run another node has continued
"""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from fedray.config.places import Place, is_place
from fedray.durable import on_disk, replacing, show_as, shown
from fedray.errors import ConfigError, RunError
from fedray.publishing.manifest import CLAIMS, CONTENTS, NOTHING, Entry, Manifest
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.objects import Missing, Objects
from fedray.publishing.publisher import Known, names_of
from fedray.storage.directory import LOCK, Lock

TRIALS = "trials"
"""Folder of a sweep whose folders are published by themselves."""

LEFT_OUT = ("checkpoints/", "forks/", "model.safetensors")
"""Beginnings of names that a report does not need."""

WAIT_S = 60.0
"""Seconds to wait for another process that fetches the same directory."""


def fetch(objects: Objects, folder: Path, *, readable: bool = False, keeps: Collection[str] = ()) -> Manifest:
    """Make a directory's contents those of the current generation; the caller has its lock.

    A process that dies here leaves a directory that says so; the next call completes it.

    Args:
        objects: of the place.
        folder: the directory; files that are not of the generation are removed, hidden ones stay.
        readable: leave checkpoints and models out.
        keeps: names of files that stay although the generation has none.

    Returns:
        The generation; `NOTHING` if nothing is published there, and then nothing is changed.

    Raises:
        StoreError: if the store does not answer.
        RunError: if an object is damaged or missing: with the name of its file.
    """
    place = str(objects.place)
    while True:
        current = read_manifest(objects)
        if current is NOTHING:
            return current
        wanted = _wanted(current, readable)
        if _holds(folder, place, current, wanted if readable else None):
            return current
        Known(place, is_partial=True, files={}).write(folder)
        try:
            _bring(objects, folder, wanted, keeps)
        except Missing as error:
            if read_manifest(objects).id != current.id:
                continue  # a later generation, whose publisher has tidied up
            raise RunError(f"{error}: generation {current.generation} is not whole") from error
        Known(place, current.generation, current.id, files=wanted, is_partial=readable).write(folder)
        return current


def _holds(folder: Path, place: str, current: Manifest, wanted: dict[str, Entry] | None) -> bool:
    """Tell whether a directory came from a generation: from all of it, or from the files that are wanted."""
    known = Known.read(folder)
    if known is None or (known.place, known.id) != (place, current.id):
        return False
    return not known.is_partial or known.files == wanted


def _wanted(manifest: Manifest, readable: bool) -> dict[str, Entry]:
    left_out = LEFT_OUT if readable else ()
    return {name: entry for name, entry in manifest.files.items() if not name.startswith(left_out)}


def _bring(objects: Objects, folder: Path, wanted: dict[str, Entry], keeps: Collection[str]) -> None:
    for name, entry in wanted.items():
        path = folder / name
        with on_disk(path):
            if not _has(path, entry):
                path.parent.mkdir(parents=True, exist_ok=True)
                _receive(objects, name, entry, path)
    for name in list(names_of(folder)):
        if name not in wanted and name not in keeps:
            with on_disk(folder / name):
                (folder / name).unlink()


def _receive(objects: Objects, name: str, entry: Entry, path: Path) -> None:
    """Write a file from its object, if that is sound."""
    size, digest = 0, sha256()
    with replacing(path) as file:
        for piece in objects.pieces(f"{CONTENTS}/{entry.sha256}"):
            size += len(piece)
            digest.update(piece)
            file.write(piece)
        if (size, digest.hexdigest()) != (entry.size, entry.sha256):
            raise RunError(
                f"{objects.place}: {name} is damaged in the store: {CONTENTS}/{entry.sha256} has {size} "
                f"bytes of SHA-256 {digest.hexdigest()[:12]}…, not {entry.size} of {entry.sha256[:12]}…"
            )


def _has(path: Path, entry: Entry) -> bool:
    with suppress(OSError):
        return path.stat().st_size == entry.size and sha256(path.read_bytes()).hexdigest() == entry.sha256
    return False


# ── copies
# ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def working_copy(address: str, runs: Path) -> Path:
    """Return a directory below `runs` with the current generation of a run or sweep; its trials come too.

    Args:
        address: of the run or sweep.
        runs: folder of working directories; one that is a copy of this address already is used again.

    Raises:
        ConfigError: if nothing is published at the address.
        RunError: if a process works in the directory, or the store does not give a sound generation.
    """
    place = Place.parse(address, "resume")
    objects = Objects(place)
    objects.check()
    if read_manifest(objects) is NOTHING:
        raise ConfigError(_nothing_at(objects))
    number, folder = 0, runs / place.name
    while folder.exists() and not _is_copy(folder, place):
        number += 1
        folder = runs / f"{place.name}-{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        _fetch_all(objects, folder, readable=False)
    return folder


def readable_copy(address: str) -> Path:
    """Return a directory of the cache with a run, a sweep, or all below an address, without checkpoints.

    Raises:
        ConfigError: if nothing is published at or below the address.
        RunError: if the store does not give a sound generation.
    """
    place = Place.parse(address, "address")
    objects = Objects(place)
    objects.check()
    folder = cached(place, "published")
    show_as(folder, str(place))
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder.parent, "copy", patience_s=WAIT_S):
        if _fetch_all(objects, folder, readable=True):
            return folder
        found = [name for name in objects.folders() if _fetch_below(objects, name, folder)]
    if not found:
        raise ConfigError(_nothing_at(objects))
    return folder


def _fetch_all(objects: Objects, folder: Path, *, readable: bool) -> bool:
    """Fetch a run or a sweep with its trials; tell whether there is one."""
    if fetch(objects, folder, readable=readable) is NOTHING:
        return False
    if readable:
        _sign(objects, folder)
    trials = objects.below(TRIALS)
    for name in trials.folders():
        there = folder / TRIALS / name
        there.mkdir(parents=True, exist_ok=True)
        if readable:
            fetch(trials.below(name), there, readable=True)
            _sign(trials.below(name), there)
            continue
        with Lock(there, "trial", patience_s=WAIT_S):
            bring_newer(trials.below(name), there)
    return True


def _sign(objects: Objects, folder: Path) -> None:
    """Let a copy for readers show the process that publishes, as if it worked there."""
    lock, claims = folder / LOCK, objects.listed(CLAIMS)
    if not claims:
        lock.unlink(missing_ok=True)
        return
    newest = max(claims, key=lambda claim: claim.written_at)
    with suppress(Missing, ValueError):  # it has just ended
        who = json.loads(objects.get(f"{CLAIMS}/{newest.name}"))
        with on_disk(lock):  # of no machine: no lock of the system tells whether it lives, its beats do
            lock.write_text(json.dumps({**who, "machine": str(objects.place)}) + "\n", encoding="utf-8")
            os.utime(lock, (newest.written_at, newest.written_at))


def _fetch_below(objects: Objects, name: str, folder: Path) -> bool:
    there = folder / name
    there.mkdir(exist_ok=True)
    if _fetch_all(objects.below(name), there, readable=True):
        return True
    with suppress(OSError):
        there.rmdir()
    return False


def bring_newer(objects: Objects, folder: Path, *, keeps: Collection[str] = ()) -> bool:
    """Fetch what another node has published since this directory was last published or fetched.

    A directory that is as new as the store, or newer, is left alone.

    Returns:
        Whether it was fetched.

    Raises:
        RunError, StoreError: as `fetch`.
    """
    known, current = Known.read(folder), read_manifest(objects)
    if current is NOTHING:
        return False
    if known is not None and known.place == str(objects.place) and known.is_of(current):
        return False
    fetch(objects, folder, keeps=keeps)
    return True


def refresh(folder: Path, place: Place, patience_s: float = 0.0) -> None:
    """Bring the directory of a run or sweep up to what another node has published; the caller resumes it.

    Args:
        folder: the directory.
        place: where it is published.
        patience_s: seconds to wait for a process that is leaving the directory.

    Raises:
        RunError: if a process works in the directory, or the place holds something that it did not come from.
        StoreError: if the store does not answer.
    """
    objects = Objects(place)
    objects.check()
    known = Known.read(folder)
    if known is not None and known.place == str(place):
        with Lock(folder, patience_s=patience_s):
            bring_newer(objects, folder)
    elif read_manifest(objects) is not NOTHING:
        raise RunError(
            f"{place}: holds something that {shown(folder)} does not come from; to continue that one: "
            f"`fedray resume {place}`; to publish this one elsewhere: storage=…"
        )


def place_of(folder: Path, storage: str) -> Place:
    """Return where a directory is published: where it was so far, or below `storage`, under its own name."""
    parent, known = Place.parse(storage), Known.read(folder)
    if known is not None and is_place(known.place):
        before = Place.parse(known.place)
        if before.options == parent.options and before.key.startswith(f"{parent.key}/"):
            return before
    return parent.below(folder.name)


def _is_copy(folder: Path, place: Place) -> bool:
    with suppress(RunError):
        known = Known.read(folder)
        return known is not None and known.place == str(place)
    return False


def is_readable_copy(folder: Path) -> bool:
    """Tell whether a directory is a copy in the cache."""
    return folder.is_relative_to(_cache())


def cached(place: Place, kind: str) -> Path:
    """Return the directory of the cache for a place; it need not exist."""
    return _cache() / kind / sha256(str(place).encode()).hexdigest()[:16] / place.name


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedray"


def _nothing_at(objects: Objects) -> str:
    near = objects.folders()
    inside = f"; below it are {', '.join(near[:8])}" if near else ""
    return f"{objects.place}: no run or sweep is published there{inside}"
