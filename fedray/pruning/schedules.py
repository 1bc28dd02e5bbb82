"""Density as a function of progress: from `initial` at progress 0 to `final` at progress 1.

Progress is the share of the pruning phase that has passed, clipped to [0, 1]. All schedules are monotone and
end exactly at `final`.
"""

from collections.abc import Callable
from math import cos, pi


def linear(progress: float, initial: float, final: float) -> float:
    """Remove the same share of all weights at each step."""
    return final + (initial - final) * (1 - _clip(progress))


def cubic(progress: float, initial: float, final: float) -> float:
    """Remove much early and little late. Source: Zhu and Gupta, "To prune, or not to prune", 2017."""
    return final + (initial - final) * (1 - _clip(progress)) ** 3


def cosine(progress: float, initial: float, final: float) -> float:
    """Start and end gently."""
    return final + (initial - final) * (1 + cos(pi * _clip(progress))) / 2


def geometric(progress: float, initial: float, final: float) -> float:
    """Remove the same share of the *remaining* weights at each step, as iterative magnitude pruning does."""
    progress = _clip(progress)
    return final if progress == 1 else float(initial * (final / initial) ** progress)


def adjust_rate(round: int, stop: float, initial: float) -> float:
    """Return the share of its held weights that a layer exchanges for others in a round of dynamic pruning.

        f(t) = initial/2 · (1 + cos(π t / stop))

    Args:
        round: t, ≥ 0.
        stop: round from which nothing is exchanged any more, > 0.
        initial: share at round 0, in [0, 1].

    Source: Evci et al., "Rigging the Lottery", ICML 2020, after Dettmers and Zettlemoyer, 2019.
    """
    return cosine(round / stop, initial, 0.0)


def _clip(progress: float) -> float:
    return min(1.0, max(0.0, progress))


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "geometric": geometric,
}
