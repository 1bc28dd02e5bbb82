"""`tune.scheduler:` which trials of a sweep run on, by Ray Tune's names.

    fifo        every trial runs to its end
    asha        asynchronous successive halving: rungs without waiting
    hyperband   brackets whose trials wait for each other at each rung
    median      a trial below the median of the others stops
    pbt         the worse trials continue from the better ones' models with changed options

Nothing here loads Ray.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated

from pydantic import ConfigDict, Field

from fedray.config.choice import Chooser
from fedray.types import Fraction, PositiveInt

Reduction = Annotated[int, Field(ge=2, le=2**63 - 1)]


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Decides after each reported round whether a trial continues."""

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True)
class Fifo(Scheduler):
    """Every trial runs to its end."""


@dataclass(frozen=True, kw_only=True)
class Asha(Scheduler):
    """Stops the worse trials at rungs, without waiting for the others (Li et al., MLSys 2020).

    Args:
        grace_rounds: round of the first rung; null: a quarter of the run, at an evaluated round.
        reduction: one trial in this many is kept at each rung.
    """

    grace_rounds: PositiveInt | None = None
    reduction: Reduction = 3


@dataclass(frozen=True, kw_only=True)
class HyperBand(Scheduler):
    """Stops the worse trials of a bracket when all of it have reached a rung (Li et al., JMLR 2018).

    Args:
        reduction: one trial in this many is kept at each rung.
    """

    reduction: Reduction = 3


@dataclass(frozen=True, kw_only=True)
class Median(Scheduler):
    """Stops a trial whose best value is below the median of the others' means (Golovin et al., KDD 2017).

    Args:
        grace_rounds: rounds before a trial may be stopped, and where the means begin; null: a quarter of the
            run, at an evaluated round.
        min_trials: other trials that must have reached the round, at least.
    """

    grace_rounds: PositiveInt | None = None
    min_trials: PositiveInt = 3


@dataclass(frozen=True, kw_only=True)
class Pbt(Scheduler):
    """The worst trials continue from the models of the best, with perturbed options (Jaderberg et al., 2017).

    All trials wait for each other at each perturbation.

    Args:
        perturb_every: rounds between perturbations, at evaluated rounds that have checkpoints.
        quantile: share of the trials that are the worst, and that are the best.
        resample_probability: of drawing an option anew; else a number is multiplied by 0.8 or 1.2, and of a
            list the neighbour is taken.
        mutations: option → verb and list, as in `space`; a number stays between the verb's bounds, and a list
            (`choice`) keeps its order.
    """

    perturb_every: PositiveInt = 10
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    resample_probability: Fraction = 0.25
    mutations: Mapping[str, Mapping[str, list[float | int | str]]] = field(default_factory=dict)


SCHEDULERS: Mapping[str, type[Scheduler]] = {
    "fifo": Fifo,
    "asha": Asha,
    "hyperband": HyperBand,
    "median": Median,
    "pbt": Pbt,
}
"""Name → options."""

SCHEDULER: Chooser[Scheduler] = Chooser("tune.scheduler", "name", SCHEDULERS, "fifo", shorthand=True)

FLAT = ("grace_rounds", "reduction")
"""Options that may also stand in `tune` itself."""


def having(option: str) -> list[str]:
    """Return the names of the schedulers that have an option."""
    return [name for name, kind in SCHEDULERS.items() if option in {entry.name for entry in fields(kind)}]
