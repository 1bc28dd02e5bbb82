"""Scores and the learning distance: numbers worked out by hand, and invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedray.pruning.scores import (
    above_quantile,
    in_units_of_layer,
    l2_distance,
    loss_deviation,
    magnitude,
    scaled_per_layer,
    sensitivity,
)
from fedray.types import Layout, Mask, Params

# conv: entries 0-3, its bias: 4-5, running statistics: 6-7, fc: 8-11
LAYOUT = Layout(
    names=("conv", "bias", "mean", "fc"),
    shapes=((2, 1, 1, 2), (2,), (2,), (1, 4)),
    prunable=(True, False, False, True),
    trainable=(True, True, False, True),
)
WEIGHTS = [3.0, -4.0, 0.0, 1.0, 100.0, 100.0, 50.0, 50.0, -0.5, 2.0, 0.0, 0.0]


def params(values: list[float] | Tensor) -> Params:
    return Params(torch.as_tensor(values), LAYOUT)


def mask(*missing: int) -> Mask:
    full = Mask.full(LAYOUT)
    full.flat[list(missing)] = False
    return full


vectors = st.lists(st.floats(-100, 100, width=32), min_size=LAYOUT.size, max_size=LAYOUT.size).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


def test_magnitude_and_sensitivity_by_hand():
    weights = params(WEIGHTS)
    gradient = torch.tensor([2.0, -0.5, 9.0, -3.0, 0.0, 1.0, 0.0, 0.0, 4.0, 0.25, 1.0, 0.0])
    assert magnitude(weights).tolist() == [3, 4, 0, 1, 100, 100, 50, 50, 0.5, 2, 0, 0]
    assert sensitivity(weights, gradient).tolist() == [6, 2, 0, 3, 0, 100, 0, 0, 2, 0.5, 0, 0]
    assert weights.flat.tolist() == WEIGHTS


def test_units_of_layer_by_hand():
    scores = magnitude(params(WEIGHTS))
    # held: conv 3 4 1 (mean 8/3), fc 0.5 2 0 0 (mean 5/8)
    scaled = in_units_of_layer(scores, mask(2))
    assert scaled[:4].tolist() == pytest.approx([9 / 8, 12 / 8, 0, 3 / 8])
    assert scaled[4:8].tolist() == [100, 100, 50, 50]
    assert scaled[8:].tolist() == pytest.approx([0.8, 3.2, 0, 0])
    assert scores.tolist() == magnitude(params(WEIGHTS)).tolist()


def test_a_tensor_without_a_mean_keeps_its_scores():
    scores = magnitude(params(WEIGHTS))
    nothing_of_conv = in_units_of_layer(scores, mask(0, 1, 2, 3))
    assert nothing_of_conv[:4].tolist() == [3, 4, 0, 1]
    zeros_of_fc = in_units_of_layer(scores, mask(8, 9))
    assert zeros_of_fc[8:].tolist() == [0.5, 2, 0, 0]


@settings(deadline=None, max_examples=50)
@given(vectors, st.floats(1e-3, 1e3), st.lists(st.integers(0, 11), max_size=6))
def test_units_do_not_depend_on_the_scale_of_a_layer(values, scale, missing):
    scores, held = values.abs(), mask(*missing)
    scaled = in_units_of_layer(scores, held)
    for name in LAYOUT.prunable_names:
        span = LAYOUT.spans[name]
        of_layer = scores[span][held.flat[span]]
        if of_layer.sum() < 1e-3:
            continue
        assert scaled[span][held.flat[span]].mean().item() == pytest.approx(1, rel=1e-5)
        louder = scores.clone()
        louder[span] *= scale
        assert torch.allclose(in_units_of_layer(louder, held)[span], scaled[span], rtol=1e-5, atol=1e-5)


def test_deviation_by_hand():
    before, after = params(WEIGHTS), params([value + step for step, value in enumerate(WEIGHTS)])
    assert loss_deviation(before, after).tolist() == [step**2 for step in range(LAYOUT.size)]
    assert torch.equal(loss_deviation(after, before), loss_deviation(before, after))
    assert not loss_deviation(before, before).any()


def test_scaling_by_hand():
    scores = torch.tensor([2.0, 4.0, 6.0, 10.0, 7.0, 7.0, 7.0, 7.0, 1.0, 2.0, 3.0, 9.0])
    minmax = scaled_per_layer(scores, LAYOUT, "minmax")
    assert minmax.tolist() == [0, 0.25, 0.5, 1, 7, 7, 7, 7, 0, 0.125, 0.25, 1]
    # conv: median 5, quartiles 3.5 and 7; fc: median 2.5, quartiles 1.75 and 4.5
    robust = scaled_per_layer(scores, LAYOUT, "robust")
    assert robust[:4].tolist() == pytest.approx([-3 / 3.5, -1 / 3.5, 1 / 3.5, 5 / 3.5])
    assert robust[8:].tolist() == pytest.approx([-1.5 / 2.75, -0.5 / 2.75, 0.5 / 2.75, 6.5 / 2.75])
    assert scores[0] == 2


def test_the_cut_of_a_quantile_is_exact_for_decimals():
    # 0.7 · 90 is 62.99999999999999: 64 of 91 scores are not above their 0.7 quantile
    for share, count, kept in ((0.7, 91, 27), (0.29, 101, 71), (0.57, 101, 43), (0.3, 11, 7)):
        assert int(above_quantile(torch.arange(float(count)), share).count_nonzero()) == kept


@pytest.mark.parametrize("scaling", ["minmax", "robust"])
def test_a_tensor_that_did_not_move_is_above_all_others(scaling):
    scores = torch.tensor([3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 9.0])
    scaled = scaled_per_layer(scores, LAYOUT, scaling)
    assert scaled[:4].tolist() == [torch.inf] * 4
    assert scaled[8:].isfinite().all()


def test_a_tensor_of_which_little_moved_has_quartiles_that_coincide():
    layout = Layout(("w",), ((3, 3),), (True,), (True,))
    scaled = scaled_per_layer(torch.tensor([2.0, 2, 2, 2, 1, 2, 2, 2, 5]), layout, "robust")
    assert scaled.tolist() == [0, 0, 0, 0, -0.25, 0, 0, 0, 0.75]


numbers = st.lists(st.integers(-50, 50), min_size=LAYOUT.size, max_size=LAYOUT.size).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


@settings(deadline=None, max_examples=50)
@given(numbers, st.sampled_from(["minmax", "robust"]), st.integers(-20, 20))
def test_scaling_keeps_the_order_and_forgets_the_scale(values, scaling, power):
    scaled = scaled_per_layer(values, LAYOUT, scaling)
    louder = scaled_per_layer(values * 2.0**power, LAYOUT, scaling)
    for name in LAYOUT.prunable_names:
        span = LAYOUT.spans[name]
        assert torch.equal(scaled[span], louder[span])
        order = values[span].argsort(stable=True)
        assert torch.equal(scaled[span][order], scaled[span].sort().values)
        if scaling == "minmax" and scaled[span].isfinite().all():
            assert scaled[span].min() == 0
            assert scaled[span].max() == 1


@pytest.mark.parametrize(
    ("scores", "share", "above"),
    [
        ([3, 1, 2, 0], 0.0, [True, True, True, False]),
        ([3, 1, 2, 0], 0.3, [True, True, True, False]),  # between 0 and 1
        ([3, 1, 2, 0], 0.34, [True, False, True, False]),  # just above 1
        ([3, 1, 2, 0], 0.99, [True, False, False, False]),
        ([0, 0, 0, 5], 0.3, [False, False, False, True]),  # all that tie with the quantile
        ([0, 5, 5, 5], 0.7, [False, True, True, True]),  # but not the highest
        ([2, 2, 2], 0.5, [True, True, True]),
        ([2, float("inf"), 1, 3], 0.5, [False, True, False, True]),  # the median of three numbers
        ([float("inf")] * 2, 0.9, [True, True]),
        ([7], 0.9, [True]),
        ([], 0.5, []),
    ],
)
def test_above_a_quantile_by_hand(scores, share, above):
    assert above_quantile(torch.tensor(scores, dtype=torch.float32), share).tolist() == above


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True))
def test_above_a_quantile_is_above_what_is_not(values, share):
    scores = torch.tensor(values, dtype=torch.float32)
    above = above_quantile(scores, share)
    assert above.any()
    if not above.all():
        assert scores[above].min() > scores[~above].max()
    below = int(share * (len(values) - 1)) + 1
    if len(set(values)) == len(values) > below:
        assert int(above.count_nonzero()) == len(values) - below


def test_distance_by_hand():
    # conv differs by (3, −4, 0, 0): 25; fc by (0, 12, 0, 0): 144; biases and statistics do not count
    other = params([0.0, 0.0, 0.0, 1.0, -7.0, 3.0, 9.0, 0.0, -0.5, 14.0, 0.0, 0.0])
    assert l2_distance(params(WEIGHTS), other) == 13.0
    # a weight that was pruned to zero counts with all that it was
    assert l2_distance(params(WEIGHTS), params(WEIGHTS).masked(mask(0, 1))) == 5.0


@settings(deadline=None, max_examples=50)
@given(vectors, vectors, vectors)
def test_distance_is_a_distance(a, b, c):
    a, b, c = params(a), params(b), params(c)
    assert l2_distance(a, a) == 0
    assert l2_distance(a, b) == l2_distance(b, a) >= 0
    assert l2_distance(a, c) <= l2_distance(a, b) + l2_distance(b, c) + 1e-3


def test_many_small_differences_are_not_lost():
    layout = Layout(("w",), ((1000, 1000),), (True,), (True,))
    zero = Params(torch.zeros(layout.size), layout)
    small = torch.full((layout.size,), 1e-4)
    small[0] = 100.0  # in float32, 10,000 + 1e-8 is 10,000, a million times over
    expected = (100.0**2 + 999_999 * float(small[1]) ** 2) ** 0.5
    assert l2_distance(zero, Params(small, layout)) == pytest.approx(expected, rel=1e-12)
