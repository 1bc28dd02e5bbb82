"""Standardised weights and pruned activations: numbers by hand, and gradients that must be exact."""

from collections.abc import Iterator
from math import prod, sqrt

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.grad import conv2d_weight

from fedray.federation.method import Method
from fedray.models.sparse_layers import (
    RELU_GAIN,
    SMALLEST_SQUARES,
    PrunedActivations,
    restore,
    standardised,
    store,
)
from fedray.models.spec import Architecture
from fedray.types import Mask, Params
from tests import small

PROPERTY = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ── standardised weights


def test_a_channel_by_hand() -> None:
    weight = torch.tensor([[1.0, 9.0], [2.0, 3.0]]).view(1, 1, 2, 2)
    held = torch.tensor([[True, False], [True, True]]).view(1, 1, 2, 2)
    # of 1, 2 and 3 the mean is 2, and √N σ = √2
    expected = torch.tensor([-1.0, 0.0, 0.0, 1.0]) * 1.5 / sqrt(2)
    assert torch.allclose(standardised({"w": weight}, {"w": held}, gain=1.5)["w"].flatten(), expected)
    # a ReLU lets (1 − 1/π)/2 of a signal's variance through
    assert pytest.approx(1 / sqrt((1 - 1 / torch.pi) / 2)) == RELU_GAIN


def squares(weights: torch.Tensor) -> float:
    """Return the sum of the squared differences from the mean; 0 for fewer than two weights."""
    return float((weights - weights.mean()).square().sum()) if len(weights) > 1 else 0.0


@PROPERTY
@example(270, 4, 2, 0.25, 1.0, 0.0)  # two weights that are almost equal
@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0, 1),
    st.floats(0.5, 4),
    st.floats(-3, 3),
)
def test_every_channel_has_mean_zero_and_the_gain_as_its_length(
    seed, out, width, density, factor, shift
) -> None:
    weight = torch.randn((out, width, 2, 3), generator=seeded(seed), dtype=torch.float64)
    held = torch.rand(weight.shape, generator=seeded(seed + 1)) < density
    after = standardised({"w": weight}, {"w": held})["w"]
    assert not bool(after[~held].any())
    for row, kept, before in zip(after.flatten(1), held.flatten(1), weight.flatten(1), strict=True):
        if int(kept.sum()) < 2:
            assert torch.equal(row[kept], before[kept])  # nothing to standardise
        else:
            assert float(row.sum()) == pytest.approx(0, abs=1e-9)
            if squares(before[kept]) > SMALLEST_SQUARES:  # weights that are almost equal stay small
                assert float(row.norm()) == pytest.approx(RELU_GAIN)
    rows = zip(held.flatten(1), weight.flatten(1), strict=True)
    many = torch.tensor([squares(row[kept]) > 4 * SMALLEST_SQUARES for kept, row in rows])
    moved = standardised({"w": factor * weight + shift}, {"w": held})["w"]
    assert torch.allclose(moved[many], after[many])


def test_only_convolutions_are_standardised_and_only_the_weights_given() -> None:
    spec = small.workplace(Method(), architecture=small.CNN).model
    params, mask = spec.init(0), Mask.full(spec.layout)
    after = standardised(params, mask)
    assert list(after) == list(params)
    for name, weight in after.items():
        assert torch.equal(weight, params[name]) == (name not in ("conv1.weight", "conv2.weight"))
    assert set(standardised({"conv1.weight": params["conv1.weight"]}, mask)) == {"conv1.weight"}


def test_its_gradient_is_that_of_finite_differences() -> None:
    weight = torch.randn((3, 2, 2, 2), generator=seeded(0), dtype=torch.float64, requires_grad=True)
    held = torch.rand(weight.shape, generator=seeded(1)) < 0.6
    held[2], held[2, 0, 0, 0] = False, True  # a channel of one
    coefficients = torch.randn(weight.shape, generator=seeded(2), dtype=torch.float64)

    def value(w: Tensor) -> Tensor:
        return (standardised({"w": w}, {"w": held})["w"] * coefficients).sum()

    (gradient,) = torch.autograd.grad(value(weight), weight)
    assert bool((gradient != 0).any()) and not bool(gradient[~held].any())
    for index in range(weight.numel()):
        h = torch.zeros(weight.numel(), dtype=torch.float64)
        h[index] = 1e-6
        slope = (
            value(weight.detach() + h.view_as(weight)) - value(weight.detach() - h.view_as(weight))
        ) / 2e-6
        assert float(gradient.flatten()[index]) == pytest.approx(float(slope), abs=1e-7)


def test_a_channel_of_equal_weights_has_finite_gradients() -> None:
    weight = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
    after = standardised({"w": weight}, {"w": torch.ones(2, 1, 2, 2, dtype=torch.bool)})["w"]
    assert not bool(after.any())
    (after * torch.arange(8.0).view_as(after)).sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


# ── stored entries


@PROPERTY
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_largest_entries_are_stored_and_nothing_else(shape, share, ties, seed) -> None:
    x = torch.randn(shape, generator=seeded(seed))
    if ties:
        x = x.round()
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    stored = store(x, share)
    after = restore(stored)
    assert after.shape == x.shape and after.stride() == x.stride()
    kept = after != 0
    assert torch.equal(after[kept], x[kept])
    count = min(round((1 - share) * x.numel()), int(x.count_nonzero()))
    assert int(kept.sum()) == count
    if 0 < count < x.numel():
        assert x[~kept].abs().max() <= x[kept].abs().min()
    assert stored.nbytes == 4 * count + -(-prod(shape) // 8)


def test_of_equal_entries_the_first_stay() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, -1.0, 1.0, 3.0])
    assert restore(store(x, 0.5)).tolist() == [1, -2, 0, 0, 0, 3]
    assert restore(store(x, 0.75)).tolist() == [0, -2, 0, 0, 0, 3]
    assert restore(store(x.view(2, 3).t(), 0.5)).tolist() == [[1, 0], [-2, 0], [0, 3]]


def test_a_tensor_that_was_kept_whole_comes_back_as_it_is() -> None:
    x = torch.ones(3)
    assert restore(x) is x


# ── gradients

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "linear": (nn.Linear(6, 4), (5, 6)),
        "linear without bias": (nn.Linear(6, 4, bias=False), (5, 6)),
        "linear on sequences": (nn.Linear(6, 4), (5, 3, 6)),
        "conv": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 6, 6)),
        "strided and grouped": (nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False), (5, 4, 7, 7)),
        "padded before": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 3, 6, 6)),
    }


def gradients(layer: nn.Module, x: Tensor, share: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output, and gradients of input and parameters of a sum with uneven weights."""
    x = x.clone().requires_grad_()
    weights = dict(layer.named_parameters())
    out = layer(x) if share is None else PrunedActivations(share)(layer, weights, x)
    value = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()
    return out, dict(zip(["x", *weights], torch.autograd.grad(value, [x, *weights.values()]), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_of_inputs_and_biases_are_exact(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=seeded(0))
    if x.dim() == 4:  # as clients compute
        x = x.contiguous(memory_format=torch.channels_last)
    plain, exact = gradients(layer, x, None)
    for share in (0.0, 0.5, 0.9):
        out, pruned = gradients(layer, x, share)
        assert torch.equal(out, plain)
        for of, gradient in exact.items():
            if of != "weight" or share == 0:
                assert torch.allclose(pruned[of], gradient, rtol=1e-4, atol=1e-5)
            else:
                assert not torch.allclose(pruned[of], gradient, rtol=0.01)


def test_gradients_of_weights_see_the_stored_part_of_the_input() -> None:
    linear, shape = LAYERS["linear"]
    x = torch.randn(shape, generator=seeded(0))
    out, pruned = gradients(linear, x, 0.6)
    coefficients = torch.linspace(-1, 2, out.numel()).view_as(out)
    assert torch.allclose(pruned["weight"], coefficients.t() @ restore(store(x, 0.6)), atol=1e-5)

    conv, shape = LAYERS["conv"]
    x = torch.randn(shape, generator=seeded(0))
    out, pruned = gradients(conv, x, 0.6)
    coefficients = torch.linspace(-1, 2, out.numel()).view_as(out)
    expected = conv2d_weight(restore(store(x, 0.6)), (4, 3, 3, 3), coefficients, padding=1)
    assert torch.allclose(pruned["weight"], expected, rtol=1e-4, atol=1e-4)


def test_no_whole_input_is_saved() -> None:
    seen: list[torch.Size] = []

    def pack(saved: Tensor) -> Tensor:
        seen.append(saved.shape)
        return saved

    layer, x = nn.Linear(40, 30), torch.randn((50, 40), generator=seeded(0), requires_grad=True) * 2
    with saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
        assert torch.Size((50, 40)) in seen
        seen.clear()
        PrunedActivations(0.5)(layer, dict(layer.named_parameters()), x)  # has its own hooks
    assert torch.Size((50, 40)) not in seen


def test_functions_of_other_kinds_are_left_alone() -> None:
    x = torch.randn((4, 6), generator=seeded(0), requires_grad=True)
    module = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    (pruned,) = torch.autograd.grad(PrunedActivations(0.9)(module, {}, x).square().sum(), x)
    assert torch.equal(plain, pruned)


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
def test_a_step_of_a_client_differs_in_weights_alone(architecture: Architecture) -> None:
    after: list[Params] = []
    for forward in (None, PrunedActivations(0.0), PrunedActivations(0.9)):
        client = small.client(Method(batch_size=200), architecture=architecture)
        params, mask = client.model.init(0), Mask.full(client.model.layout)
        after.append(client.sgd(params, mask, steps=1, forward=forward))
    plain, whole, tenth = after
    assert torch.allclose(plain.flat, whole.flat, atol=1e-6)
    for name, weight in tenth.items():  # those of one dimension are biases and normalisation
        assert torch.allclose(weight, plain[name], atol=1e-6) == (weight.dim() < 2), name
