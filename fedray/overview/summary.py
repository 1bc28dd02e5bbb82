"""A run in a few values, from its small files alone: thousands of runs are read in seconds.

    directories → summaries → Summary: status, config, newest metrics

Of `rounds.jsonl` only the end is read. A directory that cannot be read is a summary with a reason.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedray.config import yaml_text
from fedray.config.trees import flatten
from fedray.durable import scan_text, shown
from fedray.errors import FedrayError, RunError
from fedray.report.reading import (
    advising,
    check_rounds,
    find_runs,
    is_round,
    newest_saved,
    read_config,
    read_result,
)
from fedray.storage.directory import Holder, holder_of

Status = Literal["running", "finished", "stopped", "failed", "interrupted", "damaged"]

TAIL = 2**15
"""Bytes of `rounds.jsonl` that are read first, from its end; more if no round with accuracy is among them."""

MOST = 2**22

SHORT = {
    "method": "method.name",
    "data": "data.name",
    "accuracy": "val/accuracy",
    "density": "density/global",
    "up": "total/bytes/up",
    "down": "total/bytes/down",
}
"""Short name of a column → key of the config, or metric. `accuracy` of a finished run is that of the test."""


@dataclass(frozen=True, eq=False)
class Summary:
    """A run's directory in short.

    Args:
        path: the directory.
        name: a short name of it, unique in its list.
        status: running is told by the lock of the directory; interrupted is what can be resumed.
        config: the nested config; empty if it cannot be read.
        metrics: the newest value of each metric, None where it was not finite.
        round: the last complete round; None before the set-up is complete.
        when: of the last change, seconds since 1970.
        holder: the process that works in it.
        problem: why it cannot be read, or the error that ended it.
    """

    path: Path
    name: str
    status: Status
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    round: int | None
    when: float
    holder: Holder | None = None
    problem: str | None = None

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config by dotted keys."""
        return flatten(self.config)

    @property
    def rounds(self) -> int | None:
        """Planned rounds; None if the config cannot be read."""
        planned = self.config.get("rounds")
        return planned if isinstance(planned, int) else None

    @property
    def time(self) -> str:
        """When it changed last, in local time."""
        return datetime.fromtimestamp(self.when).strftime("%Y-%m-%d %H:%M")

    def value(self, key: str) -> Any:
        """Return the value of a column, a dotted key of the config or a metric; None if there is none."""
        own = {"name": self.name, "status": self.status, "round": self.round, "when": self.time}
        if key in own:
            return own[key]
        if key == "accuracy" and self.status == "finished" and self.metrics.get("test/accuracy") is not None:
            return self.metrics["test/accuracy"]
        if key == "bytes":
            sent = [self.metrics.get(f"total/bytes/{way}") for way in ("up", "down")]
            return None if None in sent else sum(sent)
        key = SHORT.get(key, key)
        return self.flat[key] if key in self.flat else self.metrics.get(key)

    def known(self) -> Iterator[str]:
        """Yield every key that `value` knows of this run."""
        yield from ("name", "status", "round", "when", "bytes", *SHORT)
        yield from self.flat
        yield from self.metrics

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "name": self.name,
            "path": str(self.path),
            "status": self.status,
            "problem": self.problem,
            "round": self.round,
            "rounds": self.rounds,
            "seed": self.config.get("seed"),
            "when": datetime.fromtimestamp(self.when).astimezone().isoformat(timespec="seconds"),
            "config": plain(dict(self.config)),
            "metrics": plain(dict(self.metrics)),
        }


def summaries(paths: Iterable[str | Path]) -> list[Summary]:
    """Return the runs at and below some directories, trials of sweeps among them.

    Raises:
        ConfigError: if a directory holds no run.
    """
    roots = [Path(os.path.abspath(Path(path).expanduser())) for path in paths]
    found = find_runs(roots)
    names = {path: _name(path, roots) for path in found}
    return [summary(path, names[path]) for path in found]


def _name(path: Path, roots: list[Path]) -> str:
    """Return a run's path below the only given directory, without `trials`; else from here."""
    above = roots[0]
    if len(roots) > 1 or path == above or not path.is_relative_to(above):
        return shown(path)
    return "/".join(part for part in path.relative_to(above).parts if part != "trials")


def summary(path: Path, name: str | None = None) -> Summary:
    """Read a run's directory; what cannot be read makes it a damaged one."""
    problem: str | None = None
    config: dict[str, Any] = {}
    result: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}
    round: int | None = None
    try:
        with advising(path):
            config = read_config(path, quickly=True)
            least = newest_saved(path)
            round, metrics = last_rounds(path / "rounds.jsonl")
            result = read_result(path)
            check_rounds(path, -1 if round is None else round, least, result)
    except (FedrayError, OSError) as error:
        problem = str(error)
    holder = holder_of(path)
    if result is not None:
        metrics |= {key: value for key, value in result.items() if key not in ("status", "rounds")}
    status, reason = ("damaged", problem) if problem else _status(path, result, holder)
    return Summary(
        path=path,
        name=name or path.name,
        status=status,
        config=config,
        metrics=metrics,
        round=round,
        when=_changed(path),
        holder=holder,
        problem=reason,
    )


def _status(path: Path, result: Mapping[str, Any] | None, holder: Holder | None) -> tuple[Status, str | None]:
    if holder is not None:
        return "running", None
    if result is not None:
        return ("stopped" if result.get("status") == "stopped" else "finished"), None
    if (path / "stopped.json").exists():
        return "stopped", None
    error = _error(path)
    return ("interrupted", None) if error is None else ("failed", error)


def _error(path: Path) -> str | None:
    """Return the error that ended a run; None if it was resumed since, or interrupted."""
    try:
        warnings = path / "warnings.txt"
        if _mtime(warnings) >= _mtime(path / "rounds.jsonl"):
            last = warnings.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")[2]
            if last.startswith("failed: "):
                return last.removeprefix("failed: ")
        traceback = path / "error.txt"  # of a trial
        if _mtime(traceback) and _mtime(traceback) >= _mtime(path / "rounds.jsonl"):
            return traceback.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")[2]
    except OSError:
        return None
    return None


def _changed(path: Path) -> float:
    """Return when a run's files changed last."""
    names = ("result.json", "rounds.jsonl", "config.yaml")
    return max((_mtime(path / name) for name in names), default=0.0) or _mtime(path)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def last_rounds(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Read the end of `rounds.jsonl`: the last complete round, and the newest value of each metric.

    Raises:
        RunError, OSError: if the end is damaged, or cannot be read.
    """
    size = _size(path)
    wanted, metrics, last = min(TAIL, size), dict[str, Any](), None
    while size:
        lines = _tail(path, wanted, size)
        metrics, last = {}, None
        for line in reversed(lines):
            last = line["round"] if last is None else last
            metrics = {**line["metrics"], **metrics}
            if metrics.get("val/accuracy") is not None:
                return last, metrics
        if wanted >= min(size, MOST):
            break
        wanted = min(8 * wanted, size)
    return last, metrics


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _tail(path: Path, wanted: int, size: int) -> list[dict[str, Any]]:
    """Return the complete rounds in the last bytes of a file; a torn last line is left out."""
    with open(path, "rb") as file:
        file.seek(size - wanted)
        text, before = file.read(), b""
    if wanted < size:
        # the beginning of the first line is missing, and the second one is checked against it
        _, before, text = [*text.split(b"\n", 2), b"", b""][:3]
    found, fault = scan_text(text, before)
    if fault is None and not all(map(is_round, found)):
        fault = "not a round"
    if fault is not None:
        raise RunError(f"{path}: a line near its end: {fault}")
    return found


def is_training(path: Path) -> bool:
    """Tell whether a directory is that of the training of an agent, or of several."""
    if (path / "config.yaml").is_file():
        return (yaml_text.load_quickly(path / "config.yaml") or {}).keys() >= {"process", "algorithm"}
    return (path / "trials").is_dir() and not (path / "sweep.yaml").exists()


def plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinities are null, paths are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
