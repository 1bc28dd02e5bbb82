"""The engine: what a loss sees, other ways forward, optimisers, learning rates, which engine trains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.federation.client import Client, Step
from fedray.federation.method import Method
from fedray.federation.worker import client_generator
from fedray.models.spec import Architecture
from fedray.pruning import masks
from fedray.pruning.channels import Shrunken, channel_mask, shrink
from fedray.training.engine import SMALLER_ENGINES, Weights
from fedray.types import ChannelGroup, Mask, Params
from tests import small

both = pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
OPTIMISERS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adam"},
    {"optimizer": "adam", "weight_decay": 0.1},
]
every_optimiser = pytest.mark.parametrize("options", OPTIMISERS, ids=str)


def one(architecture: Architecture = small.MLP, round: int = 1, **options: Any) -> Client:
    return small.client(Method(**{"batch_size": 6, **options}), architecture=architecture, round=round)


def start(client: Client, density: float = 1.0, seed: int = 3) -> tuple[Params, Mask]:
    """Return random weights of the client's model, non-zero everywhere, and a mask."""
    layout, rng = client.model.layout, np.random.default_rng(seed)
    flat = torch.from_numpy(rng.standard_normal(layout.size, dtype=np.float32)) / 2
    flat[~layout.trainable_flat] = 1.0  # running variances are positive
    return Params(flat, layout), masks.random(layout, density, rng)


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=0, atol=atol)


def plain(step: Step) -> Tensor:
    return cross_entropy(step.logits, step.y)


# ── what a loss sees


@both
@pytest.mark.parametrize("view", [None, lambda weights: {name: 2 * w for name, w in weights.items()}])
def test_features_are_what_the_classifier_was_given(architecture: Architecture, view: Any) -> None:
    client = one(architecture)
    params, mask = start(client, 0.5)
    head, factor, seen = client.model.head, 1 if view is None else 2, 0

    def look(step: Step) -> Tensor:
        nonlocal seen
        seen += 1
        weight, bias = step.weights[f"{head}.weight"], step.weights[f"{head}.bias"]
        assert step.features.shape == (len(step.x), weight.shape[1])
        assert_close(step.logits, step.features @ (factor * weight).T + factor * bias, atol=1e-5)
        return plain(step)

    client.sgd(params, mask, steps=3, loss=look, view=view)
    assert seen == 3


def test_a_loss_of_features_trains_what_is_before_the_classifier_and_not_itself() -> None:
    client = one(lr=0.1)
    params, mask = start(client)
    trained = client.sgd(params, mask, steps=2, loss=lambda step: step.features.square().mean())
    for name in params:
        assert trained[name].equal(params[name]) == name.startswith(client.model.head), name


def test_looking_at_features_leaves_no_hook_behind() -> None:
    client = one()
    params, mask = start(client)
    client.sgd(params, mask, steps=2, loss=plain)
    with pytest.raises(ZeroDivisionError):
        client.sgd(params, mask, steps=1, loss=lambda step: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not any(module._forward_pre_hooks for module in client._engine.module.modules())


# ── other ways forward


@both
def test_forward_is_given_module_weights_and_images(architecture: Architecture) -> None:
    """At a temperature of 2, as a softer softmax would have it: the same as a loss on halved logits."""
    client, other = one(architecture, lr=0.2), one(architecture, lr=0.2)
    params, mask = start(client, 0.5)

    def forward(module: nn.Module, weights: Weights, x: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(module, dict(weights), (x,))
        return logits / 2

    trained = client.sgd(params, mask, forward=forward)
    expected = other.sgd(params, mask, loss=lambda step: cross_entropy(step.logits / 2, step.y))
    assert_close(trained.flat, expected.flat)
    assert client.meter.flops == other.meter.flops
    assert (trained.flat - one(architecture, lr=0.2).sgd(params, mask).flat).abs().max() > 1e-3


def test_forward_sees_the_weights_of_the_view_and_a_loss_sees_those_that_are_trained() -> None:
    client = one(lr=0.1)
    params, mask = start(client)

    def forward(module: nn.Module, weights: Weights, x: Tensor) -> Tensor:
        assert_close(weights["fc1.weight"], 3 * params["fc1.weight"])
        logits: Tensor = torch.func.functional_call(module, dict(weights), (x,))
        return logits

    def look(step: Step) -> Tensor:
        assert_close(step.weights["fc1.weight"], params["fc1.weight"])
        return plain(step)

    def tripled(weights: Weights) -> Weights:
        return {name: 3 * weight for name, weight in weights.items()}

    trained = client.sgd(params, mask, steps=1, view=tripled, forward=forward, loss=look)
    assert trained == one(lr=0.1).sgd(params, mask, steps=1, view=tripled)


# ── what has no part in the loss


@every_optimiser
def test_a_weight_that_is_cut_off_has_a_gradient_of_zeros(options: dict[str, Any]) -> None:
    client = one(lr=0.1, **options)
    params, mask = start(client)
    gradients: list[Tensor] = []

    def cut(weights: Weights) -> Weights:
        return {name: w.detach() if name == "fc1.weight" else w for name, w in weights.items()}

    trained = client.sgd(params, mask, steps=3, view=cut, on_grad=gradients.append)
    span = params.layout.spans["fc1.weight"]
    assert len(gradients) == 3
    for gradient in gradients:
        assert gradient[span].count_nonzero() == 0
        assert gradient.count_nonzero() > 10
    moved = not trained["fc1.weight"].equal(params["fc1.weight"])
    assert moved == bool(options.get("weight_decay")), "only decay moves it"


def test_a_weight_that_the_loss_does_not_use_has_a_gradient_of_zeros_in_grad() -> None:
    client = one()
    params, mask = start(client)
    gradient = client.grad(params, mask, loss=lambda step: step.features.sum())
    head = params.layout.spans["fc2.weight"]
    assert gradient[head].count_nonzero() == 0 < gradient.count_nonzero()


# ── optimisers


def torch_adam(client: Client, params: Params, mask: Mask, method: Method) -> Tensor:
    """Train with torch.optim.Adam on the client's batches: mask gradients, step, mask weights."""
    flat = params.masked(mask).flat
    module = client.model.bind(flat).train()
    held = mask.layout.views(mask.flat.float())
    # one tensor at a time, as its documentation has it
    optimiser = torch.optim.Adam(
        module.parameters(), lr=method.lr, weight_decay=method.weight_decay, foreach=False
    )
    rng = client_generator(0, 1, client.id)()
    for _ in range(method.local_epochs):
        order = torch.from_numpy(rng.permutation(client.num_examples))
        for rows in order.split(method.batch_size):
            optimiser.zero_grad()
            cross_entropy(module(client._engine.batch(client.x[rows])), client.y[rows]).backward()
            for name, weight in module.named_parameters():
                assert weight.grad is not None
                weight.grad.mul_(held[name])
            optimiser.step()
            with torch.no_grad():
                for name, weight in module.named_parameters():
                    weight.mul_(held[name])
    return flat


@both
@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs(architecture: Architecture, density: float, weight_decay: float) -> None:
    options = {"lr": 0.01, "local_epochs": 2, "batch_size": 6, "weight_decay": weight_decay}
    method = Method(optimizer="adam", **options)  # type: ignore[arg-type]
    client = small.client(method, architecture=architecture)
    params, mask = start(client, density)
    expected = torch_adam(client, params, mask, method)
    assert_close(client.sgd(params, mask).flat, expected)
    assert (expected - params.masked(mask).flat).abs().max() > 0.02


@every_optimiser
@both
@pytest.mark.parametrize("with_loss", [False, True])
def test_masked_entries_stay_exactly_zero(
    options: dict[str, Any], architecture: Architecture, with_loss: bool
) -> None:
    client = one(architecture, lr=0.02, local_epochs=3, lr_decay=0.9, round=2, **options)
    params, mask = start(client, 0.3)
    trained = client.sgd(params, mask, loss=plain if with_loss else None)
    assert trained.flat[~mask.flat].count_nonzero() == 0
    assert (trained.flat != params.flat)[mask.flat].float().mean() > 0.5, "most others are trained"
    dense = client.sgd(params.masked(mask), Mask.full(mask.layout))
    assert dense.flat[~mask.flat].count_nonzero() > 30, "without a mask they do not stay zero"


@every_optimiser
def test_an_optimiser_starts_anew_in_each_call(options: dict[str, Any]) -> None:
    client = one(**options)
    params, mask = start(client, 0.5)
    assert client.sgd(params, mask, seed=1) == client.sgd(params, mask, seed=1)


# ── learning rates


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_learning_rate_halves_from_round_to_round(optimizer: str) -> None:
    steps = []
    for round in range(4):  # the set-up, and three rounds
        client = one(lr=0.1, lr_decay=0.5, round=round, optimizer=optimizer)
        params, mask = start(client)
        steps.append(client.sgd(params, mask, steps=1, seed=0).flat - params.flat)
        assert client.lr == 0.1 * 0.5 ** max(0, round - 1)
    assert_close(steps[0], steps[1])
    assert_close(steps[1] / 2, steps[2])
    assert_close(steps[1] / 4, steps[3])
    assert steps[1].abs().max() > 0.01


def test_a_rate_that_is_given_does_not_decay() -> None:
    params, mask = start(one())
    late, first = one(lr=0.1, lr_decay=0.5, round=9), one(lr=0.1)
    assert late.sgd(params, mask, lr=0.1, seed=0) == first.sgd(params, mask, seed=0)


@pytest.mark.parametrize("loss", [None, plain], ids=["chain of linear layers", "autograd"])
def test_a_rate_for_each_step(loss: Any) -> None:
    client, asked = one(lr=0.3), list[int]()
    params, mask = start(client)
    rates = [0.1, 0.0, 0.05, 0.2]

    def rate(index: int) -> float:
        asked.append(index)
        return rates[index]

    weights: list[Tensor] = []

    def note(flat: Tensor) -> None:
        weights.append(flat.clone())

    trained = client.sgd(params, mask, steps=4, seed=0, lr=rate, loss=loss, on_step=note)
    assert asked == [0, 1, 2, 3]
    assert weights[0].equal(weights[1]), "a rate of 0 moves nothing"
    gradients: list[Tensor] = []  # of the same steps, made again
    one(lr=0.3).sgd(params, mask, steps=4, seed=0, lr=lambda i: rates[i], on_grad=gradients.append)
    moved = torch.stack([rate * gradient for rate, gradient in zip(rates, gradients, strict=True)]).sum(0)
    assert_close(trained.flat, params.flat - moved)
    assert moved.abs().max() > 0.05


# ── a gradient of some batches


def rows_seen(client: Client, batches: int | None) -> list[int]:
    """Return which examples `grad` looks at, in order."""
    params, mask = start(client)
    seen: list[int] = []
    images = client.x.flatten(1)

    def look(step: Step) -> Tensor:
        seen.extend(int((images == image).all(1).nonzero()[0, 0]) for image in step.x.flatten(1))
        return plain(step)

    client.grad(params, mask, loss=look, batches=batches)
    return seen


def test_a_gradient_of_two_batches_is_that_of_their_examples() -> None:
    client = one()
    params, mask = start(client, 0.4)
    rows = torch.tensor(rows_seen(one(), 2))
    assert len(rows) == len(set(rows.tolist())) == 12 < client.num_examples
    found = client.grad(params, mask, batches=2)
    flat = params.masked(mask).flat
    module = client.model.bind(flat)
    gradients = torch.autograd.grad(
        cross_entropy(module(client.x[rows]), client.y[rows]), list(module.parameters())
    )
    assert_close(found, torch.cat([gradient.flatten() for gradient in gradients]))
    assert found[~mask.flat].count_nonzero() > 50, "also where the mask is False"


def test_batches_are_drawn_anew_and_charged_as_seen() -> None:
    client, flops = one(), one()._engine.flops
    full = Mask.full(client.model.layout)
    first, second = rows_seen(client, 2), rows_seen(client, 2)
    assert sorted(first) != sorted(second)
    assert client.meter.flops == (12 + 12) * flops.train(full)
    assert sorted(rows_seen(client, 1000)) == list(range(client.num_examples)), "each example once at most"
    assert rows_seen(client, None) == list(range(client.num_examples))


# ── which engine trains


def half(client: Client, first: int) -> Mask:
    """Hold two channels of each layer of the CNN: `first`, and the next one."""
    groups = client.model.channel_groups
    kept = {g.name: torch.arange(g.size).sub(first).remainder(g.size) < 2 for g in groups}
    return channel_mask(client.model.layout, groups, kept)


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """Collect the masks for which a smaller model was worked out."""
    calls: list[Mask] = []

    def noted(mask: Mask, groups: Sequence[ChannelGroup]) -> Shrunken | None:
        calls.append(mask)
        return shrink(mask, groups)

    monkeypatch.setattr("fedray.training.engine.shrink", noted)
    return calls


def test_a_full_mask_and_a_model_without_groups_need_no_second_look(shrunk: list[Mask]) -> None:
    engine = one(small.CNN)._engine
    assert engine.smaller(Mask.full(engine.layout)) is engine
    linear = one(small.LINEAR)._engine
    assert linear.smaller(Mask.none(linear.layout)) is linear
    assert not shrunk


def test_what_was_found_for_a_mask_is_remembered(shrunk: list[Mask]) -> None:
    client = one(small.CNN)
    engine, (_, scattered) = client._engine, start(client, 0.1)
    assert engine.smaller(scattered) is engine.smaller(scattered) is engine
    smaller = engine.smaller(half(client, 0))
    assert engine.smaller(half(client, 0)) is smaller is not engine
    assert len(shrunk) == 2, "also that there is none"


def test_the_oldest_is_forgotten_first(shrunk: list[Mask]) -> None:
    client = one(small.CNN)
    engine, own = client._engine, half(client, 0)
    others = [start(client, 0.5, seed)[1] for seed in range(SMALLER_ENGINES)]
    first = engine.smaller(own)
    for mask in others[:-1]:
        engine.smaller(mask)
    assert engine.smaller(own) is first
    engine.smaller(others[-1])
    assert engine.smaller(own) is not first
    assert len(shrunk) == SMALLER_ENGINES + 2
