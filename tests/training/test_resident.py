"""Examples and weights that stay on a device: tried on the CPU, where the code is the same."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedray.federation.exchange import Chunk, Job
from fedray.federation.method import Method
from fedray.federation.wire import Order
from fedray.federation.worker import Worker, Workplace
from fedray.models.spec import Architecture
from fedray.training import resident
from fedray.training.resident import Resident, Share
from fedray.types import Mask, Params, Task
from tests import small

CPU = torch.device("cpu")


def run(place: Workplace, worker: Worker) -> dict[int, torch.Tensor]:
    task = Task(place.model.init(0), Mask.full(place.model.layout))
    job = Job(1, place.method.client_update, (task,), keep_updates=True)
    orders = tuple(Order(k, 0, 0) for k in range(len(place.population)))
    (partial,) = worker.run(job, [Chunk(0, 0, orders, {}, 1)]).partials.values()
    return {client: update.params.flat for client, update in partial.updates.items()}


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("stack", [1, 4])
def test_clients_train_on_the_same_batches(architecture: Architecture, stack: int):
    place = small.workplace(Method(batch_size=6, local_epochs=2), architecture=architecture, stack=stack)
    worker = Worker(place)
    worker.__dict__["_resident"] = Resident.on(place.dataset, CPU)
    found, expected = run(place, worker), run(place, Worker(place))
    assert all(torch.equal(found[client], flat) for client, flat in expected.items())


def test_all_training_examples_are_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resident, "ROWS", 40)
    data = small.dataset(150)
    found = Resident.on(data, CPU)
    assert torch.equal(found.x, data.normalise(data.train.x))
    assert torch.equal(found.y, torch.from_numpy(data.train.y))
    x, y = Share(found, torch.tensor([5, 3, 8])).pick(torch.tensor([2, 0]))
    assert torch.equal(x, found.x[[8, 5]])
    assert torch.equal(y, found.y[[8, 5]])


def test_tokens_stay_whole_numbers():
    data = small.dataset(20)
    x = np.arange(60, dtype=np.int32).reshape(20, 3)
    data = replace(data, train=replace(data.train, x=x), input_shape=(3,), tokens=60)
    found = Resident.on(data, CPU)
    assert found.x.dtype == torch.int64
    assert torch.equal(found.x, torch.from_numpy(x).long())


def test_nothing_stays_on_the_cpu_or_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    data = small.dataset(20)
    assert Resident.of(data, CPU) is None
    placed: list[Any] = []
    monkeypatch.setattr(Resident, "on", lambda data, device: placed.append(device))
    need = 20 * 16 * 4
    for free in (8 * need - 1, 8 * need):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        Resident.of(data, torch.device("cuda"))
    assert placed == [torch.device("cuda")]
    Resident.of(replace(data, prepare=_double), torch.device("cuda"))
    assert len(placed) == 1


def _double(x: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(x).float() * 2


def test_the_weights_of_a_task_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch):
    place = small.workplace(Method())
    engine, params, full = Worker(place).engine, place.model.init(0), Mask.full(place.model.layout)
    engine.remembers = True
    masked = 0
    real = Params.masked

    def counted(self: Params, mask: Mask) -> Params:
        nonlocal masked
        masked += 1
        return real(self, mask)

    monkeypatch.setattr(Params, "masked", counted)
    half = Mask(torch.arange(full.flat.numel()) % 2 == 0, full.layout)
    for _ in range(3):
        engine.load(params, half)
        assert torch.equal(engine.flat, torch.where(half.flat, params.flat, 0.0))
        engine.flat.add_(1.0)  # a client trains
    assert masked == 1
    params.flat.mul_(2.0)  # other weights in the same memory
    engine.load(params, half)
    assert torch.equal(engine.flat, torch.where(half.flat, params.flat, 0.0))
    engine.load(params, full)
    assert torch.equal(engine.flat, params.flat)
    engine.load(place.model.init(1), full)
    assert torch.equal(engine.flat, place.model.init(1).flat)


def test_a_user_s_function_prepares_examples_before_the_client_s_code():
    place = small.workplace(Method(), data=replace(small.dataset(), prepare=_noisy))
    client = Worker(place).client(place.population[0], np.arange(3), 1, {})
    torch.manual_seed(0)
    x = client.x
    assert client.x is x
    assert float(torch.rand(())) == pytest.approx(0.4963, abs=1e-4)  # nothing was drawn since


def _noisy(x: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(x).float() + torch.rand(x.shape)
