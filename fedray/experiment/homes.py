"""Where the directory of a run or a sweep is made, and where it is published: what `storage` says.

    storage: null              runs/NAME
    storage: FOLDER            FOLDER/NAME
    storage: s3://…            runs/NAME, published at s3://…/NAME

`--out` names the directory itself; its name is then also that of the place.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.config import yaml_text
from fedray.config.overrides import parse_overrides
from fedray.config.places import Place, absolute_place, is_place
from fedray.durable import local_path
from fedray.errors import ConfigError
from fedray.publishing.fetching import place_of, refresh, working_copy
from fedray.publishing.manifest import NOTHING
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.objects import Objects
from fedray.publishing.publisher import Publisher, is_published
from fedray.storage.directory import check_free, take, take_next

RUNS = Path("runs")
"""Default parent directory of runs."""

Publish = Callable[[], object]
"""Publishes what has changed in a directory; does nothing where it is not published."""


@dataclass(frozen=True)
class Home:
    """Where a new directory goes.

    Args:
        parent: the folder in which it is made.
        out: the directory itself; None: the next free name in `parent`.
        store: the place below which it is published; None: nowhere.
        taken: names that the store has already.
    """

    parent: Path
    out: Path | None = None
    store: Place | None = None
    taken: frozenset[str] = frozenset()

    @classmethod
    def of(cls, storage: str | None, out: str | Path | None) -> "Home":
        """Check that a new directory can be made, and published, before anything starts.

        Raises:
            ConfigError: if `out` or `storage` cannot be used.
            StoreError: if the store does not answer, or refuses.
        """
        if is_place(str(out)) or str(out)[:4] in ("s3:/", "gs:/"):
            address = re.sub(r"^(\w+):/+", r"\1://", str(out))  # a Path has lost a slash
            raise ConfigError(f"--out is a directory of this node; to publish the files: storage={address}")
        path = None if out is None else local_path(out)
        if path is not None:
            check_free(path)
        if storage is None:
            return cls(local_path(RUNS), path)
        if not is_place(storage):
            return cls(_folder(storage), path)
        store = Place.parse(storage)
        objects = Objects(store)
        objects.check()
        if path is None:
            return cls(local_path(RUNS), None, store, frozenset(objects.folders()))
        if read_manifest(objects.below(path.name)) is not NOTHING:
            raise ConfigError(
                f"{store.below(path.name)}: holds a run already: choose another name with --out, or continue "
                f"that one: fedray resume {store.below(path.name)}"
            )
        return cls(local_path(RUNS), path, store)

    def make(self, stem: str, inner: str, what: str) -> tuple[Path, Place | None]:
        """Create the directory; return it and where it is published."""
        if self.out is None:
            path = take_next(self.parent, stem, inner, what, self.taken)
        else:
            path = self.out
            take(path, inner, what)
        return path, None if self.store is None else self.store.below(path.name)


def _folder(storage: str) -> Path:
    folder = Path(storage)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"storage: {there} is a file, not a folder in which directories can be made")
    return folder


@contextmanager
def published(path: Path, place: Place | None, *, is_new: bool = False) -> Iterator[Publish]:
    """Publish a directory that this process works in; what is left goes when the block ends.

    Args:
        path: the directory.
        place: where it is published; None: nowhere.
        is_new: whether it was just made; then it is removed if another process has the place.

    Raises:
        RunError: as `Publisher`.
    """
    if place is None:
        yield lambda: None
        return
    with ExitStack() as stack:
        try:
            publisher = stack.enter_context(Publisher(path, place, waits=not is_new))
        except BaseException:
            if is_new:
                shutil.rmtree(path, ignore_errors=True)
            raise
        yield publisher.publish


def brought(
    path: str | Path,
    changes: Sequence[str] | Mapping[str, Any] = (),
    place: Place | None = None,
    patience_s: float = 0.0,
) -> tuple[Path, Place | None]:
    """Return the directory to resume in, as new as its store has it, and where it is published.

    Args:
        path: a directory; or an address, of which a copy is made below `runs/`.
        changes: of the config; `storage` among them says where it is published from now on.
        place: where it is published; None: as its config says.
        patience_s: seconds to wait for a process that is leaving the directory.

    Raises:
        ConfigError: if nothing is published at an address.
        RunError: if the store cannot be asked, or does not give a sound generation.
    """
    folder = working_copy(path, local_path(RUNS)) if isinstance(path, str) and is_place(path) else None
    there = folder or local_path(path)
    storage = _storage_of(there, changes)
    if place is None and (storage is None or not is_place(storage)):
        return there, None
    place = place or place_of(there, str(storage))
    if folder is None:
        refresh(there, place, patience_s)
    return there, place


def _storage_of(folder: Path, changes: Sequence[str] | Mapping[str, Any]) -> str | None:
    """Return `storage` of a directory's config, changed; None also if the config cannot be read here."""
    given = dict(changes) if isinstance(changes, Mapping) else parse_overrides(list(changes))
    if "storage" in given:
        return absolute_place(str(given["storage"])) if given["storage"] is not None else None
    is_sweep = (folder / "sweep.yaml").is_file()
    try:
        tree = yaml_text.load(folder / ("sweep.yaml" if is_sweep else "config.yaml"))
    except ConfigError:
        return None  # whoever reads it next says why
    base = tree.get("base") if is_sweep else tree
    storage = base.get("storage") if isinstance(base, Mapping) else None
    return storage if isinstance(storage, str) else None


def publish_all(path: Path, place: Place | None) -> None:
    """Publish what has changed in a directory that nobody works in, and in its trials.

    Raises:
        RunError: as `Publisher`.
    """
    publish_rest(path, place)
    for config in sorted(path.glob("trials/*/config.yaml")) if place is not None else ():
        assert place is not None
        publish_rest(config.parent, place.below("trials", config.parent.name))


def publish_rest(path: Path, place: Place | None) -> None:
    """Publish what an earlier process could not.

    Raises:
        RunError: as `Publisher`.
    """
    if place is not None and not is_published(path):
        with published(path, place) as publish:
            publish()
