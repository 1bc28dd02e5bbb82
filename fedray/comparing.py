"""NaN is the worst value. Every comparison of losses or gains uses this module, so that no NaN wins.

Every comparison with NaN is false in Python, `max` and `min` return whichever argument came first, and
numpy's `argmax` returns the place of the NaN. A model that diverged would thus be kept or preferred.
"""

from collections.abc import Iterable
from math import inf, isfinite, isnan
from typing import Literal


def as_loss(value: float) -> float:
    """Return a number of which lower is better, with NaN as infinity."""
    return inf if isnan(value) else value


def as_gain(value: float) -> float:
    """Return a number of which higher is better, with NaN as minus infinity."""
    return -inf if isnan(value) else value


def no_worse(loss: float, bound: float) -> bool:
    """Tell whether a loss is a finite number of at most `bound`; a bound of NaN excludes nothing finite."""
    return isfinite(loss) and loss <= as_loss(bound)


def highest(gains: Iterable[float], default: float = -inf) -> float:
    """Return the largest of some gains; NaN counts as minus infinity, `default` where there are none."""
    return max(map(as_gain, gains), default=default)


def worth(value: float | None, direction: Literal["max", "min"]) -> float:
    """Return a number of which higher is better: the value, or its negative if less of it is better.

    A missing value, NaN and the infinities (which the files of a run do not tell apart) are worth -inf.
    """
    if value is None or not isfinite(value):
        return -inf
    return value if direction == "max" else -value
