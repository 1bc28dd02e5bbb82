"""Staged pruning: when, how far, by what, and that what is gone stays gone."""

from collections import OrderedDict
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fedray.config.run_config import RunConfig
from fedray.costs.codec import Codec
from fedray.errors import ConfigError
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.staged import Staged, StagedMemory
from fedray.models.spec import Architecture, InputShape
from fedray.types import Mask, Params, ServerState
from tests import small

WEIGHTS = 128
"""Prunable weights of small.MLP; 35 others are always held."""
STILL = 1e-12
"""A learning rate that leaves weights where they are."""
EVERYBODY = Schedule(rounds=10, cohort=6)


def _two_layers(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            a=nn.Linear(prod(input_shape), 4, bias=False),
            b=nn.Linear(4, num_classes, bias=False),
        )
    )


TWO_LAYERS = Architecture(_two_layers, lambda _: None, "made up", "fc 4, fc classes; linear")


def at_a_stage(method: Staged, first: list[float], second: list[float], mask: Mask | None = None) -> Server:
    """Return a federation of two linear layers, given weight by weight, that is about to reach a stage."""
    place: dict[str, Any] = {
        "architecture": TWO_LAYERS,
        "prune_last": True,
        "schedule": Schedule(rounds=5, cohort=4),
    }
    layout = small.server(method, **place).place.model.layout
    parts = zip((first, second), layout.sizes, strict=True)  # 64 and 12 weights
    values = np.concatenate([np.repeat(part, size // len(part)) for part, size in parts])
    params = Params(torch.from_numpy(values.astype(np.float32)), layout)
    state = ServerState(2, params, mask or Mask.full(layout), StagedMemory((2,)))
    return small.server(method, checkpoint=Checkpoint(state), **place)


def densities(server: Server) -> list[float]:
    return [report.metrics["density/global"] for report in small.run(server)]


# ── when


@pytest.mark.parametrize(
    ("rounds", "options", "stages"),
    [
        (100, {}, (10, 23, 37, 50)),  # a tenth, and thirds of 0.4 from there
        (10, {}, (1, 2, 4, 5)),
        (3, {}, (1, 2)),  # stages that fall together are one
        (100, {"stages": 1}, (10,)),
        (100, {"stages": 2, "start": 0.0, "until": 1.0}, (1, 100)),
        (60, {"stages": 3, "start": 0.5, "until": 0.5}, (30,)),
    ],
)
def test_stages_are_spread_over_the_run(
    rounds: int, options: dict[str, float], stages: tuple[int, ...]
) -> None:
    server = small.server(Staged(**options), schedule=Schedule(rounds=rounds, cohort=4))  # type: ignore[arg-type]
    server.setup()
    assert server.state.memory.stages == stages


def test_the_mask_moves_at_stages_only() -> None:
    found = densities(small.server(Staged(), schedule=EVERYBODY))  # stages 1, 2, 4, 5
    moved = [round for round in range(1, 11) if found[round] != found[round - 1]]
    assert moved == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"start": 0.6, "until": 0.5}, r"method\.start=0\.6 comes after method\.until=0\.5"),
        (
            {"initial_density": 0.3, "density": 0.5},
            r"method\.density=0\.5 is above method\.initial_density=0\.3",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunConfig.from_tree({"method": {"name": "staged", **options}, "tracking": {"uri": "none"}})


def test_with_a_threshold_the_target_does_not_matter() -> None:
    assert Staged(threshold=0.1, initial_density=0.3, density=0.5).check(small.setting(rounds=10)) is None


# ── how far: to a target


@pytest.mark.parametrize(
    ("schedule", "targets"),  # worked out by hand, from 1 to 0.1 in four steps
    [
        ("linear", [0.775, 0.55, 0.325, 0.1]),
        ("cubic", [0.4796875, 0.2125, 0.1140625, 0.1]),
        ("cosine", [0.868198, 0.55, 0.231802, 0.1]),
        ("geometric", [0.562341, 0.316228, 0.177828, 0.1]),
    ],
)
def test_each_stage_meets_its_target_to_one_weight(schedule: str, targets: list[float]) -> None:
    found = densities(small.server(Staged(schedule=schedule), schedule=EVERYBODY))  # type: ignore[arg-type]
    assert [round(found[stage] * WEIGHTS) for stage in (1, 2, 4, 5)] == [round(t * WEIGHTS) for t in targets]


def test_the_initial_model_is_pruned_by_magnitude() -> None:
    server = small.server(Staged(initial_density=0.5, density=0.25), schedule=EVERYBODY)
    before = server.state.params.clone()
    server.setup()
    weights, held = before["fc1.weight"].abs(), server.state.mask["fc1.weight"]
    assert int(held.sum()) == WEIGHTS // 2
    assert float(weights[held].min()) >= float(weights[~held].max())
    found = densities(server)
    # of four stages the first leaves 0.25 + (0.5 − 0.25) · (1 − 1/4)³ = 0.35546875
    assert round(found[0] * WEIGHTS) == round(0.35546875 * WEIGHTS)
    assert found[-1] == 0.25


# ── how far: by a threshold


def test_a_threshold_in_units_of_the_layer_means_the_same_in_each_layer() -> None:
    # means 0.55 and 55: half of that lies between the small and the large weights of each
    server = at_a_stage(Staged(lr=STILL, threshold=0.5), [1.0, 0.1], [100.0, 10.0])
    server.step()
    assert server.state.mask["a.weight"].flatten().tolist() == [True] * 32 + [False] * 32
    assert server.state.mask["b.weight"].flatten().tolist() == [True] * 6 + [False] * 6


def test_an_absolute_threshold_is_taken_as_it_is() -> None:
    method = Staged(lr=STILL, threshold=20.0, threshold_unit="absolute")
    server = at_a_stage(method, [1.0, 0.1], [100.0, 10.0])
    server.step()
    # the best weight of a layer stays, however little it scores; of equals the first one
    assert server.state.mask["a.weight"].flatten().tolist() == [True] + [False] * 63
    assert server.state.mask["b.weight"].flatten().tolist() == [True] * 6 + [False] * 6
    emptied = at_a_stage(replace(method, min_layer=0), [1.0, 0.1], [100.0, 10.0])
    emptied.step()
    assert not bool(emptied.state.mask["a.weight"].any())
    assert torch.equal(emptied.state.mask["b.weight"], server.state.mask["b.weight"])


def test_the_unit_is_the_mean_over_the_weights_held() -> None:
    # held are 1.0 and 0.4 with mean 0.7; with the 0.0 behind the mask it would be 0.35, and 0.4 would stay
    first = [1.0, 0.4, 0.0, 0.0]
    layout = at_a_stage(Staged(), first, [1.0]).place.model.layout
    held = Mask(torch.tensor([True] * 32 + [False] * 32 + [True] * 12), layout)
    server = at_a_stage(Staged(lr=STILL, threshold=0.6), first, [1.0], held)
    server.step()
    assert server.state.mask["a.weight"].flatten().tolist() == [True] * 16 + [False] * 48


def test_a_threshold_stops_at_the_floor() -> None:
    server = small.server(Staged(threshold=100.0, min_density=0.25), schedule=EVERYBODY)
    assert densities(server)[1:] == [0.25] * 10


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.floats(0.0, 2.0, width=32)] * 2), st.sampled_from(["magnitude", "gradient"]))
def test_a_higher_threshold_never_keeps_more(thresholds: tuple[float, float], importance: str) -> None:
    low, high = sorted(thresholds)
    first, second = (
        densities(
            small.server(
                # one stage: later ones see what other masks have learnt
                Staged(threshold=threshold, importance=importance, stages=1, min_density=0.01),  # type: ignore[arg-type]
                schedule=Schedule(rounds=1, cohort=4),
            )
        )[-1]
        for threshold in (low, high)
    )
    assert first >= second


def test_a_threshold_of_zero_keeps_everything_and_a_moderate_one_removes_at_each_stage() -> None:
    assert densities(small.server(Staged(threshold=0.0), schedule=EVERYBODY)) == [1.0] * 11
    found = densities(small.server(Staged(threshold=0.3), schedule=EVERYBODY))
    assert found[0] == 1.0 > found[1] > found[5] > 0.1


# ── by what


def importance(server: Server) -> torch.Tensor:
    """Return the mean over all clients' examples of each client's |g·w|, of fc1.weight, with plain torch."""
    place, params = server.place, server.state.params
    total = torch.zeros(params.layout.size)
    for info in place.population:
        rows = place.population.partition.rows(info.id)
        x = place.dataset.normalise(place.dataset.train.x[rows])
        module = place.model.bind(params.flat.clone())
        loss = cross_entropy(module(x), torch.from_numpy(place.dataset.train.y[rows]))
        gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        total += (gradients * params.flat).abs() * info.num_examples
    return total[params.layout.spans["fc1.weight"]] / sum(info.num_examples for info in place.population)


@pytest.mark.parametrize("by_threshold", [False, True])
@pytest.mark.parametrize("sizes", [(15, 15, 15, 15, 15, 15), (1, 90, 1, 1, 1, 1)])
def test_gradient_importance_is_the_mean_of_what_the_clients_find(
    sizes: tuple[int, ...], by_threshold: bool
) -> None:
    place: dict[str, Any] = {"schedule": EVERYBODY, "partition": small.dealt(*sizes)}
    scores = importance(small.server(Staged(), **place))
    best = scores.topk(33)
    options: dict[str, Any] = {"density": 0.25}
    if by_threshold:  # between the 32nd and the 33rd
        options = {"threshold": float(best.values[31:].mean()), "threshold_unit": "absolute"}
    server = small.server(Staged(importance="gradient", stages=1, lr=STILL, **options), **place)
    server.setup()
    server.step()
    held = server.state.mask["fc1.weight"].flatten()
    assert set(held.nonzero().flatten().tolist()) == set(best.indices[:32].tolist())


def test_gradient_importance_uploads_one_value_for_each_weight_held() -> None:
    server = small.server(Staged(importance="gradient", density=0.25), schedule=EVERYBODY)
    server.setup()
    codec = Codec()
    for round in range(1, 7):
        mask = server.state.mask
        plain = codec.size(mask, known=mask.digest)
        (paid,) = {record.cost.bytes_up for record in server.step().clients}
        if round in (1, 2, 4, 5):
            scores = paid - plain - 4 * mask.count  # what is left are the name and the shape of the vector
            assert 0 < scores < 150
        else:
            assert paid == plain


def test_a_stage_that_nobody_answers_prunes_nothing() -> None:
    for importance in ("magnitude", "gradient"):
        method = Staged(importance=importance)
        server = small.server(method, schedule=EVERYBODY, rules=Rules(deadline_s=1e-6))
        assert densities(server) == [1.0] * 11


# ── and for good


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"importance": "gradient"}])
def test_what_is_pruned_stays_pruned(options: dict[str, object]) -> None:
    server = small.server(Staged(momentum=0.9, weight_decay=0.01, **options), schedule=EVERYBODY)  # type: ignore[arg-type]
    server.setup()
    for _ in range(10):
        before = server.state.mask
        server.step()
        assert not bool((server.state.mask.flat & ~before.flat).any())
        assert not bool(server.model.flat[~server.state.mask.flat].any())


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"density": 0.3, "importance": "gradient"},
        {"threshold": 0.5, "threshold_unit": "absolute"},
        {"threshold": 0.0, "importance": "gradient"},
    ],
)
def test_large_values_behind_the_mask_are_not_brought_back(options: dict[str, Any]) -> None:
    first = [1.0, 0.5, 1000.0, 1000.0]
    method = Staged(lr=STILL, **options)
    layout = at_a_stage(method, first, [1.0]).place.model.layout
    held = Mask(torch.tensor([True] * 32 + [False] * 32 + [True] * 12), layout)
    server = at_a_stage(method, first, [1.0], held)
    server.step()
    assert not bool(server.state.mask.flat[32:64].any())
    assert not bool(server.model.flat[32:64].any())
