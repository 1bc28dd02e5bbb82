"""No method leaves a layer without a weight, unless it is told that it may; the density stays as asked."""

from collections import OrderedDict
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from fedray.config.run_config import RunConfig
from fedray.federation.method import Method
from fedray.federation.server import Schedule, Server
from fedray.methods import METHODS
from fedray.methods.frlp import FRLP
from fedray.methods.staged import Staged
from fedray.models.spec import Architecture, InputShape
from fedray.pruning.masks import empty_layers, top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Task
from tests import small

HIDDEN = 8
"""Narrow layers; those in the middle start with weights far smaller than the others'."""


def _deep(input_shape: InputShape, num_classes: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = prod(input_shape)
    for index in range(5):
        layers[f"fc{index}"] = nn.Linear(inputs, HIDDEN)
        layers[f"relu{index}"] = nn.ReLU()
        inputs = HIDDEN
    layers["head"] = nn.Linear(inputs, num_classes)
    module = nn.Sequential(layers)
    for index in (1, 2, 3):
        with torch.no_grad():
            layers[f"fc{index}"].weight.mul_(0.2)  # type: ignore[operator]
    return module


DEEP = Architecture(_deep, lambda shape: None, "made up", "five hidden layers of 8")
"""128 + 4 · 64 = 384 prunable weights."""
WEIGHTS, LAYERS = 384, 5

LOW: dict[str, dict[str, Any]] = {
    "staged": {"density": 0.02, "until": 0.7},
    "threshold": {"name": "staged", "threshold": 30.0, "min_density": 0.02},
    "initial": {"name": "staged", "density": 0.02, "initial_density": 0.02},
    "gradient": {"name": "staged", "density": 0.02, "importance": "gradient"},
    "snip": {"density": 0.02},
    "random_mask": {"density": 0.02},
    "uniform": {"name": "random_mask", "density": 0.005, "distribution": "uniform"},
    "frlp": {
        "min_density": 0.02,
        "single_shot": 0.98,
        "samples": 2,
        "tolerance": 1e-9,
        "prune_rounds": [1, 2],
    },
    "autoflip": {"threshold": 0.97},
    "robust": {"name": "autoflip", "threshold": 0.97, "scaling": "robust"},
    "agreement": {"name": "autoflip", "threshold": 0.97, "agreement": 1.0},
    "ceafl": {"initial_density": 0.02, "min_density": 0.015, "kappa0": 0.5},
    "fedmef": {"density": 0.015, "nsconv": False},
    "prunefl": {"drop": 1.0, "max_density": 0.02, "interval": 1},
    "pqsu": {"density": 0.05},
    "fedavg_small": {"density": 0.05},
}
"""Methods, and options that prune a deep and narrow network hard."""
PROTECTS = {"staged", "threshold", "initial", "snip", "uniform", "robust", "gradient"}
"""Those of them that empty a layer of it where they may."""


def masks_of(key: str, **more: Any) -> tuple[Server, list[Mask]]:
    options = {"lr": 0.01} | LOW[key] | more
    if "prune_rounds" in options:
        options["prune_rounds"] = tuple(options["prune_rounds"])
    method: Method = METHODS[str(options.pop("name", key))](**options)
    server = small.server(method, schedule=Schedule(3, 4), server_rows=30, architecture=DEEP)
    found = []
    for make in (server.setup, *[server.step] * 3):
        make()
        found.append(server.state.mask)
    return server, found


@pytest.mark.parametrize("key", LOW)
def test_every_layer_keeps_a_weight(key: str) -> None:
    server, found = masks_of(key)
    assert all(not empty_layers(mask) for mask in found)
    assert found[-1].density < 0.1
    if (target := server.method.target) is not None and key not in ("pqsu", "fedavg_small", "uniform"):
        # shares of each layer are rounded layer by layer
        apart = abs(round(found[-1].density * WEIGHTS) - round(target * WEIGHTS))
        assert apart <= (LAYERS / 2 if key in ("random_mask", "fedmef") else 0)


@pytest.mark.parametrize("key", sorted(PROTECTS))
def test_it_may_be_switched_off(key: str) -> None:
    _, found = masks_of(key, min_layer=0)
    assert empty_layers(found[-1])


@pytest.mark.parametrize("key", ["staged", "snip", "random_mask", "fedmef"])
def test_a_larger_minimum(key: str) -> None:
    _, found = masks_of(key, min_layer=3, density=0.05)
    held = [int(found[-1][name].count_nonzero()) for name in found[-1].layout.prunable_names]
    assert min(held) >= 3
    assert abs(sum(held) - round(0.05 * WEIGHTS)) <= (LAYERS / 2 if key in ("random_mask", "fedmef") else 0)


def test_actions_keep_a_weight_in_each_layer() -> None:
    """A bandit tries each of them."""
    method = Staged(policy="bandit", min_density=0.001, rollback=99.0, initial_density=0.03, stages=7)

    def emptied(method: Method) -> list[bool]:
        server = small.server(method, schedule=Schedule(8, 4), architecture=DEEP)
        found = []
        for make in (server.setup, *[server.step] * 8):
            make()
            found.append(bool(empty_layers(server.state.mask)))
        assert server.state.mask.density < 0.03
        return found

    assert not any(emptied(method))
    assert any(emptied(replace(method, min_layer=0)))


def test_a_client_that_reprunes_keeps_a_weight_in_each_layer() -> None:
    method = FRLP(zeros="reprune", lr=0.01)
    client = small.client(method, architecture=DEEP)
    params = client.model.init(0)
    task = Task(params, top_k(magnitude(params), 0.02, params.layout, min_layer=1))
    kept = method.client_update(task, client).mask
    assert not empty_layers(kept) and kept.density == task.mask.density
    assert empty_layers(replace(method, min_layer=0).client_update(task, client).mask)


def test_a_layer_that_is_emptied_all_the_same_is_named_once() -> None:
    server = small.server(
        Staged(density=0.02, until=0.7, min_layer=0), schedule=Schedule(4, 4), architecture=DEEP
    )
    noted = [note for report in small.run(server) for note in report.notes if "has no weight left" in note]
    lost = empty_layers(server.state.mask)
    assert len(lost) >= 2
    assert sorted(note.split()[0] for note in noted) == sorted(lost)
    again = small.server(
        server.method, schedule=Schedule(6, 4), architecture=DEEP, checkpoint=server.checkpoint
    )
    assert not [note for report in small.run(again) for note in report.notes]


DIGESTS = {
    "fedavg": "f15d571bee15",
    "fedavg_server": "b36ed09a6ead",
    "fedavg_small": "e45353127309",
    "fedavg_warm": "38da8f007436",
    "random_mask": "fa0d8fb3aa19",
    "staged": "f7c55f4f74da",
    "snip": "7050a6d4608c",
    "frlp": "191056e989b9",
    "prunefl": "3c5c1de3e78d",
    "autoflip": "159e4a044909",
    "fedlp": "167918a90d6c",
    "pqsu": "cd71f358e1ce",
    "ceafl": "01525a98cca6",
    "fedmef": "81a860b94cf9",
}
"""Of the default configs, before there was the option."""


@pytest.mark.parametrize("name", DIGESTS)
def test_a_config_of_before_keeps_its_digest(name: str) -> None:
    def digest(**options: Any) -> str:
        tree = {"method": {"name": name, **options}, "data": {"server_fraction": 0.1}}
        return RunConfig.from_tree(tree).digest

    assert digest() == digest(min_layer=1) == DIGESTS[name]
    assert digest(min_layer=0) != digest() != digest(min_layer=2)
