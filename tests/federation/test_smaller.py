"""Under a mask that removes channels a smaller model is trained: to the same weights as the whole one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.federation.client import Client, Step
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.methods.fedavg_small import FedAvgSmall
from fedray.models import MODELS, Architecture
from fedray.pruning.channels import channel_mask
from fedray.pruning.masks import top_k
from fedray.training.engine import SMALLER_ENGINES, Engine
from fedray.types import Mask, Params
from tests import small

ARCHITECTURES = {"mlp": MODELS["mlp"], "cnn with BatchNorm": small.CNN, "lenet5": MODELS["lenet5"]}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "lr_decay": 0.5},
]


@contextmanager
def whole(client: Client) -> Iterator[None]:
    """Let a client train the whole model under any mask, as if no channel could be told apart."""
    client._engine.smaller = lambda mask: client._engine  # type: ignore[method-assign]
    yield
    del client._engine.smaller


def start(client: Client, share: float = 0.5, seed: int = 3) -> tuple[Params, Mask]:
    """Return random weights, non-zero everywhere, and the mask of a random choice of channels."""
    layout, rng = client.model.layout, np.random.default_rng(seed)
    flat = torch.from_numpy(rng.standard_normal(layout.size, dtype=np.float32)) / 4
    flat[~layout.trainable_flat] = 1.0  # running variances are positive
    kept = {}
    for group in client.model.channel_groups:
        kept[group.name] = torch.zeros(group.size, dtype=torch.bool)
        kept[group.name][rng.permutation(group.size)[: max(1, round(share * group.size))]] = True
    return Params(flat, layout), channel_mask(layout, client.model.channel_groups, kept)


def one(architecture: Architecture, method: Method, **place: Any) -> Client:
    return small.client(method, architecture=architecture, **place)


def assert_close(found: Params, expected: Params, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(found.flat.numpy(), expected.flat.numpy(), rtol=0, atol=atol)


# ── the same weights


@every_architecture
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_trains_to_the_weights_of_the_whole_model(
    architecture: Architecture, options: dict[str, Any]
) -> None:
    method = Method(lr=0.05, batch_size=6, local_epochs=2, **options)
    client, other = (one(architecture, method, round=2) for _ in range(2))
    params, mask = start(client)
    assert client._engine.smaller(mask).layout.size < 0.6 * params.layout.size
    found = client.sgd(params, mask)
    with whole(other):
        expected = other.sgd(params, mask)
    assert_close(found, expected)
    assert (expected.flat - params.masked(mask).flat).abs().max() > 0.01  # they did train
    assert client.meter.loss == pytest.approx(other.meter.loss, abs=1e-6)
    assert client.meter.last_loss == pytest.approx(other.meter.last_loss, abs=1e-6)
    assert (client.meter.flops, client.meter.executed_flops) == (
        other.meter.flops,
        other.meter.executed_flops,
    )


@every_architecture
def test_adam_too(architecture: Architecture) -> None:
    # a step of Adam has the size of the learning rate however small a gradient is: rounding may be amplified
    method = Method(lr=0.001, batch_size=6, optimizer="adam")
    client, other = one(architecture, method), one(architecture, method)
    params, mask = start(client)
    found = client.sgd(params, mask, steps=4)
    with whole(other):
        assert_close(found, other.sgd(params, mask, steps=4), atol=1e-5)


@every_architecture
def test_nothing_grows_outside_the_mask(architecture: Architecture) -> None:
    client = one(architecture, Method(batch_size=6, momentum=0.9, weight_decay=0.1))
    params, mask = start(client)
    params.flat[~mask.flat] = float("nan")  # whatever stands there is not looked at
    found = client.sgd(params, mask)
    assert found.is_finite()
    assert found.flat[~mask.flat].count_nonzero() == 0
    assert found.layout is params.layout


@every_architecture
def test_weights_pruned_one_by_one_in_the_channels_that_stay_are_masked_there(
    architecture: Architecture,
) -> None:
    client, other = (one(architecture, Method(batch_size=6, momentum=0.9)) for _ in range(2))
    params, channels = start(client)
    mask = top_k(params.flat.abs(), 0.5 * channels.density, params.layout, within=channels)
    mask = Mask(mask.flat & channels.flat, mask.layout)
    assert 0 < mask.density < channels.density
    assert client._engine.smaller(mask) is not client._engine
    found = client.sgd(params, mask)
    assert found.flat[~mask.flat].count_nonzero() == 0
    with whole(other):
        assert_close(found, other.sgd(params, mask))


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
def test_a_federation_comes_to_the_same_model(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Params, list[dict[str, float]]]:
        server = small.server(FedAvgSmall(density=0.25), architecture=architecture, schedule=Schedule(3, 4))
        reports = [dict(report.metrics) for report in small.run(server)]
        return server.model, reports

    (found, reports), (again, _) = run(), run()
    assert found == again  # bit for bit
    monkeypatch.setattr(Engine, "smaller", lambda self, mask: self)
    expected, others = run()
    assert_close(found, expected)
    for report, other in zip(reports, others, strict=True):
        assert report["total/bytes/up"] == other["total/bytes/up"]
        assert report["total/flops/executed"] == other["total/flops/executed"]
        assert report["val/accuracy"] == other["val/accuracy"]


# ── when


def lengths(client: Client, params: Params, mask: Mask, **options: Any) -> set[int]:
    """Return the lengths of all working vectors that the client trains on."""
    loaded: set[int] = set()
    load = Engine.load

    def noted(engine: Engine, params: Params, mask: Mask) -> None:
        loaded.add(engine.layout.size)
        load(engine, params, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "load", noted)
        client.sgd(params, mask, steps=1, **options)
    return loaded


def test_whoever_looks_into_the_loop_sees_the_whole_model() -> None:
    client = one(small.CNN, Method())
    params, mask = start(client)
    size, fewer = params.layout.size, mask.count

    def loss(step: Step) -> Tensor:
        return cross_entropy(step.logits, step.y)

    def forward(module: nn.Module, weights: Any, x: Tensor) -> Tensor:
        logits: Tensor = module(x)
        return logits

    keep = mask.flat.float()
    assert lengths(client, params, mask) == {fewer}
    assert lengths(client, params, mask, lr=0.1, seed=1) == {fewer}
    for hook in (
        {"loss": loss},
        {"on_grad": lambda gradient: None},
        {"on_step": lambda flat: flat.mul_(keep)},
        {"view": lambda weights: weights},
        {"forward": forward},
    ):
        assert lengths(client, params, mask, **hook) == {size}


def test_a_mask_that_leaves_most_of_it_is_trained_whole() -> None:
    client = one(small.CNN, Method())
    params, most = start(client, share=0.9)
    assert most.count > 0.75 * params.layout.size
    for mask in (most, Mask.full(params.layout), top_k(params.flat, 0.1, params.layout)):
        assert client._engine.smaller(mask) is client._engine


@every_architecture
def test_a_layer_without_channels_trains_what_is_behind_it(architecture: Architecture) -> None:
    client = one(architecture, Method(batch_size=6))
    params, _ = start(client)
    group = client.model.channel_groups[-1]
    none = channel_mask(
        params.layout, client.model.channel_groups, {group.name: torch.zeros(group.size).bool()}
    )
    found = client.sgd(params, none)
    bias = f"{client.model.head}.bias"
    assert found.is_finite() and not found[bias].equal(params[bias])
    assert found.flat[~none.flat].count_nonzero() == 0


def test_the_smaller_model_is_built_once_for_a_mask_and_few_are_kept() -> None:
    client = one(small.CNN, Method(batch_size=6))
    params, first = start(client, seed=0)
    built = client._engine.smaller(first)
    assert client._engine.smaller(Mask(first.flat.clone(), first.layout)) is built
    trained = client.sgd(params, first, seed=1)
    for seed in range(1, 30):
        client.sgd(params, start(client, seed=seed)[1], steps=1, seed=1)
    assert len(client._engine._smaller) <= SMALLER_ENGINES
    assert client._engine.smaller(first) is not built
    assert client.sgd(params, first, seed=1) == trained  # whoever trained it


def test_what_is_returned_stays_when_the_engine_trains_on() -> None:
    client = one(small.CNN, Method(batch_size=6))
    params, mask = start(client)
    trained = client.sgd(params, mask, seed=1)
    kept = trained.clone()
    client.sgd(params, mask, seed=2)
    assert trained == kept
