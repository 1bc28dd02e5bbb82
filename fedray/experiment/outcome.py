"""The outcome of a sweep: its trials, and its best point, which `best.yaml` holds as a config."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedray.comparing import worth
from fedray.config import yaml_text
from fedray.durable import on_disk
from fedray.durable import replace as replace_file
from fedray.experiment.space import Point
from fedray.report.table import mean_and_interval
from fedray.storage.run_files import RunFiles
from fedray.types import Direction

BEST = "best.yaml"
"""File in the directory of a sweep: the config of its best point."""

Status = Literal["finished", "stopped", "failed", "missing"]


@dataclass(frozen=True)
class Trial:
    """One point and its outcome."""

    point: Point
    path: Path
    status: Status
    error: str | None = None


@dataclass(frozen=True)
class Best:
    """The best point of a sweep.

    Args:
        trials: its finished trials, one for each seed.
        mean: of the sweep's metric, over these trials.
        half: half of the 95 % t-interval of the mean; NaN for a single trial.
    """

    trials: tuple[Trial, ...]
    mean: float
    half: float


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep: its directory, its trials, and the metric that compares them."""

    path: Path
    trials: tuple[Trial, ...]
    metric: str
    direction: Direction

    @property
    def best(self) -> "Best | None":
        """The best point by the mean of the sweep's metric over its seeds; None if no trial has the metric.

        Points of which all trials have finished come before others. NaN is the worst value.
        """
        points: dict[str, list[tuple[Trial, float | None]]] = {}
        for trial in self.trials:
            result = RunFiles(trial.path).read_json("result.json") if trial.status == "finished" else None
            value = (result or {}).get(self.metric)
            without_seed = {key: given for key, given in trial.point.changes.items() if key != "seed"}
            same = json.dumps(without_seed, sort_keys=True, default=str)
            points.setdefault(same, []).append((trial, None if value is None else float(value)))
        whole = [some for some in points.values() if all(value is not None for _, value in some)]
        found = []
        for some in whole or points.values():
            seen = {trial.point.name: (trial, value) for trial, value in some if value is not None}
            if seen:
                values = [value for _, value in seen.values()]
                found.append(Best(tuple(trial for trial, _ in seen.values()), *mean_and_interval(values)))
        return max(found, key=lambda best: worth(best.mean, self.direction), default=None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Trials that failed."""
        return tuple(trial for trial in self.trials if trial.status in ("failed", "missing"))


def write_best(path: Path, best: Best) -> None:
    """Write the config of the best point, as `fedray run` takes it."""
    first = best.trials[0]
    note = f"# fedray run {BEST}\n# The best point of this sweep: {first.point.name}\n"
    with on_disk(path / BEST):
        replace_file(path / BEST, f"{note}{yaml_text.dump(first.point.config.to_tree())}".encode())
