"""A worker on a GPU trains what one on the CPU trains, to rounding; `pytest -m gpu` where there is one."""

from dataclasses import replace

import pytest
import torch

from fedray.federation.exchange import Chunk, Job
from fedray.federation.method import Method
from fedray.federation.wire import Order
from fedray.federation.worker import Worker
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Task
from tests import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize(
    "method", [Method(), Method(momentum=0.9, weight_decay=1e-3)], ids=["plain", "momentum"]
)
@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_gpu_trains_what_the_cpu_trains(method, architecture, density):
    place = small.workplace(method, architecture=architecture)
    params = place.model.init(0)
    mask = (
        top_k(magnitude(params), density, place.model.layout)
        if density < 1
        else Mask.full(place.model.layout)
    )
    job = Job(round=1, function=method.client_update, tasks=(Task(params.masked(mask), mask),))
    trained = {}
    for device in ("cpu", "cuda"):
        update = Worker(place, device).train(job, Order(client=0, task=0, bytes_down=0), {}).update
        assert update is not None
        assert update.params.flat.device.type == "cpu"
        assert not update.params.flat[~mask.flat].any()
        trained[device] = update.params.flat
    torch.testing.assert_close(trained["cuda"], trained["cpu"], rtol=1e-3, atol=1e-5)


def test_a_gpu_scores_and_evaluates_as_the_cpu_does():
    place = small.workplace(Method(), architecture=small.CNN)
    params, mask = place.model.init(0), Mask.full(place.model.layout)
    info = place.population[0]
    gradients, outcomes = [], []
    for device in ("cpu", "cuda"):
        client = Worker(place, device).client(info, place.population.partition.rows(0), 1, {})
        gradients.append(client.grad(params, mask))
        outcomes.append(client.evaluate(params, mask))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-3)


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_clients_together_on_a_gpu_train_what_each_trains_on_the_cpu(architecture, density):
    method = Method(batch_size=6, momentum=0.9)
    place = small.workplace(method, architecture=architecture)
    params, layout = place.model.init(0), place.model.layout
    mask = top_k(magnitude(params), density, layout) if density < 1 else Mask.full(layout)
    job = Job(1, method.client_update, (Task(params.masked(mask), mask),), keep_updates=True)
    chunk = Chunk(0, 0, tuple(Order(k, 0, 0) for k in range(6)), {}, 1)
    found = {}
    for device, stack in (("cpu", 1), ("cuda", 1), ("cuda", 8)):
        worker = Worker(replace(place, stack=stack), device)
        found[device, stack] = worker.run(job, [chunk]).partials[0, 0].updates
        assert (worker._way == "alone") == (stack == 1)
        assert (worker._resident is not None) == (device == "cuda")
    for updates in found.values():
        for client, update in updates.items():
            expected = found["cpu", 1][client].params.flat
            torch.testing.assert_close(update.params.flat, expected, rtol=1e-3, atol=1e-5)
