"""Pareto sets: the points of which no other is better in one objective and as good in all.

Not among the public names: `SweepResult.pareto` has the points of a sweep.
"""

from collections.abc import Sequence
from math import isfinite

from fedray.types import Direction


def front(values: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """Return the indices of the Pareto set, in order; points that are not finite are not in it.

    Args:
        values: the objectives of each point.
        directions: whether more of each objective is better.
    """
    gains = [
        [value if way == "max" else -value for value, way in zip(one, directions, strict=True)]
        for one in values
    ]
    finite = [n for n, one in enumerate(gains) if all(map(isfinite, one))]
    return [n for n in finite if not any(_dominates(gains[other], gains[n]) for other in finite)]


def hypervolume(
    values: Sequence[tuple[float, float]],
    directions: tuple[Direction, Direction],
    reference: tuple[float, float],
) -> float:
    """Return the area that points of two objectives dominate, down to a reference point.

    Args:
        values: the two objectives of each point.
        directions: whether more of each is better.
        reference: the worst value of each objective that counts.
    """
    signs = [1.0 if way == "max" else -1.0 for way in directions]
    gains = [
        tuple(sign * (value - worst) for sign, value, worst in zip(signs, one, reference, strict=True))
        for one in values
    ]
    inside = sorted((one for one in gains if one[0] > 0 and one[1] > 0), reverse=True)
    area, height = 0.0, 0.0
    for width, top in inside:
        if top > height:
            area += width * (top - height)
            height = top
    return area


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(
        a > b for a, b in zip(one, other, strict=True)
    )
