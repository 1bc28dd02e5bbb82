"""Channels read from the structure of a network: where they are found, where not, and that they are right."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedray.models import MODELS, Architecture, ModelSpec, build_model
from fedray.models.channels import channel_groups, sequential
from fedray.pruning.channels import best_channels, cannot_narrow, channel_mask, shrink
from fedray.types import ChannelGroup
from tests import small

SHAPES = ((1, 8, 8), (1, 28, 28), (3, 32, 32), (80,))
"""A model is built here for the first shape that it takes."""


@pytest.fixture(scope="module")
def built() -> dict[str, ModelSpec]:
    """Every model of the table, for small images or sequences."""
    shapes = {n: next(s for s in SHAPES if a.accepts(s) is None) for n, a in MODELS.items()}
    return {name: build_model(name, shape, 10) for name, shape in shapes.items()}


def groups_of(*layers: nn.Module) -> list[tuple[str, str, int]]:
    """Return (who makes the channels, who takes them in, columns of each) for layers in a row."""
    module = nn.Sequential(*layers)
    return [(g.name, g.columns, g.spread) for g in channel_groups(sequential(module))]


# ── where they are found


def test_the_groups_of_a_small_network_by_hand() -> None:
    spec = ModelSpec.of("small", small.CNN, small.SHAPE, small.CLASSES)
    norm = ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    assert spec.channel_groups == (
        ChannelGroup("conv1", 4, ("conv1.weight", *norm), "conv2.weight", 1),  # conv1 has no bias
        ChannelGroup("conv2", 6, ("conv2.weight", "conv2.bias"), "fc.weight", 4),  # of 2×2 pixels each
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlp", [200]),
        ("mlp_wide", [512, 512]),
        ("lenet5", [6, 16, 120, 84]),
        ("cnn", [32, 64, 512]),
        ("vgg11", [64, 128, 256, 256, *[512] * 6]),
        ("vgg19_bn", [*[64] * 2, *[128] * 2, *[256] * 4, *[512] * 10]),
        ("resnet18", [64, 64, 128, 128, 256, 256, 512, 512]),
    ],
)
def test_the_widths_of_the_built_in_models(name: str, sizes: list[int], built: dict[str, ModelSpec]) -> None:
    assert [group.size for group in built[name].channel_groups] == sizes


def test_only_the_inside_of_a_residual_block_can_be_narrower(built: dict[str, ModelSpec]) -> None:
    groups = built["resnet18"].channel_groups
    assert [g.name for g in groups] == [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [g.columns for g in groups] == [f"layer{i}.{j}.conv2.weight" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert groups[2].rows == (
        "layer2.0.conv1.weight",
        *(f"layer2.0.bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    )


def test_nested_sequences_are_one_chain() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.Dropout()))
    assert groups_of(nn.Linear(3, 5), inner, nn.Identity(), nn.Linear(4, 2)) == [
        ("0", "1.1.0.weight", 1),
        ("1.1.0", "3.weight", 1),
    ]


@pytest.mark.parametrize(
    ("between", "spread"),
    [
        ([nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()], 16),
        ([nn.AvgPool2d(4), nn.Flatten()], 4),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout()], 1),
        ([nn.BatchNorm2d(6), nn.AdaptiveMaxPool2d(3), nn.Flatten()], 9),
    ],
)
def test_flattened_channels_enter_several_columns(between: list[nn.Module], spread: int) -> None:
    assert groups_of(nn.Conv2d(1, 6, 3), *between, nn.Linear(6 * spread, 2)) == [
        ("0", f"{1 + len(between)}.weight", spread)
    ]


# ── where not


@pytest.mark.parametrize(
    "between",
    [
        nn.GroupNorm(2, 6),  # groups are of neighbouring channels
        nn.LayerNorm([6, 2, 2]),
        nn.Softmax(1),
        nn.PixelShuffle(1),
        nn.Bilinear(6, 6, 6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_mixes_channels_or_is_not_known_ends_a_chain(between: nn.Module) -> None:
    assert groups_of(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), between, nn.Conv2d(6, 2, 3)) == [
        ("0", "2.weight", 1)
    ]


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 3)),  # depthwise: a row is tied to an input
        (nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=2)),
        (nn.Conv2d(1, 6, 3), nn.Conv2d(12, 2, 3)),  # some reshaping that is not seen
        (nn.Conv2d(1, 6, 3), nn.Linear(32, 2)),  # 32 columns cannot be shared among 6
    ],
)
def test_layers_that_do_not_fit_each_other_are_no_group(producer: nn.Module, consumer: nn.Module) -> None:
    assert groups_of(producer, nn.ReLU(), consumer) == []


def test_a_layer_that_is_called_twice_has_no_channels_of_its_own() -> None:
    layer, norm = nn.Linear(8, 8), nn.GroupNorm(1, 8)
    assert groups_of(nn.Linear(16, 8), nn.ReLU(), layer, nn.ReLU(), layer, nn.Linear(8, 3)) == []
    assert groups_of(nn.Conv2d(1, 8, 1), norm, nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 4, 1)) == []
    relu = nn.ReLU()
    assert groups_of(nn.Linear(4, 5), relu, nn.Linear(5, 6), relu, nn.Linear(6, 3)) == [
        ("0", "2.weight", 1),
        ("2", "4.weight", 1),
    ]


class Residual(nn.Sequential):
    """A sequence that adds its input to its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + super().forward(x)
        return out


class Doubled(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], 1)


def tied() -> tuple[nn.Module, ...]:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return first, nn.ReLU(), second, nn.Linear(16, 3)


def hooked() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda module, args, output: output.flip(1))
    return layer


@pytest.mark.parametrize(
    ("layers", "where"),
    [
        ((nn.Linear(16, 6), Residual(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)), []),
        ((nn.Linear(16, 6), nn.ReLU(), Residual(nn.Linear(6, 6)), nn.Linear(6, 3)), []),
        ((nn.Linear(16, 6), Doubled(), nn.Linear(12, 3)), []),
        ((nn.Linear(16, 6), hooked(), nn.Linear(6, 3)), []),
        ((nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(16, 3)), []),  # a channel is a row, not some columns
        ((nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(8, 3)), []),  # takes in the last side of the image
        ((nn.Linear(28, 4), nn.Flatten(), nn.Linear(112, 3)), []),  # of each row: channels come last
        ((nn.Conv2d(1, 4, 3), nn.Unflatten(1, (2, 2)), nn.Flatten(1), nn.Linear(16, 3)), []),
        (
            (nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
            [0, 2],
        ),
    ],
    ids=lambda value: "-".join(type(m).__name__ for m in value) if isinstance(value, tuple) else "",
)
def test_only_what_is_known_is_followed(layers: tuple[nn.Module, ...], where: list[int]) -> None:
    assert [name for name, _, _ in groups_of(*layers)] == list(map(str, where))


def test_layers_that_share_a_weight_have_no_channels() -> None:
    architecture = Architecture(
        lambda shape, classes: nn.Sequential(nn.Flatten(), *tied()), lambda shape: None, "made up", "tied"
    )
    assert ModelSpec.of("tied", architecture, small.SHAPE, 3).channel_groups == ()


def test_normalisation_behind_a_flattening_goes_with_its_channel() -> None:
    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )

    spec = ModelSpec.of("late", Architecture(build, lambda shape: None, "made up", ""), small.SHAPE, 3)
    (group,) = spec.channel_groups
    kept = torch.tensor([True, False, False, True])
    mask = channel_mask(spec.layout, spec.channel_groups, {group.name: kept})
    part = shrink(mask, spec.channel_groups)
    assert part is not None
    assert part.layout.shape_of["2.weight"] == (8,)
    params, x = spec.init(0), torch.from_numpy(np.random.default_rng(0).random((5, *small.SHAPE), np.float32))
    whole = spec.bind(params.masked(mask).flat)(x)
    smaller = spec.shrunken(part.layout).bind(params.flat[part.index])(x)
    torch.testing.assert_close(smaller, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            lambda: nn.Sequential(
                nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3), nn.Flatten()
            ),
            "channels are not followed through Conv1d",
        ),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(), Doubled()), "through Doubled, PReLU"),
        (lambda: Residual(nn.Linear(16, 16)), "Residual is a class with its own `forward`"),
        (lambda: nn.Sequential(nn.Linear(16, 3)), "none go from one layer to the next"),
    ],
)
def test_the_reason_for_no_channels_is_the_right_one(build: Callable[[], nn.Module], why: str) -> None:
    architecture = Architecture(lambda shape, classes: build(), lambda shape: None, "made up", "")
    spec = ModelSpec.of("mine", architecture, small.SHAPE, 3)
    said = cannot_narrow("mine", spec.layout, spec.channel_groups, 0.5, spec.without_channels)
    assert said is not None
    assert said.startswith("model=mine has no channels that can be removed as a whole: ")
    assert why in said


def test_a_module_of_ones_own_has_none_unless_it_says_where() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
            return logits

    def chains(module: nn.Module) -> list[list[tuple[str, nn.Module]]]:
        return [[(name, module.get_submodule(name)) for name in ("fc1", "fc2")]]

    silent = Architecture(lambda shape, classes: Own(), small.MLP.accepts, "made up", "two layers")
    assert ModelSpec.of("own", silent, small.SHAPE, 3).channel_groups == ()
    (group,) = ModelSpec.of("own", replace(silent, chains=chains), small.SHAPE, 3).channel_groups
    assert group == ChannelGroup("fc1", 6, ("fc1.weight", "fc1.bias"), "fc2.weight", 1)


# ── that they are right


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_without_some_channels_every_model_computes_what_it_computes_masked(
    name: str, share: float, built: dict[str, ModelSpec]
) -> None:
    spec, rng = built[name], np.random.default_rng(0)
    kept = {
        g.name: best_channels(torch.from_numpy(rng.random(g.size)), share)  # any ones
        for g in spec.channel_groups
    }
    mask = channel_mask(spec.layout, spec.channel_groups, kept)
    part = shrink(mask, spec.channel_groups)
    if part is None:
        pytest.skip(f"{name} has too few channels that can go")
    params = spec.init(0)
    for layer, span in params.layout.spans.items():  # not those of a model that was never trained
        if layer.endswith(("running_mean", "running_var")):
            params.flat[span] = torch.from_numpy(rng.random(span.stop - span.start, np.float32)) + 0.5
    whole, smaller = (
        spec.bind(params.masked(mask).flat),
        spec.shrunken(part.layout).bind(params.flat[part.index]),
    )
    x = torch.from_numpy(rng.standard_normal((2, *spec.input_shape), np.float32))
    with torch.no_grad():
        expected = whole.eval()(x).numpy()
        np.testing.assert_allclose(
            smaller.eval()(x).numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in whole.parameters())


def test_a_channel_belongs_to_one_group_and_columns_are_not_rows_of_it(built: dict[str, ModelSpec]) -> None:
    for spec in built.values():
        rows = [name for group in spec.channel_groups for name in group.rows]
        assert len(rows) == len(set(rows))
        columns = [group.columns for group in spec.channel_groups]
        assert len(columns) == len(set(columns))
        assert all(group.columns not in group.rows for group in spec.channel_groups)
        assert all(
            spec.layout.shape_of[g.columns][1] == g.size * g.spread
            and all(spec.layout.shape_of[name][0] == g.size for name in g.rows)
            for g in spec.channel_groups
        )


def test_the_models_that_a_refusal_recommends_have_channels(built: dict[str, ModelSpec]) -> None:
    said = cannot_narrow("linear", built["mlp"].layout, (), 1.0)
    assert said is not None
    recommended = [name for name in built if name in said.replace(",", " ").split()]
    assert recommended == ["mlp", "lenet5", "cnn", "vgg11", "vgg19_bn", "resnet18"]
    assert all(built[name].channel_groups for name in recommended)
