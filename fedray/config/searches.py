"""`tune.search:` how the points of a sweep are found.

    grid        every combination of the grids; random verbs are drawn in each
    random      every key is drawn at random, a grid as a choice
    optuna      Optuna suggests points while the sweep runs: TPE, or NSGA-II for several objectives
    hyperopt    HyperOpt suggests points while the sweep runs: TPE

Nothing here loads Ray or one of these packages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from fedray.config.choice import Chooser
from fedray.types import PositiveInt


@dataclass(frozen=True, kw_only=True)
class Search:
    """Finds the points of a sweep."""

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    package: ClassVar[str | None] = (
        None  # the optional package that suggests points; None: all are drawn first
    )
    cannot_draw: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Grid(Search):
    """Every combination of the grids; random verbs are drawn `tune.num_samples` times in each."""


@dataclass(frozen=True, kw_only=True)
class Random(Search):
    """`tune.num_samples` points, each key of which is drawn at random; a grid counts as a choice."""


@dataclass(frozen=True, kw_only=True)
class Optuna(Search):
    """Optuna suggests `tune.num_samples` points, each from the results before it; a grid counts as a choice.

    Args:
        sampler: `tpe` (Bergstra et al., NeurIPS 2011) or `nsga2` (Deb et al., IEEE TEVC 2002); null: `tpe`
            for one metric, `nsga2` for several objectives.
        n_startup_trials: points that `tpe` draws at random before it learns.
        multivariate: whether `tpe` looks at all keys together.
        population_size: points in a generation of `nsga2`; the first generation is random.
    """

    package: ClassVar[str | None] = "optuna"
    cannot_draw: ClassVar[tuple[str, ...]] = ("qloguniform", "randn")

    sampler: Literal["tpe", "nsga2"] | None = None
    n_startup_trials: PositiveInt = 10
    multivariate: bool = True
    population_size: Annotated[int, Field(ge=2, le=100_000)] = 10


@dataclass(frozen=True, kw_only=True)
class HyperOpt(Search):
    """HyperOpt's TPE suggests `tune.num_samples` points; a grid counts as a choice.

    Args:
        n_initial_points: points that are drawn at random before it learns.
        gamma: share of the results that count as good.
    """

    package: ClassVar[str | None] = "hyperopt"

    n_initial_points: PositiveInt = 10
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.25


SEARCHES: Mapping[str, type[Search]] = {
    "grid": Grid,
    "random": Random,
    "optuna": Optuna,
    "hyperopt": HyperOpt,
}
"""Name → options."""

SEARCH: Chooser[Search] = Chooser("tune.search", "name", SEARCHES, "grid", shorthand=True)


def lacks_package(search: Search) -> bool:
    """Tell whether the package that suggests points is not installed."""
    return search.package is not None and find_spec(search.package) is None
