"""What the files of a run say: the reading side of `files.py`, for reports.

    directories → find_runs → load_run → RunData

Runs may be finished, stopped, going on or broken. Nothing is written here, and neither torch nor a server is
loaded.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedray.errors import ConfigError, RunError
from fedray.experiment import yaml

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["finished", "stopped", "unfinished"]
"""At its last round; ended early by a scheduler; going on, or broken."""


@dataclass(frozen=True, eq=False)
class RunData:
    """What the files of a run say.

    Args:
        path: the run's directory.
        name: the directory's name.
        label: what tells it from the runs beside it; its name until `label_runs` has seen them.
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
        """A row per client and round, as far as the last checkpoint; read when first asked for."""
        return _read_parquet(self.path / "clients.parquet")

    @property
    def finished(self) -> bool:
        """Whether all rounds were made and the final model was tested."""
        return self.status == "finished"

    @property
    def status(self) -> Status:
        """What became of the run."""
        if self.result is None:
            return "unfinished"
        return "stopped" if self.result.get("status") == "stopped" else "finished"

    @property
    def last_round(self) -> int | None:
        """Number of rounds made; None before the first is written."""
        return int(self.rounds["round"].iloc[-1]) if len(self.rounds) else None

    @property
    def seed(self) -> object:
        """The run's seed; where there is no config, its own name."""
        return self.config.get("seed", self.name)

    def last(self, metric: str) -> float:
        """Return a metric as it was last measured, or NaN."""
        value = (self.result or {}).get(metric)
        if value is None and metric in self.rounds:
            measured = self.rounds[metric].dropna()
            value = measured.iloc[-1] if len(measured) else None
        return nan if value is None else float(value)


def load_run(path: str | Path) -> RunData:
    """Read a run's directory, be the run finished or not.

    Raises:
        ConfigError: if `config.yaml` cannot be read.
        RunError: if a file is damaged; a torn last line of `rounds.jsonl` is left out.
    """
    folder = Path(path)
    config = yaml.load(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return RunData(
        path=folder,
        name=folder.resolve().name,
        label=folder.resolve().name,
        config=config,
        rounds=_read_rounds(folder / "rounds.jsonl"),
        client_accuracy=_read_parquet(folder / "client_accuracy.parquet"),
        result=_read_result(folder / "result.json"),
    )


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run directories among `paths` and below them, each once, `x-2` before `x-10`.

    Raises:
        ConfigError: if one of `paths` holds no run, with what was looked at.
    """
    given = [Path(path) for path in paths]
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


def _read_rounds(path: Path) -> "pd.DataFrame":
    import pandas as pd

    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            rows.append({"round": record["round"], **record["metrics"]})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not a round, and not the last line") from None
    frame = pd.DataFrame(rows, columns=None if rows else ["round"]).astype(float)  # null becomes NaN
    return frame.astype({"round": int})


def _read_result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path}: not JSON: {error}") from None
    return result


def _read_parquet(path: Path) -> "pd.DataFrame | None":
    if not path.exists():
        return None
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise RunError(f"{path}: cannot be read: {error}") from None
