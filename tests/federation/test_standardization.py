"""Weights standardised in every forward pass: for any method, in every engine, and in what is exported."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedray
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.federation.client import Client
from fedray.federation.method import Method
from fedray.federation.rehearsal import together
from fedray.federation.server import Schedule
from fedray.federation.worker import Worker
from fedray.methods import METHODS
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedmef import FedMef
from fedray.methods.snip import SNIP
from fedray.models import MODELS
from fedray.models.sparse_layers import RELU_GAIN, SMALLEST_SQUARES, kernels_of, standardised
from fedray.storage.final_model import load_model
from fedray.types import Mask, Params
from tests import small
from tests.experiment import tiny
from tests.federation.test_smaller import start, whole


def _by_definition(weight: Tensor, held: Tensor) -> Tensor:
    """Standardise a kernel channel by channel, in plain words."""
    rows = []
    for row, kept in zip(weight.flatten(1), held.flatten(1), strict=True):
        own = row[kept]
        if len(own) >= 2:
            centred = own - own.mean()
            own = RELU_GAIN * centred / max(float(centred.square().sum()), SMALLEST_SQUARES) ** 0.5
        rows.append(torch.zeros_like(row).masked_scatter(kept, own))
    return torch.stack(rows).view_as(weight)


def random_mask(client: Client, density: float = 0.5) -> Mask:
    layout = client.model.layout
    flat = torch.rand(layout.size, generator=torch.Generator().manual_seed(1)) < density
    return Mask(flat | ~layout.prunable_flat, layout)


def one(method: Method | None = None, **place: Any) -> Client:
    options: dict[str, Any] = {"architecture": small.CNN, "standardize": True} | place
    return small.client(method or Method(), **options)


# ── which weights


class Own(nn.Module):
    """Modules that convolve, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.one, self.three = nn.Conv1d(1, 2, 3), nn.Conv3d(1, 2, 3)
        self.two, self.up = nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(1, 2, 3)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)


def test_the_weights_of_convolutions_are_standardised_and_no_others():
    assert kernels_of(Own()) == ("kernel", "one.weight", "three.weight", "two.weight")
    for name, architecture in MODELS.items():
        shape = next(s for s in ((1, 28, 28), (3, 32, 32), (80,)) if architecture.accepts(s) is None)
        module = architecture.build(shape, 10)
        assert kernels_of(module) == tuple(n for n, p in module.named_parameters() if p.dim() == 4), name


def test_a_method_decides_what_a_model_leaves_open():
    assert small.workplace(Method(), architecture=small.CNN).model.kernels == ()
    assert small.workplace(FedMef(), architecture=small.CNN).model.kernels == ("conv1.weight", "conv2.weight")
    assert not small.workplace(FedMef(nsconv=False), architecture=small.CNN).model.kernels
    assert not small.workplace(FedMef(), architecture=small.CNN, standardize=False).model.kernels
    assert small.workplace(FedMef(nsconv=False), architecture=small.CNN, standardize=True).model.kernels
    assert small.workplace(Method(), architecture=small.CNN, standardize=True).model.kernels


# ── training


def test_the_gradient_of_a_channel_by_hand():
    weight = torch.tensor([1.0, 2.0, 3.0, 9.0]).view(1, 1, 2, 2).requires_grad_()
    held = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)
    (standardised({"w": weight}, {"w": held})["w"].flatten()[0]).backward()
    # c = (−1, 0, 1), Σc² = 2; of g = (1, 0, 0): g − c (c·g)/2 = (½, 0, ½), less its mean ⅓
    expected = torch.tensor([1 / 6, -1 / 3, 1 / 6, 0.0]) * RELU_GAIN / sqrt(2)
    assert weight.grad is not None
    assert torch.allclose(weight.grad.flatten(), expected)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adam"}])
def test_training_is_that_of_plain_torch(options: dict[str, Any]):
    client = one(Method(lr=0.1, batch_size=1000, local_epochs=3, **options))
    mask, begin = random_mask(client), client.model.init(1)
    found = client.sgd(begin, mask)
    flat = begin.masked(mask).flat.clone()
    module = client.model.bind(flat).train()
    leaves = dict(module.named_parameters())
    if "optimizer" in options:
        optimizer: Any = torch.optim.Adam(leaves.values(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(leaves.values(), lr=0.1, **options)
    for _ in range(3):
        used = {
            n: standardised({n: w}, {n: mask[n]})[n] if n.startswith("conv") and w.dim() == 4 else w
            for n, w in leaves.items()
        }
        for name in ("conv1.weight", "conv2.weight"):
            assert torch.allclose(used[name], _by_definition(leaves[name].detach(), mask[name]), atol=1e-6)
        optimizer.zero_grad()
        cross_entropy(torch.func.functional_call(module, used, (client.x,)), client.y).backward()
        optimizer.step()
        flat.detach().mul_(mask.flat)
    assert not torch.allclose(found.flat, begin.masked(mask).flat, atol=1e-3)
    assert torch.allclose(found.flat, flat.detach(), atol=1e-4)


def test_a_pruned_weight_has_the_gradient_that_it_would_have_in_the_forward_pass():
    client = one(Method(lr=0.1, batch_size=1000))
    mask, begin = random_mask(client), client.model.init(1)
    used = client.model.forward_params(begin, mask).masked(mask)
    module = client.model.bind(used.flat.clone()).train()
    loss = cross_entropy(module(client.x), client.y)
    grads = torch.autograd.grad(loss, tuple(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    seen: list[Tensor] = []
    client.sgd(begin, mask, on_grad=lambda gradient: seen.append(gradient))
    for gradient in (client.grad(begin, mask), seen[0]):
        found = client.model.layout.views(gradient)
        for name, expected in zip(names, grads, strict=True):
            assert torch.allclose(found[name], expected, atol=1e-6), name
        assert bool(found["conv2.weight"][~mask["conv2.weight"]].any())


def test_a_hook_does_not_change_the_training():
    client = one(Method(lr=0.1, batch_size=10))
    mask, begin = random_mask(client), client.model.init(1)
    watched = client.sgd(begin, mask, seed=1, on_grad=lambda gradient: None)
    assert client.sgd(begin, mask, seed=1) == watched


def test_scale_and_shift_of_a_channel_change_nothing():
    client = one()
    mask, begin = random_mask(client), client.model.init(1)
    moved = begin.flat.clone()
    moved[client.model.layout.spans["conv2.weight"]] *= 3.0
    other = Params(moved, client.model.layout)
    assert client.evaluate(begin, mask).loss == pytest.approx(client.evaluate(other, mask).loss, rel=1e-5)
    plain = one(standardize=False)
    assert plain.evaluate(begin, mask).loss != pytest.approx(plain.evaluate(other, mask).loss, rel=1e-3)


def test_flops_are_those_of_the_plain_model():
    flops = []
    for standardize in (True, False):
        client = one(standardize=standardize)
        client.sgd(client.model.init(1), random_mask(client))
        flops.append((client.meter.flops, client.meter.executed_flops))
    assert flops[0] == flops[1]


# ── the same in every engine


@pytest.mark.parametrize("name", ["lenet5", "small"])
@pytest.mark.parametrize("masked", [False, True])
def test_stacked_clients_end_where_each_ends_alone(name: str, masked: bool):
    architecture = small.CNN if name == "small" else MODELS[name]
    place = small.workplace(
        Method(lr=0.1, batch_size=10), architecture=architecture, standardize=True, stack=3
    )
    worker = Worker(place)
    begin = place.model.init(0)
    clients = [
        worker.client(place.population[k], place.population.partition.rows(k), 1, {}) for k in (0, 1, 2)
    ]
    mask = random_mask(clients[0]) if masked else Mask.full(place.model.layout)
    alone = [client.sgd(begin, mask).flat for client in clients]

    def train(k: int, make: Any) -> Tensor:
        rows = place.population.partition.rows(k)
        return worker.client(place.population[k], rows, 1, {}, make).sgd(begin, mask).flat

    stacked = list(together([0, 1, 2], train, 3, pads=False))
    assert worker._way != "alone"
    for found, expected in zip(stacked, alone, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, begin.masked(mask).flat, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet5", "small"])
def test_the_physically_smaller_model_ends_where_the_whole_one_does(name: str):
    architecture = small.CNN if name == "small" else MODELS[name]
    client = one(Method(lr=0.05, batch_size=10), architecture=architecture)
    params, mask = start(client, 0.4)
    assert client._engine.smaller(mask) is not client._engine
    found = client.sgd(params, mask, seed=1)
    with whole(client):
        expected = client.sgd(params, mask, seed=1)
    assert torch.allclose(found.flat, expected.flat, atol=2e-5)


# ── what is evaluated and exported


def test_what_is_evaluated_validated_and_saved_is_what_clients_train():
    server = small.server(
        FedAvg(lr=0.1), architecture=small.CNN, standardize=True, schedule=Schedule(rounds=2, cohort=3)
    )
    reports = small.run(server)
    client, params, mask = one(), server.state.params, server.state.mask
    module = client.model.bind(server.model.flat.clone()).eval().requires_grad_(False)
    assert client.evaluate(params, mask).loss == pytest.approx(
        float(cross_entropy(module(client.x), client.y)), rel=1e-5
    )
    validation = server.side.validation
    x, y = server.place.dataset.normalise(validation.x), torch.from_numpy(validation.y)
    loss = float(cross_entropy(module(x), y))
    assert reports[-1].metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    ctx = server._context(purpose=1)
    assert ctx.validate(params, mask)[1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_under_every_method_the_exported_model_is_the_trained_one(name: str, in_tmp: Any):
    options: dict[str, dict[str, Any]] = {"staged": {"density": 0.5}, "fedlp": {"mode": "homo"}}
    options |= {"heterofl": {"scaler": False}, "fedrolex": {"scaler": False}}
    config = tiny.config(
        {
            "rounds": 2,
            "model": "lenet5",
            "weight_standardization": True,
            "data.server_fraction": 0.1,
            "method": {"name": name, "batch_size": 50, "steps": 2} | options.get(name, {}),
        }
    )
    run = fedray.run(config, out=in_tmp / "run")
    module = load_model(in_tmp / "run")
    kernels = [module.get_parameter(n) for n in kernels_of(module)]
    assert len(kernels) == 2
    for kernel in kernels:
        rows = kernel.flatten(1)
        several = (rows != 0).sum(1) >= 2
        assert bool(several.any())
        assert torch.allclose(rows[several].sum(1), torch.zeros(int(several.sum())), atol=1e-5)
        assert torch.allclose(rows[several].norm(dim=1), torch.tensor(RELU_GAIN), rtol=1e-3)
    assert run.weights_sha256


def test_snip_scores_what_the_forward_pass_uses():
    server = small.server(SNIP(density=0.4, scorers=6), architecture=small.CNN, standardize=True)
    server.setup()
    begin, layout = server.place.model.init(0), server.place.model.layout
    used = server.place.model.forward_params(begin, Mask.full(layout))
    total = torch.zeros(layout.size)
    for k in range(6):
        client = one(SNIP(), id=k)
        total += client.grad(begin, Mask.full(layout)) * client.num_examples
    scores = (total * used.flat).abs()
    scores[~layout.prunable_flat] = 0.0
    count = int(server.state.mask.flat[layout.prunable_flat].sum())
    best = scores.topk(count).indices
    assert bool(server.state.mask.flat[best].all())


# ── the option of a run


def sha(changes: dict[str, Any], **more: Any) -> str:
    base: dict[str, Any] = {"model": "lenet5", "method": {"name": "fedavg", "batch_size": 50, "steps": 2}}
    return fedray.run(tiny.config(base | changes, **more)).weights_sha256


def test_the_runs_option_overrides_the_methods(in_tmp: Any):
    mef = {"name": "fedmef", "batch_size": 50, "steps": 2}
    default, without = sha({"method": mef}), sha({"method": mef | {"nsconv": False}})
    assert default != without
    assert sha({"method": mef, "weight_standardization": False}) == without
    assert sha({"method": mef, "weight_standardization": True}) == default
    assert sha({"method": mef | {"nsconv": False}, "weight_standardization": True}) == default
    assert sha({"method": mef, "weight_standardization": None}) == default


def test_fedavg_with_it_is_fedmef_without_all_else(in_tmp: Any):
    still = {"density": 1.0, "until": 0.0, "extrusion": 0.0, "activation_pruning": 0.0}
    mef = {"name": "fedmef", "batch_size": 50, "steps": 2} | still
    assert sha({"weight_standardization": True}) == sha({"method": mef})


def test_the_digest_of_earlier_configs_is_as_it_was():
    config = tiny.config(model="lenet5")
    assert config.override(weight_standardization=None).digest == config.digest
    others = [config.override(weight_standardization=given).digest for given in (True, False)]
    assert len({config.digest, *others}) == 3
    assert not RunConfig().standardizes and tiny.config({"method.name": "fedmef"}).standardizes


def test_it_is_refused_where_it_has_no_effect():
    with pytest.raises(ConfigError) as refused:
        tiny.config(weight_standardization=True)
    message = str(refused.value)
    assert message.startswith("weight_standardization (config): true, but mlp has no convolution")
    assert "leave it out, or use a model that has one: lenet5" in message
    assert len(message.splitlines()) == 1
    assert tiny.config(weight_standardization=False).digest
