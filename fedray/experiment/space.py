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
from fedray.experiment.config import RunConfig, Section
from fedray.experiment.messages import Where, explain, line, shortened
from fedray.experiment.overrides import CHOICES, Tree, base_of, origin, override_tree, parse_overrides
from fedray.experiment.placement import import_ray
from fedray.types import METRICS, NonNegativeInt, PositiveInt

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

        An override of a key of `space` fixes that key, and one of `method.name` a `space` of methods;
        `tune.…` and `space.…` reach those sections, and everything else changes the base.

        Raises:
            ConfigError: with every problem found, in whichever point.
        """
        tree, changes = yaml.load(path), parse_overrides(overrides)
        where = origin(path, changes)
        base, space, options = base_of(tree, path), _part(tree, "space", where), _part(tree, "tune", where)
        for key, value in changes.items():
            section, _, rest = key.partition(".")
            if section in ("space", "tune"):
                part = space if section == "space" else options
                part |= {rest: value} if rest else _part(changes, section, where)
            else:
                _fix(space, key)
                base = override_tree(base, {key: value})
        tune = tune_config(options, where)
        tree = {"base": base, "space": space, "tune": options}
        return cls.of(Path(path).stem, tree, tune, expand(space, tune, where), where)

    @classmethod
    def of(
        cls, name: str, tree: Tree, tune: TuneConfig, changes: Sequence[Mapping[str, Any]], where: Where
    ) -> "Sweep":
        """Build and validate every point.

        Raises:
            ConfigError: with the problems of all points.
        """
        points: list[Point] = []
        problems: dict[str, list[str]] = {}
        width = max(2, len(str(len(changes))))
        for number, change in enumerate(changes):
            try:
                config = RunConfig.from_tree(override_tree(tree["base"], change), where)
            except ConfigError as error:
                for problem in str(error).splitlines():
                    problems.setdefault(problem, []).append(_label(change))
                continue
            points.append(Point(_slug(f"{number:0{width}d}-{_label(change)}"), change, config))
        if problems:
            raise ConfigError("\n".join(_of_points(*item, len(changes)) for item in problems.items()))
        return cls(name, tree, tune, tuple(points))

    @property
    def rounds(self) -> int:
        """Rounds of the longest trial."""
        return max(point.config.rounds for point in self.points)


def expand(space: Mapping[str, Any], tune: TuneConfig, where: Where) -> list[Tree]:
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


def _part(tree: Mapping[str, Any], section: str, where: Where) -> Tree:
    """Return a section of a sweep, empty if it is not there."""
    part = tree.get(section)
    if part is not None and not isinstance(part, Mapping):
        raise ConfigError(line(section, f"got {shortened(part)}; must be a mapping of keys to values", where))
    return {str(key): value for key, value in (part or {}).items()}


def _fix(space: Tree, key: str) -> None:
    """Take a key that is overridden out of the space; with `method.name`, a choice among methods."""
    space.pop(key, None)
    section, _, last = key.rpartition(".")
    if CHOICES.get(section) == last:
        space.pop(section, None)


def _of_points(problem: str, labels: Sequence[str], points: int) -> str:
    """Say which points have a problem, unless all have it."""
    if len(labels) == points:
        return problem
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{problem} [{labels[0]}{more}]"


def _verb(key: str, spec: Any, where: Where) -> tuple[str, list[Any]]:
    if not isinstance(spec, Mapping) or len(spec) != 1:
        text = f"got {shortened(spec)}; write one verb and its list, e.g. {{grid: [1, 2]}}"
        raise ConfigError(line(f"space.{key}", text, where))
    ((verb, arguments),) = spec.items()
    if verb not in VERBS:
        raise ConfigError(line(f"space.{key}", unknown("verb", str(verb), VERBS), where))
    if not isinstance(arguments, list) or not arguments:
        text = f"got {shortened(arguments)}; must be a list with something in it"
        raise ConfigError(line(f"space.{key}.{verb}", text, where))
    return verb, arguments


def _domain(key: str, verb: str, arguments: list[Any], where: Where) -> Any:
    """Return Tune's domain, which is known to be drawn from."""
    import_ray()
    from ray import tune

    try:
        domain = getattr(tune, verb)(*([arguments] if verb == "choice" else arguments))
        domain.sample(random_state=np.random.RandomState(0))  # some arguments are refused only here
    except Exception as error:
        text = f"got {shortened(arguments)}; {verb} does not take that: {error}"
        raise ConfigError(line(f"space.{key}.{verb}", text, where)) from None
    return domain


def tune_config(options: Tree, where: Where) -> TuneConfig:
    """Validate the `tune:` section.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        config = TuneConfig.model_validate(options, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, TuneConfig, where, prefix=("tune",))) from None
    known = [name for name in METRICS if not name.startswith("test/")]
    known += [
        f"total/{name}" for name in known if name.startswith(("bytes/", "flops/", "time/", "clients/dropped"))
    ]
    if config.metric not in known and not config.metric.startswith("train/"):  # a method has its own of these
        raise ConfigError(line("tune.metric", unknown("metric", config.metric, known), where))
    return config


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
