"""The points of a sweep that searches: suggested, validated, written down, and told to the searcher.

`points.jsonl` in the sweep's directory holds, in order, each point as it was suggested and each result as
the searcher was told it. A resumed sweep hands the same results to a new searcher in the same order, and
compares its suggestions with the file: the searcher then knows what it knew, and so do its random numbers.

    {"suggested": 3, "changes": {…}, "trials": ["03-lr=0.5"]}                 this point runs
    {"suggested": 4, "changes": {…}, "problem": "…"}                     this one cannot, and costs no trial
    {"suggested": 5, "changes": {…}, "same_as": 3}                       nor does one that is known
    {"told": 3, "values": {"val/accuracy": 0.81}}
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from fedray.config.overrides import override_tree
from fedray.config.trees import Tree
from fedray.durable import append_lines, as_lines, replace
from fedray.errors import ConfigError, DataError, RunError
from fedray.records import Records, Shape
from fedray.storage.run_files import RunFiles
from fedray.sweeps.drawing import with_seeds
from fedray.sweeps.outcome import STOP_RECORD, status_of, writing
from fedray.sweeps.searchers import Proposer, Told, worst
from fedray.sweeps.space import Point, Sweep, point_of

logger = logging.getLogger(__name__)

POINTS = "points.jsonl"
"""File in the directory of a sweep that searches: what was suggested, and what the searcher was told."""

SUGGESTED = Records(
    POINTS,
    {
        "searcher": Shape({"searcher": str}),
        "suggested": Shape(
            {"suggested": int, "changes": dict},
            {"trials": list, "problem": str, "same_as": int, "seeds": list},
        ),
        "failed": Shape({"told": int, "failed": bool}),
        "told": Shape({"told": int, "values": dict}, {"stopped": int}),
        "ended": Shape({"ended": str}),
    },
    "or start another sweep with the best points in tune.points_to_evaluate",
)

MOST_IN_VAIN = 100
"""Suggestions in a row, at most, that cost no trial: points that cannot run or are known."""

T = TypeVar("T")

Check = Callable[[Point], None]
"""Raises ConfigError or DataError for a point that cannot run here."""


@dataclass
class Suggested:
    """A point that was suggested: its trials, and how many of them have ended.

    Args:
        number: of the suggestion.
        trials: names of its trials, one for each seed.
        failed: those that failed for good.
        told: the line with its result, once the searcher knows it.
    """

    number: int
    trials: Sequence[str]
    failed: set[str] = field(default_factory=set)
    told: Mapping[str, Any] | None = None


class Suggestions:
    """Draws the points of a sweep from a searcher, one after the other.

    Args:
        plan: the sweep.
        path: its directory.
        searcher: at its start.
        check: called with each point before it counts.

    Raises:
        RunError: if the searcher does not suggest what the file says.
    """

    def __init__(
        self, plan: Sweep, path: Path, searcher: Proposer, check: Check = lambda point: None
    ) -> None:
        self.plan, self.file, self.searcher, self.check = plan, path / POINTS, searcher, check
        self.path = path
        self.suggested: dict[int, Suggested] = {}
        self.known: dict[str, int] = {}
        self.count, self.in_vain = 0, 0
        lines = _lines(path)
        self.has_ended = any("ended" in line for line in lines)
        self._replay(lines)
        self.queue = [
            point
            for point in drawn(plan, path)
            if status_of(path / "trials" / point.name) not in ("finished", "stopped")
        ]
        for one in self.suggested.values():
            self._tell_if_ended(one)

    def next(self) -> Point | None:
        """Return the next trial; None if there is no other."""
        while not self.queue and len(self.suggested) < self.plan.tune.num_samples and not self.has_ended:
            if self.in_vain >= MOST_IN_VAIN:
                self.has_ended = True
                self._write({"ended": self._why()})
                return None
            self._suggest()
        return self.queue.pop(0) if self.queue else None

    def ended(self, name: str, error: bool = False) -> None:
        """Tell the searcher the result of a point whose last trial has ended.

        Args:
            name: of the trial; one that was interrupted has not ended.
            error: whether it failed for good.
        """
        for one in self.suggested.values():
            if name in one.trials:
                if error:
                    one.failed.add(name)
                self._tell_if_ended(one)

    def _suggest(self) -> None:
        number, self.count = self.count, self.count + 1
        changes = self.searcher.propose()
        line: Tree = {"suggested": number, "changes": changes}
        same = self.known.get(_key(changes))
        if same is not None:
            line["same_as"] = same
        else:
            try:
                points = self._points(changes)
            except (ConfigError, DataError) as error:
                line["problem"] = " | ".join(str(error).splitlines())
            else:
                line["trials"] = [point.name for point in points]
                line |= {"seeds": list(self.plan.tune.repeat)} if self.plan.tune.repeat else {}
                self.queue += points
        self._write(line)
        self._take(line)

    def _points(self, changes: Tree) -> list[Point]:
        """Return the validated trials of a point.

        Raises:
            ConfigError, DataError: if one cannot run.
        """
        seeded = with_seeds(changes, self.plan.tune)
        first, width = len(self.suggested) * len(seeded), max(2, len(str(self.plan.most)))
        points = []
        for number, change in enumerate(seeded, start=first):
            point = point_of(self.plan.tree["base"], change, number, width, POINTS)
            self.check(point)
            points.append(point)
        return points

    def _take(self, line: Mapping[str, Any]) -> None:
        """Take a suggestion into account that is in the file."""
        number = line["suggested"]
        if "trials" in line:
            self.suggested[number] = Suggested(number, line["trials"])
            self.known[_key(line["changes"])] = number
            self.in_vain = 0
            return
        self.in_vain += 1
        if "problem" in line:
            logger.info("point %d cannot run: %s", number, line["problem"])
            self.searcher.tell(number, None)
            return
        told = self._known(line["same_as"]).told
        self.searcher.tell(number, self._told(told))

    def _tell_if_ended(self, one: Suggested) -> None:
        if one.told is not None:
            return
        places = {name: self.path / "trials" / name for name in one.trials}
        done = {name: outcome for name, place in places.items() if (outcome := _outcome(place)) is not None}
        if set(done) | one.failed != set(one.trials):
            return
        if one.failed:
            line: Tree = {"told": one.number, "failed": True}
        else:
            line = {"told": one.number, **_mean(list(done.values()), self.plan.tune.learned)}
        self._write(line)
        self._learn(one, line)

    def _learn(self, one: Suggested, line: Mapping[str, Any]) -> None:
        one.told = line
        self.searcher.tell(one.number, self._told(line))

    def _told(self, line: Mapping[str, Any] | None) -> Told | None:
        """Return what the searcher learns from a line; nothing of a point that failed or still runs."""
        if line is None or "failed" in line:
            return None
        values = {name: float("nan") if value is None else value for name, value in line["values"].items()}
        return Told(worst(values, self.plan.tune.directions), line.get("stopped"))

    def _known(self, number: int) -> Suggested:
        """Return a suggestion that a later line names.

        Raises:
            RunError: if the file does not have it.
        """
        if number not in self.suggested:
            raise RunError(
                f"{self.file}: is damaged: point {number}, which it tells of, is missing; restore it from "
                f"a copy, {SUGGESTED.otherwise}"
            )
        return self.suggested[number]

    def _write(self, line: Mapping[str, Any]) -> None:
        with writing(self.file):
            append_lines(self.file, [line])

    def _replay(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Bring a new searcher to where the file ends.

        Raises:
            RunError: if it suggests other points.
        """
        if not lines:
            self._write({"searcher": self.searcher.made_by})
            return
        made_by = str(lines[0].get("searcher"))
        for line in lines[1:]:
            if "suggested" in line:
                changes, self.count = json.loads(json.dumps(self.searcher.propose())), self.count + 1
                if changes != line["changes"]:
                    raise RunError(self._differs(line, changes, made_by))
                self._take(line)
            elif "told" in line:
                self._learn(self._known(line["told"]), line)

    def _differs(self, line: Mapping[str, Any], changes: Tree, made_by: str) -> str:
        return (
            f"{self.file}: point {line['suggested']} was {json.dumps(line['changes'])}, but "
            f"{self.searcher.made_by} suggests {json.dumps(changes)} from the same results: the "
            f"sweep cannot continue as if undisturbed. The file was written with {made_by}; install that "
            "version, or start another sweep with the best points in tune.points_to_evaluate"
        )

    def _why(self) -> str:
        """Return why the search ends early."""
        lines = SUGGESTED.read(self.path)
        last = next((line["problem"] for line in reversed(lines) if "problem" in line), None)
        why = f"the last that cannot run: {last}" if last else "all of them were known: space has no others"
        return f"the searcher suggested {self.in_vain} points in a row that cost no trial; {why}"


class Trees(Mapping[str, Tree]):
    """Name of each trial → its config as a tree; of a trial that was suggested later, from the file.

    Args:
        path: the sweep's directory.
        base: of the sweep.
        known: of the trials that are known.
    """

    def __init__(self, path: Path, base: Mapping[str, Any], known: Mapping[str, Tree]) -> None:
        self.path, self.base, self.known = path, base, dict(known)

    def __getitem__(self, name: str) -> Tree:
        if name not in self.known:
            for line in SUGGESTED.read(self.path):
                seeds = [{"seed": seed} for seed in line.get("seeds", ())] or [{}]
                for trial, seed in zip(line.get("trials", ()), seeds, strict=False):
                    change = line["changes"] | seed
                    self.known.setdefault(trial, override_tree(self.base, change))
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)

    def each(self, make: Callable[[str, Tree], T]) -> "ByName[T]":
        """Return name → what `make` returns for a trial and its tree."""
        return ByName(self, make)


class ByName(Mapping[str, T]):
    """Name of each trial → a value that is made of its tree."""

    def __init__(self, trees: Trees, make: Callable[[str, Tree], T]) -> None:
        self.trees, self.make = trees, make

    def __getitem__(self, name: str) -> T:
        return self.make(name, self.trees[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.trees)

    def __len__(self) -> int:
        return len(self.trees)


def now(plan: Sweep, path: Path) -> Sweep:
    """Return a sweep with the points that were suggested so far; one that draws them first as it is."""
    return dataclasses.replace(plan, points=tuple(drawn(plan, path))) if plan.sample else plan


def is_open(plan: Sweep, path: Path) -> bool:
    """Tell whether a searcher may suggest more points."""
    return bool(plan.sample) and len(drawn(plan, path)) < plan.most and search_ended(path) is None


def search_ended(path: Path) -> str | None:
    """Return why a searcher ended early; None if it did not."""
    return next((line["ended"] for line in SUGGESTED.read(path) if "ended" in line), None)


def drawn(plan: Sweep, path: Path) -> list[Point]:
    """Return the points of a sweep that were suggested so far, validated again.

    Raises:
        ConfigError: if one cannot run any more.
    """
    points = []
    for line in _lines(path):
        if "trials" in line:
            for name, change in zip(line["trials"], with_seeds(line["changes"], plan.tune), strict=True):
                config = point_of(plan.tree["base"], change, 0, 1, POINTS).config
                points.append(Point(name, change, config))
    return points


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the file; a torn last one is removed from it."""
    file, lines = path / POINTS, SUGGESTED.read(path)
    whole = as_lines(lines)
    if file.exists() and file.read_bytes() != whole:
        with writing(file):
            replace(file, whole)
    return lines


def _key(changes: Mapping[str, Any]) -> str:
    return json.dumps(changes, sort_keys=True)


def _outcome(place: Path) -> dict[str, Any] | None:
    """Return a trial's directory, its result, and where it was stopped; None if it has not ended."""
    status = status_of(place)
    if status == "finished":
        return {"result": RunFiles(place).result() or {}, "place": place, "stopped": None}
    if status == "stopped":
        noted = STOP_RECORD.read(place) or {}
        return {"place": place, "stopped": noted.get("round")}
    return None


def _mean(outcomes: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Tree:
    """Return the mean of metrics over a point's seeds: at the end, or where the first one was stopped."""
    rounds = [outcome["stopped"] for outcome in outcomes if outcome["stopped"] is not None]
    stopped = min(rounds, default=None)
    found = [_at(outcome, stopped) for outcome in outcomes]
    means = {
        name: fmean(float(one[name]) if one.get(name) is not None else float("nan") for one in found)
        for name in metrics
    }
    values = {name: None if isnan(mean) else mean for name, mean in means.items()}
    return {"values": values} | ({} if stopped is None else {"stopped": stopped})


def _at(outcome: Mapping[str, Any], stopped: int | None) -> Mapping[str, Any]:
    """Return the metrics of a trial at its end, or the newest ones up to a round."""
    if stopped is None:
        result: Mapping[str, Any] = outcome["result"]
        return result
    seen: dict[str, Any] = {}
    for line in RunFiles(outcome["place"]).rounds():
        if line["round"] <= stopped:
            seen |= line["metrics"]
    return seen
