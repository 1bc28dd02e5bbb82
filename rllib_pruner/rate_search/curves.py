"""Synthetic learning distances: a rate search is trained and judged on them, without any model.

A curve is a callable density → D(p)/D(p_0), for `RateSearch`. There are three families:

    monotone       grows through the window in which a search ends; two of its shapes are measured
    noisy          the same, each distance times a random factor
    overshooting   jumps from below the window to above it: no state is an end
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Family = Literal["monotone", "noisy", "overshooting"]
FAMILIES: tuple[Family, ...] = get_args(Family)

EDGE = 0.035
"""Growth at which the window of the paper (1.05 ± 0.015) begins."""
SPAN = 0.5
"""Width of the range of rates, FRLP's default `single_shot`."""

Measured = Literal["lenet5", "cnn"]

# D(p)/D(0) − 1 over the rate p, on Fashion-MNIST from the random initialisation, after one masked epoch
_MEASURED: dict[Measured, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "lenet5": ((0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), (0.0, 0.004, 0.016, 0.041, 0.078, 0.20, 0.38)),
    "cnn": ((0.0, 0.2, 0.25, 0.3, 0.5), (0.0, 0.026, 0.051, 0.086, 0.36)),
}
Shape = float | Measured
"""A power, or a measured curve by the name of its model."""


@dataclass(frozen=True)
class Curve:
    """One learning distance, on the scale of its smallest.

    Args:
        shape: of the growth: a power of the rate, or a measured curve.
        end: share of the range above `start` at which growth reaches the window; beyond 1 it never does.
        start: share of the range below which the distance falls; the search should begin there.
        fall: excess of the distance at rate 0, if `start` is above 0.
        jumps: whether the curve leaps over the window at `end`.
        noise: standard deviation of the random factor of a distance.
        seed: of the noise; one density always has the same distance.
    """

    shape: Shape = 1.0
    end: float = 0.5
    start: float = 0.0
    fall: float = 0.02
    jumps: bool = False
    noise: float = 0.0
    seed: int = 0

    def __call__(self, density: float) -> float:
        """Return D at a density in [1 − SPAN, 1], divided by its smallest value without noise."""
        share = (1 - density) / SPAN
        if share < self.start:
            growth = self.fall * (1 - share / self.start)
        else:
            growth = self._growth((share - self.start) / ((1 - self.start) * self.end))
        return (1 + growth) * self._factor(density)

    def clean(self) -> "Curve":
        """Return the curve without its noise."""
        return Curve(self.shape, self.end, self.start, self.fall, self.jumps)

    def _growth(self, u: float) -> float:
        """Return D − 1 at u times the way to the window."""
        if self.jumps:
            # below the window for u < 1, and far above it from there on
            return 0.9 * EDGE * u if u < 1 else 3 * EDGE * u
        if isinstance(self.shape, str):
            rates, growths = _MEASURED[self.shape]
            reached = float(np.interp(EDGE, growths, rates))
            return float(np.interp(u * reached, rates, growths))
        return EDGE * float(u**self.shape)

    def _factor(self, density: float) -> float:
        if self.noise == 0:
            return 1.0
        rng = np.random.default_rng((self.seed, round(density * 1e9)))
        return max(0.1, 1 + self.noise * float(rng.standard_normal()))


def draw(family: Family, rng: np.random.Generator) -> Curve:
    """Draw a curve of a family; its end is uniform over the range, so that no rate is favoured."""
    shapes: tuple[Shape, ...] = ("lenet5", "cnn", float(rng.uniform(1, 3)))
    shape = shapes[rng.integers(3)]
    start = float(rng.choice([0.0, 0.2, 0.4])) if rng.random() < 0.25 else 0.0
    end, seed = float(rng.uniform(0.02, 1.05)), int(rng.integers(2**31))
    noise = float(rng.uniform(0.002, 0.015)) if family == "noisy" else 0.0
    return Curve(shape, end, start, jumps=family == "overshooting", noise=noise, seed=seed)


def held_out(family: Family, count: int, seed: int = 0) -> list[Curve]:
    """Return curves that no training sees: their random numbers have another seed."""
    rng = np.random.default_rng((0xFED, FAMILIES.index(family), seed))
    return [draw(family, rng) for _ in range(count)]


def measured(model: Measured) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the measured (rates, D(p)/D(0) − 1)."""
    rates, growths = _MEASURED[model]
    return np.array(rates), np.array(growths)
