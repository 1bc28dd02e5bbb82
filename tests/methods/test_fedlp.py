"""FedLP: layers dropped from uploads, sub-models with exits, and the mean of each layer over who sent it."""

import io
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fedray.costs.codec import HEADER_BYTES
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.method import Method
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.fedlp import FedLP, layers_of
from fedray.models import MODELS, Architecture, InputShape, ModelSpec
from fedray.models.fedlp_cnn import Path, along
from fedray.types import ClientInfo, Mask, ServerState
from tests import small

EVERYBODY = Schedule(rounds=3, cohort=6)


class Stairs(nn.Module):
    """16 → 8 → 6 → 5 → classes, with exits of one linear layer behind the first two."""

    exits: ClassVar[tuple[Path, ...]] = (
        ("flatten", "fc1", "relu", "exit1"),
        ("flatten", "fc1", "relu", "fc2", "relu", "exit2"),
        ("flatten", "fc1", "relu", "fc2", "relu", "fc3", "relu", "fc4"),
    )

    def __init__(self, input_shape: InputShape, num_classes: int) -> None:
        super().__init__()
        self.flatten, self.relu = nn.Flatten(), nn.ReLU()
        self.fc1, self.fc2, self.fc3 = nn.Linear(prod(input_shape), 8), nn.Linear(8, 6), nn.Linear(6, 5)
        self.exit1, self.exit2 = nn.Linear(8, num_classes), nn.Linear(6, num_classes)
        self.fc4 = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return along(self, self.exits[-1], x)


STAIRS = Architecture(Stairs, lambda input_shape: None, "made up", "fc 8, fc 6, fc 5, fc classes; 3 exits")
FC1, FC2, FC3, FC4 = 16 * 8 + 8, 8 * 6 + 6, 6 * 5 + 5, 5 * 3 + 3
EXIT1, EXIT2 = 8 * 3 + 3, 6 * 3 + 3


@dataclass(frozen=True, kw_only=True)
class Watched(FedLP):
    """FedLP that keeps all updates, and remembers each round: the state before its mean, and what came."""

    seen: list[tuple[ServerState, CohortUpdate]] = field(default_factory=list, compare=False)

    @property
    def fold(self) -> Fold:
        return replace(super().fold, keep_updates=True)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        self.seen.append((state, cohort))
        return super().aggregate(state, cohort)


@dataclass(frozen=True, kw_only=True)
class UniformFedAvg(Method):
    """FedAvg in which every client counts alike."""

    @property
    def fold(self) -> Fold:
        return Fold(weight="uniform")


def hetero(**options: Any) -> FedLP:
    return FedLP(mode="hetero", **options)


def only(complexity: int, **options: Any) -> FedLP:
    return hetero(complexity=complexity, preference=1.0, **options)


def prefix(mask: Mask) -> set[str]:
    """Return the modules that a mask holds, each in full."""
    held = {name.split(".")[0] for name in mask if bool(mask[name].any())}
    assert all(bool(mask[name].all()) for name in mask if name.split(".")[0] in held)
    return held


# ── whole models, uploads without some layers


def test_a_layer_has_its_bias_and_the_normalisation_behind_it() -> None:
    assert layers_of(small.setting(architecture=small.CNN).model) == [
        ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"],
        ["conv2.weight", "conv2.bias"],
        ["fc.weight", "fc.bias"],
    ]


def test_a_normalisation_before_any_layer_is_its_own_and_one_without_weights_stays_in_its_place() -> None:
    def build(input_shape: InputShape, num_classes: int) -> nn.Module:
        return nn.Sequential(
            *(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False)),
            *(nn.Flatten(), nn.Linear(8, 3)),
        )

    made_up = Architecture(build, lambda input_shape: None, "made up", "")
    assert layers_of(small.setting(architecture=made_up).model) == [
        ["0.weight", "0.bias", "0.running_mean", "0.running_var"],
        ["1.weight", "1.bias", "2.running_mean", "2.running_var"],
        ["4.weight", "4.bias"],
    ]


@pytest.mark.parametrize("name", ["lenet5", "fedlp_cnn", "fedlp_cnn_exits"])
def test_layers_are_a_partition_of_any_model(name: str) -> None:
    model = ModelSpec.of(name, MODELS[name], (3, 32, 32), 10)
    layers = layers_of(model)
    assert sorted(name for layer in layers for name in layer) == sorted(model.layout.names)
    weights = [sum(len(model.layout.shape_of[name]) > 1 for name in layer) for layer in layers]
    assert weights == [1] * len(layers)


@pytest.mark.parametrize(("unit", "groups"), [("layer", 3), ("tensor", 9)])
def test_a_layer_is_uploaded_as_a_whole_with_the_rate_asked_for(unit: Any, groups: int) -> None:
    draws, rate = 600, 0.3
    method = FedLP(preserve=rate, unit=unit)
    client = small.client(method, architecture=small.CNN)
    layout = client.model.layout
    units = layers_of(client.model) if unit == "layer" else [[name] for name in layout.names]
    assert len(units) == groups
    masks = [method.preserved(Mask.full(layout), client) for _ in range(draws)]
    kept = np.array([[bool(mask[names[0]].any()) for names in units] for mask in masks])
    for mask, row in zip(masks[:50], kept, strict=False):
        for names, keep in zip(units, row, strict=True):
            assert all(bool(mask[name].all()) == bool(mask[name].any()) == keep for name in names)
    assert kept.mean(0) == pytest.approx(rate, abs=4 * sqrt(rate * (1 - rate) / draws))
    assert np.abs(np.corrcoef(kept.T) - np.eye(groups)).max() < 0.17  # a coin for each
    # what is exchanged, as the mean of both directions: d(1 + p)/2
    sizes = np.array([sum(prod(layout.shape_of[name]) for name in names) for names in units])
    exchanged = np.mean([(layout.size + mask.count) / 2 for mask in masks])
    error = 2 * sqrt(rate * (1 - rate) * float((sizes**2).sum()) / draws)
    assert exchanged == pytest.approx(layout.size * (1 + rate) / 2, abs=error)


def test_published_communication_is_the_parameters_of_both_directions() -> None:
    count = int(ModelSpec.of("", MODELS["fedlp_cnn"], (3, 32, 32), 10).layout.trainable_flat.sum())
    for rate, thousands in {1.0: 1102.93, 0.1: 606.61, 0.3: 716.91, 0.5: 827.20, 0.7: 937.49}.items():
        assert count * (1 + rate) / 1000 == pytest.approx(thousands, abs=0.006)


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN])
def test_a_rate_of_one_is_fedavg_with_equal_clients_bit_for_bit(architecture: Architecture) -> None:
    methods = (FedLP(preserve=1.0), UniformFedAvg())
    servers = [small.server(m, architecture=architecture, schedule=EVERYBODY) for m in methods]
    for ours, fedavg in zip(*map(small.run, servers), strict=True):
        assert ours.metrics["bytes/up"] == fedavg.metrics["bytes/up"]
        assert ours.metrics.get("val/loss") == fedavg.metrics.get("val/loss")
    assert servers[0].model.sha256 == servers[1].model.sha256


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_server_takes_the_mean_of_a_layer_over_who_sent_it(weighting: Any) -> None:
    method = Watched(preserve=0.4, weighting=weighting, local_epochs=2)
    server = small.server(method, architecture=small.CNN, schedule=Schedule(4, 3))
    small.run(server)
    after = [*(state for state, _ in method.seen[1:]), server.state]
    nobody = 0
    for (before, cohort), state in zip(method.seen, after, strict=True):
        sizes = {record.client: record.num_examples for record in cohort.records}
        for name in before.params:
            who = [k for k, update in cohort.updates.items() if bool(update.mask[name].all())]
            if not who:
                nobody += 1
                assert torch.equal(state.params[name], before.params[name])
                continue
            shares = torch.tensor([sizes[k] if weighting == "examples" else 1 for k in who]).double()
            sent = torch.stack([cohort.updates[k].params[name].double() for k in who])
            mean = torch.tensordot(shares / shares.sum(), sent, 1)
            torch.testing.assert_close(state.params[name], mean.float(), atol=1e-6, rtol=1e-5)
    assert nobody


def test_an_upload_is_charged_for_what_it_keeps_and_a_few_bytes_of_positions() -> None:
    method = Watched(preserve=0.5)
    server = small.server(method, architecture=small.CNN, schedule=EVERYBODY)
    small.run(server)
    for _, cohort in method.seen:
        held = {k: update.mask.count for k, update in cohort.updates.items()}
        assert len(set(held.values())) > 1
        for record in cohort.records:
            assert 0 <= record.cost.bytes_up - HEADER_BYTES - 4 * held[record.client] <= 10


def test_clients_that_keep_nothing_send_a_header_and_change_nothing() -> None:
    server = small.server(FedLP(preserve=1e-12), schedule=EVERYBODY)
    before = server.state.params.sha256
    reports = small.run(server)
    assert {r.cost.bytes_up for report in reports[1:] for r in report.clients} == {HEADER_BYTES}
    assert server.model.sha256 == before
    assert reports[-1].metrics["flops/clients"] > 0


# ── sub-models


def infos(count: int, speeds: tuple[float, ...] = (1.0,)) -> list[ClientInfo]:
    devices = [replace(small.DEVICE, flops_per_s=speed) for speed in speeds]
    return [ClientInfo(k, 10, devices[k % len(devices)]) for k in range(count)]


def begin(method: Method, **place: Any) -> Server:
    server = small.server(method, architecture=STAIRS, **place)
    server.setup()
    return server


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (1 / 3, 1 / 3, 1 / 3)),
        ({"complexity": 1}, (0.6, 0.2, 0.2)),
        ({"complexity": 3, "preference": 0.5}, (0.25, 0.25, 0.5)),
        ({"complexity": 2, "preference": 1.0}, (0.0, 1.0, 0.0)),
    ],
)
def test_who_has_which_sub_model_is_drawn_once(options: dict[str, Any], shares: tuple[float, ...]) -> None:
    method, clients = hetero(**options), infos(2000)
    memory = begin(method).state.memory
    drawn = [method.complexity_of(client, memory) for client in clients]
    found = [drawn.count(k) / len(clients) for k in (1, 2, 3)]
    assert found == pytest.approx(shares, abs=0.05)
    if 0 < shares[0] < 1:
        other = begin(method, seed=1).state.memory
        assert drawn != [method.complexity_of(client, other) for client in clients]


def test_by_device_the_faster_have_the_deeper_ones() -> None:
    method = hetero(complexity="device")
    for speeds, expected in (((3.0, 1.0, 2.0), [3, 1, 2]), ((5.0,), [3]), ((1.0, 1.0, 9.0), [2, 2, 3])):
        devices = [replace(small.DEVICE, flops_per_s=speed) for speed in speeds]
        memory = begin(method, devices=devices).state.memory
        assert [method.complexity_of(c, memory) for c in infos(len(speeds), speeds)] == expected


@pytest.mark.parametrize("heads", ["kept", "restarted", "shared"])
@pytest.mark.parametrize(
    ("complexity", "modules", "layers", "head"),
    [
        (1, {"fc1"}, FC1, EXIT1),
        (2, {"fc1", "fc2"}, FC1 + FC2, EXIT2),
        (3, {"fc1", "fc2", "fc3", "fc4"}, FC1 + FC2 + FC3 + FC4, 0),
    ],
)
def test_only_the_layers_of_the_sub_model_travel(
    heads: Any, complexity: int, modules: set[str], layers: int, head: int
) -> None:
    server = begin(only(complexity, heads=heads), schedule=EVERYBODY)
    task = server.method.configure(server.state, server.population[0])
    assert prefix(task.mask) - {"exit1", "exit2"} == modules
    assert task.extras == {"exit": complexity}
    held = layers + (head if heads == "shared" else 0)
    assert task.mask.count == held
    before = server.state.params
    for record in server.step().clients:
        assert 0 <= record.cost.bytes_up - HEADER_BYTES - 4 * held <= 8  # a few bytes of positions
        assert 0 <= record.cost.bytes_down - HEADER_BYTES - 4 * held <= 70  # and the number of the exit
    moved = {name for name in before if not torch.equal(before[name], server.state.params[name])}
    assert moved == {name for name in before if bool(task.mask[name].any())}


def test_a_client_trains_its_layers_and_its_head_through_the_exit() -> None:
    method = only(2, batch_size=1000, lr=0.1)
    state = begin(method).state
    client, again = (small.client(method, architecture=STAIRS) for _ in range(2))
    update = method.client_update(method.configure(state, client.info), client)
    head = again.model.init(int(again.rng.integers(2**63)))  # what it draws
    fc1, fc2, exit2 = (
        [f"{layer}.{name}" for name in ("weight", "bias")] for layer in ("fc1", "fc2", "exit2")
    )
    start = {name: (head if name in exit2 else state.params)[name] for name in (*fc1, *fc2, *exit2)}
    leaves = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    x = client.x.flatten(1)
    for layer in (fc1, fc2, exit2):
        x = linear(x.relu() if layer != fc1 else x, *(leaves[name] for name in layer))
    gradients = torch.autograd.grad(cross_entropy(x, client.y), list(leaves.values()))
    after = {n: start[n] - 0.1 * gradient for n, gradient in zip(leaves, gradients, strict=True)}
    for name in (*fc1, *fc2):
        torch.testing.assert_close(update.params[name], after[name])
    torch.testing.assert_close(client.memory["head"], torch.cat([after[name].flatten() for name in exit2]))
    assert prefix(update.mask) == {"fc1", "fc2"}


@pytest.mark.parametrize("heads", ["kept", "restarted", "shared"])
def test_what_becomes_of_a_head(heads: Any) -> None:
    server = begin(only(1, heads=heads), schedule=EVERYBODY)
    memories = []
    for _ in range(2):
        server.step()
        memories.append({k: m["head"] for k, m in server.checkpoint.memories.items() if "head" in m})
    assert len(memories[0]) == (0 if heads == "shared" else 6)
    for client, head in memories[0].items():
        assert head.shape == (EXIT1,)
        assert torch.equal(head, memories[1][client]) == (heads == "restarted")
    assert len({tuple(head.tolist()) for head in memories[0].values()}) == len(memories[0])


def test_the_mean_of_a_layer_is_over_those_who_have_it() -> None:
    method = Watched(mode="hetero")
    server = begin(method, schedule=EVERYBODY)
    server.step()
    ((_, cohort),) = method.seen
    depths = {len(prefix(update.mask)) for update in cohort.updates.values()}
    assert len(depths) > 1
    for name, least in (("fc1.weight", 1), ("fc2.weight", 2), ("fc4.bias", 4)):
        sent = [u.params[name] for u in cohort.updates.values() if len(prefix(u.mask)) >= least]
        torch.testing.assert_close(server.state.params[name], torch.stack(sent).mean(0))


def test_if_all_have_all_of_it_it_is_fedavg_with_equal_clients() -> None:
    whole, fedavg = (begin(m, schedule=EVERYBODY) for m in (only(3), UniformFedAvg()))
    for server in (whole, fedavg):
        small.run(server)
    layers = [name for name in whole.model if not name.startswith("exit")]
    assert all(torch.equal(whole.model[name], fedavg.model[name]) for name in layers)


def test_a_sub_model_costs_its_own_layers_on_any_device() -> None:
    adds = {1: 16 * 8 + 8 * 3, 2: 16 * 8 + 8 * 6 + 6 * 3, 3: 16 * 8 + 8 * 6 + 6 * 5 + 5 * 3}
    for complexity, per_example in adds.items():
        for exploits in ("nothing", "structured", "unstructured"):
            device = replace(small.DEVICE, exploits=exploits)
            server = begin(only(complexity), devices=[device], schedule=EVERYBODY)
            for record in server.step().clients:
                flops = 3 * 2 * per_example * record.num_examples
                assert record.cost.flops == record.cost.executed_flops == flops


def test_published_communication_of_sub_models_leaves_out_their_heads() -> None:
    model = ModelSpec.of("", MODELS["fedlp_cnn_exits"], (3, 32, 32), 10)
    rng = np.random.default_rng(0)
    ctx: Any = SimpleNamespace(model=model, layout=model.layout, clients=infos(2), rng=rng)
    state = ServerState(0, model.init(0), Mask.full(model.layout))
    memory = hetero().setup(state, ctx).memory
    assert memory is not None
    masks = memory.masks
    sizes = np.array([int((mask.flat & model.layout.trainable_flat).sum()) for mask in masks])
    assert sizes.tolist() == [10_272, 28_896, 65_952, 140_064, 551_466]
    for preferred, thousands in {1: 169.60, 3: 225.28, 5: 710.80}.items():
        shares = np.where(np.arange(1, 6) == preferred, 0.6, 0.1)
        assert 2 * float(shares @ sizes) / 1000 == pytest.approx(thousands, abs=0.006)
    assert 2 * sizes.mean() / 1000 == pytest.approx(318.66, abs=0.006)


@pytest.mark.parametrize("complexity", ["uniform", "device", 1])
def test_sub_models_learn_together(complexity: Any) -> None:
    devices = [replace(small.DEVICE, flops_per_s=speed) for speed in (1.0, 2.0, 3.0)]
    method = hetero(complexity=complexity, local_epochs=5, lr=0.1)
    options: dict[str, Any] = {"data": small.dataset(400), "devices": devices, "schedule": Schedule(8, 6)}
    server = small.server(method, architecture=STAIRS, **options)
    reports = small.run(server)
    assert reports[-1].metrics["val/loss"] < 0.9 * reports[0].metrics["val/loss"]


def test_a_run_goes_on_from_a_checkpoint_with_the_heads_that_clients_have() -> None:
    options: dict[str, Any] = {"architecture": STAIRS, "schedule": EVERYBODY}
    whole, first = small.server(hetero(), **options), small.server(hetero(), **options)
    small.run(whole)
    first.setup()
    first.step()
    file = io.BytesIO()
    torch.save(first.checkpoint, file)
    file.seek(0)
    second = small.server(hetero(), checkpoint=torch.load(file, weights_only=False), **options)
    small.run(second)
    assert second.model.sha256 == whole.model.sha256


def test_if_nobody_answers_nothing_happens_and_no_head_is_kept() -> None:
    server = begin(hetero(), rules=Rules(deadline_s=1e-6), schedule=EVERYBODY)
    before = server.state.params.sha256
    small.run(server)
    assert server.model.sha256 == before
    assert server.checkpoint.memories == {}


def test_models_without_exits_are_refused_with_those_that_have_some() -> None:
    reason = hetero().check(small.setting(architecture=small.MLP))
    assert reason is not None
    assert reason.startswith("model=small cannot be left early")
    assert reason.endswith("those that can: fedlp_cnn_exits")
    assert FedLP().check(small.setting(architecture=small.MLP)) is None
    reason = hetero(complexity=4).check(small.setting(architecture=STAIRS))
    assert reason == "method.complexity=4 is above the number of exits of small, 3"
    assert hetero(complexity=3).check(small.setting(architecture=STAIRS)) is None
