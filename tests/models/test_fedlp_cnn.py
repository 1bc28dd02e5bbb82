"""FedLP's network: published sizes, exits that share its layers, and the cost of a pass through an exit."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from fedray.costs.flops import FlopModel
from fedray.errors import ConfigError
from fedray.models import MODELS, InputShape, ModelSpec, build_model
from fedray.models.fedlp_cnn import along, exits_of
from fedray.types import Mask

DIGITS, MNIST, CIFAR10 = (1, 8, 8), (1, 28, 28), (3, 32, 32)
PLAIN, EXITS = (build_model(name, CIFAR10, 10) for name in ("fedlp_cnn", "fedlp_cnn_exits"))
PATHS = exits_of(EXITS.module)
NORMALISED = [2 * 32 * 32 * 32, 32 * 32 * 32 // 2, 32 * 32 * 32 // 2, 32 * 32 * 32 // 4, 32 * 32 * 32 // 4]
"""Entries that the BatchNorm layers of each block normalise, per image."""


def learnable(spec: ModelSpec, modules: set[str] | tuple[str, ...]) -> int:
    """Count the parameters of some modules, without running statistics."""
    layout = spec.layout
    flags = zip(layout.names, layout.shapes, layout.trainable, strict=True)
    return sum(prod(shape) for name, shape, train in flags if train and name.split(".")[0] in modules)


def held_by(exit: int) -> Mask:
    """Return the mask of an exit's layers and its head."""
    mask = Mask.none(EXITS.layout)
    for name in mask:
        mask[name].fill_(name.split(".")[0] in PATHS[exit - 1])
    return mask


def test_the_network_has_half_the_published_count_which_is_of_both_directions() -> None:
    count = learnable(PLAIN, {name for name, _ in PLAIN.module.named_children()})
    assert count == 551_466
    assert round(2 * count / 1000, 2) == 1102.93


def test_with_exits_it_is_the_same_network_and_heads() -> None:
    plain, exits = PLAIN.init(3), EXITS.init(3)
    assert all(torch.equal(plain[name], exits[name]) for name in plain)
    heads = [8192 * 128 + 128, 4096 * 128 + 128, 4096 * 128 + 128, 2048 * 128 + 128]
    added = [learnable(EXITS, {f"exit{k}"}) for k in (1, 2, 3, 4)]
    assert added == [head + 128 * 10 + 10 for head in heads]
    assert EXITS.layout.size - PLAIN.layout.size == sum(added) == 2_364_968
    images = torch.randn(3, *CIFAR10, generator=torch.Generator().manual_seed(0))
    logits = [spec.bind(params.flat).eval()(images) for spec, params in ((PLAIN, plain), (EXITS, exits))]
    assert torch.equal(*logits)


def test_the_classifier_is_the_last_layer_and_not_a_head() -> None:
    for spec in (PLAIN, EXITS):
        assert spec.head == "classifier.fc2"
        assert "classifier.fc2.weight" not in spec.layout.prunable_names
        assert "classifier.fc1.weight" in spec.layout.prunable_names
    assert "exit4.fc2.weight" in EXITS.layout.prunable_names


def test_exits_grow_by_one_block_each_and_end_in_the_whole_network() -> None:
    assert exits_of(MODELS["fedlp_cnn_exits"].build) == PATHS
    for shallow, deep in pairwise(PATHS):
        assert deep[: len(shallow) - 1] == shallow[:-1]
        assert len(deep) == len(shallow) + 1
    assert {len(set(path) - set(PATHS[-1])) for path in PATHS[:-1]} == {1}
    assert exits_of(PLAIN.module) == exits_of(MODELS["cnn"].build) == ()


@pytest.mark.parametrize("input_shape", [DIGITS, MNIST, CIFAR10, (1, 9, 17)])
def test_every_exit_trains_on_every_size_and_on_one_example(input_shape: InputShape) -> None:
    spec = build_model("fedlp_cnn_exits", input_shape, 7)
    module = spec.bind(spec.init(0).flat)
    for path in PATHS:
        for n in (2, 1):
            module.zero_grad(set_to_none=True)
            images = torch.randn(n, *input_shape, generator=torch.Generator().manual_seed(n))
            logits = along(module, path, images)
            assert logits.shape == (n, 7)
            nn.functional.cross_entropy(logits, torch.arange(n)).backward()
            moved = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}
            assert moved == set(path)
            assert all(p.grad.abs().sum() > 0 for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["fedlp_cnn", "fedlp_cnn_exits"])
def test_too_small_an_image_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model: {name} halves .* at least 8×8; got 7×9"):
        build_model(name, (1, 7, 9), 10)


def test_channels_can_be_taken_out_of_the_network_and_not_where_exits_take_them_in() -> None:
    groups = {group.name: group for group in PLAIN.channel_groups}
    assert list(groups) == [
        *("block1.conv1", "block1.conv2", "block2.conv3", "block3.conv4", "block4.conv5", "block5.conv6"),
        "classifier.fc1",
    ]
    assert groups["block5.conv6"].columns == "classifier.fc1.weight"
    assert groups["block5.conv6"].spread == 16
    assert EXITS.channel_groups == ()


def test_multiply_adds_of_the_sub_models_are_the_published_ones() -> None:
    flops = FlopModel.trace(EXITS.module, CIFAR10, EXITS.layout)
    adds = [flops.forward(held_by(k)) / 2 for k in (1, 2, 3, 4, 5)]
    assert adds[0] == 1024 * 32 * (3 + 32) * 9 + 8192 * 128 + 1280
    assert adds[4] == flops.dense() / 2 == 38_896_896
    # the published counts add four operations for each entry that is normalised
    counted = [(a + 4 * sum(NORMALISED[: k + 1])) / 1e6 for k, a in enumerate(adds)]
    assert counted[4] == pytest.approx(39.36, abs=0.005)  # published as 36.36
    counted[4] = 36.36
    for preferred, published in ((1, 17.73), (3, 24.62)):
        shares = [0.6 if k == preferred else 0.1 for k in (1, 2, 3, 4, 5)]
        assert sum(s * c for s, c in zip(shares, counted, strict=True)) == pytest.approx(published, abs=0.01)
    assert sum(counted) / 5 == pytest.approx(23.83, abs=0.01)


def test_a_pass_through_an_exit_costs_its_layers_and_head_on_any_device() -> None:
    flops = FlopModel.trace(EXITS.module, CIFAR10, EXITS.layout)
    for exit in (1, 2, 3, 4, 5):
        mask = held_by(exit)
        assert flops.structured(mask) == flops.executed_forward(mask, "nothing") == flops.forward(mask)
        assert flops.train(mask, dense_gradient=True) == flops.train(mask) == 3 * flops.forward(mask)
    costs = [flops.forward(held_by(exit)) for exit in (1, 2, 3, 4, 5)]
    assert costs == sorted(costs)


def test_heads_cost_nothing_where_the_whole_network_runs() -> None:
    flops = FlopModel.trace(EXITS.module, CIFAR10, EXITS.layout)
    plain = FlopModel.trace(PLAIN.module, CIFAR10, PLAIN.layout)
    full = Mask.full(EXITS.layout)
    assert flops.dense() == flops.forward(full) == plain.dense()
    full["block1.conv1.weight"][0] = False
    thinner = Mask.full(PLAIN.layout)
    thinner["block1.conv1.weight"][0] = False
    assert flops.forward(Mask(full.flat, EXITS.layout)) == plain.forward(thinner) < plain.dense()
    assert flops.executed_forward(full, "nothing") == plain.dense()
