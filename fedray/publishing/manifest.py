"""The manifest of a published directory: which objects make its current generation. One small object.

manifest.json             files → size and SHA-256; the number and the id of this generation
objects/<SHA-256>         the contents of a file, whatever its name
claims/<id>.json          the process that publishes here
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fedray.durable import as_mapping, mapping_in
from fedray.errors import RunError
from fedray.publishing.objects import Missing, Objects
from fedray.records import Shape

MANIFEST, CONTENTS, CLAIMS = "manifest.json", "objects", "claims"

FORMAT = 1

_SHAPE = Shape({"generation": int, "id": str, "files": dict}, inside={"files": Shape(each=list)})


@dataclass(frozen=True)
class Entry:
    """A published file: its size in bytes and its SHA-256 (hex)."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One generation of a directory.

    Args:
        generation: counts from 1.
        id: another one for each generation that any process wrote.
        files: name, with slashes → its contents.
    """

    generation: int
    id: str
    files: Mapping[str, Entry]

    def next(self, files: Mapping[str, Entry]) -> "Manifest":
        """Return the next generation."""
        return Manifest(self.generation + 1, secrets.token_hex(8), files)

    @property
    def contents(self) -> set[str]:
        """The SHA-256 of all its objects."""
        return {entry.sha256 for entry in self.files.values()}

    def write(self) -> bytes:
        """Return it as JSON, with a checksum."""
        files = {name: [entry.size, entry.sha256] for name, entry in sorted(self.files.items())}
        tree = {"format": FORMAT, "generation": self.generation, "id": self.id, "files": files}
        return as_mapping(tree)


NOTHING = Manifest(0, "", {})
"""Stands for a place where nothing is published."""


def read(objects: Objects) -> Manifest:
    """Read the current manifest of a place; `NOTHING` if there is none.

    Raises:
        StoreError: if the store does not give it.
        RunError: if it is damaged, or of a later version of fedray.
    """
    try:
        text = objects.get(MANIFEST)
    except Missing:
        return NOTHING
    try:
        tree = mapping_in(text, sealed=True)
    except ValueError as error:
        raise RunError(f"{objects.place}: {MANIFEST} is damaged{error}") from None
    if tree.get("format") != FORMAT:
        raise RunError(f"{objects.place}: a later version of fedray wrote its {MANIFEST}")
    fault = _SHAPE.fault(tree)
    if fault is not None or not all(map(_is_entry, tree["files"].values())):
        raise RunError(f"{objects.place}: {MANIFEST} is damaged: {fault or 'a file has no size and SHA-256'}")
    files = {name: Entry(size, digest) for name, (size, digest) in tree["files"].items()}
    found = Manifest(tree["generation"], tree["id"], files)
    for name in found.files:
        if not _is_inside(name):
            raise RunError(f"{objects.place}: {MANIFEST} names {name!r}, which is not below a directory")
    return found


def _is_entry(entry: Any) -> bool:
    return len(entry) == 2 and type(entry[0]) is int and type(entry[1]) is str


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name
