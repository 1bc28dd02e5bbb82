"""What a sweep tries.

`base`, `space` and `tune` of a YAML file, turned into points that are all known to be valid.

    space:
      method.threshold: {grid: [0.2, 0.5, 1.0]}      crossed with the other grids
      method.lr:        {loguniform: [0.01, 0.3]}    drawn anew for each of `tune.num_samples`
      method:           {grid: [{name: fedavg}, {name: snip, density: 0.2}]}
    tune: {metric: val/accuracy, mode: max, scheduler: asha, concurrent: 2}

All points, random ones too, are drawn here and validated before any process is started.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from fedray.errors import ConfigError, unknown
from fedray.experiment import yaml
from fedray.experiment.config import (
    CHOICES,
    RunConfig,
    Section,
    Tree,
    base_of,
    explain,
    override_tree,
    parse_overrides,
)
from fedray.types import NonNegativeInt, PositiveInt

VERBS = (
    "grid",
    "choice",
    "uniform",
    "quniform",
    "loguniform",
    "qloguniform",
    "randint",
    "qrandint",
    "lograndint",
    "randn",
)
"""What a key of `space` may be drawn by: Tune's own names, `grid` for `grid_search`."""


class TuneConfig(Section):
    """`tune:` how the points are tried.

    Args:
        metric: what the scheduler compares; it must be known in every evaluated round.
        mode: whether more is better.
        scheduler: `fifo` runs all to the end; `asha` stops the worse ones early.
        concurrent: trials at once; None: one per CPU of the cluster, at most.
        num_samples: how often random verbs are drawn for each point of the grids.
        max_failures: how often a trial that broke goes on from its checkpoint.
        grace_rounds: rounds that ASHA leaves every trial; None: a quarter of the run.
        reduction: ASHA keeps one in so many at each rung.
        seed: of the random verbs.
    """

    metric: str = "val/accuracy"
    mode: Literal["max", "min"] = "max"
    scheduler: Literal["fifo", "asha"] = "fifo"
    concurrent: PositiveInt | None = None
    num_samples: PositiveInt = 1
    max_failures: NonNegativeInt = 1
    grace_rounds: PositiveInt | None = None
    reduction: int = Field(default=3, ge=2)
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Point:
    """One trial: its name, what it changes, and the config that comes of it."""

    name: str
    changes: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep whose points are all known to be valid.

    Args:
        name: of the file it came from.
        tree: the file, overrides applied; what is written to `sweep.yaml`.
        tune: how the points are tried.
        points: the trials.
    """

    name: str
    tree: Tree
    tune: TuneConfig
    points: tuple[Point, ...]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Sweep":
        """Read a sweep file and apply `key=value` overrides.

        An override of a key of `space` fixes that key; `tune.…` and `space.…` reach those sections, and
        everything else changes the base.

        Raises:
            ConfigError: with every problem found, in whichever point.
        """
        tree = yaml.load(path)
        base, space, options = (
            base_of(tree, path),
            dict(tree.get("space") or {}),
            dict(tree.get("tune") or {}),
        )
        for key, value in parse_overrides(overrides).items():
            section, _, rest = key.partition(".")
            if section == "tune":
                options[rest] = value
            elif section == "space":
                space[rest] = value
            else:
                space.pop(key, None)
                base = override_tree(base, {key: value})
        tune = tune_config(options, str(path))
        changes = expand(space, tune, str(path))
        return cls.of(
            Path(path).stem, {"base": base, "space": space, "tune": options}, tune, changes, str(path)
        )

    @classmethod
    def of(
        cls, name: str, tree: Tree, tune: TuneConfig, changes: Sequence[Mapping[str, Any]], where: str
    ) -> "Sweep":
        """Build and validate every point.

        Raises:
            ConfigError: with the problems of all points.
        """
        points, problems = [], []
        width = max(2, len(str(len(changes))))
        for number, change in enumerate(changes):
            try:
                config = RunConfig.from_tree(override_tree(tree["base"], change), where)
            except ConfigError as error:
                problems += [f"{line} [{_label(change)}]" for line in str(error).splitlines()]
                continue
            points.append(Point(_slug(f"{number:0{width}d}-{_label(change)}"), change, config))
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        return cls(name, tree, tune, tuple(points))

    @property
    def rounds(self) -> int:
        """Rounds of the longest trial."""
        return max(point.config.rounds for point in self.points)


def expand(space: Mapping[str, Any], tune: TuneConfig, where: str) -> list[Tree]:
    """Return the points of a space: the product of its grids, random verbs drawn anew in each.

    Raises:
        ConfigError: for a verb that there is not, or arguments it does not take.
    """
    grids: dict[str, list[Any]] = {}
    domains: dict[str, Any] = {}
    for key, spec in space.items():
        verb, arguments = _verb(key, spec, where)
        if verb == "grid":
            grids[key] = arguments
        else:
            domains[key] = _domain(key, verb, arguments, where)
    random = np.random.RandomState(tune.seed)
    points = []
    for _ in range(tune.num_samples if domains else 1):
        for values in product(*grids.values()):
            drawn = {key: _plain(domain.sample(random_state=random)) for key, domain in domains.items()}
            points.append(dict(zip(grids, values, strict=True)) | drawn)
    return points


def _verb(key: str, spec: Any, where: str) -> tuple[str, list[Any]]:
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ConfigError(
            f"space.{key} ({where}): got {spec!r}; write one verb and its list, e.g. {{grid: [1, 2]}}"
        )
    ((verb, arguments),) = spec.items()
    if verb not in VERBS:
        raise ConfigError(f"space.{key} ({where}): {unknown('verb', str(verb), VERBS)}")
    if not isinstance(arguments, list) or not arguments:
        raise ConfigError(
            f"space.{key}.{verb} ({where}): got {arguments!r}; must be a list with something in it"
        )
    return verb, arguments


def _domain(key: str, verb: str, arguments: list[Any], where: str) -> Any:
    from ray import tune

    try:
        return getattr(tune, verb)(*([arguments] if verb == "choice" else arguments))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"space.{key}.{verb} ({where}): got {arguments!r}; {error}") from None


def tune_config(options: Tree, where: str) -> TuneConfig:
    try:
        return TuneConfig.model_validate(options, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, TuneConfig, where, prefix=("tune",))) from None


def _label(changes: Mapping[str, Any]) -> str:
    """Name a point by what it changes: `staged,threshold=0.5,seed=1`."""
    parts = []
    for key, value in changes.items():
        if key in CHOICES and isinstance(value, Mapping):
            choice = CHOICES[key]
            parts += [str(value.get(choice, key))] + [f"{k}={v}" for k, v in value.items() if k != choice]
        elif key.rpartition(".")[0] in CHOICES and key.endswith(("name", "kind")):
            parts.append(str(value))
        else:
            parts.append(
                f"{key.rpartition('.')[2]}={value:.4g}"
                if isinstance(value, float)
                else f"{key.rpartition('.')[2]}={value}"
            )
    return ",".join(parts) or "base"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", text)[:100]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
