"""Channels by hand and as properties: which are removed, with which entries, and a model's width."""

from math import ceil, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedray.errors import MethodError
from fedray.federation.method import check_mask
from fedray.models.spec import Architecture, ModelSpec
from fedray.pruning.channels import (
    WORTHWHILE,
    as_initialised,
    best_channels,
    cannot_narrow,
    channel_mask,
    channel_scores,
    channels_at,
    density_at,
    removed_channels,
    removed_entries,
    share_for,
    shrink,
)
from fedray.pruning.masks import top_k
from fedray.types import ChannelGroup, Layout, Mask, Params
from tests import small

PROPERTY = settings(deadline=None, max_examples=50)

# 3 channels between a convolution with two input channels and a linear layer that sees 2 pixels of each
HAND = Layout(
    ("conv.weight", "conv.bias", "fc.weight"),
    ((3, 2, 1, 1), (3,), (2, 6)),
    (True, False, True),
    (True, True, True),
)
GROUP = ChannelGroup("conv", 3, ("conv.weight", "conv.bias"), "fc.weight", 2)

shares = st.floats(0.01, 1)


def spec_of(architecture: Architecture) -> ModelSpec:
    return ModelSpec.of("small", architecture, small.SHAPE, small.CLASSES)


MLP, CNN = spec_of(small.MLP), spec_of(small.CNN)


def choices(model: ModelSpec) -> st.SearchStrategy[dict[str, Tensor]]:
    """Which channels of each group are kept: any, none and all included."""
    kept = {g.name: st.lists(st.booleans(), min_size=g.size, max_size=g.size) for g in model.channel_groups}
    return st.fixed_dictionaries({name: flags.map(torch.tensor) for name, flags in kept.items()})


def params_of(layout: Layout, seed: int = 0) -> Params:
    return Params(
        torch.from_numpy(np.random.default_rng(seed).standard_normal(layout.size, np.float32)), layout
    )


# ── which channels


def test_a_channel_scores_the_sum_over_the_weights_that_make_it() -> None:
    weights = torch.tensor([1.0, -2.0, 3.0, 3.0, -0.5, 0.25, *[9.0] * 15])
    assert channel_scores(weights.abs(), GROUP, HAND).tolist() == [3.0, 6.0, 0.75]  # L1 norms of the rows


@pytest.mark.parametrize(
    ("scores", "share", "kept"),
    [
        ([1.0, 3.0, 2.0, 4.0], 0.5, [1, 3]),
        ([1.0, 3.0, 2.0, 4.0], 0.51, [1, 2, 3]),  # ⌈2.04⌉
        ([1.0, 3.0, 2.0, 4.0], 0.001, [3]),  # at least one
        ([1.0, 3.0, 2.0, 4.0], 1.0, [0, 1, 2, 3]),
        ([2.0, 1.0, 2.0, 2.0], 0.5, [0, 2]),  # ties go to the lower index
        ([0.0] * 5, 0.6, [0, 1, 2]),
    ],
)
def test_the_best_channels_are_kept(scores: list[float], share: float, kept: list[int]) -> None:
    assert best_channels(torch.tensor(scores), share).nonzero().flatten().tolist() == kept


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40), shares, shares)
@PROPERTY
def test_as_many_as_asked_for_none_better_left_out_and_nested(
    scores: list[float], share: float, other: float
) -> None:
    values = torch.tensor(scores)
    fewer, more = (best_channels(values, s) for s in sorted((share, other)))
    assert int(more.sum()) == max(1, ceil(max(share, other) * len(scores) - 1e-9))
    assert bool((more | ~fewer).all())
    if not bool(more.all()):
        assert values[more].min() >= values[~more].max()


def test_a_rounding_error_is_not_a_channel() -> None:
    assert 0.7 * 10 > 7 - 1e-12 and 0.07 * 100 > 7  # 7.000000000000001
    assert (channels_at(0.7, 10), channels_at(0.07, 100), channels_at(0.0701, 100)) == (7, 7, 8)
    assert all(channels_at(k / n, n) == k for n in range(1, 200) for k in range(1, n + 1))


def test_what_is_not_a_number_is_not_ranked() -> None:
    with pytest.raises(MethodError, match="2 of 3 channels score NaN"):
        best_channels(torch.tensor([1.0, float("nan"), float("nan")]), 0.5)


# ── the mask


def test_a_channel_goes_with_its_bias_and_its_columns() -> None:
    mask = channel_mask(HAND, [GROUP], {"conv": torch.tensor([True, False, True])})
    assert mask["conv.weight"].flatten(1).tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert mask["conv.bias"].tolist() == [True, False, True]
    assert mask["fc.weight"].tolist() == [[True, True, False, False, True, True]] * 2


def test_normalisation_and_its_statistics_go_too() -> None:
    mask = channel_mask(CNN.layout, CNN.channel_groups, {"conv1": torch.tensor([1, 0, 0, 1]).bool()})
    for name in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        assert mask[name].tolist() == [True, False, False, True]
    assert mask["conv2.weight"][:, [1, 2]].count_nonzero() == 0
    assert bool(mask["conv2.weight"][:, [0, 3]].all()) and bool(mask["fc.weight"].all())


def test_a_group_that_is_not_named_keeps_all_and_within_is_kept() -> None:
    within = top_k(torch.arange(CNN.layout.size).float(), 0.5, CNN.layout)
    assert channel_mask(CNN.layout, CNN.channel_groups, {}).is_full
    assert channel_mask(CNN.layout, CNN.channel_groups, {}, within=within) == within
    assert within.flat.data_ptr() != channel_mask(CNN.layout, (), {}, within=within).flat.data_ptr()


@given(choices(CNN))
@PROPERTY
def test_what_was_removed_is_found_again_and_passes_for_a_servers_mask(kept: dict[str, Tensor]) -> None:
    mask = channel_mask(CNN.layout, CNN.channel_groups, kept)
    for group in CNN.channel_groups:
        assert torch.equal(removed_channels(mask, group), ~kept[group.name])
    assert torch.equal(removed_entries(mask, CNN.channel_groups), ~mask.flat)
    assert check_mask(mask, CNN.channel_groups, "a test") is mask


@given(st.integers(0, 2**31), st.floats(0, 1))
@PROPERTY
def test_an_unstructured_mask_removes_no_channel(seed: int, density: float) -> None:
    # not even where it empties a row and its columns: the bias is still there
    mask = top_k(params_of(CNN.layout, seed).flat, density, CNN.layout)
    assert not bool(removed_entries(mask, CNN.channel_groups).any())
    assert shrink(mask, CNN.channel_groups) is None


def test_half_a_channel_is_not_removed() -> None:
    flat = channel_mask(HAND, [GROUP], {"conv": torch.tensor([True, False, True])}).flat.clone()
    flat[HAND.spans["conv.bias"].start + 1] = True
    mask = Mask(flat, HAND)
    assert not bool(removed_entries(mask, [GROUP]).any())
    assert check_mask(mask, [GROUP], "a test") is mask
    without_a_bias = Mask(flat.index_fill(0, torch.tensor(HAND.spans["conv.bias"].start), False), HAND)
    with pytest.raises(MethodError, match="False on 1 entries that are not prunable"):
        check_mask(without_a_bias, [GROUP], "a test")


# ── how wide


@given(shares)
@PROPERTY
def test_density_at_is_that_of_the_mask(share: float) -> None:
    for model in (MLP, CNN):
        kept = {g.name: torch.arange(g.size) < channels_at(share, g.size) for g in model.channel_groups}
        mask = channel_mask(model.layout, model.channel_groups, kept)
        assert density_at(share, model.layout, model.channel_groups) == pytest.approx(mask.density)


@pytest.mark.parametrize(
    ("density", "units"), [(0.25, 2), (0.125, 1), (1.0, 8), (0.3, 2), (0.32, 3), (0.3125, 2), (1e-6, 1)]
)
def test_the_share_for_a_density_is_the_nearest(density: float, units: int) -> None:
    # fc1 of the MLP has 8 units of 16 weights each; 0.3125 lies between 2 and 3: the smaller is taken
    assert share_for(density, MLP.layout, MLP.channel_groups) == units / 8


@given(st.floats(0.001, 1))
@PROPERTY
def test_bisection_finds_what_a_search_of_all_shares_finds(density: float) -> None:
    def miss(share: float) -> float:
        return abs(density_at(share, CNN.layout, CNN.channel_groups) - density)

    found = share_for(density, CNN.layout, CNN.channel_groups)
    assert miss(found) == min(miss(k / g.size) for g in CNN.channel_groups for k in range(1, g.size + 1))


def test_what_cannot_be_narrowed_is_refused_with_the_key() -> None:
    assert cannot_narrow("small", MLP.layout, MLP.channel_groups, 0.125) is None
    said = cannot_narrow("small", MLP.layout, MLP.channel_groups, 0.1)
    assert said is not None and said.startswith("method.density=0.1 cannot be reached") and "0.125" in said
    linear = spec_of(small.LINEAR)
    said = cannot_narrow("linear", linear.layout, linear.channel_groups, 1.0)
    assert said is not None and said.startswith("model=linear has no channels") and "lenet5" in said


def test_a_narrower_model_starts_in_its_own_scale() -> None:
    params = params_of(HAND)
    mask = channel_mask(HAND, [GROUP], {"conv": torch.tensor([False, False, True])})
    scaled = as_initialised(params, mask, [GROUP])
    assert scaled["conv.weight"].equal(params["conv.weight"])
    assert scaled["fc.weight"].equal(params["fc.weight"] * sqrt(3))  # it has no bias
    assert params == params_of(HAND)
    assert as_initialised(params, Mask.full(HAND), [GROUP]) == params


def test_the_scale_is_pytorchs_for_such_a_width() -> None:
    model = ModelSpec.of("cnn", small.CNN, (1, 32, 32), 100)
    kept = {g.name: torch.arange(g.size) < 1 for g in model.channel_groups}
    mask = channel_mask(model.layout, model.channel_groups, kept)
    scaled = as_initialised(model.init(0), mask, model.channel_groups)
    # 256 inputs of the classifier are left of 1,536, 9 of conv2's 36
    for name, fan_in in (("fc.weight", 256), ("fc.bias", 256), ("conv2.weight", 9), ("conv1.weight", 9)):
        values = scaled[name][mask[name]].abs()
        assert values.max() <= 1 / sqrt(fan_in)
        assert values.max() > 0.7 / sqrt(fan_in)


# ── the smaller model


def test_shrunken_shapes_by_hand() -> None:
    kept = {"conv1": torch.tensor([1, 0, 0, 1]).bool(), "conv2": torch.tensor([1, 0, 1, 0, 0, 0]).bool()}
    part = shrink(channel_mask(CNN.layout, CNN.channel_groups, kept), CNN.channel_groups)
    assert part is not None
    assert part.layout.shape_of["conv1.weight"] == (2, 1, 3, 3)
    assert part.layout.shape_of["bn1.running_var"] == (2,)
    assert part.layout.shape_of["conv2.weight"] == (2, 2, 3, 3)
    assert part.layout.shape_of["fc.weight"] == (3, 2 * 4)
    assert part.layout.names == CNN.layout.names and part.layout.prunable == CNN.layout.prunable
    whole = params_of(CNN.layout)
    smaller = Params(whole.flat[part.index], part.layout)
    assert smaller["conv2.weight"].equal(whole["conv2.weight"][[0, 2]][:, [0, 3]])
    columns = [*range(0, 4), *range(8, 12)]
    assert smaller["fc.weight"].equal(whole["fc.weight"][:, columns])


@given(choices(CNN), st.integers(0, 2**31))
@PROPERTY
def test_a_shrunk_model_computes_what_the_masked_one_computes(kept: dict[str, Tensor], seed: int) -> None:
    mask = channel_mask(CNN.layout, CNN.channel_groups, kept)
    part = shrink(mask, CNN.channel_groups)
    if part is None:
        few = mask.count <= WORTHWHILE * CNN.layout.size
        assert not few or any(not bool(flags.any()) for flags in kept.values())
        return
    assert part.layout.size == len(part.index) == mask.count
    params = params_of(CNN.layout, seed)
    params["bn1.running_var"].abs_()
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, *small.SHAPE), np.float32))
    whole = CNN.bind(params.masked(mask).flat).eval()
    smaller = CNN.shrunken(part.layout).bind(params.flat[part.index]).eval()
    with torch.no_grad():
        np.testing.assert_allclose(smaller(x).numpy(), whole(x).numpy(), rtol=1e-4, atol=1e-5)


def test_little_saved_or_a_layer_without_channels_is_not_shrunk() -> None:
    def shrunk(*units: int) -> object:
        kept = torch.zeros(8, dtype=torch.bool)
        kept[list(units)] = True
        mask = channel_mask(MLP.layout, MLP.channel_groups, {"fc1": kept})
        return shrink(mask, MLP.channel_groups)

    assert shrunk(*range(8)) is None  # the whole
    assert shrunk(0, 1, 2, 3, 4, 5) is None  # 6 · 20 + 3 = 123 of 163 entries: above 0.75
    assert shrunk(0, 1, 2, 3, 4) is not None
    assert shrunk() is None
