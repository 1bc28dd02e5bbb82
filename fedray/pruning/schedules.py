"""Schedules: the rounds in which a method acts, and density as a function of progress.

A schedule goes from `initial` at progress 0 to `final` at progress 1. Progress is the share of the pruning
phase that has passed, clipped to [0, 1]. All schedules are monotone and end exactly at `final`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from math import cos, pi
from typing import Literal

from fedray.shares import ceil_of, floor_of


def part_of(rounds: int, parts: int, most: int) -> int:
    """Return a `parts`-th of a run's rounds, rounded down, from 1 to `most`."""
    return max(1, min(most, rounds // parts))


def events(
    rounds: int, interval: int | None, until: float = 1.0, *, parts: int, most: int, before: bool = False
) -> range:
    """Return the rounds after which a method acts; `.step` is the interval, also where there are none.

    Args:
        rounds: planned rounds.
        interval: rounds from one event to the next, and before the first; None: `part_of` the run.
        until: end of the events, as a share of the run's rounds, in [0, 1].
        parts: see `part_of`.
        most: see `part_of`.
        before: whether the events stop before the round at `until`; else that round may have the last one.
    """
    every = interval or part_of(rounds, parts, most)
    stop = ceil_of(until, rounds) if before else floor_of(until, rounds) + 1
    return range(every, stop, every)


def no_event(found: Collection[int], first: int, until: float, rounds: int, act: str) -> str | None:
    """Return why no event happens, beginning with the key to change; None if one does.

    Args:
        found: the rounds of the events.
        first: the round that would have the first one.
        until: end of the events, as a share of the run's rounds.
        rounds: planned rounds.
        act: what happens at an event, e.g. "prunes".
    """
    if found:
        return None
    return (
        f"method.until={until:g} of {rounds} round(s) ends before round {first}, the first after which the "
        f"server {act}, so that it never does; raise rounds or method.until, or lower method.interval"
    )


def spread(rounds: int, count: int, start: float, until: float) -> tuple[int, ...]:
    """Return the rounds of `count` stages in equal distances; fewer where two fall on one round.

    Args:
        rounds: planned rounds.
        count: ≥ 1.
        start: the first stage, as a share of the run's rounds, in [0, 1]; the nearest round, at least 1.
        until: the last stage, as a share of the rounds too; ≥ `start`.
    """
    shares = (start + i * (until - start) / max(1, count - 1) for i in range(count))
    return tuple(sorted({max(1, round(share * rounds)) for share in shares}))


def due(rounds: Iterable[int], done: int, now: int) -> bool:
    """Tell whether a method has to act in round `now`: an event's round has come since round `done`.

    An event whose round had no answer stays due, and the next round with an answer makes up for it.

    Args:
        rounds: the rounds of all events.
        done: the round in which the method acted last; 0 if it never did.
        now: the round of the call.
    """
    return any(done < event <= now for event in rounds)


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
        stop: first round without an exchange, > 0.
        initial: share at round 0, in [0, 1].

    Source: Evci et al., "Rigging the Lottery", ICML 2020, after Dettmers and Zettlemoyer, 2019.
    """
    return cosine(round / stop, initial, 0.0)


def _clip(progress: float) -> float:
    return min(1.0, max(0.0, progress))


ScheduleName = Literal["linear", "cubic", "cosine", "geometric"]
SCHEDULES: Mapping[ScheduleName, Callable[[float, float, float], float]] = {
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "geometric": geometric,
}
