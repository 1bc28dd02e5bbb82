"""The outcome of a sweep: its trials, and its best point, which `best.yaml` holds as a config."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedray.comparing import worth
from fedray.config import yaml_text
from fedray.config.aims import Constraint
from fedray.durable import on_disk, shown
from fedray.durable import replace as replace_file
from fedray.errors import FedrayError
from fedray.experiment.forking import lineage
from fedray.records import Record, Shape
from fedray.report.table import mean_and_interval, write_report
from fedray.storage.run_files import RunFiles
from fedray.sweeps.pareto import front
from fedray.sweeps.space import Point
from fedray.tracking.mlflow_run import RunStatus
from fedray.tracking.parent import finish_parent
from fedray.tracking.store import Store
from fedray.types import Direction, RoundReport

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

BEST, NUMBERS, PARETO = "best.yaml", "best.json", "pareto.json"
"""Files in the directory of a sweep: the config of its best point, and its metrics; the Pareto set."""

STOPPED = "stopped.json"
"""File in the directory of a trial that the scheduler stopped: after which round."""

STOP_RECORD = Record(STOPPED, Shape({"round": int}), "or remove it: then the trial runs on")

_NUMBERS = Record(
    NUMBERS,
    Shape({"trials": list, "metrics": dict}, inside={"metrics": Shape(each=float)}),
    "or remove it: `fedray resume` writes it again",
)

_PARETO = Record(
    PARETO,
    Shape({"points": list}, items={"points": Shape({"trials": list})}),
    "or remove it: `fedray resume` writes it again",
)

Status = Literal["finished", "stopped", "failed", "missing"]


@dataclass(frozen=True)
class Trial:
    """One point and its outcome."""

    point: Point
    path: Path
    status: Status
    error: str | None = None


def writing(path: Path) -> AbstractContextManager[None]:
    """Return a context that turns an OSError of a write into a RunError that says how to resume the sweep.

    Args:
        path: a file in the directory of the sweep.
    """
    return on_disk(path, lambda: f"`fedray resume {shown(path.parent)}` continues with the other trials")


def status_of(place: Path) -> Status:
    """Tell from the directory of a trial how it ended."""
    if not (place / "config.yaml").exists():
        return "missing"
    result = RunFiles(place).result()
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

    def spread(self, metric: str) -> tuple[float, float]:
        """Return mean and half of the 95 % interval of a metric over the seeds."""
        return mean_and_interval([value for _, value in _values(self.trials, metric) if value is not None])

    def metrics(self) -> dict[str, float]:
        """Return the mean over the trials of each number that all their results have."""
        results = [RunFiles(trial.path).result() or {} for trial in self.trials]
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
        objectives: metric → direction, of a sweep with several.
        limits: that the best point and the Pareto set keep.
        note: why a searcher ended early; None: it did not.
    """

    path: Path
    trials: tuple[Trial, ...]
    metric: str
    direction: Direction
    ended: str | None = None
    objectives: Mapping[str, Direction] = field(default_factory=dict)
    limits: tuple[Constraint, ...] = ()
    note: str | None = None

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
            result = RunFiles(trial.path).result() or {}
            numbers = {name: value for name, value in result.items() if type(value) in (int, float)}
            rows.append(dict(trial.point.changes) | numbers | {"status": trial.status})
        names = [trial.point.name for trial in self.trials]
        return pd.DataFrame(rows, index=pd.Index(names, name="trial"))

    @property
    def best(self) -> "Best | None":
        """The best point by the mean of the sweep's metric over its seeds; None if no trial has the metric.

        Points of which all trials have finished come before others, and those within the limits before all.
        NaN is the worst value.
        """
        points = self._points()
        whole = [one for one in points if self._has(one, self.metric)]
        kept = [one for one in whole or points if self._keeps(one)] or whole or points
        found = []
        for some in kept:
            seen = [(trial, value) for trial, value in _values(some, self.metric) if value is not None]
            if seen:
                spread = mean_and_interval([value for _, value in seen])
                found.append(Best(tuple(trial for trial, _ in seen), *spread))
        return max(found, key=lambda best: worth(best.mean, self.direction), default=None)

    @property
    def pareto(self) -> "tuple[Best, ...]":
        """The points that no other is better than in one objective and as good as in the others, in order.

        A point counts if all its trials have finished with finite objectives, and within the limits. Mean and
        interval are those of `metric`; `Best.spread` gives those of each objective.
        """
        points = [
            Best(tuple(one), *mean_and_interval([value or 0.0 for _, value in _values(one, self.metric)]))
            for one in self._points()
            if all(self._has(one, name) for name in self.objectives) and self._keeps(one)
        ]
        ways = list(self.objectives.values())
        means = [[point.spread(name)[0] for name in self.objectives] for point in points]
        kept = front(means, ways) if ways else []
        return tuple(sorted((points[n] for n in kept), key=lambda p: -worth(p.mean, self.direction)))

    def _points(self) -> list[list[Trial]]:
        """Return the trials of each point, one for each seed."""
        points: dict[str, list[Trial]] = {}
        for trial in self.trials:
            without_seed = {key: given for key, given in trial.point.changes.items() if key != "seed"}
            same = json.dumps(without_seed, sort_keys=True, default=str)
            points.setdefault(same, []).append(trial)
        return list(points.values())

    def _has(self, trials: Sequence[Trial], metric: str) -> bool:
        return all(value is not None for _, value in _values(trials, metric))

    def _keeps(self, trials: Sequence[Trial]) -> bool:
        """Tell whether the means of a point are within the limits."""
        for limit in self.limits:
            seen = [value for _, value in _values(trials, limit.metric)]
            whole = [value for value in seen if value is not None]
            if len(whole) < len(seen) or limit.violation(fmean(whole)) > 0:
                return False
        return True

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


def _values(trials: Sequence[Trial], metric: str) -> list[tuple[Trial, float | None]]:
    """Return each trial once, with the metric of its result; None unless it has finished with one."""
    found = {}
    for trial in trials:
        result = RunFiles(trial.path).result() if trial.status == "finished" else None
        value = (result or {}).get(metric)
        found[trial.point.name] = (trial, None if value is None else float(value))
    return list(found.values())


def record_pareto(path: Path, result: SweepResult) -> None:
    """Write the Pareto set of a sweep with several objectives to `pareto.json`, best first by its metric."""
    if not result.objectives:
        return
    points = []
    for point in result.pareto:
        spread = {name: point.spread(name) for name in result.objectives}
        points.append(
            {
                "trials": [trial.point.name for trial in point.trials],
                "changes": {k: v for k, v in point.trials[0].point.changes.items() if k != "seed"},
                "means": {name: mean for name, (mean, _) in spread.items()},
                "halves": {name: half if isfinite(half) else None for name, (_, half) in spread.items()},
            }
        )
    RunFiles(path).write_json(PARETO, {"objectives": dict(result.objectives), "points": points})


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
    with writing(path / BEST):
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
    best = _NUMBERS.read(path) or {}
    tags = {f"trials_{word}": str(became[word]) for word in get_args(Status)}
    tags |= {"best": ", ".join(best["trials"])} if best else {}
    artifacts = [path / name for name in ("sweep.yaml", BEST, PARETO, "points.jsonl")]
    if parent is not None and became["finished"] + became["stopped"]:
        try:
            artifacts.append(sweep_report(path))
        except FedrayError as error:  # the sweep has ended all the same
            logger.warning("MLflow gets no report of the sweep: %s", error)
    # trials that have ended, as the step: a later best point then stands after an earlier one
    report = RoundReport(became["finished"] + became["stopped"], best.get("metrics", {}))
    pareto = _PARETO.read(path)
    if pareto:
        tags["pareto"] = ", ".join(trial for point in pareto["points"] for trial in point["trials"])
    return finish_parent(store, parent, status, artifacts, tags, report, path)
