"""Votes for growth: the vote of a client, and their tally on the server."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.pruning.masks import grow
from fedray.pruning.votes import cast, tally
from fedray.types import Layout, Mask

# w: entries 0-3, bias: 4-5 (not prunable), v: 6-9
SMALL = Layout(("w", "bias", "v"), ((2, 2), (2,), (1, 4)), (True, False, True), (True, True, True))


def holding(*entries: int) -> Mask:
    flat = ~SMALL.prunable_flat
    flat[list(entries)] = True
    return Mask(flat, SMALL)


def test_a_vote_by_hand():
    gradient = torch.tensor([9.0, -5.0, 1.0, 2.0, 90.0, 90.0, 3.0, -2.0, 0.0, 2.0])
    vote = cast(gradient, 3, holding(0))
    # of the 2s, 3 comes first; the bias is nobody's candidate
    assert vote["positions"].tolist() == [1, 3, 6] and vote["positions"].dtype == torch.int32
    assert vote["gradient"].tolist() == [-5.0, 2.0, 3.0]
    assert cast(gradient, 0, holding(0))["positions"].tolist() == []
    assert cast(gradient, 99, holding(0, 1, 2, 3))["positions"].tolist() == [6, 7, 8, 9]


def test_what_diverged_votes_last_and_sends_numbers():
    gradient = torch.tensor([float("nan"), 1.0, float("nan"), 0.5, 0.0, 0.0, 0.25, 2.0, 0.125, float("nan")])
    vote = cast(gradient, 5, holding())
    assert vote["positions"].tolist() == [1, 3, 6, 7, 8]
    assert bool(cast(gradient, 8, holding())["gradient"].isfinite().all())


def test_a_tally_by_hand():
    one = {"positions": torch.tensor([1, 6]).int(), "gradient": torch.tensor([2.0, -1.0])}
    other = {"positions": torch.tensor([1, 7]).int(), "gradient": torch.tensor([-3.0, 4.0])}
    # 1: |10·2 − 30·3|, 6: |−10·1|, 7: 30·4; held entries are below those without a vote
    total = tally([(10, one), (30, other)], holding(0))
    assert total.tolist() == [-1.0, 70.0, 0.0, 0.0, -1.0, -1.0, 10.0, 120.0, 0.0, 0.0]
    assert tally([], holding(0)).tolist() == [-1.0, 0.0, 0.0, 0.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=10, max_size=10),
    st.sets(st.sampled_from([0, 1, 2, 3, 6, 7, 8, 9])),
    st.integers(0, 8),
)
def test_one_voter_gets_what_it_asked_for(values, held, count):
    gradient, mask = torch.tensor(values), holding(*held)
    grown = grow(tally([(7, cast(gradient, count, mask))], mask), count, SMALL, within=mask)
    assert grown == grow(gradient.abs(), count, SMALL, within=mask)


def test_what_was_just_removed_does_not_come_back_for_want_of_votes():
    before, kept = holding(0, 1, 2), holding(0)
    vote = {"positions": torch.tensor([8]).int(), "gradient": torch.tensor([0.0])}
    mask = grow(tally([(1, vote)], before), 2, SMALL, within=kept)
    assert mask == holding(0, 3, 6)  # without a vote worth anything the lowest that was not held
