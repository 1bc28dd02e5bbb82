"""Reads the files of runs for reports; `storage/run_files.py` writes them.

    directories → find_runs → load_run → RunData

Runs may be finished, stopped, running or broken. This module writes nothing and needs no torch.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedray.config import sealed
from fedray.config.uri import SQLITE, database_of, sqlite_uri
from fedray.durable import local_path, read_mapping, scan_lines, shown
from fedray.errors import ConfigError, RunError
from fedray.parquet import read_table
from fedray.records import Record, Shape

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"round-([0-9]{6,18})\.checkpoint")

_PART = re.compile(r"(?:\.unusable-)?part-([0-9]{1,18})-([0-9]{1,18})")

TRACKED = Record(
    "mlflow.json",
    Shape(
        may={
            "run_id": (str, type(None)),
            "uri": str,
            "experiment_id": str,
            "parent": str,
            "is_complete": bool,
        }
    ),
    "or remove it: then MLflow gets this once more",
)
"""Of a run, a sweep or a training: its run in MLflow, the run's parent, and whether MLflow has everything."""

Status = Literal["finished", "stopped", "unfinished"]
"""At its last round; ended early by a scheduler; running, or broken."""


@dataclass(frozen=True, eq=False)
class RunData:
    """The contents of a run's files.

    Args:
        path: the run's directory.
        name: the directory's name.
        label: distinguishes the run from those beside it; its name until `label_runs` sets it.
        config: the nested config, empty where there is none.
        rounds: a row per round, ascending; `round` and a column per metric, NaN where it was not measured.
        client_accuracy: client, device, num_examples and accuracy of the final model; finished runs only.
        result: the final metrics by name and `status`; finished and stopped runs only.
    """

    path: Path
    name: str
    label: str
    config: dict[str, Any]
    rounds: "pd.DataFrame"
    client_accuracy: "pd.DataFrame | None"
    result: dict[str, Any] | None

    @cached_property
    def clients(self) -> "pd.DataFrame | None":
        """A row per client and round, as far as the last checkpoint; read when first asked for.

        Raises:
            RunError: if a part of it is damaged or missing.
        """
        missing = missing_rows(self.path)
        if missing is not None:
            raise RunError(missing)
        with advising(self.path):
            return read_table(self.path / "clients.parquet")

    @property
    def finished(self) -> bool:
        """Whether all rounds are complete and the final model was tested."""
        return self.status == "finished"

    @property
    def status(self) -> Status:
        """Outcome of the run."""
        if self.result is None:
            return "unfinished"
        return "stopped" if self.result.get("status") == "stopped" else "finished"

    @property
    def last_round(self) -> int | None:
        """Number of complete rounds; None before the first."""
        return int(self.rounds["round"].iloc[-1]) if len(self.rounds) else None

    @property
    def seed(self) -> object:
        """The run's seed; where there is no config, its own name."""
        return self.config.get("seed", self.name)

    def last(self, metric: str) -> float:
        """Return the last value of a metric, or NaN."""
        value = (self.result or {}).get(metric)
        if value is None and metric in self.rounds:
            measured = self.rounds[metric].dropna()
            value = measured.iloc[-1] if len(measured) else None
        return nan if value is None else float(value)


@contextmanager
def advising(folder: Path) -> Iterator[None]:
    """Let errors of the files of a run say what mends them.

    Raises:
        RunError: an error of the block, with what to do.
    """
    try:
        yield
    except RunError as error:
        text = str(error)
        if "fedray resume" in text or "restore" in text:
            raise
        advice = f"`fedray resume {shown(folder)}` mends what it can; otherwise restore it from a copy"
        raise RunError(f"{text}; {advice}") from error


def load_run(path: str | Path) -> RunData:
    """Read a run's directory, be the run finished or not.

    Raises:
        ConfigError: if `config.yaml` cannot be read.
        RunError: if a file is damaged, or rounds are missing; a torn last line of `rounds.jsonl` is left out.
    """
    folder = local_path(path)
    with advising(folder):
        return _loaded(folder)


def _loaded(folder: Path) -> RunData:
    config = read_config(folder) if _has_config(folder) else {}
    least = newest_saved(folder)  # before the rounds are read: the run may be running
    rounds = _read_rounds(folder / "rounds.jsonl")
    result = read_result(folder)
    check_rounds(folder, len(rounds) - 1, least, result)
    return RunData(
        path=folder,
        name=folder.resolve().name,
        label=folder.resolve().name,
        config=config,
        rounds=rounds,
        client_accuracy=read_table(folder / "client_accuracy.parquet"),
        result=result,
    )


def _has_config(path: Path) -> bool:
    """Tell whether a run has a config; a warning says that it has none, and is shown under its name."""
    found = os.path.lexists(path / "config.yaml")
    if not found:
        logger.warning(
            "%s: is missing: the run is shown under the name of its directory", path / "config.yaml"
        )
    return found


def read_config(path: Path, *, quickly: bool = False) -> dict[str, Any]:
    """Read a run's `config.yaml`; a run writes it before all else.

    Raises:
        ConfigError, RunError: if it is missing or cannot be read, or its values were changed.
    """
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path / 'config.yaml'}: is missing; restore it from a copy")
    return sealed.look(path / "config.yaml", quickly=quickly)


def read_result(path: Path) -> dict[str, Any] | None:
    """Read a run's `result.json`; None if there is none.

    Raises:
        RunError: if it is damaged.
    """
    found = read_mapping(path / "result.json")
    if found is not None and found.get("status") not in ("finished", "stopped"):
        raise RunError(f"{path / 'result.json'}: is damaged: it has no status of a run that has ended")
    return found


def missing_rows(path: Path) -> str | None:
    """Return which rounds' rows are missing in a run's `clients.parquet`; None: none are.

    Rows that were lost before, and of which `warnings.txt` tells, do not count.
    """
    folder, saved = path / "clients.parquet", newest_saved(path)
    there: set[int] = set()
    for found in filter(None, (_PART.fullmatch(part.stem) for part in folder.glob("*part-*.parquet"))):
        first, last = int(found[1]), int(found[2])
        there.update(range(first, min(last, saved) + 1))
    lost = sorted(set(range(1, saved + 1)) - there)
    return f"{folder}: the rows of rounds {lost[0]} to {lost[-1]} are missing" if lost else None


def newest_saved(path: Path) -> int:
    """Return the last round of which a run has a checkpoint; -1: none. `rounds.jsonl` has it, too."""
    names = (file.name for file in (path / "checkpoints").glob("round-*.checkpoint"))
    numbers = [int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))]
    return max(numbers, default=0) - 1


def check_rounds(path: Path, last: int, saved: int, result: Mapping[str, Any] | None) -> None:
    """Refuse a run whose last rounds are missing in `rounds.jsonl`.

    Args:
        path: the run's directory.
        last: the last round in the file; -1: none.
        saved: the last round with a checkpoint, as `newest_saved` returned it before the file was read.
        result: the content of `result.json`, if there is one.

    Raises:
        RunError: with the rounds that are missing.
    """
    ended = (result or {}).get("rounds")
    least = max(saved, ended if type(ended) is int else -1)
    if last < least:
        known = "result.json" if least > saved else "its newest checkpoint"
        has = f"ends with round {last}" if last >= 0 else "has no round"
        raise RunError(
            f"{path / 'rounds.jsonl'}: {has}, but {known} is of round {least}: rounds are missing; "
            f"`fedray resume {shown(path)}` makes them again where an older checkpoint is left"
        )


def store_of(path: Path) -> str | None:
    """Return the URI of the store that tracks a run or a sweep; None if none does.

    Raises:
        ConfigError, RunError: if a file of it cannot be read.
    """
    known = TRACKED.read(path)
    if known is None:
        return None
    uri, run_id = known.get("uri"), known.get("run_id")
    if uri is None and (path / "sweep.yaml").is_file():
        uri = _at(sealed.look(path / "sweep.yaml"), "base", "tracking", "uri")
    return None if uri is None else moved_store(str(uri), path, None if run_id is None else str(run_id))


def _at(tree: Any, *keys: str) -> Any:
    """Return an entry of nested mappings; None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def moved_store(uri: str, path: Path, run_id: str | None) -> str:
    """Return the URI of the store of a run whose directory may have been moved or copied together with it.

    That is an SQLite file of the same name in a folder above the run, if it has the run; otherwise `uri`.

    Args:
        uri: of the store when the run was made.
        path: the run's directory now.
        run_id: of the run in the store.
    """
    if not uri.startswith(SQLITE) or run_id is None:
        return uri
    named = database_of(uri)
    place = path.resolve()
    if named.parent in place.parents and named.is_file():
        return uri
    found = (above / named.name for above in place.parents if _has_run(above / named.name, run_id))
    beside = next(found, None)
    return uri if beside is None else sqlite_uri(beside)


def _has_run(database: Path, run_id: str) -> bool:
    """Tell whether a file is a store that has a run."""
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as store:
            return bool(store.execute("SELECT 1 FROM runs WHERE run_uuid = ?", [run_id]).fetchone())
    except sqlite3.Error:
        return False


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run directories among `paths` and below them, each once, `x-2` before `x-10`.

    Raises:
        ConfigError: if one of `paths` holds no run.
    """
    given = [local_path(path) for path in paths]
    found = {path: list(_runs_below(path)) for path in given}
    empty = [path for path, runs in found.items() if not runs]
    if empty or not given:
        looked = "; ".join(_what_is_at(path) for path in empty) or "no directory was given"
        raise ConfigError(
            f"no runs found: {looked}. A run's directory holds config.yaml and rounds.jsonl; "
            "give such a directory, a sweep's, or one above them"
        )
    runs = [run for path in given for run in found[path]]
    return list({run.resolve(): run for run in reversed(runs)}.values())[::-1]


def _runs_below(path: Path) -> Iterable[Path]:
    for folder, below, files in os.walk(path):
        if "config.yaml" in files or "rounds.jsonl" in files:
            below.clear()
            yield Path(folder)
        elif "sweep.yaml" in files:
            below[:] = [name for name in below if name == "trials"]  # PBT keeps parts of runs beside it
        # copies of the files that a tracker keeps are not further runs
        kept = (d for d in below if not d.startswith(".") and d not in ("mlruns", "mlartifacts", "artifacts"))
        below[:] = sorted(kept, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _what_is_at(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file"
    inside = sorted(p.name for p in path.iterdir())
    return f"{path} holds {', '.join(inside[:8]) or 'nothing'}{', …' if len(inside) > 8 else ''}"


def scan_rounds(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Read `rounds.jsonl` as far as it is sound: round 0, 1, 2 and so on.

    Returns:
        The rounds; and the fault of the next line, None if there is none or it is torn and the last.

    Raises:
        RunError: if the file cannot be read.
    """
    lines, problem = scan_lines(path)
    for number, line in enumerate(lines):
        found = line.get("round")
        if not is_round(line):
            if problem is None and number + 1 == len(lines):
                return lines[:number], None
            return lines[:number], f"{path}, line {number + 1}: not a round, and not the last line"
        if found != number:
            return lines[:number], f"{path}, line {number + 1}: round {found} where round {number} belongs"
    return lines, problem


def is_round(line: Mapping[str, Any]) -> bool:
    """Tell whether a line of `rounds.jsonl` has a round and its metrics, numbers or null."""
    metrics = line.get("metrics")
    return (
        type(line.get("round")) is int
        and isinstance(metrics, dict)
        and all(value is None or type(value) in (int, float) for value in metrics.values())
    )


def sound_rounds(path: Path) -> list[dict[str, Any]]:
    """Read `rounds.jsonl`.

    Raises:
        RunError: if a round is missing, stands twice, or is damaged.
    """
    rounds, problem = scan_rounds(path)
    if problem is not None:
        raise RunError(problem)
    return rounds


def _read_rounds(path: Path) -> "pd.DataFrame":
    import pandas as pd

    rows = [{"round": line["round"], **line["metrics"]} for line in sound_rounds(path)]
    frame = pd.DataFrame(rows, columns=None if rows else ["round"]).astype(float)  # null becomes NaN
    return frame.astype({"round": int})
