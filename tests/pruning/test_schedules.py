"""Schedules: where they start and end, that they never turn back, and numbers worked out by hand."""

from fractions import Fraction
from math import ceil, cos, floor, pi

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.pruning.schedules import (
    SCHEDULES,
    adjust_rate,
    cosine,
    cubic,
    due,
    events,
    geometric,
    linear,
    part_of,
    spread,
)
from fedray.shares import ceil_of, floor_of

PROPERTY = settings(deadline=None, max_examples=50)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

progress = st.floats(0, 1)
densities = st.floats(1e-3, 1)
ULP = 1e-15
"""Largest rounding error of a density ≤ 1."""


def test_by_hand():
    # from 1 to 0.2, with 0.8 to remove
    assert linear(0.25, 1.0, 0.2) == pytest.approx(0.8)
    assert cubic(0.5, 1.0, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert cosine(0.25, 1.0, 0.2) == pytest.approx(0.2 + 0.8 * (1 + cos(pi / 4)) / 2)
    assert cosine(0.5, 1.0, 0.2) == pytest.approx(0.6)
    # iterative pruning: each of three steps removes a fifth of the remaining weights
    assert [geometric(i / 3, 1.0, 0.512) for i in range(4)] == pytest.approx([1, 0.8, 0.64, 0.512])
    assert geometric(0.5, 0.4, 0.1) == pytest.approx(0.2)


def test_a_config_names_a_schedule_as_the_code_does():
    assert {f.__name__: f for f in (linear, cubic, cosine, geometric)} == SCHEDULES


@each_schedule
@PROPERTY
@given(densities, densities, st.floats(0, 100), st.floats(0, 100))
def test_starts_at_initial_and_ends_exactly_at_final(schedule, initial, final, before, after):
    assert schedule(1.0, initial, final) == final == schedule(1 + after, initial, final)
    assert schedule(0.0, initial, final) == pytest.approx(initial, abs=ULP)
    assert schedule(-before, initial, final) == schedule(0.0, initial, final)


@each_schedule
@PROPERTY
@given(densities, densities, progress, progress)
def test_never_turns_back_nor_leaves_its_range(schedule, one, other, early, late):
    final, initial = sorted((one, other))
    early, late = sorted((early, late))
    assert schedule(late, initial, final) <= schedule(early, initial, final) + ULP
    assert final - ULP <= schedule(early, initial, final) <= initial + ULP
    # and the other way round, for a density that grows
    assert schedule(late, final, initial) >= schedule(early, final, initial) - ULP


@each_schedule
@PROPERTY
@given(densities, progress)
def test_nothing_to_remove_is_nothing_removed(schedule, density, at):
    assert schedule(at, density, density) == pytest.approx(density, abs=ULP)


@PROPERTY
@given(progress, st.floats(0.01, 0.9))
def test_what_tells_the_four_apart(at, final):
    assert linear(at, 1, final) + linear(1 - at, 1, final) == pytest.approx(1 + final)
    assert cosine(at, 1, final) + cosine(1 - at, 1, final) == pytest.approx(1 + final)
    assert geometric(at, 1, final) * geometric(1 - at, 1, final) == pytest.approx(final)
    # the share that is still to be removed is the cube of linear's
    left = [(schedule(at, 1, final) - final) / (1 - final) for schedule in (cubic, linear)]
    assert left[0] == pytest.approx(left[1] ** 3, abs=1e-12)
    # cosine starts slower than linear and makes up for it
    early = min(at, 1 - at)
    assert cosine(early, 1, final) >= linear(early, 1, final) - ULP


def test_the_adjust_rate_by_hand():
    assert [adjust_rate(t, 300, 0.2) for t in (0, 100, 150, 200)] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert adjust_rate(300, 300, 0.2) == adjust_rate(301, 300, 0.2) == 0


@PROPERTY
@given(st.integers(0, 500), st.floats(0.1, 600), progress)
def test_the_adjust_rate_only_falls(round, stop, initial):
    now, then = adjust_rate(round, stop, initial), adjust_rate(round + 1, stop, initial)
    assert 0 <= then <= now <= initial


# ------------------------------------------------------------------------------------------------ rounds


@pytest.mark.parametrize(
    ("rounds", "interval", "until", "last"),
    [
        (100, 1, 0.57, 57),  # 0.57 · 100 is 56.99999999999999
        (100, 1, 0.29, 29),
        (50, 1, 0.58, 29),
        (90, 9, 0.7, 63),
        (1000, 1, 0.001, 1),
        (30, None, 0.1, 0),  # a fifth of the run is 6, and the events end in round 3
        (30, 3, 0.1, 3),
        (100, None, 0.6, 60),
        (7, 2, 1.0, 6),
        (100, 1, 0.575, 57),  # in the middle of round 58
    ],
)
def test_the_last_event_by_hand(rounds: int, interval: int | None, until: float, last: int):
    found = events(rounds, interval, until, parts=5, most=20)
    assert max(found, default=0) == last
    assert found.step == (interval or min(20, rounds // 5))


@pytest.mark.parametrize(
    ("until", "last"),
    [(0.57, 56), (0.07, 6), (0.14, 13), (0.55, 54), (0.28, 27), (1.0, 99), (0.575, 57), (0.0, 0)],
)
def test_events_that_stop_before_a_round(until: float, last: int):
    # 0.07 · 100 is 7.000000000000001, 0.55 · 100 is 55.00000000000001
    assert max(events(100, 1, until, parts=5, most=10, before=True), default=0) == last


decimals = st.integers(1, 6).flatmap(
    lambda digits: st.integers(0, 10**digits).map(lambda n: f"{n / 10**digits:.{digits}f}")
)


@settings(deadline=None, max_examples=500)
@given(decimals, st.integers(1, 10**7))
def test_a_share_of_a_count_is_exact_for_every_decimal(share: str, count: int):
    exact = Fraction(share) * count
    assert (floor_of(float(share), count), ceil_of(float(share), count)) == (floor(exact), ceil(exact))
    rounds = count % 10_000 + 1
    last, every = floor(Fraction(share) * rounds), part_of(rounds, 5, 20)
    found = events(rounds, None, float(share), parts=5, most=20)
    assert list(found) == list(range(every, last + 1, every))
    stop = ceil(Fraction(share) * rounds)
    assert list(events(rounds, 1, float(share), parts=5, most=20, before=True)) == list(range(1, stop))


@PROPERTY
@given(st.integers(1, 5000), st.data())
def test_a_count_over_a_count_gives_it_back(count: int, data: st.DataObject):
    part = data.draw(st.integers(0, count))
    assert floor_of(part / count, count) == ceil_of(part / count, count) == part


def test_stages_are_spread_by_hand():
    assert spread(100, 4, 0.1, 0.5) == (10, 23, 37, 50)
    assert spread(2, 4, 0.1, 0.5) == (1,)
    assert spread(10, 1, 0.3, 0.9) == (3,)
    assert spread(5, 12, 0.0, 0.9) == (1, 2, 3, 4)


def test_an_event_without_an_answer_stays_due():
    rounds = (3, 6, 9)
    assert [due(rounds, 0, now) for now in range(1, 5)] == [False, False, True, True]
    assert [due(rounds, 4, now) for now in range(5, 9)] == [False, True, True, True]  # 3 was made up for in 4
    assert [due(rounds, 9, now) for now in (10, 99)] == [False, False]
    assert not due((), 0, 5)
