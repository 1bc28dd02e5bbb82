"""Runs grouped by setting: the seeds of one config, labelled by the keys in which configs differ.

Nothing is mixed in silence: runs that stopped early, or have another number of rounds, are another setting.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedray.config.trees import CHOICES, decisive, flatten
from fedray.report.reading import RunData, Status

Flat = dict[str, Any]
"""Dotted key → value."""

NAMING = {f"{section}.": f"{section}.{key}" for section, key in CHOICES.items()}
"""Prefix of a section's keys → its key that decides which other keys exist."""

VALUE_ALONE = (*NAMING.values(), "model", "data.name")
"""Keys whose values need no name in a label."""

OPEN_SECTIONS = ("clients.devices",)
"""Sections whose keys are data: they are one value."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in the seed only, with equally many rounds.

    Args:
        label: distinguishes this setting from the others.
        runs: one per seed, at least one.
        notes: remarks for the reader on how the runs were grouped.
    """

    label: str
    runs: tuple[RunData, ...]
    notes: tuple[str, ...] = ()

    @property
    def last_round(self) -> int | None:
        """Number of rounds made; None before the first is written."""
        return self.runs[0].last_round

    @property
    def status(self) -> Status:
        """Outcome of the runs."""
        return self.runs[0].status

    @property
    def is_fedavg(self) -> bool:
        """Whether this is the dense reference."""
        return self.flat.get("method.name") == "fedavg"

    @property
    def progress(self) -> str:
        """The status in words, with the round where it matters."""
        if self.last_round is None:
            return "no round yet"
        return "finished" if self.status == "finished" else f"{self.status} at round {self.last_round}"

    @cached_property
    def flat(self) -> Flat:
        """The flattened config, without the seed and keys that do not change results."""
        return _without_seed(self.runs[0])


def label_runs(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs with labels made of the config keys in which they differ.

    `method.name` stands as its value alone, `seed` as s0, any other key by its last part, e.g.
    `staged threshold=0.5 s0`. Equal labels get the name of the directory.
    """
    labels = _unambiguous(_labels([_flatten(run.config) for run in runs], [run.name for run in runs]), runs)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def label_of(tree: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return a label of one config: its method, then those of `keys` that it has, the seed last."""
    flat = _flatten(tree)
    told = sorted((key for key in keys if key in flat and key != "method.name"), key=_rank)
    last_parts = Counter(key.rpartition(".")[2] for key in told)
    return " ".join(_part(key, flat[key], last_parts, exact=False) for key in ["method.name", *told])


def _rank(key: str) -> tuple[bool, bool]:
    return not key.startswith("method."), key == "seed"


def _unambiguous(labels: Sequence[str], runs: Sequence[RunData]) -> list[str]:
    """Return the labels, with the directory of its run behind each that is not the only one of its kind."""
    often, homes = Counter(labels), Counter(run.name for run in runs)
    return [
        label if often[label] == 1 else f"{label} ({_home(run, homes)})"
        for run, label in zip(runs, labels, strict=True)
    ]


def _home(run: RunData, homes: Mapping[str, int]) -> str:
    return run.name if homes[run.name] == 1 else str(run.path)


def settings(runs: Sequence[RunData]) -> list[Setting]:
    """Group runs that differ in the seed only and have equally many rounds, in order of first appearance.

    Two runs of one seed are the same run twice: only the last counts. Of two settings whose configs differ no
    label is the other's; two that differ in their rounds only may share one, and their status differs.
    """
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same = [_without_seed(run) or str(run.path), run.last_round, run.status]
        key = json.dumps(same, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    flats = [_without_seed(group[0]) for group in members]
    labels = _labels(flats, [group[0].name for group in members])
    if len(set(labels)) < len({_same(flat) for flat in flats}):
        labels = _unambiguous(labels, [group[0] for group in members])
    return [_setting(label, group) for label, group in zip(labels, members, strict=True)]


def _setting(label: str, group: Sequence[RunData]) -> Setting:
    by_seed = {run.seed: run for run in group}
    often = Counter(run.seed for run in group)
    notes = tuple(f"seed {seed} stands {n} times, one counts" for seed, n in often.items() if n > 1)
    return Setting(label, tuple(by_seed.values()), notes)


def _without_seed(run: RunData) -> Flat:
    return {key: value for key, value in _flatten(run.config).items() if key != "seed"}


def _flatten(tree: Mapping[str, Any]) -> Flat:
    """Return dotted key → value of the keys that a result depends on."""
    return flatten(decisive(tree), lambda key: key not in OPEN_SECTIONS)


def _labels(flats: Sequence[Flat], names: Sequence[str]) -> list[str]:
    """Return a label for each config; where nothing differs, the method's name or the given one."""
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    known = [flat for flat in flats if flat]  # a run without a config differs in its name
    keys = [key for key in keys if _differs(key, known)]
    keys.sort(key=_rank)  # stable: else as in the config
    last_parts = Counter(key.rpartition(".")[2] for key in keys)
    labels: list[str] = []
    for exact in (False, True):  # all digits only where six do not distinguish two values
        labels = []
        for flat, name in zip(flats, names, strict=True):
            parts = [_part(key, flat[key], last_parts, exact) for key in keys if key in flat]
            labels.append(" ".join(parts) or str(flat.get("method.name", name)))
        if len(set(labels)) == len({_same(flat) for flat in flats}):
            break
    return labels


def _same(flat: Flat) -> str:
    """Return a text that equal configs share."""
    return json.dumps(flat, sort_keys=True, default=str)


def _differs(key: str, flats: Sequence[Flat]) -> bool:
    """Tell whether runs differ in a key; an option of one method is compared within that method."""
    choice = next((c for above, c in NAMING.items() if key.startswith(above) and key != c), None)
    values: dict[str, set[str]] = {}
    for flat in flats:  # an older config may lack an option
        of = "" if choice is None or all(key in flat for flat in flats) else str(flat.get(choice))
        values.setdefault(of, set()).add(repr(flat[key]) if key in flat else "absent")
    return any(len(different) > 1 for different in values.values())


def _part(key: str, value: Any, last_parts: Mapping[str, int], exact: bool) -> str:
    if key == "seed":
        return f"s{value}"
    if key in VALUE_ALONE:
        return str(value)
    last = key.rpartition(".")[2]
    return f"{last if last_parts[last] == 1 else key}={_text(value, exact)}"


def _text(value: Any, exact: bool) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{_text(part, exact)}" for key, part in value.items())
    if isinstance(value, list):
        return ",".join(_text(part, exact) for part in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and not exact else str(value)
