"""The outcome of a sweep: its trials, and its best point, which `best.yaml` holds as a config."""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedray.comparing import worth
from fedray.config import yaml_text
from fedray.durable import on_disk, shown
from fedray.durable import replace as replace_file
from fedray.errors import FedrayError
from fedray.experiment.forking import lineage
from fedray.report.table import mean_and_interval, write_report
from fedray.storage.run_files import RunFiles
from fedray.sweeps.space import Point
from fedray.tracking.mlflow_run import RunStatus, finish_parent
from fedray.tracking.store import Store
from fedray.types import Direction, RoundReport

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

BEST, NUMBERS = "best.yaml", "best.json"
"""Files in the directory of a sweep: the config of its best point, and its metrics."""

STOPPED = "stopped.json"
"""File in the directory of a trial that the scheduler stopped: after which round."""

Status = Literal["finished", "stopped", "failed", "missing"]


@dataclass(frozen=True)
class Trial:
    """One point and its outcome."""

    point: Point
    path: Path
    status: Status
    error: str | None = None


def status_of(place: Path) -> Status:
    """Tell from the directory of a trial how it ended."""
    if not (place / "config.yaml").exists():
        return "missing"
    result = RunFiles(place).read_json("result.json")
    if result:
        status: Status = result["status"]
        return status
    return "stopped" if (place / STOPPED).exists() else "failed"


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

    def metrics(self) -> dict[str, float]:
        """Return the mean over the trials of each number that all their results have."""
        results = [RunFiles(trial.path).read_json("result.json") or {} for trial in self.trials]
        numbers = [{k: v for k, v in one.items() if type(v) in (int, float)} for one in results]
        return {name: fmean(one[name] for one in numbers) for name in set(numbers[0]).intersection(*numbers)}


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The result of a sweep.

    Args:
        path: its directory.
        trials: its trials, in order.
        metric: the metric that compares them.
        direction: whether more of it is better.
        ended: why it ended before all trials; None: it did not.
    """

    path: Path
    trials: tuple[Trial, ...]
    metric: str
    direction: Direction
    ended: str | None = None

    def __repr__(self) -> str:
        """Return one line: where the sweep is, its trials and its best point."""
        became = Counter(trial.status for trial in self.trials)
        counts = ", ".join(f"{count} {status}" for status, count in became.items())
        best = self.best
        text = "" if best is None else f"; best {self.metric}={best.mean:.4g}: {best.trials[0].point.name}"
        return f"SweepResult({shown(self.path)!r}, {counts}{text})"

    def _repr_html_(self) -> str:
        """Return a table with a row per setting, and a picture of accuracy over bytes, for notebooks."""
        from fedray.report.notebook import html_of

        return html_of([trial.path for trial in self.trials if trial.status != "missing"], repr(self))

    def table(self) -> "pd.DataFrame":
        """Return a row per trial: its name, status, changes of the base, and final numbers by metric."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            result = RunFiles(trial.path).read_json("result.json") or {}
            numbers = {name: value for name, value in result.items() if type(value) in (int, float)}
            rows.append(dict(trial.point.changes) | numbers | {"status": trial.status})
        names = [trial.point.name for trial in self.trials]
        return pd.DataFrame(rows, index=pd.Index(names, name="trial"))

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
        """Trials that failed. Those that the end of the sweep has cut, or kept from beginning, did not."""
        left = [trial for trial in self.trials if trial.status in ("failed", "missing")]
        return tuple(trial for trial in left if self.ended is None or trial.error is not None)

    @property
    def cut(self) -> tuple[Trial, ...]:
        """Trials that the end of the sweep has cut, or kept from beginning; `resume` continues with them."""
        left = [trial for trial in self.trials if trial.status in ("failed", "missing")]
        return tuple(trial for trial in left if trial not in self.failed)


def record_best(path: Path, best: Best, metric: str) -> dict[str, Any]:
    """Write the best point to `best.yaml`, as `fedray run` takes it, and its numbers to `best.json`.

    Returns:
        The contents of `best.json`: trials, metric, mean, half (None for one trial), and all final metrics.
    """
    first = best.trials[0]
    note = f"# fedray run {BEST}\n# The best point of this sweep: {first.point.name}\n"
    tree = first.point.config.to_tree()
    if lineage(first.path):
        note += "# Its options changed in the run (lineage.jsonl of the trial); these are the last ones.\n"
        tree = RunFiles(first.path).read_config()
    with on_disk(path / BEST):
        replace_file(path / BEST, f"{note}{yaml_text.dump(tree)}".encode())
    numbers = {
        "trials": [trial.point.name for trial in best.trials],
        "metric": metric,
        "mean": best.mean if isfinite(best.mean) else None,
        "half": best.half if isfinite(best.half) else None,
        "metrics": best.metrics(),
    }
    RunFiles(path).write_json(NUMBERS, numbers)
    return numbers


def sweep_report(path: Path) -> Path:
    """Return the folder with a sweep's figures and tables, written anew if a trial is newer."""
    table = path / "report" / "table.csv"
    newest = max((file.stat().st_mtime for file in path.glob("trials/*/r*")), default=0.0)
    if not table.is_file() or table.stat().st_mtime < newest:
        return write_report([path]).path
    return table.parent


def finish_sweep(
    store: Store, parent: str | None, status: RunStatus, path: Path, became: Counter[Status]
) -> bool:
    """End a sweep's run in MLflow, with the metrics of its best point; tell whether MLflow took all of it.

    Args:
        store: where it is tracked.
        parent: its run; None if it is not tracked.
        status: how it ended.
        path: the sweep's directory.
        became: how many trials have which outcome.
    """
    best = RunFiles(path).read_json(NUMBERS) or {}
    tags = {f"trials_{word}": str(became[word]) for word in get_args(Status)}
    tags |= {"best": ", ".join(best["trials"])} if best else {}
    artifacts = [path / "sweep.yaml", path / BEST]
    if parent is not None and became["finished"] + became["stopped"]:
        try:
            artifacts.append(sweep_report(path))
        except FedrayError as error:  # the sweep has ended all the same
            logger.warning("MLflow gets no report of the sweep: %s", error)
    # trials that have ended, as the step: a later best point then stands after an earlier one
    report = RoundReport(became["finished"] + became["stopped"], best.get("metrics", {}))
    return finish_parent(store, parent, status, artifacts, tags, report, path)
