"""An SQLite store that was moved or copied: its artifacts stay beside it, and it learns where that is.

MLflow keeps the absolute location of each run's artifacts in the database. When the folder of the database
has another name or place, the locations that lie in its `mlartifacts` are rewritten, in one transaction.
"""

import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

logger = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"
"""Folder beside the database."""

LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow that hold locations."""

WAIT_S = 30.0
"""Timeout in seconds for a database that another process writes to."""


def follow(database: Path) -> int:
    """Let a database find the artifacts beside it; return how many locations were rewritten.

    A location is rewritten if its artifacts lie beside the database, or if nothing is left at the old place.
    """
    here = (database.parent / ARTIFACTS).as_uri()
    try:
        with closing(sqlite3.connect(database, timeout=WAIT_S, isolation_level=None)) as connection:
            if not _elsewhere(connection, here):
                return 0
            connection.execute("BEGIN IMMEDIATE")
            changed = _rewrite(connection, here)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        logger.warning("%s: the locations of its artifacts could not be read: %s", database, error)
        return 0
    if changed:
        logger.warning("%s was moved or copied: the locations of its artifacts were rewritten", database)
    return changed


def _elsewhere(connection: sqlite3.Connection, here: str) -> dict[str, list[str]]:
    """Return the roots of artifacts that are not `here` but should be, with the locations below each."""
    found: dict[str, list[str]] = {}
    for table, column in _present(connection):
        for (location,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}"):
            root = re.match(rf"(file:///.*/{ARTIFACTS})(?=/|$)", location or "")
            if root is not None and root[1] != here:
                found.setdefault(root[1], []).append(location)
    return {old: below for old, below in found.items() if _is_moved(old, below, here)}


def _is_moved(old: str, below: list[str], here: str) -> bool:
    if not _path(old).exists():
        return True
    inside = [location for location in below if location != old]
    return any(_path(here + location.removeprefix(old)).exists() for location in inside)


def _rewrite(connection: sqlite3.Connection, here: str) -> int:
    changed = 0
    for old in _elsewhere(connection, here):
        for table, column in _present(connection):
            done = connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                [here, len(old) + 1, old, len(old) + 1, f"{old}/"],
            )
            changed += done.rowcount
    return changed


def _present(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield the columns that this database has: older ones lack some."""
    for table, column in LOCATIONS:
        if any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})").fetchall()):
            yield table, column


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
