"""Files that survive a crash, a full disk and a second process.

    replacing, replace    a file takes the place of another as a whole, or not at all
    append, scan_lines    JSON lines, of which only the last can be torn
    keep_newest           the newest few of a series of files
    on_disk               an OSError becomes a RunError with path, reason and advice
    local_path            a user's path: `~` expanded, absolute

A write is on the disk when its call returns: contents first, then the name.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fedray.errors import ConfigError, RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def local_path(path: str | Path) -> Path:
    """Return a user's path as an absolute one, so that it never looks like a URI.

    Raises:
        ConfigError: if it names an unknown user's home, or cannot be a path.
    """
    try:
        text = os.fspath(path)
        if not text or "\0" in text:
            raise ValueError("it is empty" if not text else "it holds a zero byte")
        return Path(text).expanduser().absolute()
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} is not a path: {error}") from None


def shown(path: Path) -> str:
    """Return a path as a user would write it here: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@contextmanager
def on_disk(path: Path, then: str = "run the command again") -> Iterator[None]:
    """Turn an OSError of the block into a RunError.

    Args:
        path: the file or folder that the block writes.
        then: advice for the user once the cause is mended.

    Raises:
        RunError: with path, reason and advice.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {_reason(error)}; {_advice(error)}{then}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _advice(error: OSError) -> str:
    if error.errno in FULL:
        return "free space, then "
    return "give yourself the right to write there, then " if error.errno in REFUSED else ""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends; if the block raises, nothing has changed.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.writing")  # hidden: a reader of the folder passes over it
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # a partial file may fill the disk
        raise
    sync(path.parent)


def remove_partials(folder: Path) -> None:
    """Remove the half-written files that a dead process left in a folder and its subfolders.

    Only the process that holds the folder's lock may call this: a living process is still writing such files.
    """
    for partial in folder.rglob(".*.writing"):
        with suppress(OSError):
            partial.unlink()


def replace(path: Path, data: bytes) -> None:
    """Write a file as a whole.

    Raises:
        OSError: if it cannot be written; then the file has not changed.
    """
    with replacing(path) as file:
        file.write(data)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
        OSError: if it cannot be written; then a part of the text may be in the file.
    """
    is_new = not path.exists()
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder, and flush the new name to disk.

    Raises:
        OSError: if the system refuses.
    """
    old.rename(new)
    sync(new.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Replace a folder by a finished one; `restore_folder` repairs the state after a crash.

    Raises:
        OSError: if the system refuses.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        rename(folder, old)
    rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Restore a folder that `replace_folder` was replacing when its process died."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        rename(old, folder)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of each file below a folder, by relative name, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def sync(folder: Path) -> None:
    """Flush the names in a folder to disk, if the file system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return JSON, a line for each mapping."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def scan_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Read a file of JSON lines up to the first that is damaged; a torn last line is left out.

    Returns:
        A mapping for each line, none for a missing file; and the fault of the next line, if any.

    Raises:
        RunError: if the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _mapping(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            return rows, f"{path}, line {number}: not a JSON mapping, and not the last line"
    return rows, None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, as `scan_lines` does.

    Raises:
        RunError: if a line that is not the last is damaged, or the file cannot be read.
    """
    rows, problem = scan_lines(path)
    if problem is not None:
        raise RunError(problem)
    return rows


def read_mapping(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that holds a mapping; None if there is no such file.

    Raises:
        RunError: if it holds something else, or cannot be read.
    """
    try:
        found = _mapping(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error
    if found is None:
        raise RunError(f"{path}: is damaged: it does not hold a JSON mapping")
    return found


def _mapping(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def keep_newest(paths: Sequence[Path], count: int) -> None:
    """Remove all but the first `count` files or folders of a series that is sorted from the newest.

    Raises:
        OSError: if one cannot be removed.
    """
    for old in paths[count:]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
