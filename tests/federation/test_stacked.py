"""Clients that train together end where each ends alone, to rounding, and at the same bits on any number of
workers.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedray.errors import ClientError
from fedray.federation.aggregate import chunk_size, merge_within, share
from fedray.federation.client import Client, ClientFunction, Step
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.method import Method
from fedray.federation.pool import ActorOptions, Group, LocalPool, RayPool
from fedray.federation.rehearsal import StandIn
from fedray.federation.server import Schedule
from fedray.federation.wire import Memory, Order
from fedray.federation.worker import Worker, Workplace
from fedray.methods import METHODS
from fedray.models import MODELS
from fedray.models.spec import Architecture, InputShape
from fedray.pruning import masks
from fedray.pruning.channels import channel_mask
from fedray.training import agreement, plan, stacked
from fedray.training.agreement import way_of
from fedray.types import ClientUpdate, Mask, Params, Task
from tests import small
from tests.federation.probes import Moving, score

SIZES = (9, 25, 12, 12, 40, 1)
"""Examples of the clients: several end with a batch of another size than the others."""


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the normalised convolution."""
        return torch.relu(x + self.norm(self.conv(x)))


def _residual(input_shape: InputShape, num_classes: int) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return nn.Sequential(nn.Conv2d(input_shape[0], 4, 3, padding=1), Block(4), Block(4), *head)


def _random(layer: nn.Module) -> Architecture:
    def build(input_shape: InputShape, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), layer, nn.Linear(8, num_classes))

    return Architecture(build, lambda shape: None, "made up", "fc 8, fc classes")


def _dropping(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3, padding=1, bias=False),  # BatchNorm leaves a bias no gradient
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, num_classes),
    )


class Gated(nn.Module):
    """Python's `if` on a value, which cannot be mapped."""

    def forward(self, x: Tensor) -> Tensor:
        """Depend on the data."""
        return torch.relu(x) if bool(x.sum() > 0) else x


class Functional(nn.Module):
    """Drops values by a function, not by a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop half."""
        return nn.functional.dropout(x, 0.5, self.training)


class Noisy(nn.Module):
    """Draws from numpy's generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale by a random number."""
        return x * (1 + 1e-9 * float(np.random.random()))


RESIDUAL = Architecture(_residual, lambda shape: None, "made up", "two residual blocks of 4")
DROPOUT = _random(nn.Dropout(0.5))
CHANNELS = Architecture(_dropping, lambda shape: None, "made up", "two kinds of dropout")
ARCHITECTURES = {
    "mlp": small.MLP,
    "cnn": small.CNN,
    "residual": RESIDUAL,
    "dropout": DROPOUT,
    "channels": CHANNELS,
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1, "local_epochs": 2},
    {"optimizer": "adam", "lr": 0.01},
    {"steps": 4, "lr_decay": 0.5},
]


def place_of(method: Method, **options: Any) -> Workplace:
    usual: dict[str, Any] = {"partition": small.dealt(*SIZES)}
    return small.workplace(method, **usual | options)


def answers(
    place: Workplace,
    function: ClientFunction | None = None,
    *,
    task: Task | None = None,
    tasks: Sequence[Task] = (),
    memories: dict[int, Memory] | None = None,
    round: int = 1,
) -> Answer:
    """Train every client of a place, in one chunk."""
    given = tuple(tasks) or (task or task_of(place),)
    job = Job(round, function or place.method.client_update, given, keep_updates=True)
    orders = tuple(Order(k, k % len(given), 0) for k in range(len(place.population)))
    return Worker(place).run(job, [Chunk(0, 0, orders, memories or {}, 1)])


def task_of(place: Workplace, mask: Mask | None = None) -> Task:
    mask = mask or Mask.full(place.model.layout)
    return Task(place.model.init(0).masked(mask), mask)


def check(alone: Answer, together: Answer, atol: float = 1e-5) -> None:
    """Compare updates, records and memories."""
    (a,), (b,) = alone.partials.values(), together.partials.values()
    assert a.updates.keys() == b.updates.keys()
    for client, update in a.updates.items():
        assert update.mask == b.updates[client].mask
        torch.testing.assert_close(b.updates[client].params.flat, update.params.flat, rtol=1e-4, atol=atol)
        assert not b.updates[client].params.flat[~update.mask.flat].any()
    for x, y in zip(alone.records, together.records, strict=True):
        assert (x.client, x.fate, x.cost, x.density) == (y.client, y.fate, y.cost, y.density)
        assert x.loss == pytest.approx(y.loss, rel=1e-4, nan_ok=True)
    assert alone.memories.keys() == together.memories.keys()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients were trained in each stack, without the trial of the model."""
    sizes: list[int] = []
    train = stacked.Stack.train

    def counted(self: stacked.Stack, requests: Sequence[plan.Request], *rest: Any) -> Any:
        if not isinstance(rest[2], agreement._Plain):
            sizes.append(len(requests))
        return train(self, requests, *rest)

    monkeypatch.setattr(stacked.Stack, "train", counted)
    return sizes


# ── agreement ────────────────────────────────────────────────────────────────────────────────────────────


@every_architecture
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_clients_together_train_what_each_trains_alone(name: str, options: dict[str, Any], asked: list[int]):
    place = place_of(Method(batch_size=6, **options), architecture=ARCHITECTURES[name])
    loose = 1e-3 if options.get("optimizer") == "adam" else 1e-5  # its steps amplify rounding
    check(answers(place, round=3), answers(replace(place, stack=8), round=3), atol=loose)
    assert asked == [6]


@every_architecture
def test_under_a_mask(name: str, asked: list[int]):
    place = place_of(Method(batch_size=6, momentum=0.5), architecture=ARCHITECTURES[name])
    task = task_of(place, masks.random(place.model.layout, 0.4, np.random.default_rng(0)))
    check(answers(place, task=task), answers(replace(place, stack=8), task=task))
    assert asked == [6]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_as_a_physically_smaller_model(name: str, asked: list[int]):
    place = place_of(Method(batch_size=6, momentum=0.5), architecture=ARCHITECTURES[name])
    layout, group = place.model.layout, place.model.channel_groups[0]
    removed = {group.name: torch.arange(group.size) >= group.size // 2}
    task = task_of(place, channel_mask(layout, place.model.channel_groups, removed))
    assert Worker(place).engine.smaller(task.mask).part is not None
    check(answers(place, task=task), answers(replace(place, stack=8), task=task))
    assert asked == [6]


@pytest.mark.parametrize("name", ["lenet5", "fedlp_cnn"])
def test_models_of_the_package(name: str, asked: list[int]):
    channels = 3 if name == "fedlp_cnn" else 1
    data, shape = small.dataset(60), (channels, 28, 28)
    images = np.random.default_rng(0).integers(0, 256, (60, *shape), dtype=np.uint8)
    train, scale = replace(data.train, x=images), ((0.5,) * channels, (0.25,) * channels)
    data = replace(data, train=train, input_shape=shape, mean=scale[0], std=scale[1])
    place = small.workplace(
        Method(batch_size=6, lr=1e-3), architecture=MODELS[name], data=data, partition=small.dealt(10, 16, 6)
    )
    (alone,), (together,) = (answers(replace(place, stack=stack)).partials.values() for stack in (1, 8))
    start = place.model.init(0).flat
    for client, update in alone.updates.items():  # rounding may decide between two pixels of a pool
        distance = (together.updates[client].params.flat - update.params.flat).norm()
        assert distance < 1e-3 * (update.params.flat - start).norm()
    assert asked == [3]


@pytest.mark.parametrize("norm", ["local", "static", "group"])
def test_with_every_policy_for_norms(norm: Any):
    place = place_of(Method(batch_size=6), architecture=small.CNN, norm=norm)
    first, second = answers(place), answers(replace(place, stack=8))
    check(first, second)
    check(answers(place, memories=first.memories), answers(replace(place, stack=8), memories=first.memories))


def test_clients_with_different_masks_and_weights(asked: list[int]):
    place = place_of(Method(batch_size=6))
    full = task_of(place)
    half = task_of(place, masks.random(place.model.layout, 0.5, np.random.default_rng(0)))
    other = Task(Params(full.params.flat * 2, full.params.layout), full.mask)
    for tasks in ((full, half), (full, other), (full, half, other)):
        check(answers(place, tasks=tasks), answers(replace(place, stack=8), tasks=tasks))
    assert sorted(asked) == [2, 3, 3, 4, 6]


def test_a_client_whose_mask_no_other_has_trains_alone(asked: list[int]):
    place = place_of(Method(batch_size=6))
    rng = np.random.default_rng(0)
    tasks = [task_of(place, masks.random(place.model.layout, 0.5, rng)) for _ in SIZES]
    check(answers(place, tasks=tasks), answers(replace(place, stack=8), tasks=tasks))
    assert asked == []


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batch=st.integers(1, 9),
    stack=st.integers(2, 9),
    epochs=st.integers(1, 3),
)
def test_any_sizes_of_clients_batches_and_stacks(sizes: list[int], batch: int, stack: int, epochs: int):
    method = Method(batch_size=batch, local_epochs=epochs, momentum=0.5)
    place = small.workplace(method, data=small.dataset(300), partition=small.dealt(*sizes))
    check(answers(place), answers(replace(place, stack=stack)), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "way", "calls"),
    [
        ("mlp", "padded", 7),
        ("residual", "equal", 10),  # batches of 3, 1, 4 and 1 beside those of 6
        ("channels", "equal", 10),
        ("dropout", "equal", 10),
    ],
)
def test_short_batches_are_filled_up_where_examples_do_not_meet(
    name: str, way: str, calls: int, monkeypatch: pytest.MonkeyPatch
):
    place = replace(place_of(Method(batch_size=6), architecture=ARCHITECTURES[name]), stack=8)
    worker = Worker(place)
    assert worker._way == way
    gradients, seen = stacked.Stack._gradients, []

    def counted(*given: Any) -> Any:
        seen.append(given[2].shape)
        return gradients(*given)

    monkeypatch.setattr(stacked.Stack, "_gradients", counted)
    orders = tuple(Order(k, 0, 0) for k in range(len(SIZES)))
    worker.run(Job(1, place.method.client_update, (task_of(place),)), [Chunk(0, 0, orders, {}, 1)])
    assert len(seen) == calls


# ── functions that do other things ───────────────────────────────────────────────────────────────────────


def twice(task: Task, client: Client) -> ClientUpdate:
    """Train, and train on."""
    first = client.sgd(task.params, task.mask, epochs=1)
    first.flat.mul_(0.5)  # a client may write into its own copy
    return ClientUpdate(
        client.sgd(first, task.mask, epochs=1, lr=0.01), task.mask, metrics={"loss": client.meter.loss}
    )


def with_a_schedule(task: Task, client: Client) -> ClientUpdate:
    """Train with a learning rate that depends on client and step, on batches of a fixed seed."""
    half = client.id % 2 + 1
    params = client.sgd(task.params, task.mask, lr=lambda step: 0.1 / (half + step), seed=5)
    return ClientUpdate(params, task.mask, metrics={"draw": float(client.rng.random())})


def with_a_loss(task: Task, client: Client) -> ClientUpdate:
    """Train with a loss of its own."""

    def loss(step: Step) -> Tensor:
        return nn.functional.cross_entropy(step.logits, step.y) + sum(
            w.square().sum() for w in step.weights.values()
        )

    return ClientUpdate(client.sgd(task.params, task.mask, loss=loss), task.mask)


def looks_first(task: Task, client: Client) -> ClientUpdate:
    """Evaluate, then train."""
    before = client.evaluate(task.params, task.mask).loss
    return ClientUpdate(client.sgd(task.params, task.mask), task.mask, metrics={"before": before})


def remembers(task: Task, client: Client) -> ClientUpdate:
    """Count the rounds, and draw before and after the training from every generator."""
    client.memory["rounds"] = client.memory.get("rounds", 0) + 1
    draws = [float(torch.rand(())), float(np.random.random()), float(client.rng.random())]
    start = Params(task.params.flat + draws[0] + draws[1] + draws[2], task.params.layout)
    params = client.sgd(start, task.mask)
    client.memory["draws"] = [
        *draws,
        float(torch.rand(())),
        float(np.random.random()),
        float(client.rng.random()),
    ]
    client.memory["weights"] = params.flat
    return ClientUpdate(params, task.mask)


def catches_all(task: Task, client: Client) -> ClientUpdate:
    """Catch what it should not."""
    params = task.params
    with suppress(BaseException):
        params = client.sgd(task.params, task.mask)
    return ClientUpdate(params, task.mask)


def changes_its_mind(task: Task, client: Client) -> ClientUpdate:
    """Ask for something else in every run."""
    start = Params(task.params.flat + float(np.random.default_rng().random()), task.params.layout)
    return ClientUpdate(client.sgd(start, task.mask), task.mask)


@pytest.mark.parametrize(
    ("function", "stacks"),
    [
        (twice, [6]),
        (with_a_schedule, [6]),
        (with_a_loss, []),
        (looks_first, []),
        (score, []),
        (remembers, [6]),
        (catches_all, [6]),
    ],
)
def test_other_functions(function: ClientFunction, stacks: list[int], asked: list[int]):
    place = place_of(Method(batch_size=6))
    alone, together = answers(place, function), answers(replace(place, stack=8), function)
    check(alone, together)
    assert asked == stacks
    (a,), (b,) = alone.partials.values(), together.partials.values()
    assert a.metrics.keys() == b.metrics.keys()
    for metric, value in a.metrics.items():
        assert value == pytest.approx(b.metrics[metric], rel=1e-4)
    assert a.sums.keys() == b.sums.keys()
    for client, memory in alone.memories.items():
        assert memory.get("rounds") == together.memories[client].get("rounds")
        assert memory.get("draws") == together.memories[client].get("draws")
    for memory in together.memories.values():
        if "weights" in memory:  # what is kept must not hold the weights of all others
            assert memory["weights"].untyped_storage().nbytes() == 4 * place.model.layout.size


@pytest.mark.parametrize("architecture", [DROPOUT, CHANNELS], ids=["dropout", "channels"])
def test_dropout_draws_from_the_stream_of_each_client(architecture: Architecture, asked: list[int]):
    place = place_of(Method(batch_size=6, local_epochs=2), architecture=architecture)
    alone, together = answers(place, remembers), answers(replace(place, stack=8), remembers)
    check(alone, together)
    assert asked == [6]
    for client, memory in alone.memories.items():  # among them a draw after the training
        assert memory["draws"] == together.memories[client]["draws"]
    other = answers(place, round=2)
    (a,), (b,) = alone.partials.values(), other.partials.values()
    assert not torch.allclose(a.updates[0].params.flat, b.updates[0].params.flat, atol=1e-3)


def test_a_function_that_asks_for_something_else_in_its_second_run_trains_alone(asked: list[int]):
    place = place_of(Method(batch_size=6))
    found = answers(replace(place, stack=8), changes_its_mind)
    assert [record.fate for record in found.records] == ["folded"] * 6
    assert asked == [6]


@dataclass
class Failing:
    """Fails for some clients, before or after their training."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    calls: list[int] = field(default_factory=list)

    def __call__(self, task: Task, client: Client) -> ClientUpdate:
        """Train, or fail."""
        self.calls.append(client.id)
        if client.id in self.before:
            raise ValueError("before")
        params = client.sgd(task.params, task.mask)
        if client.id in self.after:
            raise ValueError("after")
        return ClientUpdate(params, task.mask)


@pytest.mark.parametrize(
    ("before", "after", "first"), [((3,), (), 3), ((), (2,), 2), ((3,), (1,), 1), ((1,), (4,), 1)]
)
def test_the_error_is_that_of_the_first_client(before: tuple[int, ...], after: tuple[int, ...], first: int):
    place = place_of(Method(batch_size=6))
    for stack in (1, 8):
        with pytest.raises(ClientError) as caught:
            answers(replace(place, stack=stack), Failing(before, after))
        assert caught.value.client == first


def test_a_client_without_examples_raises_what_it_raises_alone():
    place = place_of(Method(batch_size=6), partition=small.dealt(5, 0, 5))
    for stack in (1, 8):
        with pytest.raises(ClientError, match="client 1 has no examples"):
            answers(replace(place, stack=stack))


def test_a_function_runs_twice_up_to_its_training_and_not_at_all_without_a_stack():
    place = place_of(Method(batch_size=6))
    for stack, calls in ((1, 6), (8, 12)):
        function = Failing()
        answers(replace(place, stack=stack), function)
        assert len(function.calls) == calls


# ── models that cannot be stacked ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(Functional(), "random"), (Noisy(), "random"), (Gated(), "")],
    ids=["torch", "numpy", "branch"],
)
def test_a_model_that_cannot_be_stacked_trains_one_client_after_the_other(
    layer: nn.Module, reason: str, asked: list[int], caplog: pytest.LogCaptureFixture
):
    place = place_of(Method(batch_size=6), architecture=_random(layer))
    with caplog.at_level(logging.WARNING):
        found = answers(replace(place, stack=8))
    alone = answers(place)
    for client, update in alone.partials[0, 0].updates.items():
        assert torch.equal(update.params.flat, found.partials[0, 0].updates[client].params.flat)
    assert asked == []
    (message,) = [record.getMessage() for record in caplog.records]
    assert "cannot be stacked" in message
    assert reason in message


def test_results_that_would_be_others_are_noticed(monkeypatch: pytest.MonkeyPatch):
    engine = Worker(place_of(Method())).engine
    assert way_of(engine) == "padded"
    gradients = stacked.Stack._gradients

    def wrong(*given: Any) -> Any:
        losses, grads = gradients(*given)
        return losses, tuple(1.01 * grad for grad in grads)

    monkeypatch.setattr(stacked.Stack, "_gradients", wrong)
    assert way_of(engine) == "alone"


def test_vmap_does_not_compute_in_bf16(caplog: pytest.LogCaptureFixture):
    place = replace(place_of(Method()), precision="bf16")
    with caplog.at_level(logging.WARNING):
        assert way_of(Worker(place).engine) == "alone"
    assert "bf16" in caplog.text


def test_a_trial_leaves_the_global_generators_as_they_were():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = float(torch.rand(())), float(np.random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    assert way_of(Worker(place_of(Method())).engine) == "padded"
    assert (float(torch.rand(())), float(np.random.random())) == expected


# ── the same bits on any number of workers ───────────────────────────────────────────────────────────────


class Several(LocalPool):
    """Several workers in this process; each gets its chunks as actors do."""

    def __init__(self, place: Workplace, workers: int) -> None:
        super().__init__(place)
        self.workers = [Worker(place) for _ in range(workers)]

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Deal the chunks; the last worker goes first."""
        answer = Answer()
        dealt = share([chunk.num_examples for chunk in chunks], len(self.workers))
        for worker, part in reversed(list(zip(self.workers, dealt, strict=True))):
            answer.join(worker.run(job, chunks[part.start : part.stop]))
        answer.partials = merge_within(answer.partials)
        return answer


def several(workers: int) -> Callable[[Workplace], LocalPool]:
    return lambda place: Several(place, workers)


def finish(method: Method, pool: Any, **options: Any) -> str:
    usual: dict[str, Any] = {"schedule": Schedule(rounds=3, cohort=11), "clients": 20, "stack": 3}
    server = small.server(method, pool=pool, **usual | options)
    small.run(server)
    return server.model.sha256


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN, DROPOUT], ids=["mlp", "cnn", "dropout"])
def test_any_number_of_workers_gives_the_same_bits(architecture: Architecture, asked: list[int]):
    sums = {
        finish(Moving(batch_size=4), pool, architecture=architecture)
        for pool in (LocalPool, several(1), several(2), several(3))
    }
    assert len(sums) == 1
    assert set(asked) == {2, 3}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_bits_on_two_workers(name: str):
    options = {"clients": 8, "server_rows": 20, "schedule": Schedule(rounds=5, cohort=5)}
    method = METHODS[name]()
    assert finish(method, LocalPool, **options) == finish(method, several(2), **options)


def test_on_ray_too(ray_local: Any):
    def pool(place: Workplace) -> RayPool:
        return RayPool(place, [Group(2, ActorOptions(cpu=0.5))])

    assert finish(Moving(batch_size=4), pool) == finish(Moving(batch_size=4), LocalPool)


def test_the_federation_ends_where_it_ends_without_a_stack():
    def model(stack: int) -> Tensor:
        server = small.server(Moving(batch_size=4), schedule=Schedule(3, 11), clients=20, stack=stack)
        small.run(server)
        return server.model.flat

    torch.testing.assert_close(model(4), model(1), rtol=1e-4, atol=1e-5)


# ── chunks ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("clients", "stack", "size"),
    [(100, 1, 7), (100, 32, 25), (10, 32, 10), (10, 1, 1), (1, 8, 1), (33, 32, 17)],
)
def test_the_size_of_a_chunk(clients: int, stack: int, size: int):
    assert chunk_size(clients, stack) == size


@given(clients=st.integers(1, 2000), stack=st.integers(1, 64))
def test_there_are_at_most_16_chunks_unless_stacks_are_smaller(clients: int, stack: int):
    size = chunk_size(clients, stack)
    assert 1 <= size <= clients
    assert -(-clients // size) <= 16


def test_a_stand_in_is_a_client():
    assert issubclass(StandIn, Client)
