"""The narrower dense model: as many weights as asked for, and nothing but FedAvg of such a network."""

from collections import OrderedDict
from math import prod, sqrt

import numpy as np
import pytest
from torch import nn

from fedray.config.run_config import RunConfig
from fedray.costs.codec import DIGEST_BYTES, HEADER_BYTES
from fedray.errors import ConfigError
from fedray.federation.method import Method
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.methods.fedavg_small import FedAvgSmall
from fedray.models.spec import Architecture, InputShape
from fedray.types import Mask, Params, ServerState
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable: 8 units of 16."""
SCHEDULE = Schedule(rounds=3, cohort=4)


def narrow_mlp(input_shape: InputShape, num_classes: int) -> nn.Module:
    """small.MLP with 2 hidden units instead of 8."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(prod(input_shape), 2),
            relu=nn.ReLU(),
            fc2=nn.Linear(2, num_classes),
        )
    )


NARROW = Architecture(narrow_mlp, small.MLP.accepts, "made up", "fc 2, fc classes; ReLU")


def begin(density: float, architecture: Architecture = small.MLP) -> Server:
    server = small.server(FedAvgSmall(density=density), architecture=architecture, schedule=SCHEDULE)
    server.setup()
    return server


@pytest.mark.parametrize(
    ("density", "units"), [(0.125, 1), (0.25, 2), (0.3, 2), (0.32, 3), (0.9, 7), (0.95, 8), (1.0, 8)]
)
def test_the_first_units_are_kept_as_many_as_come_nearest(density: float, units: int) -> None:
    mask = begin(density).state.mask
    assert mask["fc1.weight"].all(1).tolist() == [True] * units + [False] * (8 - units)
    assert mask["fc1.bias"].tolist() == mask["fc2.weight"][0].tolist() == mask["fc1.weight"].all(1).tolist()
    assert bool(mask["fc2.bias"].all())
    assert mask.density == units / 8


def test_every_layer_keeps_the_same_share() -> None:
    server = begin(0.25, small.CNN)
    mask = server.state.mask
    # 2 of 4 and 3 of 6 channels: (2 · 9 + 3 · 2 · 9) of 252 weights
    assert bool(mask["conv1.weight"][:2].all()) and not bool(mask["conv1.weight"][2:].any())
    assert bool(mask["conv2.weight"][:3, :2].all()) and not bool(mask["conv2.weight"][3:].any())
    assert mask.density == (2 * 9 + 3 * 2 * 9) / 252


def test_it_is_fedavg_of_a_network_that_was_built_so_narrow() -> None:
    server = begin(0.25)
    held = server.state.mask.flat
    narrow = small.server(Method(), architecture=NARROW, schedule=SCHEDULE)
    layout = narrow.place.model.layout
    start = Params(server.state.params.flat[held], layout)
    narrow.checkpoint = Checkpoint(ServerState(0, start, Mask.full(layout)))
    reports, others = small.run(server), small.run(narrow)[1:]
    np.testing.assert_allclose(server.model.flat[held].numpy(), narrow.model.flat.numpy(), atol=1e-6)
    assert server.model.flat[~held].count_nonzero() == 0
    for report, other in zip(reports, others, strict=True):
        assert report.metrics["flops/clients"] == other.metrics["flops/clients"]
        assert report.metrics["flops/executed"] == other.metrics["flops/executed"]
        assert report.metrics["val/accuracy"] == other.metrics["val/accuracy"]
        assert report.metrics["train/loss"] == pytest.approx(other.metrics["train/loss"], abs=1e-6)
        # the one price of being a part of the whole model: a mask has a name
        assert report.metrics["bytes/up"] == other.metrics["bytes/up"] + 4 * DIGEST_BYTES
    assert others[-1].metrics["bytes/up"] == 4 * (HEADER_BYTES + 4 * int(held.sum()))


def test_it_starts_in_the_scale_of_its_own_initialisation() -> None:
    server = begin(0.25)
    initial, params = server.place.model.init(0), server.state.params
    assert params["fc1.weight"].equal(initial["fc1.weight"])
    for name in ("fc2.weight", "fc2.bias"):  # it has 2 inputs instead of 8
        assert params[name].equal(initial[name] * 2.0)
        assert params[name].abs().max() <= 1 / sqrt(2)
        assert initial[name].abs().max() <= 1 / sqrt(8)


def test_at_density_1_it_is_fedavg() -> None:
    server, fedavg = begin(1.0), small.server(Method(), schedule=SCHEDULE)
    small.run(server)
    small.run(fedavg)
    assert server.model == fedavg.model


def test_the_mask_stays_for_the_run_and_nothing_grows() -> None:
    server = begin(0.25, small.CNN)
    mask = server.state.mask
    for _ in range(3):
        server.step()
        assert server.state.mask == mask
        assert server.model.flat[~mask.flat].count_nonzero() == 0


def test_what_cannot_be_so_narrow_is_refused() -> None:
    said = FedAvgSmall(density=0.1).check(small.setting())
    assert said is not None and said.startswith("method.density=0.1 cannot be reached")
    assert FedAvgSmall(density=0.125).check(small.setting()) is None
    said = FedAvgSmall().check(small.setting(architecture=small.LINEAR))
    assert said is not None and said.startswith("model=small has no channels")
    tree = {"method": {"name": "fedavg_small", "density": 1e-5}, "model": "mlp", "tracking": {"uri": "none"}}
    with pytest.raises(ConfigError, match=r"method\.density=1e-05 cannot be reached.*mlp has 0\.005"):
        RunConfig.from_tree(tree)
