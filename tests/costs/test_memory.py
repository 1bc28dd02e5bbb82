"""The memory of training, by hand and against what autograd keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from fedray.config.run_config import RunConfig
from fedray.costs.devices import draw
from fedray.costs.hardware import GIB
from fedray.costs.memory import MemoryModel, OnShort
from fedray.errors import ConfigError
from fedray.experiment.dealing import check_memory, memory_of
from fedray.federation.method import Method
from fedray.federation.pool import LocalPool
from fedray.federation.server import Schedule, Server
from fedray.models.spec import ModelSpec
from fedray.types import Layout, RoundReport
from tests import small

LAYOUT = Layout(("w",), ((7,),), (True,), (True,))


def traced(module: nn.Module, shape: tuple[int, ...], **more: Any) -> MemoryModel:
    return MemoryModel.trace(module, shape, LAYOUT, **more)


def test_a_small_network_by_hand():
    """Of 16 inputs, 8 hidden values and 3 classes."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    memory = traced(module, (1, 4, 4))
    # inputs, hidden values (kept once, by two layers), log-probabilities, labels (int64), twice the inputs
    assert memory.example_bytes == 4 * 16 + 4 * 8 + 4 * 3 + 8 + 2 * 4 * 16
    assert memory.fixed_bytes == 4  # the sum of the weights of the classes
    assert memory.vectors_bytes == 4 * 4 * 7
    assert memory.training_bytes(10) == 4 * 4 * 7 + 4 + 10 * memory.example_bytes


def test_the_weights_are_not_counted_as_activations_and_the_module_is_left_alone():
    module = nn.Linear(1000, 3)
    before = [parameter.clone() for parameter in module.parameters()]
    assert traced(module, (1000,)).example_bytes == 3 * 4000 + 12 + 8
    assert all(map(torch.equal, before, module.parameters()))
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("batch", [2, 5, 17])
def test_it_is_what_autograd_keeps_for_any_batch(batch: int):
    module = small.CNN.build((1, 4, 4), 3)
    memory, found = traced(module, (1, 4, 4), pairs=1), {}
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    x = torch.rand(batch, 1, 4, 4)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(module(x), torch.zeros(batch, dtype=torch.int64))
    sizes = [storage.nbytes() for storage in found.values()]
    assert memory.training_bytes(batch) - memory.vectors_bytes == sum(sizes) + 2 * max(sizes)


def test_tokens_are_whole_numbers():
    module = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(40, 3))
    assert traced(module, (10,), tokens=50).example_bytes == 10 * 8 + 160 + 12 + 8 + 2 * 160


@pytest.mark.parametrize(("vectors", "held"), [(0, 4), (1, 4), (2, 5)])
def test_optimisers_keep_vectors(vectors: int, held: int):
    assert traced(nn.Linear(4, 3), (4,), more_vectors=vectors).vectors_bytes == held * 4 * 7


def test_a_batch_is_halved_until_it_fits():
    memory = MemoryModel(100, 0, 10)
    assert memory.largest_batch(20, 300) == 20
    assert memory.largest_batch(20, 299) == 10
    assert memory.largest_batch(20, 149) == 2 and memory.largest_batch(20, 119) == 1
    assert memory.largest_batch(20, 1) == 1 and not memory.fits(1, 1)
    assert replace(memory, least=2).largest_batch(20, 1) == 2


# ── in a run ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stack", [1, 3])
def test_clients_without_memory_take_smaller_batches_if_the_config_says_so(stack: int):
    """The others train as before, and what each takes is in its record."""
    scarce, method = replace(small.DEVICE, name="scarce", memory_bytes=1000.0), Method(batch_size=20)
    memory = MemoryModel(500, 0, 50)
    deal = small.dealt(40, 40, 40)

    def run(on_short: OnShort) -> RoundReport:
        server = small.server(
            method,
            partition=deal,
            devices=(scarce, small.DEVICE, small.DEVICE),
            schedule=Schedule(rounds=1, cohort=3),
            stack=stack,
        )
        place = replace(server.place, memory=memory, on_short=on_short)
        return small.run(Server(place, LocalPool(place), server.schedule, server.side))[-1]

    fewer, all_the_same = run("batch"), run("ignore")
    assert [record.cost.steps for record in fewer.clients] == [4, 2, 2]
    assert [record.memory_bytes for record in fewer.clients] == [1000, 1500, 1500]
    assert [record.cost.steps for record in all_the_same.clients] == [2, 2, 2]
    assert [record.memory_bytes for record in all_the_same.clients] == [1500] * 3
    assert fewer.metrics["clients/memory_bytes"] == 1500
    assert fewer.clients[1:] == all_the_same.clients[1:]
    assert fewer.clients[0].loss != all_the_same.clients[0].loss


def refused(**clients: object) -> str | None:
    """Return why a run of ResNet-18 on 10 clients of 500 images is refused; None if it is not."""
    tree = {
        "model": "resnet18",
        "data": {"name": "cifar10"},
        "method": {"name": "fedavg", "batch_size": 200},
        "clients": {"population": 10, **clients},
    }
    config = RunConfig.from_tree(tree)
    memory = MemoryModel(int(0.17 * GIB), 0, 5_000_000)
    fleet = draw(10, config.clients.devices, 0)
    try:
        check_memory(config, "resnet18", memory, fleet, small.dealt(*[500] * 10))
    except ConfigError as error:
        return str(error)
    return None


def test_a_device_without_memory_is_refused_with_the_numbers():
    mix = {"phone": 0.5, "laptop": 0.5}
    assert refused(devices=mix) == (
        "clients.devices: phone has 1,024 MiB for training, but resnet18 needs 1,128 MiB: 174.1 MiB of "
        "weights, gradients and optimiser, 953.7 MiB of a batch of 200 and its activations; batches of 100 "
        "fit: set method.batch_size=100, or clients.memory=batch for smaller batches on such devices only; "
        "or take it out of the mix, or a smaller model (clients.memory=ignore trains all the same)"
    )
    assert refused(devices={"laptop": 1.0}) is None
    for memory in ("batch", "ignore"):
        assert refused(devices=mix, memory=memory) is None


def test_the_memory_of_a_config_is_that_of_its_model_and_its_optimiser():
    tree = {"model": "lenet5", "data": {"name": "digits"}, "method": {"name": "fedavg", "optimizer": "adam"}}
    config = RunConfig.from_tree(tree)
    model: ModelSpec = config.build_model((1, 8, 8), 10)
    assert memory_of(config, model).vectors_bytes == 5 * 4 * model.layout.size
