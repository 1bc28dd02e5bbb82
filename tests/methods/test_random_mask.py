"""A random mask: how many weights each layer keeps, that it is drawn once, and that drawing it is free."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedray.costs.codec import HEADER_BYTES
from fedray.federation.server import Schedule, Server
from fedray.methods.fedavg import FedAvg
from fedray.methods.random_mask import RandomMask
from fedray.pruning.masks import erk
from fedray.types import Mask
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
EVERYBODY = Schedule(rounds=3, cohort=6)


def begin(method: RandomMask, seed: int = 0) -> Server:
    """Return a federation with three prunable layers: 36, 216 and 72 weights."""
    return small.server(method, architecture=small.CNN, prune_last=True, seed=seed)


def kept(mask: Mask) -> list[int]:
    """Return how many weights each prunable layer keeps."""
    return [int(mask[name].count_nonzero()) for name in mask.layout.prunable_names]


# Σ dims of (4, 1, 3, 3), (6, 4, 3, 3) and (3, 24) are 11, 16 and 27, and a third of 324 weights is twice that
@pytest.mark.parametrize(("distribution", "expected"), [("erk", [22, 32, 54]), ("uniform", [12, 72, 24])])
def test_layers_keep_their_share(distribution: str, expected: list[int]) -> None:
    server = begin(RandomMask(density=1 / 3, distribution=distribution))  # type: ignore[arg-type]
    server.setup()
    assert kept(server.state.mask) == expected


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 1.0), st.sampled_from(["erk", "uniform"]), st.integers(0, 2))
@example(0.00390625, "erk", 1)  # less than a weight in each layer: one stays
@example(0.0078125, "uniform", 1)  # a large layer gives up a weight for a small one
def test_the_density_is_met_to_half_a_weight_in_each_layer(
    density: float, distribution: str, min_layer: int
) -> None:
    method = RandomMask(density=density, distribution=distribution, min_layer=min_layer)  # type: ignore[arg-type]
    server = begin(method)
    server.setup()
    mask = server.state.mask
    shares = (
        erk(mask.layout, density)
        if distribution == "erk"
        else dict.fromkeys(mask.layout.prunable_names, density)
    )
    assert sum(shares[name] * mask[name].numel() for name in shares) == pytest.approx(density * 324)
    rounded = [round(share * mask[name].numel()) for name, share in shares.items()]
    if min(rounded) >= min_layer:
        assert kept(mask) == rounded
    else:  # layers below the minimum are filled up by the others, so the total stays
        assert min(kept(mask)) == min_layer
        assert sum(kept(mask)) == max(sum(rounded), min_layer * len(rounded))
        assert all(after <= max(before, min_layer) for after, before in zip(kept(mask), rounded, strict=True))
    assert mask.flat[~mask.layout.prunable_flat].all()


def test_it_is_drawn_once_and_stays() -> None:
    server = begin(RandomMask(density=0.3))
    server.setup()
    mask = server.state.mask
    for _ in range(3):
        server.step()
        assert server.state.mask == mask
    assert not server.model.flat[~mask.flat].any()


def test_the_draw_depends_on_the_seed_alone() -> None:
    def drawn(seed: int, examples: int = 150) -> Mask:
        server = small.server(RandomMask(density=0.25), seed=seed, data=small.dataset(examples))
        server.setup()
        return server.state.mask

    assert drawn(1) == drawn(1, examples=300)
    overlaps = [
        int((one.flat & other.flat)[:WEIGHTS].count_nonzero())
        for one, other in pairwise(map(drawn, range(9)))
    ]
    # of two independent draws of 32 weights a quarter is the same, give or take
    assert 4 <= sum(overlaps) / len(overlaps) <= 12


def test_at_density_1_it_is_fedavg() -> None:
    masked, plain = small.server(RandomMask(density=1.0)), small.server(FedAvg())
    assert small.run(masked)[-1].metrics["total/bytes/up"] == small.run(plain)[-1].metrics["total/bytes/up"]
    assert masked.model.sha256 == plain.model.sha256


def test_drawing_is_free_and_positions_are_paid_once() -> None:
    server = small.server(RandomMask(density=0.1), schedule=EVERYBODY)
    setup, first, second, _ = (report.metrics for report in small.run(server))
    for cost in ("bytes/up", "bytes/down", "flops/clients", "flops/server", "time/simulated_s"):
        assert setup[cost] == 0
    held = server.state.mask.count
    assert held == round(0.1 * WEIGHTS) + SIZE - WEIGHTS
    assert first["bytes/up"] == second["bytes/up"] == 6 * (HEADER_BYTES + 4 * held + 8)
    assert second["bytes/down"] == 6 * (HEADER_BYTES + 4 * held + 8)  # they hold the mask by now
    assert first["bytes/down"] > second["bytes/down"]
