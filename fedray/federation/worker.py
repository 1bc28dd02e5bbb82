"""A worker trains the clients of a chunk, sends their updates over the link, decides their fates and folds
them.

The same code runs in process and inside an actor, so where it runs cannot change a bit. Nothing here knows of
Ray.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedray.costs.clock import clocked
from fedray.costs.differences import PLAIN, UplinkCodec
from fedray.costs.flops import FlopModel
from fedray.costs.memory import MemoryModel, OnShort
from fedray.data.datasets import Dataset, Examples
from fedray.errors import ClientError, ConfigError, FedrayError
from fedray.federation.aggregate import Bounds, Partial, merge_within
from fedray.federation.client import Client, Engine, Outcome
from fedray.federation.exchange import Answer, Chunk, Job, Trained
from fedray.federation.faults import (
    ClientRaised,
    check_raised,
    fault_of,
    not_finite,
    of_machine,
    of_signal,
    too_far,
    traceback_of,
)
from fedray.federation.method import Method
from fedray.federation.population import Population
from fedray.federation.rehearsal import Asked, MakeClient, together
from fedray.federation.wire import Memory, Order, Upload, Wire, check_types, malformed, split_memory
from fedray.models.spec import ModelSpec
from fedray.randomness import Watch, generator, seed_globals, seed_others, seed_torch
from fedray.training.agreement import Way, way_of
from fedray.training.precision import Precision, refusal
from fedray.training.resident import Resident, Share
from fedray.types import ClientInfo, ClientRecord, ClientUpdate, Cost, Fate, Fault, Mask, Task

EVALUATION_SHARD = 500
"""Examples in one shard of an evaluation; fixed, so that sums have the same bits on any number of workers."""


@dataclass(frozen=True)
class Rules:
    """Rules by which updates count, beside the devices' own dropout.

    Args:
        deadline_s: simulated seconds after which an update is late; None waits for every client.
        dropout: probability that an asked client never answers, in [0, 1), beside its device's own.
        max_failed: share of the asked clients, at most, that may fail, in [0, 1].
        max_change: L2 norm of an update's change, at most, in multiples of the norm of the weights that it
            started from, or of √entries if that is more; None: any.
    """

    deadline_s: float | None = None
    dropout: float = 0.0
    max_failed: float = 0.1
    max_change: float | None = 1000.0


@dataclass(frozen=True)
class Workplace:
    """The data, model, clients and method of a run; sent to a worker once. Without the test set.

    `stack` is how many clients are trained together, 1 for one after the other. The method decides whether
    a model standardises its weights that leaves this open. `memory` is what training takes on a device, None
    if unknown, and `on_short` what becomes of a device without it.
    """

    model: ModelSpec
    flops: FlopModel
    dataset: Dataset
    population: Population
    method: Method
    rules: Rules
    seed: int
    codec: UplinkCodec = PLAIN
    stack: int = 1
    precision: Precision = "fp32"
    memory: MemoryModel | None = None
    on_short: OnShort = "refuse"

    def __post_init__(self) -> None:
        """Let the method decide what the model leaves open."""
        if self.model.standardize is None:
            model = replace(self.model, standardize=self.method.standardizes)
            object.__setattr__(self, "model", model)

    def method_of(self, info: ClientInfo) -> Method:
        """Return the method as a client trains it: with smaller batches where its memory asks for them."""
        if self.memory is None or self.on_short != "batch":
            return self.method
        most = min(self.method.batch_size, max(1, info.num_examples))
        fitting = self.memory.largest_batch(most, info.profile.memory_bytes)
        return self.method if fitting == most else replace(self.method, batch_size=fitting)

    def memory_bytes(self, info: ClientInfo) -> int:
        """Return the bytes that training takes on a client's device; 0 if unknown, or without examples."""
        if self.memory is None or not info.num_examples:
            return 0
        return self.memory.training_bytes(min(self.method_of(info).batch_size, info.num_examples))

    @cached_property
    def wire(self) -> Wire:
        """The link between the server and the clients."""
        return Wire(self.model, self.method.downlink, self.method.uplink, self.seed, self.codec)


class Worker:
    """Trains clients one after the other on one engine, on the CPU or on a GPU."""

    def __init__(self, place: Workplace, device: str = "cpu") -> None:
        self.place, self.device = place, device
        self.engine = self._new_engine()
        self._refusal = refusal(place.precision, self.engine.device)
        self._watch, self._seeds_all = Watch(), False

    def _new_engine(self) -> Engine:
        place = self.place
        return Engine(
            place.model, place.flops, self.device, precision=place.precision, narrow=place.method.slices
        )

    def begin(self) -> None:
        """Prepare for clients: from here on, only they may draw from the global generators.

        Raises:
            ConfigError: if this machine, which may be another one than the driver's, lacks the precision.
        """
        if self._refusal is not None:
            raise ConfigError(f"train.precision: {self._refusal} ({socket.gethostname()})")
        self._watch.start()

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold chunks; neighbours of one subtree are merged before they are returned."""
        self.begin()
        answer = Answer()
        for chunk in chunks:
            answer.join(fold_chunk(self.place, job, chunk.index, self.results(job, chunk)))
            answer.partials = merge_within(answer.partials)  # at once: each holds a vector
            answer.check(job)
        return answer

    def results(self, job: Job, chunk: Chunk) -> Iterator[Trained]:
        """Train the clients of a chunk, in order of id."""

        def train(order: Order, make: MakeClient) -> Trained:
            return self.attempt(job, order, chunk.memories.get(order.client, {}), make)

        way = self._way
        most = 1 if way == "alone" else self.place.stack
        return together(chunk.orders, train, most, pads=way == "padded")

    @cached_property
    def _way(self) -> Way:
        """How clients are trained together, if the workplace asks for it and the model allows it."""
        return way_of(self.engine) if self.place.stack > 1 else "alone"

    def attempt(self, job: Job, order: Order, memory: Memory, make: MakeClient = Client) -> Trained:
        """Run one client's function, as `train`; a client whose code raises has failed.

        Raises:
            Asked, ClientError: as `train`; of a client that raises, if none may fail.
        """
        try:
            return self.train(job, order, memory, make)
        except ClientRaised as error:
            check_raised(job.round, [error.fault], job.may_fail, job.failed)
            self.engine = self._new_engine()  # whatever it left behind in the old one
            return Trained(error.record, None, None, error.fault)

    def train(self, job: Job, order: Order, memory: Memory, make: MakeClient = Client) -> Trained:
        """Run one client's function, with global generators that are seeded for this client.

        The generators of Python and numpy are seeded only after some client has drawn from them; that client
        then runs again.

        Args:
            job: what to run.
            order: which client, and which task of the job.
            memory: the client's.
            make: makes the client.

        Raises:
            Asked: from a client of `together`.
            ClientRaised: if the client's code raised; with client and round.
            ClientError: if it broke a rule of fedray, returned what cannot be sent, or lacked memory.
        """
        if not self._watch.started:
            self.begin()
        if not self._seeds_all:
            try:
                trained = self._train(job, order, memory, make)
            except (ClientError, Asked):
                if not self._watch.drawn():
                    raise
            else:
                if not self._watch.drawn():
                    return trained
            self._seeds_all = True
        seed_others(self.place.seed, job.round, order.client)
        return self._train(job, order, memory, make)

    def _train(self, job: Job, order: Order, memory: Memory, make: MakeClient) -> Trained:
        """Run one client's function; torch's global generators are seeded for it."""
        seed_torch(self.place.seed, job.round, order.client)
        info = self.place.population[order.client]
        memory, kept = split_memory(deepcopy(memory))
        task = self.place.wire.arrive(job.tasks[order.task], kept)
        rows = self.place.population.partition.rows(order.client)
        client = self.client(info, rows, job.round, memory, make)
        versions = _versions(task)
        try:
            update = job.function(task, client)
            trained = self._judge(job, order, task, client, update, kept)
        except FedrayError as error:
            raise ClientError(order.client, job.round, str(error)) from error
        except (Exception, SystemExit) as error:
            if of_signal(error):
                raise
            _check_unchanged(task, versions, order.client, job.round)
            if of_machine(error):
                raise ClientError(order.client, job.round, traceback_of(error)) from error
            record = _record(self.place, order, client, "failed")
            raise ClientRaised(record, fault_of(order.client, error), job.round) from error
        _check_unchanged(task, versions, order.client, job.round)
        return trained

    def client(
        self, info: ClientInfo, rows: np.ndarray, round: int, memory: Memory, make: MakeClient = Client
    ) -> Client:
        """Return a client, made by `make`, with the examples of some rows."""
        resident, method = self._resident, self.place.method_of(info)
        if method is not self.place.method:
            make = Client  # a stack's batches are of one size
        return make(
            info=info,
            y=torch.from_numpy(self.place.dataset.train.y[rows]),
            round=round,
            memory=memory,
            _engine=self.engine,
            _training=method,
            _generator=client_generator(self.place.seed, round, info.id),
            _examples=self._normalised(rows),
            _share=None if resident is None else Share(resident, torch.from_numpy(rows.astype(np.int64))),
        )

    @cached_property
    def _resident(self) -> Resident | None:
        """The training examples on the worker's GPU, if it has one and they fit."""
        return Resident.of(self.place.dataset, self.engine.device)

    def _normalised(self, rows: np.ndarray) -> Callable[[], torch.Tensor]:
        """Return what makes the examples of some rows; they are made at once by a user's own function.

        Such a function may draw from the global generators, and does so before the client's code.
        """
        dataset = self.place.dataset
        if dataset.prepare is None:
            return lambda: dataset.normalise(dataset.train.x[rows])
        x = dataset.normalise(dataset.train.x[rows])
        return lambda: x

    def evaluate(self, task: Task, examples: Examples) -> list[Outcome]:
        """Classify examples with a model, shard by shard."""
        outcomes = []
        for start in range(0, len(examples), EVALUATION_SHARD):
            part = slice(start, start + EVALUATION_SHARD)
            x = self.place.dataset.normalise(examples.x[part])
            y = torch.from_numpy(np.array(examples.y[part]))
            seed_globals(self.place.seed)  # the same for each shard, wherever it is
            outcomes.append(self.engine.evaluate(task.params, task.mask, x, y))
        return outcomes

    @cached_property
    def _bounds(self) -> Bounds:
        """Largest magnitudes of an update with which the mean of the largest cohort stays finite."""
        return self.place.method.fold.bounds(self.place.population.partition.sizes)

    def _judge(
        self, job: Job, order: Order, task: Task, client: Client, update: ClientUpdate, kept: Memory
    ) -> Trained:
        """Send an update over the wire, read the clock, and decide whether it counts."""
        place, info = self.place, client.info
        problem = malformed(update, place.model.layout.size)
        if problem:
            received, bytes_up, kept = Upload(update, 0, kept)
        else:
            check_types(update)
            rng = generator(place.seed, "uplink", job.round, info.id + 1)
            received, bytes_up, kept = place.wire.upload(task, update, kept, training=job.training, rng=rng)
        record = _record(self.place, order, client, "folded", bytes_up)
        missed = self._missed(job, info, record.cost.seconds)
        fault = None if missed else self._fault(info.id, problem, received, task)
        fate: Fate = missed or (fault.fate if fault else "folded")
        arrived = replace(record.cost, bytes_up=0 if fate == "dropped" else bytes_up)
        density = float("nan") if problem else update.mask.density
        record = replace(record, fate=fate, cost=arrived, density=density)
        if fate != "folded":
            return Trained(record, None, None, fault)
        return Trained(record, received, client.memory | kept)

    def _missed(self, job: Job, info: ClientInfo, seconds: float) -> Fate | None:
        """Tell whether the answer to a round's training never arrives, or too late."""
        if not job.training:
            return None
        stays = (1 - info.profile.dropout) * (1 - self.place.rules.dropout)
        if stays < 1 and generator(self.place.seed, "fate", job.round, info.id).random() >= stays:
            return "dropped"
        deadline = self.place.rules.deadline_s
        return "late" if deadline is not None and seconds > deadline else None

    def _fault(self, client: int, problem: str | None, update: ClientUpdate, task: Task) -> Fault | None:
        """Return the fault of an update that arrived: malformed, not to be averaged, or too far away."""
        if problem:
            return Fault(client, "malformed", problem)
        if cause := not_finite(update, self._bounds):
            return Fault(client, "non-finite", cause)
        most = self.place.rules.max_change
        cause = None if most is None else too_far(update, task, most)
        return Fault(client, "too-large", cause) if cause else None


def fold_chunk(place: Workplace, job: Job, index: int, results: Any) -> Answer:
    """Fold clients' answers in order; `results` is any iterable of Trained."""
    fold = replace(place.method.fold, keep_updates=job.keep_updates or place.method.fold.keep_updates)
    partial = Partial(place.model.layout, fold, masks_of(place.model, job.tasks))
    answer = Answer({(0, index): partial})
    for trained in results:
        record = trained.record
        answer.records.append(record)
        if trained.fault is not None:
            answer.faults.append(trained.fault)
            answer.check(job)
        if trained.update is not None:
            partial.add(record.client, record.num_examples, trained.update)
        if trained.memory is not None:
            answer.memories[record.client] = trained.memory
    return answer


def _record(place: Workplace, order: Order, client: Client, fate: Fate, bytes_up: int = 0) -> ClientRecord:
    """Return the record of a client that has done its part."""
    info, meter = client.info, client.meter
    cost = Cost(order.bytes_down, bytes_up, meter.flops, meter.executed_flops, steps=meter.steps)
    cost = clocked(cost, info.profile)
    unknown, memory = float("nan"), place.memory_bytes(info)
    return ClientRecord(
        info.id, info.profile.name, info.num_examples, fate, cost, unknown, meter.loss, memory
    )


def masks_of(model: ModelSpec, tasks: Sequence[Task]) -> dict[bytes, Mask]:
    """Return the masks, by digest, that updates have under the tasks' own."""
    masks = [model.norms.shared_mask(task.mask) for task in tasks]
    return {mask.digest: mask for mask in masks}


def client_generator(seed: int, round: int, client: int) -> Callable[..., np.random.Generator]:
    """Return a factory of a client's generators: of the round, or of a number that the method chose."""

    def make(fixed: int | None = None) -> np.random.Generator:
        # id −1 is the server; a fixed seed must not meet the stream of a round
        return generator(seed, "client", client + 1, *((round,) if fixed is None else (fixed, 1)))

    return make


def _check_unchanged(task: Task, versions: list[int], client: int, round: int) -> None:
    """Refuse a task that a client wrote into.

    Raises:
        ClientError: with client and round.
    """
    if _versions(task) != versions:
        text = "it wrote into the params, mask or extras of its task, which the next client would receive"
        raise ClientError(client, round, f"{text}; work on a copy")


def _versions(task: Task) -> list[int]:
    """Return torch's counts of writes to each tensor of a task."""
    tensors = (task.params.flat, task.mask.flat, *task.extras.values())
    return [tensor._version for tensor in tensors if isinstance(tensor, torch.Tensor)]
