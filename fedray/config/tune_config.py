"""`tune:` how the points of a sweep are tried and compared, and whether that is possible.

Nothing here loads Ray: every check comes before a process starts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedray.config import aims
from fedray.config.aims import Constraint
from fedray.config.choice import Choice
from fedray.config.messages import Where, explain, line
from fedray.config.run_config import RunConfig, Section
from fedray.config.schedulers import FLAT, SCHEDULER, Fifo, Scheduler, having
from fedray.config.searches import SEARCH, Search
from fedray.config.stop_rules import ROUND, round_problems, sense, target_problems
from fedray.config.trees import Tree
from fedray.errors import ConfigError, nearest, unknown
from fedray.federation.accounts import TOTALS
from fedray.types import (
    METRICS,
    Direction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    direction_of,
)

COMPARABLE = (*(name for name in METRICS if not name.startswith("test/")), *(f"total/{n}" for n in TOTALS))
"""Metrics that every run reports. A method's own are added by `Method.metric_names`."""

VERBS: Mapping[str, str] = {
    "grid": "Every value of the list: one point for each, in all combinations with other grids.",
    "choice": "One value of the list.",
    "uniform": "[low, high]: a number from low up to high.",
    "quniform": "[low, high, step]: as uniform, rounded to a multiple of step.",
    "loguniform": "[low, high]: a number whose logarithm is uniform; low > 0.",
    "qloguniform": "[low, high, step]: as loguniform, rounded to a multiple of step.",
    "randint": "[low, high]: a whole number from low to high − 1.",
    "qrandint": "[low, high, step]: a multiple of step from low to high.",
    "lograndint": "[low, high]: a whole number from low to high − 1 whose logarithm is uniform.",
    "randn": "[mean, sd]: a number of the normal distribution.",
}
"""Verb of `space` → its list and what it draws: Tune's own names, `grid` for `grid_search`."""

OWN = ("train/", "method/")
"""How a method's own metrics begin."""


class TuneConfig(Section):
    """`tune:` how the points of a sweep are tried and compared.

    Args:
        metric: metric that the scheduler and the choice of the best trial compare; every evaluated round must
            report it.
        mode: whether more of the metric (`max`) or less (`min`) is better; null: the metric's own direction.
            A method's own metric needs it.
        scheduler: which trials run on: a name, or a mapping with `name` and options.
        concurrent: trials at once; null: one per CPU that the cluster has at the moment.
        num_samples: points that a searcher tries; with `grid`, draws of the random verbs for each
            combination.
        max_failures: restarts of a failed trial from its checkpoint, at most.
        grace_rounds: the option of `asha` and `median`, in short.
        reduction: the option of `asha` and `hyperband`, in short.
        seed: seed of the random verbs and of the searcher.
        stop: metric, or `round` → target; a trial that reaches any of them ends there, as finished. Totals
            and `round` reach theirs from below.
        time_budget_s: seconds for all trials, those of `resume` included. No trial begins after them, and the
            running ones end after their rounds, with checkpoints; null: no limit.
        search: how points are found: a name, or a mapping with `name` and options.
        objectives: metric → `max` or `min`, null for its own direction: the sweep ends with the Pareto set.
        constraints: metric → limit (`<= 0.1`, `>= 0.8`) that the best point and the Pareto set must keep.
        points_to_evaluate: points that are tried first; each gives every key of `space`.
        repeat: seeds with which each point runs; it is judged by the mean over them.
    """

    metric: str = "val/accuracy"
    mode: Direction | None = None
    scheduler: Annotated[Choice[Scheduler], SCHEDULER] = Field(default_factory=SCHEDULER.default)
    concurrent: PositiveInt | None = None
    num_samples: PositiveInt = 1
    max_failures: NonNegativeInt = 1
    grace_rounds: PositiveInt | None = None
    reduction: int = Field(default=3, ge=2, le=2**63 - 1)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)  # NumPy's RandomState takes no more
    stop: Mapping[str, float] = Field(default_factory=dict)
    time_budget_s: PositiveFloat | None = None
    search: Annotated[Choice[Search], SEARCH] = Field(default_factory=SEARCH.default)
    objectives: dict[str, Direction | None] = Field(default_factory=dict)
    constraints: dict[str, str] = Field(default_factory=dict)
    points_to_evaluate: tuple[dict[str, Any], ...] = ()
    repeat: tuple[Seed, ...] = ()

    @property
    def direction(self) -> Direction:
        """Whether more of the metric is better: the given mode, else the metric's own direction."""
        return self.mode or self.objectives.get(self.metric) or direction_of(self.metric) or "max"

    @property
    def directions(self) -> dict[str, Direction]:
        """Each metric that a searcher learns from → whether more of it is better."""
        return aims.directions(self.objectives) if self.objectives else {self.metric: self.direction}

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints."""
        found = (aims.constraint(metric, text) for metric, text in self.constraints.items())
        return tuple(limit for limit in found if limit is not None)

    @property
    def is_searching(self) -> bool:
        """Whether points are suggested while the sweep runs."""
        return self.search.options.package is not None

    @property
    def learned(self) -> tuple[str, ...]:
        """The metrics that a point's result must have: those of the objectives and the constraints."""
        return tuple(dict.fromkeys([*self.directions, *self.constraints]))

    def direction_of(self, metric: str) -> Direction | None:
        """Return the better direction of a metric; of a method's own one, only if it is the compared one."""
        own = self.mode if metric == self.metric else None
        return own or direction_of(metric)

    @property
    def rules(self) -> Scheduler:
        """The scheduler's options, those given in short among them."""
        options = self.scheduler.options
        own = [key for key in FLAT if key in self.model_fields_set and hasattr(options, key)]
        return replace(options, **{key: getattr(self, key) for key in own})

    @property
    def compares(self) -> bool:
        """Whether the metric has to be known: it was given, or a scheduler or a searcher compares by it."""
        return not isinstance(self.rules, Fifo) or self.is_searching or "metric" in self.model_fields_set


def tune_config(options: Tree, where: Where) -> TuneConfig:
    """Validate the `tune:` section.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        config = TuneConfig.model_validate(options, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, TuneConfig, where, prefix=("tune",))) from None
    if config.objectives and "metric" not in config.model_fields_set:
        config.__dict__["metric"] = next(iter(config.objectives))
    problems = [line(key, text, where) for key, text in _problems(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _problems(config: TuneConfig) -> Iterator[tuple[str, str]]:
    """Yield the problems of the section that do not depend on the points."""
    unknowns = [(key, name) for key, name in _named(config) if not _may_be(name)]
    for key, name in unknowns:
        yield key, unknown("metric", name, COMPARABLE)
    if unknowns:
        return
    yield from aims.problems(config)
    own = direction_of(config.metric) or config.objectives.get(config.metric)
    if own is None and config.mode is None and config.compares:
        yield (
            "tune.mode",
            f"missing; {config.metric} has no direction that fedray knows: say whether more is better (max) "
            "or less (min)",
        )
    if own is not None and config.mode not in (own, None):
        better = "more" if own == "max" else "less"
        yield (
            "tune.mode",
            f"got {config.mode!r}, but {better} of {config.metric} is better; leave tune.mode out, and each "
            "metric has its own direction",
        )
    yield from target_problems(config.stop)
    for metric in config.stop:
        yield from _target_problems(config, metric)
    for key in FLAT:
        if key in config.model_fields_set:
            yield from _short_problems(config, key)


def _target_problems(config: TuneConfig, metric: str) -> Iterator[tuple[str, str]]:
    """Yield why there is no target of a metric."""
    key = f"tune.stop.{metric}"
    if metric != ROUND and metric not in COMPARABLE and not metric.startswith(OWN):
        yield key, unknown("metric", metric, (ROUND, *COMPARABLE))
    elif sense(metric, config.direction_of(metric)) is None:
        yield key, f"{metric} has no direction that fedray knows; give a target of another metric"


def _named(config: TuneConfig) -> Iterator[tuple[str, str]]:
    """Yield key and name of each metric that the section names."""
    if not config.objectives or "metric" in config.model_fields_set:
        yield "tune.metric", config.metric
    for section in ("objectives", "constraints"):
        for metric in getattr(config, section):
            yield f"tune.{section}.{metric}", metric


def _may_be(metric: str) -> bool:
    return metric in COMPARABLE or metric.startswith(OWN)


def _short_problems(config: TuneConfig, key: str) -> Iterator[tuple[str, str]]:
    """Yield the problem of an option that stands in `tune` itself."""
    chosen, owners = config.scheduler.name, " and ".join(having(key))
    if key in config.scheduler.given:
        yield f"tune.{key}", f"given twice: leave it out here, or in tune.scheduler ({chosen})"
    elif "scheduler" not in config.model_fields_set:
        yield f"tune.{key}", f"only {owners} have it; set tune.scheduler={having(key)[0]}, or leave it out"
    elif chosen not in ("fifo", *having(key)):  # a file's fifo may be given in place of its asha
        yield f"tune.{key}", f"{chosen} has no such option; {owners} have it; leave it out"


def comparison_problems(tune: TuneConfig, configs: Sequence[RunConfig]) -> list[tuple[str, str]]:
    """Return the reasons why a sweep's points cannot be compared as `tune` says: keys and messages."""
    found: list[tuple[str, str]] = []
    if tune.compares:
        found += _every("tune.metric", tune.metric, configs)
    for metric, target in tune.stop.items():
        if metric == ROUND:
            every = lcm(*(config.eval_every for config in configs))
            found += round_problems(target, [config.rounds for config in configs], every)
        else:
            found += _every(f"tune.stop.{metric}", metric, configs)
    for section in ("objectives", "constraints"):
        for metric in getattr(tune, section):
            found += _every(f"tune.{section}.{metric}", metric, configs)
    if tune.compares and getattr(tune.rules, "grace_rounds", None) is not None:
        found += _grace_problems(tune, configs)
    return found


def _every(key: str, metric: str, configs: Sequence[RunConfig]) -> Iterator[tuple[str, str]]:
    """Yield the reasons why a metric is not known of every point, each once."""
    problems = (problem for config in configs for problem in _metric_problems(metric, config))
    yield from dict.fromkeys((key, text) for text in problems)


def _metric_problems(metric: str, config: RunConfig) -> Iterator[str]:
    data = config.data
    if metric.startswith("val/") and not data.validation_fraction:
        yield (
            f"{metric}, but data.validation_fraction=0 leaves no examples to measure it on; set it, e.g. "
            "data.validation_fraction=0.1, or compare by another metric, e.g. train/loss"
        )
    if metric in COMPARABLE:
        return
    own = config.method.options.metric_names
    if own is not None and metric not in own:
        kind = metric.partition("/")[0]
        known = sorted({*own, *(name for name in COMPARABLE if name.startswith(f"{kind}/"))})
        yield (
            f"{metric!r} is not among what {config.method.name} reports with these options"
            f"{nearest(metric, [*known, *COMPARABLE])} It reports {', '.join(known) or f'no {kind}/…'}"
        )


def _grace_problems(tune: TuneConfig, configs: Sequence[RunConfig]) -> Iterator[tuple[str, str]]:
    grace, longest = getattr(tune.rules, "grace_rounds", 0), max(config.rounds for config in configs)
    key, name = (
        f"tune.{'scheduler.' * ('grace_rounds' in tune.scheduler.given)}grace_rounds",
        tune.scheduler.name,
    )
    if grace > longest:
        yield (
            key,
            f"{grace} is more than the {longest} rounds of the longest trial, so that {name} would stop "
            "none; lower it, or set tune.scheduler=fifo",
        )
        return
    every = _evaluated_every(tune, configs)
    if grace % every and grace != longest:
        around = [n for n in (grace // every * every, -(-grace // every) * every) if 0 < n <= longest]
        yield (
            key,
            f"got {grace}, but {tune.metric} is only known every {every} rounds (eval_every); "
            f"{' or '.join(map(str, around or [longest]))} would do",
        )


def first_rung(tune: TuneConfig, configs: Sequence[RunConfig]) -> int:
    """Return the round at which the scheduler first compares: an evaluated one of every trial."""
    longest = max(config.rounds for config in configs)
    grace: int | None = getattr(tune.rules, "grace_rounds", None)
    if grace is not None:
        return min(longest, grace)
    every = _evaluated_every(tune, configs)
    return min(longest, -(-max(1, longest // 4) // every) * every)


def _evaluated_every(tune: TuneConfig, configs: Sequence[RunConfig]) -> int:
    """Return how often all points know the metric in the same round; costs are known in every round."""
    return lcm(*(config.eval_every for config in configs)) if tune.metric.startswith("val/") else 1
