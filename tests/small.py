"""A federation small enough to follow: tiny models, made-up examples, devices with round numbers.

    server = small.server(Method(), clients=6, seed=1)
    reports = small.run(server)                             # set-up, then every round of its schedule
    client = small.client(Method())                         # one client, as `client_update` gets it

All of it is in process and takes milliseconds, so that whatever a test is about can be run for real: parts
that it does not name are made for it, and any of them can be given instead.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from torch import nn

from fedray.costs.devices import Fleet
from fedray.costs.differences import PLAIN, UplinkCodec
from fedray.costs.flops import FlopModel
from fedray.data.datasets import Dataset, Examples
from fedray.data.partition import Dealt, Partition, QuantitySkew
from fedray.federation.client import Client
from fedray.federation.method import Method, Setting
from fedray.federation.pool import ClientPool, LocalPool
from fedray.federation.population import Population
from fedray.federation.server import Checkpoint, Schedule, Server, ServerSide
from fedray.federation.worker import Rules, Worker, Workplace
from fedray.models.norms import Norm
from fedray.models.spec import Architecture, InputShape, ModelSpec
from fedray.types import DeviceProfile, RoundReport

SHAPE: InputShape = (1, 4, 4)
CLASSES = 3
EXAMPLES = 150
VALIDATION = 30
"""The last examples of a data set are for validation, the first ones for the server, the rest for clients."""

DEVICE = DeviceProfile(
    name="device",
    flops_per_s=1000.0,
    downlink_bytes_per_s=100.0,
    uplink_bytes_per_s=50.0,
    latency_s=1.0,
    memory_bytes=2.0**30,
)
RULES = Rules()
SCHEDULE = Schedule(rounds=3, cohort=4)


def _mlp(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(prod(input_shape), 8),
            relu=nn.ReLU(),
            fc2=nn.Linear(8, num_classes),
        )
    )


def _cnn(input_shape: InputShape, num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 4, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(4),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 6, 3, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(6 * (height // 2) * (width // 2), num_classes),
        )
    )


def _linear(input_shape: InputShape, num_classes: int) -> nn.Module:
    layer = nn.Linear(prod(input_shape), num_classes, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=layer))


def _takes_anything(input_shape: InputShape) -> str | None:
    return None


MLP = Architecture(_mlp, _takes_anything, "made up", "fc 8, fc classes; ReLU")
"""163 weights on SHAPE, 128 of them (all of fc1.weight) prunable unless `prune_last`."""
CNN = Architecture(_cnn, _takes_anything, "made up", "conv 4, batch norm, pool, conv 6, fc classes; ReLU")
"""349 weights on SHAPE, 252 of them prunable unless `prune_last`; 8 running statistics."""
LINEAR = Architecture(_linear, _takes_anything, "made up", "fc classes, without bias, from zero")
"""One weight per pixel and class; prunable only with `prune_last`."""


def dataset(examples: int = EXAMPLES, seed: int = 0) -> Dataset:
    """Return images of SHAPE that a small model can tell apart: a pattern for each class, and noise."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(60, 196, (CLASSES, *SHAPE))
    y = rng.integers(CLASSES, size=examples)
    noise = rng.normal(0, 35, (examples, *SHAPE))
    x = np.clip(patterns[y] + noise, 0, 255).astype(np.uint8)
    return Dataset("made up", Examples(x, y), Examples(x[:0], y[:0]), CLASSES, SHAPE, (0.5,), (0.25,))


def pixels(values: Sequence[int], labels: Sequence[int], classes: int) -> Dataset:
    """Return images of a single pixel, which the model sees as the very numbers given (0 to 255)."""
    x = np.array(values, dtype=np.uint8).reshape(-1, 1, 1, 1)
    y = np.array(labels, dtype=np.int64)
    return Dataset("pixels", Examples(x, y), Examples(x[:0], y[:0]), classes, (1, 1, 1), (0.0,), (1 / 255,))


def dealt(*sizes: int) -> Partition:
    """Return a partition that gives the first rows to client 0, the next ones to client 1, and so on."""
    return Dealt(np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes), len(sizes))


def fleet(clients: int, devices: Sequence[DeviceProfile] = (DEVICE,)) -> Fleet:
    """Return a fleet without jitter in which client k has device k, from the front again after the last."""
    index = (np.arange(clients) % len(devices)).astype(np.uint8)
    return Fleet(tuple(devices), index, np.ones((clients, 3), dtype=np.float32))


def workplace(
    method: Method,
    *,
    clients: int = 6,
    seed: int = 0,
    rules: Rules = RULES,
    server_rows: int = 0,
    architecture: Architecture = MLP,
    norm: Norm = "average",
    standardize: bool | None = None,
    prune_last: bool = False,
    data: Dataset | None = None,
    partition: Partition | None = None,
    devices: Sequence[DeviceProfile] = (DEVICE,),
    codec: UplinkCodec = PLAIN,
    stack: int = 1,
) -> Workplace:
    """Return what a worker needs.

    Args:
        method: what is run.
        clients: number of clients, unless `partition` says it.
        seed: of the run; also deals out the examples, in unequal numbers.
        rules: which updates count.
        server_rows: examples that are kept from the clients, for the server.
        architecture: MLP, CNN, LINEAR or another one.
        norm: the policy for its batch normalisation.
        standardize: whether weights are standardised; None: as the method has it.
        prune_last: whether the last layer's weights may be pruned.
        data: what is learnt; `dataset()` if None.
        partition: who has which examples of it.
        devices: client k has device k, from the front again after the last.
        codec: how the updates of training are written.
        stack: clients that train together.
    """
    data = data or dataset()
    if partition is None:
        rows = np.arange(server_rows, len(data.train) - VALIDATION)
        partition = QuantitySkew(alpha=5.0).split(data.train.y, None, rows, clients, seed)
    model = ModelSpec.of(
        "small",
        architecture,
        data.input_shape,
        data.num_classes,
        norm=norm,
        standardize=standardize,
        prune_last=prune_last,
    )
    return Workplace(
        model=model,
        flops=FlopModel.trace(
            model.bind(model.init(seed).flat), data.input_shape, model.layout, tokens=data.tokens
        ),
        dataset=data,
        population=Population(partition, fleet(partition.population, devices)),
        method=method,
        rules=rules,
        seed=seed,
        codec=codec,
        stack=stack,
    )


def setting(
    *, architecture: Architecture = MLP, rounds: int = 10, population: int = 10, cohort: int = 4
) -> Setting:
    """Return what a method is asked to check before anything starts."""
    return Setting(ModelSpec.of("small", architecture, SHAPE, CLASSES), population, cohort, rounds)


def server(
    method: Method,
    *,
    schedule: Schedule = SCHEDULE,
    server_rows: int = 0,
    pool: Callable[[Workplace], ClientPool] = LocalPool,
    checkpoint: Checkpoint | None = None,
    **place: Any,
) -> Server:
    """Return a federation that has not begun.

    Args:
        method: what is run.
        schedule: how long, how many, how often.
        server_rows: how many examples the server has of its own.
        pool: what makes the pool of clients.
        checkpoint: where to go on.
        **place: model, data and clients, as for `workplace`.
    """
    at = workplace(method, server_rows=server_rows, **place)
    train = at.dataset.train
    validation = Examples(train.x[-VALIDATION:], train.y[-VALIDATION:])
    own = ServerSide(replace(DEVICE, name="server"), np.arange(server_rows), validation)
    return Server(at, pool(at), schedule, own, checkpoint)


def run(server: Server) -> list[RoundReport]:
    """Set up unless that is done, and make all rounds that are left; return their reports."""
    reports = [server.setup()] if server.state.round == 0 else []
    while server.state.round <= server.schedule.rounds:
        reports.append(server.step())
    return reports


def client(
    method: Method, *, id: int = 0, round: int = 1, memory: dict[str, Any] | None = None, **place: Any
) -> Client:
    """Return one client as a worker makes it, on an engine of its own; `place` as in `server`."""
    at = workplace(method, **place)
    rows = at.population.partition.rows(id)
    return Worker(at).client(at.population[id], rows, round, {} if memory is None else memory)
