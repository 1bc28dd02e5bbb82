"""Whether the Python files that a config file names under `imports` may be run.

    command line or Python names the file, or says --import      run
    --trust, or trust=True in Python                             run
    the run that is resumed has imported it, with this SHA-256   run
    otherwise                                                    refused, with path and SHA-256

A config file alone runs nothing: it may come from a stranger.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path

from fedray.config import plugins
from fedray.errors import ConfigError
from fedray.records import Record, Shape

IMPORTS = "imports.json"
"""File of a run or a sweep: path → SHA-256 of each Python file that it has imported."""

IMPORTED = Record(
    IMPORTS,
    Shape(each=str),
    "or remove it, read the files of `imports`, and resume with --trust",
)

NOT_FILES = ("config", "mapping", "override")
"""Origins of keys that no file has: Python or the command line gave them."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)
_recorded: ContextVar[Mapping[str, str] | None] = ContextVar("recorded", default=None)
_accepted: set[Path] = set()
"""Folders of files that were trusted, in this process: a change in them is no news."""


@contextmanager
def trusting(yes: bool = True) -> Iterator[None]:
    """Let config files that are read inside import what they name; with False, as outside."""
    token = _trusted.set(yes or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def recorded(digests: Mapping[str, str] | None) -> Iterator[None]:
    """Let the config of a directory import what the directory has recorded.

    Args:
        digests: path → SHA-256, the content of `IMPORTS`; None: it has no such file.
    """
    token = _recorded.set(digests or {})
    try:
        yield
    finally:
        _recorded.reset(token)


def record(imports: Sequence[Path]) -> dict[str, str]:
    """Return path → SHA-256 of imported files, and of those that they imported from their folders."""
    given = [path.resolve() for path in imports]
    folders = {path.parent for path in given}
    beside = [s.path for s in plugins.sources() if not s.given and not folders.isdisjoint(s.path.parents)]
    digests = {str(path): _digest(path) for path in (*given, *beside)}
    return {path: digest for path, digest in digests.items() if digest is not None}


def resolved(name: str) -> Path | None:
    """Return the absolute path of a file; None for a name that no file can have, which is refused later."""
    try:
        path = Path(name).expanduser().resolve()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def check(imports: Sequence[str], origin: str) -> None:
    """Check that a config may import files.

    Args:
        imports: the files.
        origin: where their names come from: a config file, or one of `NOT_FILES`.

    Raises:
        ConfigError: if it may not.
    """
    paths = [path for path in map(resolved, imports) if path is not None]
    if _trusted.get():
        _accepted.update(path.parent for path in paths)
    if _trusted.get() or origin in NOT_FILES or not _is_file(origin):
        return
    known = _recorded.get()
    _refuse_changed(paths, known or {}, origin)
    unknown = [path for path in paths if str(path) not in (known or {}) and not plugins.is_imported(path)]
    if unknown:
        files = "; ".join(f"{path} (SHA-256 {(_digest(path) or 'no file')[:16]})" for path in unknown)
        names = " ".join(f"--import {path}" for path in unknown)
        why = f"its {IMPORTS} does not record" if known is not None else "a config file alone does not run"
        raise ConfigError(
            f"imports ({origin}) names Python code, which {why}: {files}. Read it; to run it: {names}, or "
            "--trust for all that the file names; in Python trust=True"
        )


def _refuse_changed(paths: Sequence[Path], known: Mapping[str, str], origin: str) -> None:
    """Refuse files that have changed since they were recorded.

    Raises:
        ConfigError: with both digests of each.
    """
    folders = {path.parent for path in paths} - _accepted
    changed = []
    for name, digest in known.items():
        now = _digest(Path(name)) if not folders.isdisjoint(Path(name).parents) else digest
        if now is not None and now != digest:
            changed.append(f"{name} (SHA-256 {digest[:16]} then, {now[:16]} now)")
    if changed:
        raise ConfigError(
            f"imports ({origin}): changed since the run imported it: {'; '.join(changed)}. Put it back, or "
            "take the new code: --trust, in Python trust=True"
        )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file as it was imported, or else as it is; None if it cannot be read."""
    text = next((source.text for source in plugins.sources() if source.path == path), None)
    try:
        return sha256(path.read_bytes() if text is None else text).hexdigest()
    except OSError:
        return None
