"""The problems of a sweep's points, each named once with its points."""

from collections.abc import Sequence

from fedray.config.messages import SHOWN
from fedray.errors import ConfigError

MOST_REFUSED = 100
"""Refused points after which the others are not checked: thousands of points take minutes."""


class Refused:
    """The problems of the points so far.

    Args:
        points: how many there are.
    """

    def __init__(self, points: int) -> None:
        self.points, self.count = points, 0
        self.problems: dict[str, list[str]] = {}

    def add(self, label: str, problems: Sequence[str], checked: int) -> None:
        """Note the problems of a point.

        Args:
            label: of the point.
            problems: at least one.
            checked: number of points that are checked by now.

        Raises:
            ConfigError: if this is the last refused point before the others are left unchecked.
        """
        self.count += 1
        for problem in problems:
            self.problems.setdefault(problem, []).append(label)
        if self.count == MOST_REFUSED and checked < self.points:
            left = f"{self.points - checked:,} more points were not checked"
            self.check(checked, f"{self.count} of the first {checked:,} points cannot run; {left}")

    def check(self, checked: int | None = None, note: str | None = None) -> None:
        """Refuse the sweep if a point has a problem.

        Args:
            checked: number of points that were checked; None: all.
            note: the last line of the message.

        Raises:
            ConfigError: with the first SHOWN problems and their points.
        """
        if not self.problems:
            return
        found = list(self.problems.items())
        lines = [_of_points(*item, checked or self.points) for item in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"and {len(found) - SHOWN:,} more problems")
        raise ConfigError("\n".join([*lines, *([note] if note else [])]))


def _of_points(problem: str, labels: Sequence[str], points: int) -> str:
    """Name the points that have a problem, unless all have it."""
    if len(labels) == points:
        return problem
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{problem} [{labels[0]}{more}]"
