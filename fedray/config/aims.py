"""Objectives, constraints, seeds and first points of `tune`: what is wrong before there are points."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from fedray.config.schedulers import Fifo
from fedray.config.searches import Grid, HyperOpt, Optuna, lacks_package
from fedray.errors import nearest
from fedray.types import Direction, direction_of

if TYPE_CHECKING:
    from fedray.config.tune_config import TuneConfig

_LIMIT = re.compile(r"\s*(<=|>=)\s*(\S+)\s*")

Problem = tuple[str, str]


@dataclass(frozen=True)
class Constraint:
    """A limit of a metric.

    Args:
        metric: its name.
        sense: `<=` or `>=`.
        limit: the value that the metric may reach.
    """

    metric: str
    sense: str
    limit: float

    def violation(self, value: float | None) -> float:
        """Return by how much a value, unless missing or NaN, is beyond the limit; at most 0 if it is not."""
        if value is None or isnan(value):
            return 1e300
        return value - self.limit if self.sense == "<=" else self.limit - value


def constraint(metric: str, text: str) -> Constraint | None:
    """Read a limit such as `<= 0.1`; None if it is not one."""
    found = _LIMIT.fullmatch(text)
    try:
        limit = float(found[2]) if found else float("nan")
    except ValueError:
        return None
    return Constraint(metric, found[1], limit) if found and not isnan(limit) else None


def directions(objectives: dict[str, Direction | None]) -> dict[str, Direction]:
    """Return the direction of each objective: the given one, else the metric's own."""
    return {metric: given or direction_of(metric) or "max" for metric, given in objectives.items()}


def problems(tune: "TuneConfig") -> Iterator[Problem]:
    """Yield what is wrong with objectives, constraints, the searcher, seeds and first points."""
    yield from _objectives(tune)
    for metric, text in tune.constraints.items():
        if constraint(metric, text) is None:
            yield f"tune.constraints.{metric}", f"got {text!r}; write a limit, e.g. '<= 0.1' or '>= 0.8'"
    yield from _search(tune)
    if len(set(tune.repeat)) < len(tune.repeat):
        yield "tune.repeat", f"got {list(tune.repeat)}; each seed once"


def _objectives(tune: "TuneConfig") -> Iterator[Problem]:
    if not tune.objectives:
        return
    if len(tune.objectives) == 1:
        (only,) = tune.objectives
        yield "tune.objectives", f"got only {only}; give two or more, or set tune.metric={only}"
    for metric, given in tune.objectives.items():
        own = direction_of(metric)
        if own is None and given is None:
            yield (
                f"tune.objectives.{metric}",
                f"missing; {metric} has no direction that fedray knows: say max or min",
            )
        elif own is not None and given not in (own, None):
            better = "more" if own == "max" else "less"
            yield (
                f"tune.objectives.{metric}",
                f"got {given!r}, but {better} of {metric} is better; leave it null",
            )
    if "metric" in tune.model_fields_set and tune.metric not in tune.objectives:
        text = f"{tune.metric} is no objective{nearest(tune.metric, tune.objectives)}"
        yield "tune.metric", f"{text} best.yaml is the best point by this objective; null takes the first"
    if not isinstance(tune.rules, Fifo):
        yield (
            "tune.scheduler",
            f"{tune.scheduler.name} stops trials by one metric, and a stopped trial has not paid all its "
            "costs; with tune.objectives, set tune.scheduler=fifo",
        )


def _search(tune: "TuneConfig") -> Iterator[Problem]:
    search, name = tune.search.options, tune.search.name
    if lacks_package(search):
        text = f"{name} needs the package {search.package}: pip install 'fedray[{search.package}]'"
        yield "tune.search", text
    if not isinstance(search, Grid) and "num_samples" not in tune.model_fields_set:
        yield "tune.num_samples", f"missing; how many points {name} tries, e.g. tune.num_samples=40"
    if search.package is not None and tune.scheduler.name in ("hyperband", "pbt"):
        text = f"{tune.scheduler.name} needs all trials from the start, but {name} suggests them one by one"
        yield "tune.scheduler", f"{text}; set tune.scheduler=asha, median or fifo"
    if isinstance(search, HyperOpt):
        for key in ("objectives", "constraints"):
            if getattr(tune, key):
                yield f"tune.{key}", "hyperopt searches for one metric without limits; set tune.search=optuna"
    if isinstance(search, Optuna):
        yield from _optuna(tune, search)


def _optuna(tune: "TuneConfig", search: Optuna) -> Iterator[Problem]:
    sampler = search.sampler or ("nsga2" if tune.objectives else "tpe")
    given: Any = tune.search.given
    others = ("population_size",) if sampler == "tpe" else ("n_startup_trials", "multivariate")
    for option in others:
        if option in given:
            yield (
                f"tune.search.{option}",
                f"{sampler} has no such option; the other sampler has it; leave it out",
            )
