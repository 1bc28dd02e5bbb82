"""Code that draws from the global generators of Python, numpy and torch: the same bits, and no trace."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedray.data.datasets import Examples
from fedray.errors import ClientError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Outcome
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import LocalPool
from fedray.federation.server import Schedule, Server
from fedray.federation.wire import Order
from fedray.federation.worker import Worker, Workplace
from fedray.models.spec import Architecture, ModelSpec
from fedray.types import ClientInfo, ClientUpdate, Mask, Params, ServerState, Task
from tests import small


class Augmented(nn.Module):
    """Images with noise from one of the three libraries, and in evaluation too."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.draw()


def _dropout(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(prod(input_shape), 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, num_classes)
    )


def _noisy(draw: Callable[[], float]) -> Architecture:
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(Augmented(draw), nn.Flatten(), nn.Linear(prod(input_shape), num_classes))

    return Architecture(build, lambda shape: None, "made up", "noise on the images")


def _forked() -> float:
    """Draw, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        return float(torch.rand(()))


DROPOUT = Architecture(_dropout, lambda shape: None, "made up", "fc 8, dropout, fc classes")
NOISY = {
    "torch": _noisy(lambda: float(torch.randn(()))),
    "numpy": _noisy(lambda: float(np.random.randn())),
    "python": _noisy(lambda: random.gauss(0, 1)),
    "forked": _noisy(_forked),
}
MODELS = {"dropout": DROPOUT} | NOISY


def disturb(seed: int) -> None:
    """Leave the global generators in another state than before."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass(frozen=True, kw_only=True)
class Drawing(Method):
    """Every hook draws, from all three libraries."""

    def _draw(self) -> float:
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    def _jitter(self, params: Params) -> Params:
        return Params(params.flat * (1 + 0.01 * self._draw()), params.layout)

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        return replace(state, params=self._jitter(state.params), memory=self._draw())

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        return Task(state.params, state.mask, extras={"lr": 0.1 * self._draw()})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        params = client.sgd(task.params, task.mask, lr=float(task.extras["lr"]))
        return ClientUpdate(self._jitter(params), task.mask, metrics={"draw": self._draw()})

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        return replace(state, params=self._jitter(cohort.mean(state.params)))

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        before = self._draw()
        ctx.ask(self.client_update, {k: self.configure(state, ctx.clients[k]) for k in ctx.sample(2)})
        ctx.validate(state.params, state.mask)
        return replace(state, params=self._jitter(state.params), memory=before + self._draw())

    def eval_params(self, state: ServerState) -> Params:
        return self._jitter(state.params)


class Scattered:
    """A pool of several workers, each of which gets some chunks, the last ones first; none lasts a round."""

    def __init__(self, place: Workplace, workers: int) -> None:
        self.place, self.workers = place, workers

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        disturb(self.workers)
        answer = LocalPool(self.place).run(job, chunks[:1])
        for first in range(1, len(chunks), self.workers):
            part = LocalPool(self.place).run(job, chunks[first : first + self.workers])
            answer.join(part)
        return answer

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        return LocalPool(self.place).evaluate(task, examples)

    def close(self) -> None:
        pass


def begin(architecture: Architecture = DROPOUT, method: Method | None = None, **options: Any) -> Server:
    usual: dict[str, Any] = {"schedule": Schedule(rounds=3, cohort=5, chunk=1)}
    return small.server(method or Method(), architecture=architecture, **usual | options)


def drawing() -> tuple[Worker, Task]:
    """Return a worker, and a task for its clients."""
    place = small.workplace(Drawing(), architecture=DROPOUT)
    return Worker(place), Task(place.model.init(0), Mask.full(place.model.layout), {"lr": 0.1})


def ends(server: Server) -> tuple[str, float, float]:
    last = small.run(server)[-1].metrics
    return server.model.sha256, last["val/loss"], last.get("train/draw", 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_draws_gives_the_same_bits_again(name: str) -> None:
    first = ends(begin(MODELS[name]))
    disturb(1)
    assert first == ends(begin(MODELS[name])) != ends(begin(MODELS[name], seed=1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_who_trains_a_client_does_not_matter(name: str, workers: int) -> None:
    scattered = begin(MODELS[name], pool=lambda place: Scattered(place, workers))
    assert ends(scattered) == ends(begin(MODELS[name]))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_hooks_that_draw_give_the_same_bits_wherever_clients_are(workers: int) -> None:
    found = ends(begin(method=Drawing(), pool=lambda place: Scattered(place, workers)))
    assert found == ends(begin(method=Drawing())) != ends(begin(method=Drawing(), seed=1))


def test_a_run_that_goes_on_draws_as_one_that_never_stopped() -> None:
    expected = ends(begin(method=Drawing()))
    stopped = begin(method=Drawing())
    stopped.setup()
    stopped.step()
    disturb(9)
    assert ends(begin(method=Drawing(), checkpoint=stopped.checkpoint)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_run_leaves_the_global_generators_as_they_were(name: str) -> None:
    disturb(5)
    np.random.randn()  # numpy keeps the second of a pair of normal numbers
    ends(begin(MODELS[name], method=Drawing()))
    assert random.random() == random.Random(5).random()
    assert np.random.randn() == np.random.RandomState(5).randn(2)[1]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))


def test_clients_and_rounds_draw_different_numbers() -> None:
    draws = [report.metrics["train/draw"] for report in small.run(begin(method=Drawing()))[1:]]
    assert len(set(draws)) == len(draws)
    worker, task = drawing()
    found = [
        worker.train(Job(1, Drawing().client_update, (task,)), Order(client, 0, 0), {}) for client in range(4)
    ]
    assert len({trained.update.metrics["draw"] for trained in found if trained.update}) == 4


@pytest.mark.parametrize("draw", [np.random.rand, random.random, np.random.randn])
def test_a_client_is_trained_twice_only_where_somebody_draws_first(draw: Callable[[], float]) -> None:
    worker, task = drawing()
    calls: list[int] = []

    def counted(task: Task, client: Client) -> ClientUpdate:
        calls.append(client.id)
        if client.id:
            draw()
        torch.rand(())
        return ClientUpdate(task.params, task.mask)

    for client in range(4):
        worker.train(Job(1, counted, (task,)), Order(client, 0, 0), {})
    assert calls == [0, 1, 1, 2, 3]


def test_code_that_fails_by_chance_fails_wherever_it_runs() -> None:
    def unlucky(task: Task, client: Client) -> ClientUpdate:
        raise ValueError(f"drew {np.random.rand()}")

    found = []
    for before in (0, 1):
        worker, task = drawing()
        for client in range(before):
            worker.train(Job(1, Method().client_update, (task,)), Order(client, 0, 0), {})
        with pytest.raises(ClientError) as error:
            worker.train(Job(1, unlucky, (task,)), Order(3, 0, 0), {})
        found.append(str(error.value))
    assert found[0] == found[1]


@pytest.mark.parametrize("draw", [np.random.randn, random.random, lambda: float(torch.rand(()))])
def test_an_initialisation_may_draw_from_any_library(draw: Callable[[], float]) -> None:
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        layer = nn.Linear(prod(input_shape), num_classes)
        nn.init.constant_(layer.weight, draw())
        return nn.Sequential(nn.Flatten(), layer)

    spec = ModelSpec.of("mine", Architecture(build, lambda shape: None, "", ""), small.SHAPE, small.CLASSES)
    first = spec.init(3)
    disturb(2)
    assert spec.init(3) == first != spec.init(4)
    assert random.random() == random.Random(2).random()
    assert np.random.rand() == np.random.RandomState(2).rand()


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_what_a_module_counts_does_not_pass_from_client_to_client(momentum: float | None) -> None:
    """With momentum=None, BatchNorm weighs a batch by the number of batches that it has seen."""

    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(1, momentum=momentum), nn.Flatten(), nn.Linear(prod(input_shape), num_classes)
        )

    counting = Architecture(build, lambda shape: None, "made up", "BatchNorm that counts")
    scattered = begin(counting, pool=lambda place: Scattered(place, 2))
    assert ends(scattered) == ends(begin(counting))
