"""A share of a whole number, as the decimal that was written: 0.57 of 100 is 57.

The nearest float to 0.57 is smaller, and `int(0.57 * 100)` is 56. Where a count is the nearest one to a
share, `round` is right; these two are for counts that are rounded down or up.
"""

from math import ceil, floor

SLACK = 1e-14
"""Relative error of a product of two floats and of the steps that led to them, with room to spare."""


def floor_of(share: float, count: int) -> int:
    """Return ⌊share · count⌋, both ≥ 0; a product that is whole up to rounding counts as whole."""
    return floor(share * count * (1 + SLACK))


def ceil_of(share: float, count: int) -> int:
    """Return ⌈share · count⌉, both ≥ 0; a product that is whole up to rounding counts as whole."""
    return ceil(share * count * (1 - SLACK))
