"""Made-up learning distances: where they enter the window, and that they are what their names say."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.policies.line_search import scan
from fedray.policies.rate_search import RateSearch
from rllib_pruner.rate_search.curves import EDGE, FAMILIES, SPAN, Curve, Family, draw, held_out, measured

PROPERTY = settings(deadline=None, max_examples=60)
DENSITIES = np.linspace(1, 1 - SPAN, 401)

seeds = st.integers(0, 2**32)


def search(curve: Curve, states: int = 1000) -> RateSearch:
    return RateSearch(1.0, 1 - SPAN, curve, step=SPAN / states)


def test_a_curve_by_hand():
    # straight, from rate 0; growth 0.035 at half of the range, rate 0.25, and so 0.07 at its end
    curve = Curve(shape=1.0, end=0.5)
    assert [curve(d) for d in (1.0, 0.9, 0.75, 0.5)] == pytest.approx([1, 1.014, 1.035, 1.07])
    assert scan(search(curve), stride=1) == 501  # the window is open: state 500 is on its edge
    # it falls to rate 0.2, and reaches the window half way from there
    curve = Curve(shape=2.0, end=0.5, start=0.4, fall=0.1)
    assert [curve(d) for d in (1.0, 0.9, 0.8, 0.65)] == pytest.approx([1.1, 1.05, 1, 1.035])
    assert search(curve).start_rate == pytest.approx(0.2)


@pytest.mark.parametrize("model", ["lenet5", "cnn"])
def test_measured_shapes_are_the_measured_ones(model):
    rates, growths = measured(model)
    reached = float(np.interp(EDGE, growths, rates))
    curve = Curve(shape=model, end=reached / SPAN)  # not stretched
    for rate, growth in zip(rates, growths, strict=True):
        if rate <= SPAN:
            assert curve(1 - rate) == pytest.approx(1 + growth)


@PROPERTY
@given(seeds)
def test_monotone_curves_never_fall_from_where_the_search_starts(seed):
    curve = draw("monotone", np.random.default_rng(seed))
    values = np.array([curve(d) for d in DENSITIES])
    lowest = int(values.argmin())
    assert (np.diff(values[lowest:]) >= 0).all() and (np.diff(values[: lowest + 1]) <= 0).all()
    assert search(curve).looks_monotone
    assert search(curve).start_rate == pytest.approx(curve.start * SPAN)


@PROPERTY
@given(seeds)
def test_overshooting_curves_have_no_end(seed):
    curve = search(draw("overshooting", np.random.default_rng(seed)))
    assert not any(curve.is_end(state) for state in range(0, curve.limit + 1, 3))
    assert scan(curve, stride=1) == curve.limit


@PROPERTY
@given(seeds)
def test_noise_is_a_function_of_the_density(seed):
    curve = draw("noisy", np.random.default_rng(seed))
    assert 0.002 <= curve.noise <= 0.015
    values = [curve(d) for d in DENSITIES[:50]]
    assert values == [curve(d) for d in DENSITIES[:50]]
    assert values != [curve.clean()(d) for d in DENSITIES[:50]]
    assert curve.clean().noise == 0


def test_the_noise_is_as_large_as_asked():
    curve = Curve(shape=1.0, end=2.0, noise=0.01)
    factors = np.array([curve(d) / curve.clean()(d) for d in DENSITIES])
    assert factors.mean() == pytest.approx(1, abs=0.002) and factors.std() == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_draws_the_same_curves(family: Family):
    assert held_out(family, 5) == held_out(family, 5) != held_out(family, 5, seed=1)
    assert pickle.loads(pickle.dumps(held_out(family, 5))) == held_out(family, 5)
    assert held_out(family, 9)[:5] == held_out(family, 5)


def test_ends_lie_all_over_the_range():
    found = [search(curve) for curve in held_out("monotone", 400)]
    shares = np.array([scan(s, stride=1) / s.limit for s in found])
    counts, _ = np.histogram(shares, bins=5, range=(0, 1))
    assert counts.min() > 50  # of 80, were they uniform
