"""A running run or sweep as it stands, from its files; a sweep's points need not be drawn yet."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedray.config import sealed
from fedray.durable import scan_lines, shown
from fedray.errors import ConfigError
from fedray.overview.summary import Summary, is_training, summary
from fedray.report.reading import find_runs
from fedray.storage.directory import holder_of


@dataclass(frozen=True, eq=False)
class View:
    """A run or a sweep at one moment.

    Args:
        path: its directory.
        is_running: whether a process works there.
        runs: the run itself, or the trials that have begun.
        planned: trials of the sweep, also those that its search has not suggested yet; 1 for a run.
        rounds: planned rounds of a trial that has not begun.
    """

    path: Path
    is_running: bool
    runs: tuple[Summary, ...]
    planned: int
    rounds: int

    @property
    def waiting(self) -> int:
        """Trials that have not begun."""
        return max(0, self.planned - len(self.runs))

    @cached_property
    def done(self) -> int:
        """Complete rounds of all trials."""
        return sum(run.round or 0 for run in self.runs)

    @cached_property
    def left(self) -> int:
        """Rounds that are to be made yet, if no further trial stops early."""
        open_ones = (run for run in self.runs if run.status in ("running", "interrupted"))
        return self.waiting * self.rounds + sum((run.rounds or 0) - (run.round or 0) for run in open_ones)

    @property
    def rounds_per_s(self) -> float:
        """Rounds per second of the trials that run, by the wall time of their rounds; 0 if unknown."""
        return sum(speed(run) for run in self.runs if run.status == "running")

    @property
    def left_s(self) -> float | None:
        """Expected seconds until the end; None if unknown."""
        return self.left / self.rounds_per_s if self.is_running and self.rounds_per_s > 0 else None

    @property
    def best(self) -> float | None:
        """The highest accuracy so far."""
        found = [run.value("val/accuracy") for run in self.runs]
        return max((value for value in found if value is not None), default=None)

    def line(self) -> str:
        """Return the state in one line."""
        counts: dict[str, int] = {}
        for run in self.runs:
            counts[run.status] = counts.get(run.status, 0) + 1
        counts |= {"waiting": self.waiting} if self.waiting else {}
        words = [f"{self.done} of {self.done + self.left} rounds"]
        if self.planned > 1 or len(self.runs) > 1:
            words.append(", ".join(f"{count} {status}" for status, count in counts.items()) or "no trial yet")
        if self.best is not None:
            words.append(f"accuracy {'up to ' if len(self.runs) > 1 else ''}{self.best:.3f}")
        if self.left_s is not None:
            words.append(f"{self.rounds_per_s:.3g} rounds/s, about {duration(self.left_s)} left")
        return f"{shown(self.path)}: {' · '.join(words)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "path": str(self.path),
            "running": self.is_running,
            "trials": [run.to_json() | {"actors": run.holder and run.holder.actors} for run in self.runs],
            "planned": self.planned,
            "waiting": self.waiting,
            "rounds_done": self.done,
            "rounds_left": self.left,
            "rounds_per_s": self.rounds_per_s,
            "left_s": self.left_s,
        }


def speed(run: Summary) -> float:
    """Return the rounds per second of a run, by the wall time of its rounds; 0 if unknown."""
    seconds = run.metrics.get("total/time/wall_s") or 0.0
    return (run.round or 0) / seconds if seconds > 0 else 0.0


def duration(seconds: float) -> str:
    """Write seconds for a reader: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def look(path: Path) -> View:
    """Read the state of a run or a sweep.

    Raises:
        ConfigError: if it is neither.
    """
    running = holder_of(path) is not None
    if is_training(path):
        raise ConfigError(
            f"{shown(path)} is of the training of an agent, and `watch` shows runs and sweeps; the "
            "evaluations of a training are in its progress.jsonl, and in MLflow: fedray ui; "
            "a sweep has a sweep.yaml"
        )
    if not (path / "sweep.yaml").is_file():
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{shown(path)} is not the directory of a run or a sweep: it has no sweep.yaml or config.yaml"
            )
        run = summary(path)
        return View(path, running, (run,), 1, run.rounds or 0)
    tree = sealed.look(path / "sweep.yaml", quickly=True)
    trials = path / "trials"
    begun = sorted(place for place in trials.glob("*") if _has_begun(place))
    base = tree.get("base")
    planned = max(_planned(path, tree), len(begun))
    rounds = base.get("rounds") if isinstance(base, dict) else None
    return View(path, running, tuple(map(summary, begun)), planned, rounds if isinstance(rounds, int) else 0)


def _has_begun(trial: Path) -> bool:
    """Tell whether a trial has begun; its config is there from the start, unless it is damaged."""
    return os.path.lexists(trial / "config.yaml") or (trial / "rounds.jsonl").is_file()


def _planned(path: Path, tree: Mapping[str, Any]) -> int:
    """Return the trials of a sweep, without drawing its points."""
    points, tune = tree.get("points"), tree.get("tune")
    if points or not isinstance(tune, dict):
        return len(points) if isinstance(points, list) else 0
    lines = scan_lines(path / "points.jsonl")[0]
    if any("ended" in line for line in lines):
        return sum(len(line.get("trials", ())) for line in lines)
    repeat, samples = tune.get("repeat"), tune.get("num_samples")
    seeds = len(repeat) if isinstance(repeat, list) and repeat else 1
    return samples * seeds if isinstance(samples, int) else 0


def actors(run: Summary) -> str:
    """Return the client actors of a run: those that live, of those that the config asks for."""
    asked = run.flat.get("clients.actors", "—")
    live = run.holder.actors if run.status == "running" and run.holder is not None else None
    if live is None or live == asked:
        return str(asked)
    return f"{live} (auto)" if asked == "auto" else f"{live} of {asked}"


def newest_running(folder: Path) -> Path:
    """Return the run or sweep below a folder that was begun last and still runs.

    Raises:
        ConfigError: if none runs.
    """
    places = {shown(folder): folder} if (folder / "config.yaml").is_file() else {}
    for run in find_runs([folder]) if folder.is_dir() else ():
        is_trial = run.parent.name == "trials" and (run.parent.parent / "sweep.yaml").is_file()
        place = run.parent.parent if is_trial and holder_of(run.parent.parent) else run
        places[str(place)] = place
    # a sweep whose trials have not begun
    places |= {str(file.parent): file.parent for file in folder.glob("*/sweep.yaml")}
    found = [(holder.since, str(place), place) for place in places.values() if (holder := holder_of(place))]
    if not found:
        raise ConfigError(f"nothing runs below {shown(folder)}: `fedray runs` lists what is there")
    return max(found)[2]
