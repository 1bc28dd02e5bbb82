"""SNIP: the mask is that of the gradient over all scorers' examples, and its price stands in round 0."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedray.costs.codec import HEADER_BYTES
from fedray.federation.server import Schedule, Server
from fedray.methods.snip import SNIP
from fedray.types import Params
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
EVERYBODY = Schedule(rounds=3, cohort=6)


def saliency(server: Server, params: Params) -> torch.Tensor:
    """Return |g·w| (size,) for the mean loss over all clients' examples at once, with plain torch."""
    place = server.place
    rows = sorted(row for k in range(6) for row in place.population.partition.rows(k).tolist())
    x, y = place.dataset.normalise(place.dataset.train.x[rows]), torch.from_numpy(place.dataset.train.y[rows])
    module = place.model.bind(params.flat.clone())
    gradients = torch.autograd.grad(cross_entropy(module(x), y), list(module.parameters()))
    return (params.flat * torch.cat([g.flatten() for g in gradients])).abs()


@pytest.mark.parametrize("density", [0.05, 0.25, 0.5])
def test_the_mask_is_that_of_the_gradient_over_the_union(density: float) -> None:
    server = small.server(SNIP(density=density), seed=3)
    scores = saliency(server, server.state.params)[server.place.model.layout.spans["fc1.weight"]]
    server.setup()
    held = server.state.mask["fc1.weight"].flatten()
    assert set(held.nonzero().flatten().tolist()) == set(
        scores.topk(round(density * WEIGHTS)).indices.tolist()
    )


def test_clients_of_unequal_size_count_by_their_examples() -> None:
    sizes = (1, 90, 1, 1, 1, 1)
    server = small.server(SNIP(density=0.25), partition=small.dealt(*sizes))
    scores = saliency(server, server.state.params)[server.place.model.layout.spans["fc1.weight"]]
    server.setup()
    held = server.state.mask["fc1.weight"].flatten()
    assert set(held.nonzero().flatten().tolist()) == set(scores.topk(32).indices.tolist())


def test_the_mask_stays_for_the_run() -> None:
    server = small.server(SNIP(density=0.2), schedule=EVERYBODY)
    server.setup()
    mask = server.state.mask
    for _ in range(3):
        server.step()
        assert server.state.mask == mask


@pytest.mark.parametrize(("scorers", "asked"), [(1, 1), (4, 4), (10, 6)])  # there are six clients
def test_scoring_is_charged_in_round_0(scorers: int, asked: int) -> None:
    server = small.server(SNIP(scorers=scorers, density=0.1), schedule=EVERYBODY)
    setup = server.setup().metrics
    # down: the dense model; up: a header, and a dense gradient with its name
    assert setup["bytes/down"] == asked * (HEADER_BYTES + 4 * SIZE)
    up = setup["bytes/up"] / asked - HEADER_BYTES - 4 * SIZE
    assert 0 < up < 100
    flops = server.place.flops
    per_example = 3 * flops.dense()  # forward, and a dense backward pass
    examples = setup["flops/clients"] / per_example
    sizes = server.place.population.partition.sizes
    assert examples == sizes.sum() if asked == 6 else sizes.min() * asked <= examples <= sizes.max() * asked
    assert setup["time/simulated_s"] > 0
    assert setup["total/bytes/up"] == setup["bytes/up"]


def test_training_is_paid_for_under_the_mask() -> None:
    server = small.server(SNIP(density=0.1), schedule=EVERYBODY)
    server.setup()
    held = server.state.mask.count
    assert held == round(0.1 * WEIGHTS) + SIZE - WEIGHTS
    first, second = server.step().metrics, server.step().metrics
    assert second["bytes/up"] == first["bytes/up"] == 6 * (HEADER_BYTES + 4 * held + 8)
    assert second["bytes/down"] == 6 * (HEADER_BYTES + 4 * held + 8)  # they hold the mask by now
    assert first["bytes/down"] > second["bytes/down"]
