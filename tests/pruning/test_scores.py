"""Scores and the learning distance: numbers worked out by hand, and what they must not depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedray.pruning.scores import in_units_of_layer, l2_distance, magnitude, sensitivity
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
