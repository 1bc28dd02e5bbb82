"""Masks against a plain sort, by hand, and as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedray.errors import MethodError
from fedray.pruning.masks import (
    at_least,
    empty_layers,
    erk,
    filled,
    grow,
    grow_per_layer,
    lowest_density,
    random,
    support,
    top_k,
    top_k_per_layer,
    union,
)
from fedray.types import Layout, Mask, Params

NAN, INF = float("nan"), float("inf")
PROPERTY = settings(deadline=None, max_examples=50)

# w: entries 0-3, bias: 4-5 (not prunable), v: 6-9
SMALL = Layout(("w", "bias", "v"), ((2, 2), (2,), (1, 4)), (True, False, True), (True, True, True))

shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to four prunable tensors, each with or without a bias."""
    names, dims, prunable = [], [], []
    for i, (shape, bias) in enumerate(
        draw(st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=4))
    ):
        names += [f"{i}.weight", f"{i}.bias"][: 1 + bias]
        dims += [shape, shape[:1]][: 1 + bias]
        prunable += [True, False][: 1 + bias]
    return Layout(tuple(names), tuple(dims), tuple(prunable), (True,) * len(names))


@st.composite
def scored(draw: st.DrawFn) -> tuple[Layout, Tensor, Mask]:
    """A layout, scores with many ties and infinities, and any mask."""
    layout = draw(layouts())
    score = st.sampled_from([-INF, -1.5, -1.0, -0.0, 0.0, 1e-38, 1.0, 2.0, INF])
    scores = torch.tensor(draw(st.lists(score, min_size=layout.size, max_size=layout.size)))
    flags = draw(st.lists(st.booleans(), min_size=layout.size, max_size=layout.size))
    return layout, scores, Mask(torch.tensor(flags), layout)


densities = st.floats(0, 1)


def kept(mask: Mask) -> set[int]:
    """The prunable entries that are held."""
    return set((mask.flat & mask.layout.prunable_flat).nonzero().squeeze(1).tolist())


def best(scores: Tensor, candidates: set[int], count: int) -> set[int]:
    """The reference: sort by score, then by index."""
    return set(sorted(candidates, key=lambda i: (-scores[i].item(), i))[:count])


def holds_all_else(mask: Mask) -> bool:
    return bool(mask.flat[~mask.layout.prunable_flat].all())


def span(layout: Layout, name: str) -> set[int]:
    return set(range(layout.spans[name].start, layout.spans[name].stop))


# ------------------------------------------------------------------------------------------------ top_k


def test_top_k_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 9.0, 2.0, 0.0, 5.0, -7.0])
    # of 8 prunable entries: 1/8 is entry 8; half is 8, 0 and two of the three 2s, the first ones
    assert kept(top_k(scores, 1 / 8, SMALL)) == {8}
    mask = top_k(scores, 0.5, SMALL)
    assert mask.flat.tolist() == [True, False, True, True, True, True, False, False, True, False]
    assert mask.density == 0.5
    assert kept(top_k(scores, 1.0, SMALL)) == {0, 1, 2, 3, 6, 7, 8, 9}
    nothing = top_k(scores, 0.0, SMALL)
    assert kept(nothing) == set() and holds_all_else(nothing)


@PROPERTY
@given(scored(), densities)
def test_top_k_is_a_sort_and_meets_the_density_to_one_entry(problem: tuple[Layout, Tensor, Mask], density):
    layout, scores, _ = problem
    before = scores.clone()
    mask = top_k(scores, density, layout)
    count = len(kept(mask))
    assert kept(mask) == best(scores, kept(Mask.full(layout)), count)
    assert abs(count - density * layout.prunable_count) <= 0.5 + 1e-9
    assert holds_all_else(mask)
    assert torch.equal(scores, before)


@PROPERTY
@given(scored(), densities, densities)
def test_masks_of_falling_density_are_nested(problem, one, other):
    layout, scores, within = problem
    low, high = sorted((one, other))
    assert kept(top_k(scores, low, layout)) <= kept(top_k(scores, high, layout))
    first = top_k(scores, high, layout, within=within)
    assert kept(top_k(scores, low, layout, within=within)) <= kept(first)
    # going there in two steps comes to the same
    assert top_k(scores, low, layout, within=first) == top_k(scores, low, layout, within=within)


@PROPERTY
@given(scored(), densities)
def test_top_k_stays_within(problem, density):
    layout, scores, within = problem
    wanted = len(kept(top_k(scores, density, layout)))
    mask = top_k(scores, density, layout, within=within)
    assert kept(mask) == best(scores, kept(within), min(wanted, len(kept(within))))
    assert holds_all_else(mask)


@PROPERTY
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 8))
def test_ties_go_to_the_lower_index(values, count):
    scores = torch.zeros(SMALL.size)
    scores[SMALL.prunable_flat] = torch.tensor(values, dtype=torch.float32)
    mask = top_k(scores, count / 8, SMALL)
    assert mask.density == count / 8
    for value in range(4):
        same = [i for i in sorted(kept(Mask.full(SMALL))) if scores[i] == value]
        flags = [bool(mask.flat[i]) for i in same]
        assert flags == sorted(flags, reverse=True)


def test_nan_is_refused_only_where_it_would_have_to_be_ranked():
    scores = torch.arange(10.0)
    scores[[4, 7, 8]] = NAN  # 4 is the bias, which nobody ranks
    with pytest.raises(MethodError, match="2 of 8 scores are NaN"):
        top_k(scores, 0.5, SMALL)
    with pytest.raises(MethodError, match="1 of 7 scores are NaN"):
        without_8 = Mask.full(SMALL)
        without_8.flat[8] = False
        top_k(scores, 0.5, SMALL, within=without_8)
    finite = Mask(~scores.isnan(), SMALL)
    assert kept(top_k(scores, 0.25, SMALL, within=finite)) == {6, 9}
    assert top_k(scores, 1.0, SMALL).is_full


def test_a_model_with_nothing_to_prune_stays_whole():
    layout = Layout(("bias",), ((3,),), (False,), (True,))
    assert top_k(torch.zeros(3), 0.0, layout).is_full
    assert top_k_per_layer(torch.zeros(3), {}, layout).is_full
    assert random(layout, 0.1, np.random.default_rng(0)).is_full
    assert erk(layout, 0.1) == {}


# ------------------------------------------------------------------------------------------------ per layer


def test_top_k_per_layer_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 90.0, 80.0, 80.0, 70.0])
    mask = top_k_per_layer(scores, {"w": 0.5, "v": 0.25}, SMALL)
    assert kept(mask) == {0, 2, 6} and holds_all_else(mask)
    within = Mask.full(SMALL)
    within.flat[[0, 6, 7]] = False
    assert kept(top_k_per_layer(scores, {"w": 0.5, "v": 1.0}, SMALL, within=within)) == {2, 3, 8, 9}


@PROPERTY
@given(scored(), st.data())
def test_top_k_per_layer_ranks_each_tensor_by_itself(problem, data):
    layout, scores, within = problem
    wanted = {name: data.draw(densities) for name in layout.prunable_names}
    mask = top_k_per_layer(scores, wanted, layout, within=within)
    for name, density in wanted.items():
        entries = span(layout, name)
        count = len(kept(mask) & entries)
        assert count == min(round(density * len(entries)), len(kept(within) & entries))
        assert kept(mask) & entries == best(scores, kept(within) & entries, count)
    assert holds_all_else(mask)


# ------------------------------------------------------------------------------------------------ thresholds


def test_at_least_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 2.0, 0.5, 5.0, -7.0])
    full = Mask.full(SMALL)
    assert kept(at_least(scores, 2.0, SMALL, within=full)) == {0, 2, 3, 6, 8}
    assert kept(at_least(scores, 99.0, SMALL, within=full)) == set()
    assert kept(at_least(scores, 99.0, SMALL, within=full, min_density=0.25)) == {0, 8}
    assert kept(at_least(scores, 3.0, SMALL, within=full, min_density=0.25)) == {0, 8}
    within = Mask.full(SMALL)
    within.flat[[8, 3]] = False
    assert kept(at_least(scores, 2.0, SMALL, within=within)) == {0, 2, 6}
    assert kept(at_least(scores, 99.0, SMALL, within=within, min_density=0.25)) == {0, 2}


@PROPERTY
@given(scored(), st.sampled_from([-1.0, 0.0, 1.0, 3.0]), densities)
def test_at_least_keeps_what_passes_or_the_best(problem, threshold, min_density):
    layout, scores, within = problem
    passing = {i for i in kept(within) if scores[i] >= threshold}
    mask = at_least(scores, threshold, layout, within=within, min_density=min_density)
    assert passing <= kept(mask) <= kept(within)
    assert holds_all_else(mask)
    if len(kept(mask)) > len(passing):
        floor = round(min_density * layout.prunable_count)
        assert kept(mask) == best(scores, kept(within), min(floor, len(kept(within))))
    assert abs(mask.density - max(mask.density, min(min_density, within.density))) < 1 / layout.prunable_count


def test_a_threshold_refuses_nan_rather_than_prune_it():
    scores = torch.tensor([3.0, NAN, 2.0, 2.0, NAN, 0.0, 2.0, 0.5, 5.0, -7.0])
    with pytest.raises(MethodError, match="1 of 8 scores are NaN"):
        at_least(scores, 2.0, SMALL, within=Mask.full(SMALL))
    assert kept(at_least(scores, 2.0, SMALL, within=Mask(~scores.isnan(), SMALL))) == {0, 2, 3, 6, 8}


# ------------------------------------------------------------------------------------------------ min_layer


def best_with_layers(
    scores: Tensor, candidates: set[int], count: int, layout: Layout, least: int
) -> set[int]:
    """The reference: each tensor's best first, then the best of all others, as many as asked for."""
    firm = set[int]()
    for name in layout.prunable_names:
        firm |= best(scores, candidates & span(layout, name), least)
    return firm | best(scores, candidates - firm, max(0, count - len(firm)))


def test_a_layer_keeps_its_best_and_the_others_lose_their_lowest_for_it():
    # w is 0 to 3 and v 6 to 9: globally v would have all four
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0, 0.0, 0.0, 9.0, 7.0, 8.0, 6.0])
    assert kept(top_k(scores, 0.5, SMALL)) == {6, 7, 8, 9}
    assert kept(top_k(scores, 0.5, SMALL, min_layer=1)) == {6, 7, 8, 2}
    assert kept(top_k(scores, 0.5, SMALL, min_layer=2)) == {6, 8, 2, 0}
    assert kept(top_k(scores, 0.25, SMALL, min_layer=1)) == {6, 2}
    # minima that add up to more than is asked for
    assert kept(top_k(scores, 0.0, SMALL, min_layer=1)) == {6, 2}
    assert kept(top_k(scores, 0.5, SMALL, min_layer=3)) == {6, 8, 7, 2, 0, 3}
    assert top_k(scores, 0.5, SMALL, min_layer=99).is_full
    assert [lowest_density(SMALL, least) for least in (0, 1, 3, 99)] == [0, 2 / 8, 6 / 8, 1]
    # per layer, a share that rounds to nothing
    shares = {"w": 0.1, "v": 0.5}
    assert kept(top_k_per_layer(scores, shares, SMALL)) == {6, 8}
    assert kept(top_k_per_layer(scores, shares, SMALL, min_layer=1)) == {6, 2}
    # a threshold asks for no count: nothing else goes
    full = Mask.full(SMALL)
    assert kept(at_least(scores, 7.0, SMALL, within=full, min_layer=1)) == {6, 7, 8, 2}
    assert kept(at_least(scores, 99.0, SMALL, within=full, min_density=0.5, min_layer=1)) == {6, 7, 8, 2}
    # entries that are not held cannot be kept
    assert kept(top_k(scores, 0.25, SMALL, within=Mask(scores > 4, SMALL), min_layer=1)) == {6, 8}


@PROPERTY
@given(scored(), densities, st.integers(0, 3), st.data())
def test_every_layer_keeps_its_minimum_and_the_count_is_the_one_asked_for(problem, density, least, data):
    layout, scores, within = problem
    count, layers = round(density * layout.prunable_count), layout.prunable_names
    mask = top_k(scores, density, layout, within=within, min_layer=least)
    assert kept(mask) == best_with_layers(scores, kept(within), count, layout, least)
    for name in layers:
        here = span(layout, name)
        assert len(kept(mask) & here) >= min(least, len(kept(within) & here))
    minima = sum(min(least, len(kept(within) & span(layout, name))) for name in layers)
    assert len(kept(mask)) == min(max(count, minima), len(kept(within)))
    assert holds_all_else(mask)
    plain = top_k(scores, density, layout, within=within)
    if all(
        len(kept(plain) & span(layout, n)) >= min(least, len(kept(within) & span(layout, n))) for n in layers
    ):
        assert mask == plain
    # falling densities are nested
    lower = top_k(scores, density * data.draw(densities), layout, within=within, min_layer=least)
    assert kept(lower) <= kept(mask)
    assert top_k(scores, lower.density, layout, within=mask, min_layer=least) == lower


@PROPERTY
@given(scored(), st.data(), st.integers(0, 3))
def test_so_do_shares_of_each_layer_thresholds_and_random_masks(problem, data, least):
    layout, scores, within = problem
    wanted = {name: data.draw(densities) for name in layout.prunable_names}
    full, plain = Mask.full(layout), top_k_per_layer(scores, wanted, layout)
    minima = round(lowest_density(layout, least) * layout.prunable_count)
    mask = top_k_per_layer(scores, wanted, layout, min_layer=least)
    assert len(kept(mask)) == max(len(kept(plain)), minima)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    drawn = random(layout, wanted, rng, min_layer=least)
    assert len(kept(drawn)) == max(len(kept(plain)), minima)
    passed = at_least(scores, 1.0, layout, within=full, min_layer=least)
    assert kept(at_least(scores, 1.0, layout, within=full)) <= kept(passed)
    more = filled(within, scores, least)
    assert within.flat.logical_and(more.flat).equal(within.flat)
    for name in layout.prunable_names:
        here = span(layout, name)
        for found in (mask, drawn, passed, more):
            assert len(kept(found) & here) >= min(least, len(here))
        assert len(kept(more) & here) == max(len(kept(within) & here), min(least, len(here)))


def test_the_layers_that_hold_nothing():
    assert empty_layers(Mask.full(SMALL)) == []
    assert empty_layers(top_k(torch.arange(10.0), 0.5, SMALL)) == ["w"]
    assert empty_layers(Mask.none(SMALL)) == ["w", "v"]


# ------------------------------------------------------------------------------------------------ growing


def test_grow_by_hand():
    scores = torch.tensor([9.0, 1.0, 2.0, 2.0, 90.0, 90.0, 3.0, 0.0, 2.0, -7.0])
    within = top_k(scores, 1 / 8, SMALL)
    assert kept(within) == {0}
    assert kept(grow(scores, 1, SMALL, within=within)) == {0, 6}
    assert kept(grow(scores, 3, SMALL, within=within)) == {0, 6, 2, 3}  # of three 2s the first ones
    assert grow(scores, 0, SMALL, within=within) == within
    assert grow(scores, 99, SMALL, within=within).is_full
    # entries of `within` stay however little they score
    assert kept(grow(scores, 2, SMALL, within=Mask(scores < 0, SMALL))) == {9, 0, 6}


@PROPERTY
@given(scored(), st.integers(0, 30))
def test_grow_adds_the_best_of_the_rest(problem, count):
    layout, scores, within = problem
    before = scores.clone(), within.clone()
    mask = grow(scores, count, layout, within=within)
    outside = kept(Mask.full(layout)) - kept(within)
    assert kept(mask) == kept(within) | best(scores, outside, count)
    assert holds_all_else(mask)
    assert torch.equal(scores, before[0]) and within == before[1]


@PROPERTY
@given(scored(), st.data())
def test_grow_per_layer_grows_each_tensor_by_itself(problem, data):
    layout, scores, within = problem
    some = data.draw(st.lists(st.sampled_from(layout.prunable_names), unique=True))
    counts = {name: data.draw(st.integers(0, 9)) for name in some}
    before = within.clone()
    mask = grow_per_layer(scores, counts, layout, within=within)
    for name in layout.prunable_names:
        held, entries = kept(within), span(layout, name)
        grown = best(scores, entries - held, counts.get(name, 0))
        assert kept(mask) & entries == held & entries | grown
    assert holds_all_else(mask) and within == before


def test_growing_refuses_nan_only_where_it_would_have_to_be_ranked():
    scores = torch.tensor([NAN, 1.0, NAN, 3.0, NAN, NAN, 4.0, 5.0, 6.0, 7.0])
    within = Mask(torch.tensor([True, *[False] * 9]), SMALL)
    with pytest.raises(MethodError, match="1 of 7 scores are NaN"):
        grow(scores, 2, SMALL, within=within)
    assert kept(grow_per_layer(scores, {"v": 2}, SMALL, within=within)) == {0, 8, 9}
    assert grow(scores, 7, SMALL, within=within).is_full


# ------------------------------------------------------------------------------------------------ random


@PROPERTY
@given(layouts(), densities, st.integers(0, 2**32))
def test_random_masks_are_reproducible_and_meet_the_density(layout, density, seed):
    first, again = (random(layout, density, np.random.default_rng(seed)) for _ in range(2))
    assert first == again
    assert len(kept(first)) == round(density * layout.prunable_count)
    assert holds_all_else(first)
    each = {name: density for name in layout.prunable_names}
    per_layer = random(layout, each, np.random.default_rng(seed))
    for name in layout.prunable_names:
        entries = span(layout, name)
        assert len(kept(per_layer) & entries) == round(density * len(entries))
    assert holds_all_else(per_layer)


def test_random_masks_differ_by_seed_and_favour_no_entry():
    masks = [random(SMALL, 0.25, np.random.default_rng(seed)).flat for seed in range(400)]
    times_kept = torch.stack(masks).sum(0)[SMALL.prunable_flat]
    # 400 draws at 1/4: 100 ± 8.7 each; five standard deviations
    assert times_kept.sum() == 800 and (times_kept - 100).abs().max() < 44


# ------------------------------------------------------------------------------------------------ erk

TWO = Layout(("a", "b"), ((10, 10), (10, 40)), (True, True), (True, True))


def test_erk_by_hand():
    # Σ dims / Π dims: 20/100 and 50/400; half of 500 is 250 = scale·(20 + 50)
    assert erk(TWO, 0.5) == pytest.approx({"a": 250 / 70 * 0.2, "b": 250 / 70 * 0.125})
    # at 0.8 a would be 1.14: it is kept whole, and b gets the other 300 of its 400
    assert erk(TWO, 0.8) == pytest.approx({"a": 1.0, "b": 0.75})
    # the sides of a kernel count: (4 + 2 + 3 + 3)/72 = 1/6 against (4 + 18)/72 = 11/36
    conv = Layout(("conv", "fc"), ((4, 2, 3, 3), (4, 18)), (True, True), (True, True))
    shares = erk(conv, 0.1)
    assert shares["fc"] / shares["conv"] == pytest.approx((11 / 36) / (1 / 6))
    assert erk(SMALL, 1.0) == {"w": 1.0, "v": 1.0}


@PROPERTY
@given(layouts(), st.floats(1e-3, 1))
def test_erk_spends_the_whole_budget_and_no_tensor_exceeds_one(layout, density):
    shares = erk(layout, density)
    assert set(shares) == set(layout.prunable_names)
    assert all(0 < share <= 1 for share in shares.values())
    sizes = {name: len(span(layout, name)) for name in shares}
    spent = sum(shares[name] * sizes[name] for name in shares)
    assert spent == pytest.approx(density * layout.prunable_count)
    raw = {name: sum(layout.shape_of[name]) / sizes[name] for name in shares}
    sparse = [name for name in shares if shares[name] < 1]
    scales = [shares[name] / raw[name] for name in sparse]
    assert scales == pytest.approx([scales[0]] * len(scales)) if scales else True
    # whatever is whole would not fit below 1 at the common scale
    assert all(raw[name] * min(scales, default=INF) >= 1 - 1e-9 for name in shares if name not in sparse)


# ------------------------------------------------------------------------------------------------ the others


@PROPERTY
@given(scored(), st.data())
def test_union_holds_what_either_holds(problem, data):
    layout, _, first = problem
    flags = data.draw(st.lists(st.booleans(), min_size=layout.size, max_size=layout.size))
    second = Mask(torch.tensor(flags), layout)
    both = union(first, second)
    assert kept(both) == kept(first) | kept(second)
    assert both == union(second, first) and union(first, first) == first


def test_support_is_what_is_not_zero():
    values = [1.0, 0.0, -0.0, 1e-45, 0.0, 7.0, 0.0, -2.0, 0.0, 0.0]
    assert support(Params(torch.tensor(values), SMALL)).flat.tolist() == [
        *(True, False, False, True),
        *(True, True),
        *(False, True, False, False),
    ]
