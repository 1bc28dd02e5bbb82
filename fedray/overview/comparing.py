"""Two or more runs side by side: what differs in config, costs and results.

    directories → sides (a setting each, with its seeds) → differences from the first, paired by seed

A side that cannot be compared with the first is named with the reason, and no difference is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from fedray.config.trees import flatten
from fedray.durable import shown
from fedray.errors import ConfigError
from fedray.report.cells import load_runs
from fedray.report.series import OPEN_SECTIONS, Setting, settings
from fedray.report.table import MEASURES, mean_and_interval, paired

SAME = ("data.name", "data.partition", "data.validation_fraction", "clients.population")
"""Keys that must agree: they decide which examples train and which are the validation's."""


@dataclass(frozen=True, eq=False)
class Side:
    """One setting of a comparison.

    Args:
        name: the directory as given, and the setting where it holds several.
        setting: its runs, one for each seed.
        problem: why it cannot be compared with the first; None: it can.
    """

    name: str
    setting: Setting
    problem: str | None = None

    @property
    def seeds(self) -> list[Any]:
        """The seeds of its runs."""
        return [run.seed for run in self.setting.runs]

    @property
    def flat(self) -> dict[str, Any]:
        """The whole config of its first run, by dotted keys."""
        return flatten(self.setting.runs[0].config, lambda key: key not in OPEN_SECTIONS)

    def value(self, measure: str) -> tuple[float, float]:
        """Return the mean of a measure over the seeds, and half of its 95 % interval."""
        metric, unit = MEASURES[measure]
        return mean_and_interval([run.last(metric) / unit for run in self.setting.runs])

    def difference(self, base: "Side", measure: str) -> tuple[float, float, int]:
        """Return the mean difference from another side, paired by seed, half its interval, and the pairs."""
        metric, unit = MEASURES[measure]
        pairs = [value / unit for value in paired(self.setting.runs, base.setting.runs, metric)]
        return *mean_and_interval(pairs), len(pairs)


def sides_of(paths: Sequence[str | Path]) -> list[Side]:
    """Return the sides of a comparison; the first one is what the others are compared with.

    Raises:
        ConfigError: for fewer than two settings, or if none can be compared with the first.
    """
    sides: list[Side] = []
    for path in paths:
        found = settings(load_runs([path]))
        for setting in found:
            name = shown(Path(path).absolute())
            sides.append(Side(name if len(found) == 1 else f"{name}: {setting.label}", setting))
    if len(sides) < 2:
        given = ", ".join(side.name for side in sides)
        raise ConfigError(
            f"compare needs two runs, sweeps or settings: got {given}; give another directory beside it"
        )
    base = sides[0]
    sides = [base, *(Side(side.name, side.setting, _problem(base, side)) for side in sides[1:])]
    problems = [f"{side.name}: {side.problem}" for side in sides[1:] if side.problem is not None]
    if len(problems) == len(sides) - 1:
        raise ConfigError(f"not comparable with {base.name}: {'; '.join(problems)}")
    return sides


def _problem(base: Side, side: Side) -> str | None:
    """Return why a side cannot be compared with the first one; None if it can."""
    for one in (base, side):
        if not one.setting.runs[0].config:
            return f"{'it' if one is side else one.name} has no config.yaml"
        if one.setting.status == "unfinished":
            done = one.setting.last_round
            rounds = "no round" if done is None else f"round {done} of {one.flat.get('rounds', '?')}"
            return f"{'it' if one is side else one.name} is unfinished ({rounds})"
    theirs, ours = base.flat, side.flat
    for key in dict.fromkeys([*theirs, *ours]):
        is_same = theirs.get(key) == ours.get(key)
        if not is_same and any(key == above or key.startswith(f"{above}.") for above in SAME):
            return f"{key} is {_word(ours.get(key))}, not {_word(theirs.get(key))}"
    if not set(base.seeds) & set(side.seeds):
        return f"seed {_list(side.seeds)}, not {_list(base.seeds)}: another partition and validation split"
    return None


def config_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Return each dotted key in which the configs differ → the value of each side, None where it has none."""
    keys = dict.fromkeys(key for side in sides for key in side.flat)
    found = {key: [side.flat.get(key) for side in sides] for key in keys}
    if any(len(side.setting.runs) > 1 for side in sides):
        found.pop("seed", None)
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def to_json(sides: Sequence[Side]) -> dict[str, Any]:
    """Return a comparison as JSON has it."""
    base = sides[0]
    return {
        "sides": [
            {
                "name": side.name,
                "paths": [str(run.path) for run in side.setting.runs],
                "seeds": side.seeds,
                "status": side.setting.progress,
                "problem": side.problem,
                "values": {m: _numbers(("mean", "half"), side.value(m)) for m in MEASURES},
                "differences": None
                if side is base or side.problem is not None
                else {m: _numbers(("mean", "half", "pairs"), side.difference(base, m)) for m in MEASURES},
            }
            for side in sides
        ],
        "config": config_differences(sides),
    }


def _numbers(names: Sequence[str], values: Sequence[float]) -> Mapping[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in zip(names, values, strict=True)}


def _word(value: Any) -> str:
    return "absent" if value is None else str(value)


def _list(seeds: Sequence[Any]) -> str:
    return ", ".join(map(str, seeds))
