"""The searchers of Ray Tune, as a sweep uses them: `propose` returns a point, `tell` its result.

    searcher = proposer(tune, space)
    changes = searcher.propose()                        {"method.lr": 0.03, "model": "mlp"}
    searcher.tell(0, Told({"val/accuracy": 0.8}))       points are counted from 0

Tune's wrappers see aliases of the keys, and the numbers of the values of a list: a searcher needs values that
it can compare and hash, and a list may hold mappings.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from fedray.config.messages import Where
from fedray.config.searches import HyperOpt, Optuna
from fedray.config.trees import Tree
from fedray.config.tune_config import TuneConfig
from fedray.sweeps.drawing import WHOLE, verb_of
from fedray.types import Direction


@dataclass(frozen=True)
class Told:
    """What a searcher learns of a point.

    Args:
        values: metric → mean over the point's seeds.
        stopped: round in which a scheduler stopped the point; None: it ran to its end.
    """

    values: Mapping[str, float]
    stopped: int | None = None


class Proposer(Protocol):
    """A searcher whose draws depend on its seed and on the order of the calls alone."""

    @property
    def made_by(self) -> str:
        """Package and version."""

    def propose(self) -> Tree:
        """Return the changes of the next point."""

    def tell(self, number: int, told: Told | None) -> None:
        """Report the result of the point with this number; None: it cannot run, or failed."""


@dataclass(frozen=True)
class Code:
    """How a key of `space` looks to a searcher.

    Args:
        key: the key.
        verb: its verb.
        arguments: the verb's list.
    """

    key: str
    verb: str
    arguments: list[Any]

    def domain(self) -> Any:
        """Return Tune's domain of what the searcher draws."""
        from ray import tune

        if self.verb in ("grid", "choice"):
            return tune.choice(list(range(len(self.arguments))))
        if self.verb == "qrandint":  # the wrappers disagree about the upper end
            low, high, step = self.arguments
            return tune.randint(low // step, high // step + 1)
        return getattr(tune, self.verb)(*self.arguments)

    def encode(self, value: Any) -> Any:
        """Return what the searcher knows a value as."""
        if self.verb in ("grid", "choice"):
            return self.arguments.index(value)
        return value // self.arguments[2] if self.verb == "qrandint" else value

    def decode(self, drawn: Any) -> Any:
        """Return the value that was drawn, as a file holds it."""
        if self.verb in ("grid", "choice"):
            return self.arguments[int(drawn)]
        if self.verb == "qrandint":
            return int(drawn) * self.arguments[2]
        return int(drawn) if self.verb in WHOLE else float(drawn)


class Wrapped:
    """A searcher of Tune.

    Args:
        inner: Tune's wrapper.
        codes: alias of each key → its code.
        made_by: package and version.
        tune: what it learns from.
    """

    def __init__(self, inner: Any, codes: Mapping[str, Code], made_by: str, tune: TuneConfig) -> None:
        self.inner, self.codes, self.made_by, self.tune = inner, codes, made_by, tune
        self.count = 0

    def propose(self) -> Tree:
        """Return the changes of the next point."""
        with _quiet():
            drawn = self.inner.suggest(str(self.count))
        self.count += 1
        return {code.key: code.decode(drawn[alias]) for alias, code in self.codes.items()}

    def tell(self, number: int, told: Told | None) -> None:
        """Report the result of a point; one without a result is among the worst.

        As an error, a searcher would pass over it and suggest its neighbours again.
        """
        with _quiet():
            self._learn(str(number), told)

    def _learn(self, trial: str, told: Told | None) -> None:
        nothing = worst({self.tune.metric: math.nan}, self.tune.directions)
        self.inner.on_trial_complete(trial, dict(told.values) if told else nothing)


class WrappedOptuna(Wrapped):
    """Optuna, which knows limits, and trials without a result or that a scheduler stopped: pruned ones."""

    def _learn(self, trial: str, told: Told | None) -> None:
        known = self.inner._ot_trials[trial]  # Tune's wrapper has no other way to Optuna's constraints
        for limit in self.tune.limits:
            violation = limit.violation(told.values.get(limit.metric) if told else None)
            known.set_constraint(f"{limit.metric} {limit.sense} {limit.limit:g}", violation)
        if told is not None and told.stopped is None:
            self.inner.on_trial_complete(trial, dict(told.values))
            return
        if told is not None and not self.tune.objectives:
            step = {self.tune.metric: told.values[self.tune.metric], "training_iteration": told.stopped}
            self.inner.on_trial_result(trial, step)
        self.inner.on_trial_complete(trial)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warnings of searchers about what their wrappers do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def proposer(tune: TuneConfig, space: Mapping[str, Any], where: Where = "tune") -> Proposer:
    """Return the searcher that `tune.search` names, at its start.

    Args:
        tune: names the searcher, its seed, what it learns from, and the points that it proposes first.
        space: key → verb and list.
        where: of the keys, for messages.
    """
    codes = {f"p{n}": Code(key, *verb_of(key, spec, where)) for n, (key, spec) in enumerate(space.items())}
    first = [
        {alias: code.encode(point[code.key]) for alias, code in codes.items()}
        for point in tune.points_to_evaluate
    ]
    make = _optuna if isinstance(tune.search.options, Optuna) else _hyperopt
    return make(tune, codes, first)


def worst(values: Mapping[str, float], directions: Mapping[str, Direction]) -> dict[str, float]:
    """Return values in which NaN of a metric with a direction is the worst number: no searcher takes NaN."""
    ends = {name: -math.inf if way == "max" else math.inf for name, way in directions.items()}
    return {name: ends.get(name, value) if math.isnan(value) else value for name, value in values.items()}


def _optuna(tune: TuneConfig, codes: Mapping[str, Code], first: Sequence[Tree]) -> Proposer:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    options = tune.search.options
    assert isinstance(options, Optuna)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
    if (options.sampler or ("nsga2" if tune.objectives else "tpe")) == "nsga2":
        sampler: Any = optuna.samplers.NSGAIISampler(population_size=options.population_size, seed=tune.seed)
    else:
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=options.n_startup_trials, multivariate=options.multivariate, seed=tune.seed
        )
    directions = tune.directions
    one = len(directions) == 1
    with _quiet():
        inner = OptunaSearch(
            OptunaSearch.convert_search_space({alias: code.domain() for alias, code in codes.items()}),
            metric=next(iter(directions)) if one else list(directions),
            mode=next(iter(directions.values())) if one else list(directions.values()),
            points_to_evaluate=list(first),
            sampler=sampler,
        )
    return WrappedOptuna(inner, codes, f"optuna {version('optuna')}", tune)


def _hyperopt(tune: TuneConfig, codes: Mapping[str, Code], first: Sequence[Tree]) -> Proposer:
    from ray.tune.search.hyperopt import HyperOptSearch

    options = tune.search.options
    assert isinstance(options, HyperOpt)
    logging.getLogger("hyperopt").setLevel(logging.ERROR)
    with _quiet():
        inner = HyperOptSearch(
            HyperOptSearch.convert_search_space({alias: code.domain() for alias, code in codes.items()}),
            metric=tune.metric,
            mode=tune.direction,
            points_to_evaluate=list(first) or None,
            n_initial_points=options.n_initial_points,
            random_state_seed=tune.seed,
            gamma=options.gamma,
        )
    return Wrapped(inner, codes, f"hyperopt {version('hyperopt')}", tune)
