"""Files that survive a crash, a full disk and a second process.

    replacing, replace    a file takes the place of another as a whole, or not at all
    append_lines, scan_lines, as_mapping, read_mapping
                          JSON lines, of which only the last can be torn; JSON files; each with checksums
    keep_newest           the newest few of a series of files
    on_disk               an OSError becomes a RunError with path, reason and advice
    local_path            a user's path: `~` expanded, absolute

A write is on the disk when its call returns: contents first, then the name.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fedray.errors import ConfigError, RunError

fences: list[Callable[[Path], None]] = []
"""Each is called with a path before it is written, and raises if another process has taken its directory."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}

CHECKSUM = "checksum"
"""The last key of a JSON mapping on disk: the SHA-256, cut to 128 bits, of the text before it."""

_SEAL = re.compile(rb'(.*?),?\s*"checksum": "([0-9a-f]{32})"\s*}', re.DOTALL)


_PRIVATE = re.compile(r".*\.(yaml|txt)|mlflow.*|points\.jsonl|registered\.json")
"""Names of files that may hold a secret: an address, an environment, a traceback."""


def _opened(path: Path, mode: str, name: str) -> Any:
    """Open a file; a new one that may hold a secret is readable by its owner alone."""
    if _PRIVATE.fullmatch(name) is None:
        return open(path, mode)
    return open(path, mode, opener=lambda file, flags: os.open(file, flags, 0o600))


def pass_fences(path: Path) -> None:
    """Raise RunError if another process has taken the directory of a file or folder that is to be written."""
    for fence in fences:
        fence(path)


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


_addresses: dict[Path, str] = {}
"""Directory of the cache → the address of which it is a copy."""


def show_as(folder: Path, address: str) -> None:
    """Let `shown` name a directory, and what is in it, by the address of which it is a copy."""
    _addresses[folder] = address


def shown(path: Path) -> str:
    """Return a path as a user would write it here.

    Relative where it lies below the working directory; of a copy in the cache the address.
    """
    for folder, address in _addresses.items():
        if path.is_relative_to(folder):
            place, mark, options = address.partition("?")
            return "/".join((place, *path.relative_to(folder).parts)) + mark + options
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@contextmanager
def on_disk(path: Path, then: str | Callable[[], str] = "run the command again") -> Iterator[None]:
    """Turn an OSError of the block into a RunError.

    Args:
        path: the file or folder that the block writes.
        then: advice for the user once the cause is mended, or what returns it.

    Raises:
        RunError: with path, reason and advice.
    """
    try:
        yield
    except OSError as error:
        advice = f"{_advice(error)}{then if isinstance(then, str) else then()}"
        raise RunError(f"{path}: cannot be written: {_reason(error)}; {advice}") from error


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
    pass_fences(path)
    partial = path.with_name(f".{path.name}.writing")  # hidden: a reader of the folder passes over it
    try:
        with _opened(partial, "wb", path.name) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        pass_fences(path)  # the block may have taken long
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
    pass_fences(path)
    is_new = not path.exists()
    with _opened(path, "ab", path.name) as file:
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
    pass_fences(new)
    old.rename(new)
    sync(new.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Replace a folder by a finished one; `restore_folder` repairs the state after a crash.

    Raises:
        OSError: if the system refuses.
    """
    pass_fences(folder)
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


def as_lines(rows: Iterable[Mapping[str, Any]], before: bytes = b"") -> bytes:
    """Return JSON, a line for each mapping, each with a checksum of itself and of the line before it.

    Args:
        rows: the mappings.
        before: the line before the first, without its end; empty at the beginning of a file.

    `append_lines` adds to a file; these lines begin one.
    """
    lines: list[bytes] = []
    for row in rows:
        before = _sealed(json.dumps(row).encode()[:-1], before, b", ", b"}")
        lines.append(before + b"\n")
    return b"".join(lines)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, flush: bool = True) -> None:
    """Add mappings to a file of JSON lines; a torn last line makes room for them.

    Args:
        path: the file.
        rows: the mappings.
        flush: whether they must survive the machine, not only the process.

    Raises:
        OSError: if it cannot be written; then a part of the first new line may be in the file.
    """
    pass_fences(path)
    is_new = not path.exists()
    with _opened(path, "ab+", path.name) as file:
        last, end = _last_line(file)
        if end != file.seek(0, 2):
            file.truncate(end)
        file.write((b"" if end == 0 or last.endswith(b"\n") else b"\n") + as_lines(rows, last.rstrip(b"\n")))
        file.flush()
        if flush:
            os.fsync(file.fileno())
    if is_new and flush:
        sync(path.parent)


def _last_line(file: BinaryIO) -> tuple[bytes, int]:
    """Return the last line that is not torn, with its end if it has one, and the place after it."""
    size, wanted = file.seek(0, 2), 2**14
    while True:
        start = file.seek(max(0, size - wanted))
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n") and _mapping(lines[-1]) is None:
            size -= len(lines.pop())  # torn
        if len(lines) > 1 or start == 0:
            return (lines[-1] if lines else b""), size
        wanted *= 8


def scan_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Read a file of JSON lines up to the first that is damaged; a torn last line is left out.

    The lines of a file that an earlier version began have no checksums, up to the first that has one.

    Returns:
        A mapping for each line, none for a missing file; and the fault of the next line, if any.

    Raises:
        RunError: if the file cannot be read.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        _check_missing(path, error)
        return [], None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error
    rows, fault = scan_text(text)
    return rows, None if fault is None else f"{path}, line {len(rows) + 1}: {fault}"


def scan_text(text: bytes, before: bytes = b"") -> tuple[list[dict[str, Any]], str | None]:
    """Read JSON lines up to the first that is damaged; a torn last line is left out.

    Args:
        text: whole lines, of which only the last can be torn.
        before: the line before the first; empty at the beginning of a file.

    Returns:
        A mapping for each line; and the fault of the next line, if any.
    """
    rows: list[dict[str, Any]] = []
    *lines, torn = text.split(b"\n")  # the last is empty, unless a process died while it wrote
    must = CHECKSUM in (_mapping(before) or {})
    for line in [*lines, torn] if _mapping(torn) is not None else lines:
        row = _mapping(line)
        fault = "not a JSON mapping" if row is None else _line_fault(row, line, before, must)
        if row is None or fault is not None:
            return rows, fault
        must, before = row.pop(CHECKSUM, None) is not None, line
        rows.append(row)
    return rows, None


def _line_fault(row: Mapping[str, Any], line: bytes, before: bytes, must: bool) -> str | None:
    if CHECKSUM not in row:
        return "is damaged: it has no checksum, and the line before it has one" if must else None
    if _is_sealed(line, before):
        return None
    return "is damaged, or the line before it is: its checksum does not match"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, as `scan_lines` does.

    Raises:
        RunError: if a line is damaged, or the file cannot be read.
    """
    rows, problem = scan_lines(path)
    if problem is not None:
        raise RunError(problem)
    return rows


def as_mapping(value: Mapping[str, Any]) -> bytes:
    """Return a mapping as a JSON file with a checksum."""
    return sealed_text(json.dumps(value, indent=2).encode() if value else b"{\n}")


def sealed_text(text: bytes) -> bytes:
    """Return a JSON file with a checksum as its last key.

    Args:
        text: a mapping; its closing brace stands alone in the last line.
    """
    body = text.removesuffix(b"\n}")
    return _sealed(body, b"", b"\n  " if body == b"{" else b",\n  ", b"\n}\n")


def read_mapping(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that holds a mapping; None if there is no such file.

    A file without a checksum is read unchecked: an earlier version wrote it, or another program.

    Raises:
        RunError: if it holds something else, is damaged, or cannot be read.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        _check_missing(path, error)
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error
    try:
        return mapping_in(text)
    except ValueError as error:
        raise RunError(f"{path}: is damaged{error}") from None


def mapping_in(text: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """Return the mapping in the text of a JSON file.

    Args:
        text: as `as_mapping` wrote it.
        sealed: whether it must have a checksum.

    Raises:
        ValueError: if it holds something else, or is damaged; the message follows `is damaged`.
    """
    found = _mapping(text)
    if found is None:
        raise ValueError(": it does not hold a JSON mapping")
    if (sealed or CHECKSUM in found) and not _is_sealed(text.rstrip(b"\n"), b""):
        raise ValueError(", or was edited: its checksum does not match")
    found.pop(CHECKSUM, None)
    return found


def _check_missing(path: Path, error: OSError) -> None:
    """Raise RunError for a link to nowhere, which is not the same as no file."""
    if path.is_symlink():
        raise RunError(
            f"{path}: cannot be read: it links to {os.readlink(path)}, which is missing"
        ) from error


def _mapping(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sealed(body: bytes, before: bytes, comma: bytes, end: bytes) -> bytes:
    """Return the text of a mapping, up to its closing brace, with a checksum of it as the last key."""
    return b'%b%b"%b": "%b"%b' % (body, comma, CHECKSUM.encode(), _checksum(before, body), end)


def _is_sealed(text: bytes, before: bytes) -> bool:
    found = _SEAL.fullmatch(text)
    return found is not None and found[2] == _checksum(before, found[1])


def _checksum(before: bytes, body: bytes) -> bytes:
    return sha256(b"%b\n%b" % (before, body)).hexdigest()[:32].encode()


def keep_newest(paths: Sequence[Path], count: int) -> None:
    """Remove all but the first `count` files or folders of a series that is sorted from the newest.

    Raises:
        OSError: if one cannot be removed.
    """
    for old in paths[count:]:
        pass_fences(old)
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
