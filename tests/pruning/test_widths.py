"""Levels, windows of channels, and the masks of slices."""

import pytest
import torch

from fedray.models import build_model
from fedray.pruning.channels import shrink
from fedray.pruning.widths import Mix, mix_of, slice_mask, window
from tests import small


@pytest.mark.parametrize(
    ("levels", "rates", "shares"),
    [
        ("a", (1.0,), (1.0,)),
        ("c-d-e", (0.25, 0.125, 0.0625), (1 / 3, 1 / 3, 1 / 3)),
        ("e8-a2", (1.0, 0.0625), (0.2, 0.8)),
        ("b3-d", (0.5, 0.125), (0.75, 0.25)),
    ],
)
def test_levels_are_read_widest_first(
    levels: str, rates: tuple[float, ...], shares: tuple[float, ...]
) -> None:
    assert mix_of(levels) == Mix(rates, shares)
    assert mix_of(levels).widest == rates[0]


@pytest.mark.parametrize(
    "levels", ["", "f", "A", "a-a", "a-", "a0", "a1.5", "a,b", "a b", "a2-a3", "a1234567"]
)
def test_other_texts_are_refused(levels: str) -> None:
    with pytest.raises(ValueError, match=r"must be different levels from a .* got "):
        mix_of(levels)


def test_the_widest_have_the_first_positions() -> None:
    mix = mix_of("a1-c2-e1")
    found = [mix.at(position) for position in (0.0, 0.24, 0.25, 0.74, 0.75, 0.999)]
    assert found == [1.0, 1.0, 0.25, 0.25, 0.0625, 0.0625]


def held(size: int, rate: float, **more: float) -> list[int]:
    return window(size, rate, **more).nonzero().squeeze(1).tolist()  # type: ignore[arg-type]


def test_a_window_begins_in_front_unless_it_rolls() -> None:
    assert held(8, 0.25) == [0, 1]
    assert held(6, 0.25) == [0, 1]  # ⌈1.5⌉
    assert held(6, 0.0625) == [0]
    assert held(8, 0.5, start=3) == [3, 4, 5, 6]
    assert held(8, 0.5, start=6) == [0, 1, 6, 7]  # round the end
    assert held(8, 0.5, start=8) == held(8, 0.5, start=0) == [0, 1, 2, 3]


def test_a_window_rolls_within_the_servers_channels() -> None:
    assert held(8, 0.25, within=0.5, start=3) == [0, 3]
    assert held(8, 0.25, within=0.5, start=4) == [0, 1]
    assert held(8, 0.5, within=0.5, start=2) == [0, 1, 2, 3]


def test_in_as_many_rounds_as_channels_each_is_held_equally_often() -> None:
    counts = sum(window(12, 0.25, start=start).int() for start in range(12))
    assert isinstance(counts, torch.Tensor)
    assert counts.tolist() == [3] * 12


def test_the_entries_of_a_slice() -> None:
    """conv1: 4 channels of 1·3·3; bn1; conv2: 6 of 4·3·3 and a bias; fc: 3 of 6·2·2 and a bias."""
    model = small.setting(architecture=small.CNN).model
    mask = slice_mask(model.layout, model.channel_groups, 0.5)
    counts = {name: int(mask[name].count_nonzero()) for name in mask}
    assert counts == {
        "conv1.weight": 2 * 9,
        **dict.fromkeys(("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"), 2),
        "conv2.weight": 3 * 2 * 9,
        "conv2.bias": 3,
        "fc.weight": 3 * 3 * 4,
        "fc.bias": 3,
    }
    assert bool(mask["conv2.weight"][:3, :2].all())
    rolled = slice_mask(model.layout, model.channel_groups, 0.5, start=3)
    assert rolled["bn1.weight"].tolist() == [True, False, False, True]
    assert rolled["conv2.bias"].tolist() == [False, False, False, True, True, True]
    assert bool(rolled["conv2.weight"][3:, [0, 3]].all())
    assert rolled.count == mask.count


def test_the_same_slice_is_the_same_object() -> None:
    model = small.setting(architecture=small.CNN).model
    one, other = (slice_mask(model.layout, model.channel_groups, 0.5, start=1) for _ in range(2))
    assert one is other


@pytest.mark.parametrize(
    ("rate", "parameters"),
    [(1, 1_556_874), (1 / 2, 391_370), (1 / 4, 98_922), (1 / 8, 25_274), (1 / 16, 6_594)],
)
def test_the_papers_network_has_its_numbers_of_parameters(rate: float, parameters: int) -> None:
    """4 convolutions of 64r to 512r channels with biases, two vectors of BatchNorm each, 10 rows of 512r."""
    model = build_model("heterofl_cnn", (1, 28, 28), 10)
    mask = slice_mask(model.layout, model.channel_groups, rate)
    assert int((mask.flat & model.layout.trainable_flat).count_nonzero()) == parameters
    part = shrink(mask, model.channel_groups)
    if rate < 1:
        assert part is not None
        conv3, fc = (list(part.layout.shape_of[f"{name}.weight"]) for name in ("conv3", "fc"))
        assert conv3 == [int(256 * rate), int(128 * rate), 3, 3]
        assert fc == [10, int(512 * rate)]


def test_the_papers_network_starts_with_a_bias_of_zero_and_refuses_small_images() -> None:
    model = build_model("heterofl_cnn", (1, 28, 28), 10)
    assert not bool(model.init(0)["fc.bias"].any())
    accepts = model.architecture.accepts
    assert accepts((1, 15, 28)) == (
        "heterofl_cnn halves the image three times and needs at least 16×16; got 15×28"
    )
    assert accepts((1, 16, 16)) is None
