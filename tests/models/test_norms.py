"""A model's BatchNorm under each policy: layers, entries, and the part that is sent."""

from functools import partial
from math import gcd

import pytest
import torch
from hypothesis import given, strategies
from torch import nn

from fedray.errors import ConfigError
from fedray.models import Architecture, InputShape, ModelSpec, build_model
from fedray.models.norms import Norm, Norms, overlaid
from fedray.types import Mask, Params
from tests import small

NORM_NAMES = ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
"""Of small.CNN: four channels, so 16 of its 349 entries, 8 of them running statistics."""


def cnn(norm: Norm = "average") -> ModelSpec:
    return ModelSpec.of("small", small.CNN, small.SHAPE, small.CLASSES, norm=norm)


NORMS: Norms = cnn("local").norms


def of_channels(*channels: int) -> Architecture:
    """Return a network of BatchNorm layers with these numbers of channels."""

    def build(input_shape: InputShape, num_classes: int) -> nn.Module:
        return nn.Sequential(*map(nn.BatchNorm2d, channels), nn.Flatten(), nn.Linear(1, num_classes))

    return Architecture(build, small.CNN.accepts, "made up", "BatchNorms")


@pytest.mark.parametrize("norm", ["average", "local", "static"])
def test_three_policies_have_the_same_entries_and_the_same_initial_bits(norm):
    spec, plain = cnn(norm), ModelSpec.of("small", small.CNN, small.SHAPE, small.CLASSES)
    assert spec.layout == plain.layout and spec.layout.size == 349
    assert spec.init(3) == plain.init(3)
    assert spec.norms.names == NORM_NAMES and spec.norms.tracked == ("bn1",)
    values = Params(torch.arange(349.0), spec.layout)
    assert values.flat[spec.norms.entries].tolist() == [v for n in NORM_NAMES for v in values[n].tolist()]
    assert values.flat[spec.norms.statistics].tolist() == [
        v for n in NORM_NAMES[2:] for v in values[n].tolist()
    ]


def test_group_replaces_the_layer_and_leaves_the_rest_as_it_was():
    spec, plain = cnn("group"), cnn()
    assert not spec.norms.names
    assert set(plain.layout.names) - set(spec.layout.names) == set(NORM_NAMES[2:])
    assert spec.layout.names == tuple(n for n in plain.layout.names if n not in NORM_NAMES[2:])
    before, after = plain.init(3), spec.init(3)
    assert all(torch.equal(after[name], before[name]) for name in spec.layout.names)
    norm = spec.bind(after.flat).get_submodule("bn1")
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 4
    # which mixes channels, so that none can be taken out before it
    assert [group.name for group in plain.channel_groups] == ["conv1", "conv2"]
    assert [group.name for group in spec.channel_groups] == ["conv2"]


def test_a_group_norm_has_as_many_groups_as_32_and_its_channels_allow():
    channels = (1, 6, 32, 48, 64, 100, 512)
    spec = ModelSpec.of("small", of_channels(*channels), small.SHAPE, small.CLASSES, norm="group")
    norms = [layer for layer in spec.module.modules() if isinstance(layer, nn.GroupNorm)]
    assert [layer.num_groups for layer in norms] == [1, 2, 32, 16, 32, 4, 32]
    assert [gcd(32, c) for c in channels] == [layer.num_groups for layer in norms]


def test_group_keeps_what_a_batch_norm_was_made_with():
    layer = nn.BatchNorm2d(4, eps=0.5)
    nn.init.constant_(layer.weight, 0.0)  # as some start the last one of a residual block
    architecture = Architecture(
        lambda shape, classes: nn.Sequential(layer, nn.Flatten(), nn.Linear(4, classes)),
        small.CNN.accepts,
        "made up",
        "BatchNorm that starts at zero",
    )
    spec = ModelSpec.of("small", architecture, small.SHAPE, small.CLASSES, norm="group")
    norm = spec.bind(spec.init(0).flat).get_submodule("0")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.eps == 0.5 and norm.weight.tolist() == [0.0] * 4


def test_group_refuses_batch_norm_of_vectors():
    network = partial(nn.Sequential, nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    architecture = Architecture(lambda *_: network(), small.CNN.accepts, "made up", "BatchNorm1d")
    with pytest.raises(ConfigError, match=r"norm: group replaces BatchNorm2d only, and 1 is a BatchNorm1d"):
        ModelSpec.of("small", architecture, small.SHAPE, small.CLASSES, norm="group")


def test_static_tracks_nothing_in_training_and_evaluates_with_what_it_is_given():
    spec, x = cnn("static"), torch.rand(5, *small.SHAPE, generator=torch.Generator().manual_seed(0))
    params = spec.init(0)
    params["bn1.running_mean"].fill_(0.25)
    before = params.clone()
    module, usual = spec.bind(params.flat), cnn().bind(before.clone().flat)
    assert torch.equal(module.train()(x), usual.train()(x)), "both normalise a batch by its own statistics"
    assert params == before
    untouched = cnn().bind(before.clone().flat)
    assert torch.equal(module.eval()(x), untouched.eval()(x))


def test_a_nested_network_changes_all_its_layers():
    spec = build_model("resnet18", (3, 32, 32), 10, norm="group")
    kinds = [type(layer) for layer in spec.module.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(nn.GroupNorm) == 20
    assert not spec.channel_groups


# ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("norm", ["average", "static", "group"])
def test_everything_is_sent_unless_norms_stay(norm):
    spec = cnn(norm)
    mask, params = Mask.full(spec.layout), spec.init(0)
    norms = spec.norms
    assert norms.sent_layout is spec.layout and not norms.private
    assert norms.sent_mask(mask) is norms.shared_mask(mask) is norms.global_mask(mask) is mask
    assert norms.sent(params) is norms.received(params) is params


def test_norms_that_stay_are_no_part_of_the_wire():
    norms = cnn("local").norms
    assert norms.sent_layout.names == tuple(n for n in norms.layout.names if n not in NORM_NAMES)
    full = Mask.full(norms.layout)
    assert norms.sent_mask(full).is_full and norms.sent_mask(full).count == 349 - 16
    assert norms.shared_mask(full).count == 349 - 16
    assert norms.global_mask(full).count == 349 - 8
    assert all(not norms.shared_mask(full)[name].any() for name in NORM_NAMES)
    assert norms.shared_mask(full) is norms.shared_mask(Mask.full(norms.layout)), "remembered by its bits"


@given(strategies.integers(0, 2**32 - 1))
def test_what_is_sent_arrives_where_it_was(seed):
    norms, generator = NORMS, torch.Generator().manual_seed(seed)
    params = Params(torch.randn(349, generator=generator), norms.layout)
    mask = Mask(torch.rand(349, generator=generator) < 0.5, norms.layout)
    sent = norms.sent(params).masked(norms.sent_mask(mask))
    assert norms.received(sent) == params.masked(norms.shared_mask(mask))
    assert norms.sent_mask(mask).density == norms.shared_mask(mask).density == mask.density


def test_many_masks_are_not_all_remembered():
    norms = cnn("local").norms
    masks = []
    for index in range(20):
        flat = torch.ones(349, dtype=torch.bool)
        flat[index] = False
        masks.append(Mask(flat, norms.layout))
    assert [norms.shared_mask(mask).count for mask in masks] == [349 - 16 - 1] * 20
    assert len(norms._shared) == 8


def test_overlaid_by_hand():
    layout = cnn().layout
    params = Params(torch.zeros(349), layout)
    flat = torch.ones(349, dtype=torch.bool)
    flat[5] = False
    index, values = torch.tensor([3, 5, 7]), torch.tensor([1.0, 2.0, 3.0])
    assert overlaid(params, index, values).flat[:8].tolist() == [0, 0, 0, 1, 0, 2, 0, 3]
    assert overlaid(params, index, values, Mask(flat, layout)).flat[:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 3]
    assert not params.flat.any()
