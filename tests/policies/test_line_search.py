"""FRLP's decision process and its line searches, against a plain walk over every state."""

from collections.abc import Callable
from math import ceil, inf, log2, nan
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError, MethodError
from fedray.policies.line_search import LINE_SEARCHES, SOLVERS, Agent, Solver, bisect, scan, solve, walk
from fedray.policies.rate_search import ACTIONS, FEATURES, RateSearch

PROPERTY = settings(deadline=None, max_examples=50)
SAMPLES, STATES = 6, 50


def by_table(table: list[float], asked: list[float] | None = None) -> RateSearch:
    """Search densities 1 … 0.5 in steps of 0.01, with table[i] the distance at rate i/100."""

    def distance(density: float) -> float:
        if asked is not None:
            asked.append(density)
        return table[round((1 - density) * 100)]

    return RateSearch(1.0, 0.5, distance, step=0.01)


def reference(table: list[float]) -> int:
    """The reference: the paper's search as a loop over all states above the best sampled rate."""
    sampled = range(0, STATES + 1, STATES // (SAMPLES - 1))
    start = min(sampled, key=lambda i: table[i])
    for state in range(STATES - start):
        if abs(table[start + state] / table[start] - 1.05) < 0.015:
            return state
    return STATES - start


@st.composite
def monotone_from_the_best(draw: st.DrawFn) -> list[float]:
    """A curve that falls to one of the sampled rates and never falls again, in steps small and large."""
    bottom = draw(st.sampled_from([0, 10, 20, 30, 40, 50]))
    rise = draw(st.sampled_from([0, 1, 2, 5, 20, 100]))
    rises = draw(st.lists(st.integers(0, rise), min_size=STATES - bottom, max_size=STATES - bottom))
    falls = draw(st.lists(st.integers(1, 9), min_size=bottom, max_size=bottom))
    thousandths = [1000 + sum(falls[i:]) for i in range(bottom)]
    thousandths += [1000 + sum(rises[:i]) for i in range(STATES - bottom + 1)]
    unit = draw(st.sampled_from([1e-3, 0.0173, 5.0]))  # of the distance: only its growth may matter
    return [unit * t for t in thousandths]


curves = st.lists(st.floats(0.5, 2), min_size=STATES + 1, max_size=STATES + 1)


# ------------------------------------------------------------------------------------------------ by hand


def test_a_search_by_hand():
    asked: list[float] = []
    # D = 1 + p: the window (1.035, 1.065) holds states 4, 5 and 6
    search = by_table([1 + i / 100 for i in range(51)], asked)
    assert asked == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert (search.start_rate, search.limit, search.evaluations) == (0, 50, 6)
    assert [s for s in range(51) if search.is_end(s)] == [4, 5, 6]
    assert [s for s in range(51) if search.is_below(s)] == [0, 1, 2, 3]
    assert search.density(4) == pytest.approx(0.96) and search.growth(10) == pytest.approx(1.1)
    assert scan(search, stride=1) == bisect(search) == 4
    assert scan(search, stride=3) == 6
    assert scan(search, stride=10) == 50  # walks over the window, and then drifts to the limit
    assert solve(search, "bisect") == pytest.approx(0.96)
    assert solve(search, "scan", stride=10) == 0.5


def test_where_the_distance_falls_between_two_samples_bisection_finds_an_end_but_not_the_first():
    # 1.05 at rate 0.04 and again from 0.17 on; the samples at 0, 0.1, 0.2, … never fall
    table = [1.0, 1.0, 1.0, 1.0, 1.05, *[1.0] * 12, *[1.05] * 8, *[1.2] * 26]
    search = by_table(table)
    assert search.looks_monotone
    assert scan(search, stride=1) == 4
    assert search.is_end(bisect(search)) and bisect(search) == 17


def test_the_search_starts_at_the_best_sampled_rate():
    # lowest at rate 0.25, between two samples: 0.2 and 0.3 tie, and the lower rate wins
    search = by_table([1 + abs(i - 25) / 100 for i in range(51)])
    assert search.start_rate == pytest.approx(0.2)
    assert search.limit == 30 and search.density(0) == pytest.approx(0.8)
    assert search.growth(5) == pytest.approx(1 / 1.05) and search.growth(15) == pytest.approx(1.1 / 1.05)
    # (1.05 + 0.01·k) / 1.05 > 1.035 from k = 4 on, which is rate 0.34: fourteen states above 0.2
    assert scan(search, stride=1) == bisect(search) == 14


def test_the_steps_of_the_paper():
    def search() -> RateSearch:
        return RateSearch(1.0, 0.5, lambda density: 1 + 1.02 * (1 - density))

    # growth 1.02·0.0005·s passes 0.035 at s = 68.6
    first, second, third = search(), search(), search()
    assert first.limit == 1000
    assert scan(first, stride=1) == bisect(second) == 69
    assert scan(third) == 70
    assert third.evaluations == 6 + 7  # states 10, 20 … 70; state 0 was sampled
    assert second.evaluations <= 6 + 10


# ------------------------------------------------------------------------------------------------ the range


@PROPERTY
@given(st.floats(0.02, 1), st.floats(0.0, 0.999), st.integers(2, 9), st.sampled_from([0.0005, 0.01, 0.3]))
def test_only_densities_of_the_range_are_tried_each_once(now, share, samples, step):
    stop, asked = now * share, []

    def distance(density: float) -> float:
        asked.append(density)
        return 2 - density

    search = RateSearch(now, stop, distance, samples=samples, step=step)
    assert len(asked) <= samples
    densities = [search.density(state) for state in range(search.limit + 1)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == search.density(search.limit + 1) == pytest.approx(stop, abs=1e-9)
    if search.limit:
        assert densities[0] == pytest.approx(now, abs=1e-9)
    for state in range(0, search.limit + 1, 7):
        search.growth(state)
    solved = solve(search, "scan"), solve(search, "bisect")
    assert all(stop <= density <= now for density in (*asked, *densities, *solved))
    assert len(asked) == len(set(asked)) == search.evaluations
    assert set(solved) <= {*asked, densities[-1]}


def test_staying_where_one_is_gives_the_density_one_had():
    # 1 − (1 − 0.3) is 0.30000000000000004, above what there is to prune
    search = RateSearch(0.3, 0.1, lambda density: 1 - density, ratio=1.0)
    assert solve(search, "scan") == solve(search, "bisect") == 0.3


def test_a_rate_that_two_sums_reach_is_one_candidate():
    search = RateSearch(0.7, 0.2, lambda density: 1.0)  # 0.3 + 200·0.0005 is not quite 0.3 + 1·0.5/5
    assert scan(search, stride=1) == search.limit == 1000
    assert search.evaluations == 1001


def test_a_range_narrower_than_a_step_ends_at_its_end():
    search = RateSearch(0.5, 0.4999, lambda density: 1.0)
    assert search.limit == 0
    assert solve(search, "scan") == solve(search, "bisect") == 0.4999


# ------------------------------------------------------------------------------------------------ solvers


@PROPERTY
@given(monotone_from_the_best())
def test_on_monotone_curves_the_solvers_agree_with_the_reference(table):
    expected = reference(table)
    assert scan(by_table(table), stride=1) == expected
    search = by_table(table)
    assert search.looks_monotone
    assert bisect(search) == expected
    if search.is_end(expected) or search.is_below(expected):  # not where the curve jumps over the window
        assert search.evaluations <= SAMPLES + ceil(log2(max(1, search.limit))) + 2
    assert solve(by_table(table), "bisect") == by_table(table).density(expected)


@PROPERTY
@given(st.floats(0.01, 5), st.floats(0.5, 4), st.floats(0.05, 1), st.floats(0.1, 0.9))
def test_on_smooth_curves_bisect_finds_what_a_full_scan_finds(slope, power, now, share):
    def search() -> RateSearch:
        return RateSearch(now, now * share, lambda density: 0.7 + slope * (1 - density) ** power)

    halved = search()
    state = bisect(halved)
    assert state == scan(search(), stride=1)
    if halved.is_end(state) or halved.is_below(state):  # not where the curve jumps over the window
        assert halved.evaluations <= SAMPLES + ceil(log2(max(1, halved.limit))) + 2


@PROPERTY
@given(curves, st.integers(1, 20))
def test_on_any_curve_the_solvers_return_an_end_or_the_limit(table, stride):
    for solver in LINE_SEARCHES.values():
        search = by_table(table)
        state = solver(search, stride)
        assert state == search.limit or (0 <= state < search.limit and search.is_end(state))
    assert scan(by_table(table), stride=1) == reference(table)


@PROPERTY
@given(curves, st.integers(1, 20))
def test_bisect_scans_where_the_samples_are_not_monotone(table, stride):
    search = by_table([0.4, *table[1:]])
    if not search.looks_monotone:
        assert bisect(search, stride) == scan(by_table([0.4, *table[1:]]), stride)


def test_a_dip_between_ends_is_not_bisected():
    # in the window at states 5 to 7, then down again: only the samples at 10, 20 … tell bisect
    table = [1.0] * 5 + [1.05] * 3 + [2.0] * 22 + [1.01] * 21
    search = by_table(table)
    assert not search.looks_monotone
    assert bisect(search, stride=1) == 5
    assert bisect(search, stride=10) == scan(search, stride=10) == 50


@pytest.mark.parametrize("solver", LINE_SEARCHES)
def test_a_curve_that_jumps_over_the_window_ends_at_the_limit(solver):
    search = by_table([1.0] * 23 + [1.3] * 28)
    assert LINE_SEARCHES[solver](search, 1) == search.limit == 50
    assert solve(search, solver) == 0.5


@pytest.mark.parametrize("solver", LINE_SEARCHES)
def test_a_curve_that_never_reaches_the_window_ends_at_the_limit(solver):
    search = by_table([1 + i / 2000 for i in range(51)])
    assert LINE_SEARCHES[solver](search, 10) == search.limit == 50
    if solver == "bisect":
        assert search.evaluations == SAMPLES  # the limit was sampled: nothing more to look at


@pytest.mark.parametrize("solver", LINE_SEARCHES)
def test_no_distance_at_all_ends_at_the_limit(solver):
    assert solve(by_table([0.0] * 51), solver) == 0.5
    assert solve(by_table([0.0] + [1.0] * 50), solver) == 0.5


@PROPERTY
@given(st.integers(0, 2**16))
def test_the_edges_of_the_window_are_the_same_for_both_solvers(numerator):
    # growths that lie on, or an ulp beside, ratio ± tolerance
    edge = 1.05 - 0.015 if numerator % 2 else 1.05 + 0.015
    near = edge + (numerator % 9 - 4) * 2.0**-53
    table = [1.0] * 17 + [near] * 34
    assert bisect(by_table(table), stride=10) == scan(by_table(table), stride=1) == reference(table)


def test_the_window_is_open_at_both_edges():
    # growths 1, 1.25, 1.5, 1.75 and 2, all exact in binary; the window is (1.25, 1.75)
    search = RateSearch(
        1.0, 0.0, lambda density: 2 - density, samples=2, step=0.25, ratio=1.5, tolerance=0.25
    )
    assert [search.is_below(s) for s in range(5)] == [True, True, False, False, False]
    assert [search.is_end(s) for s in range(5)] == [False, False, True, False, False]
    assert scan(search, stride=1) == bisect(search) == 2


# ------------------------------------------------------------------------------------------------ the process


UP, DOWN = ACTIONS.index("increase"), ACTIONS.index("decrease")


def always(action: int) -> Agent:
    return lambda observation: action


def test_an_episode_by_hand():
    # D = 1 + p: states 4, 5 and 6 are ends
    search = by_table([1 + i / 100 for i in range(51)])
    assert search.start() == 0 and not search.is_done and search.step_limit == 100
    assert search.step(UP) == (1, 0.5, False)
    assert search.step(UP) == (2, 0.5, False)
    assert search.step(DOWN) == (1, -0.5, False)
    assert search.step(UP) == (2, 0.5, False) and search.step(UP) == (3, 0.5, False)
    assert search.step(UP) == (4, 1.0, True)
    assert (search.outcome, search.settled) == ("end", 4)
    assert search.evaluations == 6 + 4  # states 1 to 4; state 0 was sampled, and 1 and 2 are not tried twice


def test_leaving_the_range_ends_an_episode_with_minus_one():
    search = by_table([1 + i / 2000 for i in range(51)])  # never in the window
    search.start()
    assert search.step(DOWN) == (-1, -1.0, True)
    assert (search.outcome, search.settled) == ("below", 0)
    search.start(stride=20)
    assert search.step(UP) == (20, 0.5, False) and search.step(UP) == (40, 0.5, False)
    assert search.step(UP) == (60, -1.0, True)
    assert (search.outcome, search.settled) == ("above", 50)
    assert search.evaluations == SAMPLES  # states 20 and 40 were among the samples


def test_the_last_state_belongs_to_the_range():
    search = by_table([1.0] * 50 + [1.05])
    search.start(stride=25)
    assert search.step(UP) == (25, 0.5, False)
    assert search.step(UP) == (50, 1.0, True)
    assert (search.outcome, search.settled) == ("end", 50)


def test_an_agent_that_walks_up_and_down_runs_into_the_step_limit():
    search, seen = by_table([1 + i / 2000 for i in range(51)]), []

    def undecided(observation):
        seen.append(float(observation[0]))
        return UP if observation[0] < 0.2 else DOWN

    assert walk(search, undecided, stride=5) == 50  # the last state, as for a scan that finds no end
    assert search.outcome == "step limit"
    assert len(seen) == search.step_limit == 20
    assert seen == pytest.approx([0, 0.1] + [0.2, 0.1] * 9)
    assert search.evaluations == SAMPLES + 1  # states 5 and 10 again and again; 10 was sampled


def test_an_observation_is_the_share_of_the_range():
    search = RateSearch(1.0, 0.5, lambda density: 1.0)
    for state, share in ((0, 0.0), (250, 0.25), (1000, 1.0), (1010, 1.0), (-10, 0.0)):
        seen = search.observation(state)
        assert seen.shape == (FEATURES,) and seen.dtype == np.float32 and seen[0] == np.float32(share)
    assert RateSearch(0.5, 0.4999, lambda density: 1.0).observation(0)[0] == 0


@PROPERTY
@given(curves, st.integers(1, 60))
def test_an_agent_that_always_increases_is_a_scan(table, stride):
    search, scanned = by_table(table), by_table(table)
    assert walk(search, always(UP), stride) == scan(scanned, stride)
    # the walk also looks at the last state, if it comes there: what the search ends on is fine-tuned anyway
    assert scanned.evaluations <= search.evaluations <= scanned.evaluations + 1


@PROPERTY
@given(curves, st.integers(1, 60), st.randoms(use_true_random=False))
def test_whatever_an_agent_does_it_settles_in_the_range_and_tries_no_state_twice(table, stride, random):
    asked: list[float] = []
    search = by_table(table, asked)
    state = walk(search, lambda observation: random.randrange(2), stride)
    assert 0 <= state <= search.limit
    assert len(asked) == len(set(asked)) == search.evaluations
    assert search.is_end(state) or state in (0, search.limit)


def test_an_agent_that_jumps_over_the_window_drifts_to_the_limit():
    search = by_table([1.0] * 23 + [1.3] * 28)
    assert walk(search, always(UP), stride=1) == search.limit == 50
    assert search.outcome == "above"


def test_a_range_of_one_state_needs_no_decision():
    def never(observation):
        raise AssertionError

    assert walk(RateSearch(0.5, 0.4999, lambda density: 1.0), never) == 0
    assert walk(RateSearch(1.0, 0.5, lambda density: 1.0, ratio=1.0), never) == 0  # state 0 is an end


# ------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_candidate_that_diverged_is_infinitely_far(bad):
    rising = [1 + i / 100 for i in range(51)]
    for solver in LINE_SEARCHES.values():
        assert solver(by_table([*rising[:30], *[bad] * 21]), 1) == 4
        # the first samples diverged: the search starts at the first one that did not, rate 0.2
        search = by_table([*[bad] * 15, *rising[15:]])
        assert search.start_rate == pytest.approx(0.2)
        assert solver(search, 1) == 5  # (1.2 + 0.05) / 1.2 = 1.0417


@pytest.mark.parametrize("bad", [nan, inf])
def test_if_all_candidates_diverged_there_is_nothing_to_search(bad):
    with pytest.raises(
        MethodError, match=r"between density 0\.5 and 1 .* all 6 sampled rates; lower the lear"
    ):
        by_table([bad] * 51)


# ------------------------------------------------------------------------------------------------ names


def test_an_unknown_solver_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"method\.solver: unknown solver 'bisekt'; did you mean 'bisect'"):
        solve(by_table([1.0] * 51), "bisekt")


def test_every_solver_has_a_name_that_a_config_may_give():
    table: dict[str, Callable[[RateSearch, int], int]] = LINE_SEARCHES
    assert set(SOLVERS) == {"dqn", *table} == set(get_args(Solver))
