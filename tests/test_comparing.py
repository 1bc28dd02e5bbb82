"""NaN is the worst value, whichever way a number is better."""

from itertools import permutations
from math import inf, nan

import pytest

from fedray.comparing import as_gain, as_loss, highest, no_worse


def test_nan_is_the_largest_loss_and_the_smallest_gain() -> None:
    assert (as_loss(nan), as_gain(nan)) == (inf, -inf)
    assert (as_loss(0.5), as_gain(0.5)) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("loss", "bound", "fine"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (nan, 1.0, False), (1.0, nan, True), (nan, nan, False)],
)
def test_a_loss_within_a_bound(loss: float, bound: float, fine: bool) -> None:
    assert no_worse(loss, bound) is fine


def test_a_model_that_diverged_is_never_within_a_bound() -> None:
    assert not no_worse(inf, inf) and not no_worse(inf, nan)


@pytest.mark.parametrize("gains", list(permutations([0.2, nan, 0.7])))
def test_the_highest_does_not_depend_on_the_order(gains: tuple[float, ...]) -> None:
    assert highest(gains) == 0.7  # Python's max returns NaN where NaN comes first


def test_the_highest_of_nothing() -> None:
    assert highest([]) == highest([nan]) == -inf
