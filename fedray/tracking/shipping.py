"""Names and files in the form that MLflow takes."""

import hashlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_LETTERS = 250
"""MLflow's limit for a name."""


def files_of(paths: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Yield each file with the folder where it goes among the artifacts, None for the top."""
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file, file.parent.relative_to(path.parent).as_posix()
        elif path.is_file():
            yield path, None


def name_of(key: str) -> str:
    """Return `key` if MLflow accepts it as a name; otherwise an accepted name that no other key gets."""
    clean = re.sub(r"[^\w.\- :/]", "_", key)
    norm = posixpath.normpath(clean)
    if clean == key and norm == key != "." and not key.startswith(("/", "..")) and len(key) <= MOST_LETTERS:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{re.sub(r'^[.]+|/', '_', clean)[: MOST_LETTERS - 9]}-{digest}"
