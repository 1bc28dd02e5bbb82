"""The points of a sweep.

`base`, `space` and `tune` of a YAML file become a list of points. Every point is validated.

    space:
      method.threshold: {grid: [0.2, 0.5, 1.0]}      crossed with the other grids
      method.lr:        {loguniform: [0.01, 0.3]}    drawn for each of `tune.num_samples`
      method:           {grid: [{name: fedavg}, {name: snip, density: 0.2}]}
    tune: {metric: val/accuracy, scheduler: asha, concurrent: 2}

All points, random ones too, are drawn here and validated before any process is started.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from fedray.config import yaml_text
from fedray.config.messages import Where, line, shortened
from fedray.config.overrides import base_of, origin, override_tree, parse_overrides
from fedray.config.pbt_rules import pbt_problems
from fedray.config.run_config import RunConfig
from fedray.config.schedulers import Pbt
from fedray.config.searches import Grid
from fedray.config.trees import CHOICES, Tree
from fedray.config.trust import trusting
from fedray.config.tune_config import TuneConfig, comparison_problems, tune_config
from fedray.errors import ConfigError
from fedray.sweeps.drawing import check_drawable, extremes, mutations_of, points_of, random_points, verb_of
from fedray.sweeps.refused import Refused

SHARED = {
    "tracking": "all trials are tracked in one store, as children of one run",
    "imports": "all trials choose from the same tables",
    "storage": "a sweep and its trials are kept in one place",
}
"""Sections that all points of a sweep share, and why."""


OnPoint = Callable[[int, int], None]
"""Called during validation with the number of validated points and of all points."""


@dataclass(frozen=True)
class Point:
    """One trial: its name, its changes to the base, and the resulting config."""

    name: str
    changes: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep of validated points.

    Args:
        name: name of the sweep's file.
        tree: the file with overrides applied, as `sweep.yaml` stores it.
        tune: how the points are run.
        points: the trials; of a sweep that searches, those that were suggested so far.
        sample: of a sweep that searches: configs at the ends of the space.
    """

    name: str
    tree: Tree
    tune: TuneConfig
    points: tuple[Point, ...]
    sample: tuple[RunConfig, ...] = ()

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        on_point: OnPoint | None = None,
        *,
        trust: bool = False,
    ) -> "Sweep":
        """Read a sweep file and apply `key=value` overrides.

        An override of a key of `space` fixes that key, and one of `method.name` a `space` of methods;
        `tune.…` and `space.…` reach those sections, and everything else changes the base. `on_point` is
        called as points are validated. With `trust`, the Python files of `imports` are run.

        Raises:
            ConfigError: with every problem of every point.
        """
        changes = parse_overrides(overrides)
        with trusting(trust):
            return cls.read(yaml_text.load(path), str(path), Path(path).stem, changes, on_point)

    @classmethod
    def read(
        cls, tree: Tree, source: str, name: str, changes: Tree, on_point: OnPoint | None = None
    ) -> "Sweep":
        """Make a sweep of the content of a file with dotted changes, as `load` does.

        Args:
            tree: the content.
            source: its name, for messages.
            name: of the sweep.
            changes: dotted key → value.
            on_point: as of `load`.
        """
        where = origin(source, changes)
        base, space, options = (
            override_tree({}, base_of(tree, source)),
            _part(tree, "space", where),
            _part(tree, "tune", where),
        )
        given = dict(space)  # before an override fixes a drawn key
        for key, value in changes.items():
            section, _, rest = key.partition(".")
            if section in ("space", "tune"):
                part = space if section == "space" else options
                change = {rest: value} if rest else _part(changes, section, where)
                part |= change if section == "space" else opened(part, change)
            else:
                _fix(space, key)
                base = override_tree(base, {key: value})
        tune = tune_config(options, where)
        refuse_shared(space, where)
        check_samples(given | space, tune, where)
        tree = {"base": base, "space": space, "tune": options}
        if tune.is_searching:
            return cls.searching(name, tree, tune, where, on_point)
        return cls.of(name, tree, tune, points_of(space, tune, where), where, on_point)

    @classmethod
    def of(
        cls,
        name: str,
        tree: Tree,
        tune: TuneConfig,
        changes: Sequence[Mapping[str, Any]],
        where: Where,
        on_point: OnPoint | None = None,
    ) -> "Sweep":
        """Build and validate every point; paths of base and points become absolute.

        Args:
            name: of the sweep.
            tree: its `base`, `space` and `tune`.
            tune: the validated section.
            changes: key → value, for each point.
            where: the keys were given; for messages.
            on_point: called with the number of points validated so far, and of all.

        Raises:
            ConfigError: with the problems of all points, or of the first MOST_REFUSED that have any.
        """
        points: list[Point] = []
        refused = Refused(len(changes))
        width = max(2, len(str(len(changes))))
        for number, change in enumerate(changes):
            try:
                points.append(point_of(tree["base"], change, number, width, where))
            except ConfigError as error:
                refused.add(_label(change), str(error).splitlines(), number + 1)
            if on_point is not None:
                on_point(number + 1, len(changes))
        refused.check()
        configs = [point.config for point in points]
        _check_comparison(tune, configs, where, _population_problems(tune, points, where))
        return cls(name, tree | {"base": _base(tree["base"], configs)}, tune, tuple(points))

    @classmethod
    def searching(
        cls, name: str, tree: Tree, tune: TuneConfig, where: Where, on_point: OnPoint | None = None
    ) -> "Sweep":
        """Return a sweep whose points are suggested while it runs, after a trial of the ends of its space.

        The arguments are those of `of`.

        Raises:
            ConfigError: with every problem of a verb, a first point, or a value with which no point can run.
        """
        space: Tree = dict(tree.get("space") or {})
        check_drawable(space, tune, where)
        contexts = random_points(space, CONTEXTS, tune, where)
        tried = [[dict(point)] for point in tune.points_to_evaluate]
        for key, spec in space.items():
            verb, arguments = verb_of(key, spec, where)
            tried += [[{**point, key: value} for point in contexts] for value in extremes(verb, arguments)]
        configs, refused = list[RunConfig](), Refused(len(tried))
        for number, changes in enumerate(tried):
            found, faults = _first_valid(tree["base"], changes, where)
            configs += found
            if faults:
                refused.add(_label(changes[0]), faults, number + 1)
            if on_point is not None:
                on_point(number + 1, len(tried))
        refused.check()
        _check_comparison(tune, configs, where)
        located = {key: _located(spec, configs, key, is_verb=True) for key, spec in space.items()}
        whole = {"base": _base(tree["base"], configs), "space": located}
        return cls(name, tree | whole, tune, (), tuple(configs))

    @property
    def configs(self) -> list[RunConfig]:
        """The configs that stand for the sweep's trials: of its points, and at the ends of its space."""
        return [*(point.config for point in self.points), *self.sample]

    @property
    def most(self) -> int:
        """Number of trials of the whole sweep, at most."""
        return self.tune.num_samples * max(1, len(self.tune.repeat)) if self.sample else len(self.points)

    @property
    def lengths(self) -> dict[str, int]:
        """Name of each trial → its rounds, at most; a number stands for one that is not suggested yet."""
        known = {point.name: point.config.rounds for point in self.points}
        return known | {str(number): self.rounds for number in range(len(known), self.most)}

    @property
    def rounds(self) -> int:
        """Rounds of the longest trial."""
        return max(config.rounds for config in self.configs)


CONTEXTS = 4
"""Random points in which a value of `space` is tried; it is refused if it can run in none."""


def point_of(
    base: Mapping[str, Any], change: Mapping[str, Any], number: int, width: int, where: Where
) -> Point:
    """Return the validated point with this number, which its name begins with, in `width` digits.

    Raises:
        ConfigError: with every problem found.
    """
    config = RunConfig.from_tree(override_tree(base, change), where)
    change = _located(change, [config])
    return Point(_slug(f"{number:0{width}d}-{_label(change)}"), change, config)


def _first_valid(
    base: Mapping[str, Any], changes: Sequence[Tree], where: Where
) -> tuple[list[RunConfig], list[str]]:
    """Return the config of the first change that can run, or else the problems of the first."""
    problems: list[str] = []
    for change in changes:
        try:
            return [RunConfig.from_tree(override_tree(base, change), where)], []
        except ConfigError as error:
            problems = problems or str(error).splitlines()
    return [], problems


def _check_comparison(
    tune: TuneConfig, configs: Sequence[RunConfig], where: Where, more: Sequence[str] = ()
) -> None:
    problems = [line(key, text, where) for key, text in comparison_problems(tune, configs)] + list(more)
    if problems:
        raise ConfigError("\n".join(problems))


def _population_problems(tune: TuneConfig, points: Sequence[Point], where: Where) -> list[str]:
    """Return why the points cannot be PBT's population."""
    if not isinstance(tune.rules, Pbt):
        return []
    configs = [point.config for point in points]
    every = lcm(*(config.eval_every for config in configs))
    found = pbt_problems(tune.rules, configs, [point.changes for point in points], every)
    problems = [line(key, text, where) for key, text in found]
    if not problems:
        mutations_of(tune.rules, where)
    return problems


def refuse_shared(space: Mapping[str, Any], where: Where) -> None:
    """Refuse keys that cannot differ from point to point.

    Raises:
        ConfigError: with each such key, and why.
    """
    problems = [
        line(f"space.{key}", f"{SHARED[section]}: set {key} in base", where)
        for key in space
        if (section := key.partition(".")[0]) in SHARED
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_samples(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> None:
    """Refuse settings of random verbs where a space has none.

    Raises:
        ConfigError: with each such setting.
    """
    if not isinstance(tune.search.options, Grid):
        return
    if any(isinstance(spec, Mapping) and "grid" not in spec for spec in space.values()):
        return
    problems = []
    if tune.num_samples > 1:
        text = f"{tune.num_samples}, but space draws nothing at random, so that all samples would be alike; "
        text += "leave it out, draw a key, e.g. {loguniform: [0.01, 0.3]}, or make a grid of seeds"
        problems.append(line("tune.num_samples", text, where))
    if "seed" in tune.model_fields_set:
        text = f"{tune.seed}, but space draws nothing at random; the seed of the runs is the key seed in base"
        problems.append(line("tune.seed", text, where))
    if problems:
        raise ConfigError("\n".join(problems))


def _base(base: Tree, configs: Sequence[RunConfig]) -> Tree:
    """Return the base with absolute paths, and with addresses as its configs have them: without a login."""
    first, located = configs[0], _located(base, configs)
    addresses = {"storage": first.storage} if located.get("storage") is not None else {}
    if "uri" in (located.get("tracking") or {}):
        addresses["tracking.uri"] = first.tracking.uri
    return override_tree(located, addresses)


def _located(
    tree: Mapping[str, Any], configs: Sequence[RunConfig], above: str = "", *, is_verb: bool = False
) -> Tree:
    """Return a tree of dotted keys with absolute paths, as its configs have them.

    Args:
        tree: keys and values, or a verb and its list.
        configs: tell which values are paths.
        above: what stands before the keys; for a verb, the key that it draws.
        is_verb: whether it is a verb.
    """
    if is_verb:
        return {verb: [_absolute(value, configs, above) for value in given] for verb, given in tree.items()}
    return {key: _absolute(value, configs, above + key) for key, value in tree.items()}


def _absolute(value: Any, configs: Sequence[RunConfig], key: str) -> Any:
    if isinstance(value, Mapping):
        return _located(value, configs, f"{key}.")
    if any(isinstance(found, Path) for config in configs for found in _values(config, key)):
        given = value if isinstance(value, list) else [value]
        whole = [str(Path(part).expanduser().absolute()) if part is not None else None for part in given]
        return whole if isinstance(value, list) else whole[0]
    return value


def _values(config: RunConfig, key: str) -> Iterator[Any]:
    """Yield the value of a config at a dotted key; each of several."""
    found: Any = config
    for part in key.split("."):
        found = getattr(getattr(found, "options", found), part, None)
    yield from found if isinstance(found, tuple) else (found,)


def _part(tree: Mapping[str, Any], section: str, where: Where) -> Tree:
    """Return a section of a sweep; empty if it is missing."""
    part = tree.get(section)
    if part is not None and not isinstance(part, Mapping):
        raise ConfigError(line(section, f"got {shortened(part)}; must be a mapping of keys to values", where))
    return {str(key): value for key, value in (part or {}).items()}


def opened(options: Tree, changes: Tree) -> Tree:
    """Return changes of `tune` without dotted keys: `scheduler.reduction` is a key of `scheduler`.

    Args:
        options: the section so far; a section of it that is a text is a choice by name.
        changes: key, perhaps with a dot, → value.
    """
    result: Tree = {}
    for key, value in changes.items():
        section, dot, inner = key.partition(".")
        if not dot:
            result[key] = value
            continue
        before = result.get(section, options.get(section))
        before = {"name": before} if isinstance(before, str) else before
        kept = dict(before) if isinstance(before, Mapping) else {}
        kept = {} if inner == "name" and kept.get("name") != value else kept
        result[section] = {**kept, inner: value}
    return result


def _fix(space: Tree, key: str) -> None:
    """Remove an overridden key from the space; `method.name` removes a choice among methods."""
    space.pop(key, None)
    section, _, last = key.rpartition(".")
    if CHOICES.get(section) == last:
        space.pop(section, None)


def _label(changes: Mapping[str, Any]) -> str:
    """Name a point by its changes: `staged,threshold=0.5,seed=1`."""
    parts = []
    for key, value in changes.items():
        if key in CHOICES and isinstance(value, Mapping):
            choice = CHOICES[key]
            parts.append(str(value.get(choice, key)))
            parts += [f"{k}={_short(v)}" for k, v in value.items() if k != choice]
        elif key.rpartition(".")[0] in CHOICES and key.endswith(("name", "kind")):
            parts.append(str(value))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else _short(value)
            parts.append(f"{key.rpartition('.')[2]}={shown}")
    return ",".join(parts) or "base"


def _short(value: Any) -> str:
    """Return a value as text; of an absolute path the last part."""
    text = str(value)
    return Path(text).name if text.startswith("/") and Path(text).name else text


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", text)[:100]
