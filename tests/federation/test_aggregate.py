"""The mask-aware mean: numbers worked out by hand, and the same bits whoever computed which chunk."""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import MethodError
from fedray.federation.aggregate import (
    CohortUpdate,
    Fold,
    Node,
    Partial,
    cut,
    merge_all,
    merge_within,
    share,
)
from fedray.types import ClientRecord, ClientUpdate, Cost, Fate, Layout, Mask, Params

properties = settings(deadline=None, max_examples=50)
LAYOUT = Layout(("a", "b"), ((2,), (2,)), (True, False), (True, True))
WIDE = Layout(("w",), ((37,),), (True,), (True,))
FULL = Mask.full(LAYOUT)
NAN = math.nan


def mask(*held: int) -> Mask:
    return Mask(torch.tensor(held, dtype=torch.bool), LAYOUT)


def update(*values: float, held: Mask = FULL, **beside: Mapping[str, torch.Tensor]) -> ClientUpdate:
    return ClientUpdate(Params(torch.tensor(values, dtype=torch.float32), LAYOUT), held, **beside)  # type: ignore[arg-type]


def partial(*updates: ClientUpdate, n: Sequence[int] = (1, 3), fold: Fold = Fold()) -> Partial:  # noqa: B008
    """Fold clients 0, 1, …, the first with n[0] examples; full masks are known on both sides."""
    out = Partial(LAYOUT, fold, {FULL.digest: FULL})
    for client, one in enumerate(updates):
        out.add(client, n[client], one)
    return out


def values(params: Params) -> list[float]:
    found: list[float] = params.flat.tolist()
    return found


# ── the mean ─────────────────────────────────────────────────────────────────────────────────────────────


def test_full_masks_give_the_mean_weighted_by_examples():
    folded = partial(update(1, 2, 3, 4), update(5, 6, 7, 8))
    assert values(folded.mean()) == [(1 + 3 * 5) / 4, (2 + 3 * 6) / 4, (3 + 3 * 7) / 4, (4 + 3 * 8) / 4]


def test_each_coordinate_is_the_mean_of_those_who_hold_it():
    folded = partial(
        update(1, 2, 3, 99, held=mask(1, 1, 1, 0)),
        update(5, 99, 7, 8, held=mask(1, 0, 1, 1)),
        update(9, 99, 99, 99, held=mask(1, 0, 0, 0)),
        n=(1, 3, 4),
    )
    # (1 + 15 + 36)/8, 2 of client 0 alone, (3 + 21)/4, 8 of client 1 alone
    assert values(folded.mean()) == [6.5, 2, 6, 8]


def test_otherwise_stands_where_nobody_holds():
    folded = partial(
        update(1, 99, 3, 99, held=mask(1, 0, 1, 0)), update(5, 99, 99, 99, held=mask(1, 0, 0, 0))
    )
    otherwise = update(-1, -2, -3, -4).params
    assert values(folded.mean(otherwise)) == [4, -2, 3, -4]
    assert values(folded.mean()) == [4, 0, 3, 0]


def test_a_common_sparse_mask_takes_otherwise_outside():
    held = mask(1, 0, 1, 1)
    folded = Partial(LAYOUT, Fold(), {held.digest: held})
    folded.add(0, 1, update(1, 99, 3, 4, held=held))
    folded.add(1, 1, update(3, NAN, 5, 6, held=held))
    assert folded.held is None, "one mask needs no vector of weights"
    assert values(folded.mean(update(-1, -2, -3, -4).params)) == [2, -2, 4, 5]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_nobody_only_otherwise_is_left_and_it_is_a_copy(count: int):
    folded = partial(*[update(1, 2, 3, 4, held=Mask.none(LAYOUT))] * count)
    otherwise = update(-1, -2, -3, -4).params
    mean = folded.mean(otherwise)
    assert values(mean) == [-1, -2, -3, -4]
    mean.flat.zero_()
    assert values(otherwise) == [-1, -2, -3, -4]
    assert values(folded.mean()) == [0, 0, 0, 0]


def test_uniform_weight_counts_heads():
    folded = partial(update(1, 2, 3, 4), update(5, 6, 7, 9), fold=Fold(weight="uniform"))
    assert values(folded.mean()) == [3, 4, 5, 6.5]


def test_by_nonzero_leaves_zeros_out_of_the_mean():
    updates = update(0, 2, 4, 0), update(4, 0, 8, 0)
    assert values(partial(*updates).mean()) == [3, 0.5, 7, 0]
    literal = partial(*updates, fold=Fold(by="nonzero"))
    assert values(literal.mean()) == [4, 2, 7, 0]
    assert values(literal.mean(update(-1, -2, -3, -4).params)) == [4, 2, 7, -4]


def test_by_everyone_an_absent_weight_is_a_zero():
    updates = update(1, 2, 3, 4, held=mask(1, 0, 1, 1)), update(5, 6, 7, NAN, held=mask(1, 1, 0, 0))
    folded = partial(*updates, fold=Fold(by="everyone"))
    assert values(folded.mean()) == [(1 + 3 * 5) / 4, 3 * 6 / 4, 3 / 4, 1.0]
    silent = partial(updates[0], update(9, 9, 9, 9, held=mask(0, 0, 0, 0)), fold=Fold(by="everyone"))
    assert values(silent.mean()) == [1, 0, 3, 4]


def test_by_everyone_is_by_mask_where_all_hold_the_same():
    held = mask(1, 0, 1, 1)
    updates = update(0.1, 0, 0.7, 0.3, held=held), update(0.2, 0, 0.9, 1.3, held=held)
    folds = [partial(*updates, fold=Fold(by=by)).mean() for by in ("mask", "everyone")]
    assert values(folds[0]) == values(folds[1])


def test_by_nonzero_takes_nothing_from_outside_the_mask():
    folded = partial(update(5, 7, 3, 4, held=mask(0, 1, 1, 1)), n=[1], fold=Fold(by="nonzero"))
    assert values(folded.mean()) == [0, 7, 3, 4]


def test_what_lies_behind_a_mask_never_enters():
    held = mask(1, 1, 0, 0)
    folded = partial(update(1, 2, NAN, math.inf, held=held), update(3, 4, 5, 6))
    assert values(folded.mean()) == [2.5, 3.5, 5, 6]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("held", [FULL, mask(1, 1, 0, 1)], ids=["full", "of its own"])
def test_a_silent_client_changes_no_bit(place: int, held: Mask):
    speaking = [(1, update(0.1, 0.2, 0.3, 0.4, held=held)), (7, update(0.5, 0.6, 0.7, 0.8))]
    silent = (1000, update(NAN, 99, 99, 99, held=Mask.none(LAYOUT)))
    with_it, without = Partial(LAYOUT, Fold(), {FULL.digest: FULL}), partial()
    for client, (n, one) in enumerate([*speaking[:place], silent, *speaking[place:]]):
        with_it.add(client, n, one)
    for client, (n, one) in enumerate(speaking):
        without.add(client, n, one)
    assert with_it.mean() == without.mean()
    assert (with_it.held is None) == (without.held is None), "a common mask stays a number"


def test_a_silent_client_is_still_heard_in_sums_and_metrics():
    silent = update(0, 0, 0, 0, held=Mask.none(LAYOUT), sums={"g": torch.ones(2)})
    folded = partial(replace(silent, metrics={"loss": 3.0}), n=[5])
    assert folded.sums["g"].tolist() == [1, 1]
    assert CohortUpdate(folded).metrics == {"loss": 3.0}


def test_a_mask_that_both_sides_do_not_know_is_spread_out():
    folded = partial(update(1, 2, 3, 4), update(5, 99, 7, 8, held=mask(1, 0, 1, 1)))
    assert folded.common is None
    assert folded.held is not None
    assert folded.held.tolist() == [4, 1, 4, 4]
    assert values(folded.mean()) == [4, 2, 6, 7]


def test_an_update_is_not_written_into():
    one = update(1, 2, 3, 4, sums={"g": torch.ones(2)}, each={"h": torch.ones(1)})
    partial(one, one)
    assert values(one.params) == [1, 2, 3, 4]
    assert one.sums["g"].tolist() == [1, 1]
    assert one.each["h"].tolist() == [1]


# ── what travels beside the weights ──────────────────────────────────────────────────────────────────────


def test_sums_are_plain_sums_whatever_the_weights():
    folded = partial(
        update(0, 0, 0, 0, sums={"g": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}),
        update(0, 0, 0, 0, sums={"g": torch.tensor([10.0, 20.0]), "n": torch.tensor(6)}),
    )
    cohort = CohortUpdate(folded)
    assert cohort.sum("g").tolist() == [11, 22]
    assert cohort.sum("n").item() == 11
    cohort.sum("g").zero_()
    assert cohort.sum("g").tolist() == [11, 22], "a sum that was handed out can be written into"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_votes_add_up_beyond_their_type(dtype: torch.dtype):
    votes = update(0, 0, 0, 0, sums={"votes": torch.tensor([1, 0, 1]).to(dtype)})
    halves = [partial(*[votes] * 200, n=[1] * 200) for _ in range(2)]
    assert CohortUpdate(halves[0].merge(halves[1])).sum("votes").tolist() == [400, 0, 400]


def test_sums_in_half_precision_are_added_in_full():
    folded = partial(*[update(0, 0, 0, 0, sums={"g": torch.tensor([60000.0]).half()})] * 4, n=[1] * 4)
    assert CohortUpdate(folded).sum("g").item() == 4 * float(torch.tensor(60000.0).half())


def test_an_unknown_sum_is_refused_with_the_names_there_are():
    cohort = CohortUpdate(partial(update(0, 0, 0, 0, sums={"importance": torch.ones(2)}), n=[1]))
    with pytest.raises(MethodError, match=r"'importence'.*\['importance'\]"):
        cohort.sum("importence")
    with pytest.raises(MethodError, match="none"):
        CohortUpdate(partial()).sum("importance")


def test_metrics_are_means_over_those_who_report_them():
    folded = partial(
        replace(update(0, 0, 0, 0), metrics={"loss": 1.0}),
        replace(update(0, 0, 0, 0), metrics={"loss": 5.0, "kept": 2.0}),
        update(0, 0, 0, 0),
        n=(1, 3, 100),
    )
    assert CohortUpdate(folded).metrics == {"loss": 4.0, "kept": 2.0}
    uniform = partial(
        replace(update(0, 0, 0, 0), metrics={"loss": 1.0}),
        replace(update(0, 0, 0, 0), metrics={"loss": 5.0}),
        fold=Fold(weight="uniform"),
    )
    assert CohortUpdate(uniform).metrics == {"loss": 3.0}


def test_each_is_kept_by_client_as_it_was_sent():
    head = torch.ones(2)
    folded = partial(update(0, 0, 0, 0, each={"head": head}), update(0, 0, 0, 0))
    head.zero_()
    assert {client: sent["head"].tolist() for client, sent in CohortUpdate(folded).each.items()} == {
        0: [1, 1]
    }


def test_updates_are_kept_where_the_fold_says_so():
    updates = update(1, 2, NAN, 4, held=mask(1, 1, 0, 1)), update(5, 6, 7, 8)
    assert CohortUpdate(partial(*updates)).updates == {}
    kept = CohortUpdate(partial(*updates, fold=Fold(keep_updates=True))).updates
    assert [values(kept[k].params) for k in (0, 1)] == [[1, 2, 0, 4], [5, 6, 7, 8]]
    assert [kept[k].mask for k in (0, 1)] == [updates[0].mask, FULL]
    updates[1].params.flat.zero_()
    assert values(kept[1].params) == [5, 6, 7, 8]


def test_merging_joins_everything_and_changes_neither_side():
    left = partial(
        update(1, 2, 3, 4, sums={"a": torch.ones(1), "b": torch.ones(1)}, each={"h": torch.ones(1)}),
        fold=Fold(keep_updates=True),
    )
    right = Partial(LAYOUT, Fold(keep_updates=True), {FULL.digest: FULL})
    right.add(1, 3, update(5, 6, 7, 8, held=mask(1, 1, 0, 0), sums={"b": torch.ones(1), "c": torch.ones(1)}))
    right.metrics, left.metrics = {"loss": (6.0, 3.0)}, {"loss": (1.0, 1.0), "kept": (2.0, 1.0)}
    before = pickle.dumps((left, right))
    merged = left.merge(right)
    assert values(merged.mean()) == [4, 5, 3, 4]
    assert {name: total.tolist() for name, total in merged.sums.items()} == {"a": [1], "b": [2], "c": [1]}
    assert (list(merged.each), list(merged.updates)) == ([0], [0, 1])
    assert CohortUpdate(merged).metrics == {"kept": 2.0, "loss": 7 / 4}
    assert pickle.dumps((left, right)) == before


def test_merging_two_common_masks_tells_them_apart():
    one, other = mask(1, 1, 0, 1), mask(0, 1, 1, 1)
    known = {held.digest: held for held in (one, other)}
    halves = [Partial(LAYOUT, Fold(), known) for _ in range(2)]
    halves[0].add(0, 1, update(1, 2, 99, 4, held=one))
    halves[1].add(1, 3, update(99, 6, 7, 8, held=other))
    for merged in (halves[0].merge(halves[1]), halves[1].merge(halves[0])):
        assert values(merged.mean()) == [1, 5, 7, 7]


def test_merging_with_nobody_changes_no_bit():
    folded, nobody = partial(update(0.1, 0.2, 0.3, 0.4), n=[7]), partial()
    for merged in (folded.merge(nobody), nobody.merge(folded)):
        assert merged.held is None
        assert merged.mean() == folded.mean()


def test_pickling_keeps_the_bits_and_leaves_masks_and_layout_behind():
    known = {FULL.digest: FULL}
    common, mixed = (
        partial(update(0.1, 0.2, 0.3, 0.4)),
        partial(update(0.1, 0.2, 0.3, 0.4, held=mask(1, 1, 0, 1))),
    )
    for sent in (common, mixed, partial()):
        received = pickle.loads(pickle.dumps(sent))
        assert received.masks == {}
        assert received.layout is None
        assert received.arrived(LAYOUT, known) is received
        assert received.mean() == sent.mean()
        assert received.merge(common).mean() == sent.merge(common).mean()


def test_arrays_that_may_not_be_written_can_be_merged():
    halves = [partial(update(1, 2, 3, 4, held=mask(1, 1, 0, 1))), partial(update(5, 6, 7, 8))]
    for half in halves:
        for array in (half.weighted, half.held):
            if array is not None:
                array.flags.writeable = False
    merged = halves[0].merge(halves[1])
    assert values(merged.mean()) == [3, 4, 7, 6]


# ── the tree: who computes what does not matter ──────────────────────────────────────────────────────────

Chunks = list[list[tuple[int, int, ClientUpdate]]]


def make_chunks(count: int, kind: str, seed: int) -> tuple[Chunks, dict[bytes, Mask]]:
    """Return chunks of one to three clients with any weights, and the masks that all sides know."""
    rng = np.random.default_rng(seed)
    size = WIDE.size

    def any_mask() -> Mask:
        return Mask(torch.from_numpy(rng.random(size) < rng.choice([0.0, 0.3, 0.9])), WIDE)

    known = [Mask.full(WIDE)] if kind == "full" else [any_mask() for _ in range(1 if kind == "common" else 2)]
    unknown = 0.5 if kind == "mixed" else 0.0
    chunks: Chunks = []
    client = 0
    for _ in range(count):
        chunk, usual = [], known[rng.integers(len(known))]
        for _ in range(rng.integers(1, 4)):
            held = any_mask() if rng.random() < unknown else usual
            params = Params(torch.from_numpy(rng.standard_normal(size, dtype=np.float32)), WIDE)
            sums = {"g": torch.from_numpy(rng.standard_normal(3, dtype=np.float32))}
            each = {"h": torch.tensor([float(client)])}
            metrics = {"loss": float(rng.random())}
            n = int(rng.integers(1, 1000))
            chunk.append((client, n, ClientUpdate(params, held, sums=sums, each=each, metrics=metrics)))
            client += 1
        chunks.append(chunk)
    return chunks, {one.digest: one for one in known}


def folded_chunk(chunk: list[tuple[int, int, ClientUpdate]], known: dict[bytes, Mask]) -> Partial:
    out = Partial(WIDE, Fold(keep_updates=True), known)
    for client, n, one in chunk:
        out.add(client, n, one)
    return out


def by_the_book(partials: list[Partial]) -> Partial:
    """Merge neighbours, level by level; a last one without a neighbour moves up."""
    while len(partials) > 1:
        pairs = [partials[i : i + 2] for i in range(0, len(partials), 2)]
        partials = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return partials[0]


def assert_same_bits(found: Partial, expected: Partial) -> None:
    def bits(one: Partial) -> object:
        vectors = [None if v is None else v.tobytes() for v in (one.weighted, one.held)]
        sums = {name: total.tobytes() for name, total in one.sums.items()}
        each = {client: sent["h"].item() for client, sent in sorted(one.each.items())}
        updates = {client: kept.params.flat.numpy().tobytes() for client, kept in sorted(one.updates.items())}
        return vectors, one.common, one.weight, sums, each, updates, one.metrics

    assert bits(found) == bits(expected)
    assert found.mean().sha256 == expected.mean().sha256


KINDS = st.sampled_from(["full", "common", "two", "mixed"])


@properties
@given(data=st.data(), count=st.integers(1, 20), kind=KINDS, seed=st.integers(0, 2**32))
def test_whoever_computed_which_chunk_the_bits_are_the_same(
    data: st.DataObject, count: int, kind: str, seed: int
):
    chunks, known = make_chunks(count, kind, seed)
    expected = by_the_book([folded_chunk(chunk, known) for chunk in chunks])
    workers = data.draw(st.integers(1, 8), "workers")
    if data.draw(st.booleans(), "dealt by share"):
        parts = share([sum(n for _, n, _ in chunk) for chunk in chunks], workers)
        owners = [next(w for w, part in enumerate(parts) if c in part) for c in range(count)]
    else:
        owners = data.draw(st.lists(st.integers(0, workers - 1), min_size=count, max_size=count), "owners")
    arrived: dict[Node, Partial] = {}
    for worker in data.draw(st.permutations(range(workers)), "order of arrival"):
        own = {(0, c): folded_chunk(chunks[c], known) for c in range(count) if owners[c] == worker}
        merged = merge_within(own)
        assert len(merged) <= len(own)
        for node, part in merged.items():
            arrived[node] = pickle.loads(pickle.dumps(part)).arrived(WIDE, known)
    assert_same_bits(merge_all(arrived, count), expected)


@properties
@given(count=st.integers(1, 20), kind=KINDS, seed=st.integers(0, 2**32))
def test_the_merged_mean_is_the_mean(count: int, kind: str, seed: int):
    chunks, known = make_chunks(count, kind, seed)
    weighted, held = np.zeros(WIDE.size), np.zeros(WIDE.size)
    for _, n, one in (entry for chunk in chunks for entry in chunk):
        weighted += n * np.where(one.mask.flat.numpy(), one.params.flat.numpy(), 0).astype(float)
        held += n * one.mask.flat.numpy()
    expected = np.divide(weighted, held, out=np.full(WIDE.size, -1.0), where=held > 0)
    nodes = {(0, c): folded_chunk(chunk, known) for c, chunk in enumerate(chunks)}
    otherwise = Params(torch.full((WIDE.size,), -1.0), WIDE)
    np.testing.assert_allclose(merge_all(nodes, count).mean(otherwise).flat.numpy(), expected, atol=2e-5)


def test_a_worker_merges_only_neighbours_of_one_subtree():
    chunks, known = make_chunks(6, "full", seed=0)
    nodes: dict[Node, Partial] = {(0, c): folded_chunk(chunks[c], known) for c in (1, 2, 3, 4, 5)}
    assert set(merge_within(nodes)) == {(0, 1), (1, 1), (1, 2)}
    assert set(nodes) == {(0, c) for c in (1, 2, 3, 4, 5)}, "what was given stays as it was"
    whole: dict[Node, Partial] = {(0, c): folded_chunk(chunks[c], known) for c in range(4)}
    assert set(merge_within(whole)) == {(2, 0)}


# ── cutting and dealing ──────────────────────────────────────────────────────────────────────────────────


def test_cut_by_hand():
    assert cut([1, 4, 6, 9, 12], 2) == [(1, 4), (6, 9), (12,)]
    assert cut([1, 4], 5) == [(1, 4)]
    assert cut([], 3) == []


def test_share_by_hand():
    assert share([1, 1, 1, 1], 2) == [range(0, 2), range(2, 4)]
    assert share([10, 1, 1], 2) == [range(0, 1), range(1, 3)]
    assert share([1, 1, 10], 2) == [range(0, 2), range(2, 3)]
    assert [len(part) for part in share([1, 1], 4)].count(1) == 2
    assert share([], 3) == [range(0, 0)] * 3


@properties
@given(weights=st.lists(st.integers(0, 10_000), max_size=40), workers=st.integers(1, 12))
def test_shares_are_contiguous_and_cover(weights: list[int], workers: int):
    parts = share(weights, workers)
    assert len(parts) == workers
    assert [chunk for part in parts for chunk in part] == list(range(len(weights)))


@properties
@given(chunks=st.integers(0, 40), workers=st.integers(1, 12))
def test_equal_chunks_are_dealt_evenly(chunks: int, workers: int):
    lengths = [len(part) for part in share([7] * chunks, workers)]
    assert max(lengths) - min(lengths) <= 1


# ── what the server sees ─────────────────────────────────────────────────────────────────────────────────


def test_a_cohort_counts_the_folded_and_charges_everybody():
    def record(client: int, n: int, fate: Fate, seconds: float) -> ClientRecord:
        return ClientRecord(client, "device", n, fate, Cost(1, 10, 100.0, 1000.0, seconds), 1.0, 0.0)

    cohort = CohortUpdate(
        partial(), (record(0, 5, "folded", 3.0), record(2, 7, "late", 9.0), record(3, 11, "folded", 4.0))
    )
    assert [r.client for r in cohort.folded] == [0, 3]
    assert cohort.num_examples == 16
    assert cohort.cost == Cost(3, 30, 300.0, 3000.0, 9.0)
    assert CohortUpdate(partial()).cost == Cost()


# ── what lies outside a mask ─────────────────────────────────────────────────────────────────────────────

FIRST, LAST = mask(1, 1, 0, 0), mask(0, 0, 1, 1)


def known(*updates: ClientUpdate, masks: Sequence[Mask] = (FIRST, LAST), first: int = 0) -> Partial:
    """Fold clients with one example each, under masks that both sides know."""
    out = Partial(LAYOUT, Fold(), {m.digest: m for m in masks})
    for client, one in enumerate(updates, start=first):
        out.add(client, 1, one)
    return out


@pytest.mark.parametrize("outside", [NAN, math.inf, -math.inf, 3e38, 7.0])
def test_values_outside_a_mask_never_reach_the_mean(outside: float):
    first = update(1, 2, outside, outside, held=FIRST)
    last = update(outside, -outside, 5, 6, held=LAST)
    rest = Params(torch.tensor([9.0, 9, 9, 9]), LAYOUT)
    assert values(known(first, first, first).mean(rest)) == [1, 2, 9, 9]
    assert values(known(first, first, last).mean(rest)) == [1, 2, 5, 6]
    assert values(known(first).merge(known(first)).mean(rest)) == [1, 2, 9, 9]
    assert values(known(first).merge(known(last)).merge(known(first)).mean(rest)) == [1, 2, 5, 6]
    with_unknown = known(first, last, masks=[FIRST]), known(last, first, masks=[LAST])
    for folded in with_unknown:
        assert values(folded.mean(rest)) == [1, 2, 5, 6]
        assert values(pickle.loads(pickle.dumps(folded)).arrived(LAYOUT, folded.masks).mean(rest)) == [
            1,
            2,
            5,
            6,
        ]


def test_a_fold_of_a_common_mask_is_not_changed_by_a_merge():
    one = known(update(1, 2, NAN, NAN, held=FIRST))
    one.merge(known(update(NAN, NAN, 5, 6, held=LAST)))
    assert values(one.merge(known()).mean()) == [1, 2, 0, 0]
