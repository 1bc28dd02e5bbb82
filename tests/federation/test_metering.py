"""Nobody computes past the meter: what torch really multiplies, beside what devices and server are charged.

Every product of matrices and every convolution is counted where torch runs it, whoever asked for it. On
devices that skip no zeros, each call on a client, and the server in each round, must be charged at least
that, and nothing where nothing was computed. So a method that trains a copy of the model, or asks a second
model for its opinion, fails here, in the set-up too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fedray.data.datasets import Examples
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Outcome, Step
from fedray.federation.exchange import Job, Trained
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import LocalPool
from fedray.federation.rehearsal import MakeClient
from fedray.federation.server import Schedule, Server
from fedray.federation.wire import Memory, Order
from fedray.federation.worker import Worker, Workplace
from fedray.methods import METHODS
from fedray.models.spec import Architecture
from fedray.types import ClientUpdate, Mask, ServerState, Task
from tests import small

ROUNDS = 3
DENSE = replace(small.DEVICE, exploits="nothing")
ARCHITECTURES = {"mlp": small.MLP, "cnn": small.CNN}
aten = torch.ops.aten


class RealFlops(TorchDispatchMode):
    """Adds up two FLOPs for each multiply-add of matrix products and convolutions, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += 2.0 * multiply_adds(func.overloadpacket, args, out)
        return out


def multiply_adds(op: Any, args: Sequence[Any], out: Any) -> int:
    """Return the multiply-adds of one operation; 0 for what is none of weights with activations."""
    if op in (aten.mm, aten.bmm):
        return int(out.numel() * args[0].shape[-1])
    if op in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_):
        return int(out.numel() * args[1].shape[-1])
    if op is aten.convolution:
        return int(out.numel() * prod(args[1].shape[1:]))
    if op is aten.convolution_backward:  # of the output; gradients of input and weights, as far as asked for
        return int(args[0].numel() * prod(args[2].shape[1:]) * sum(args[-1][:2]))
    return 0


@dataclass(frozen=True)
class Entry:
    """What somebody computed: really, by the theoretical count, and as charged to a device without tricks."""

    who: str
    real: float
    flops: float
    executed: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it."""
        if (self.real > 0) != (self.flops > 0):
            return f"{self.who} computed {self.real:,.0f} FLOPs, and its meter says {self.flops:,.0f}"
        if self.real > self.executed * (1 + 1e-9):
            return f"{self.who} computed {self.real:,.0f} FLOPs, but was charged for {self.executed:,.0f}"
        return None


class WatchedWorker(Worker):
    """A worker that notes what each call on a device really computes."""

    def __init__(self, place: Workplace, real: RealFlops) -> None:
        super().__init__(place)
        self.real, self.entries = real, list[Entry]()
        # another thread (of a Ray that an earlier test started) may draw from Python's generator; a client
        # would then train twice, and be charged once
        self._seeds_all = True

    def train(self, job: Job, order: Order, memory: Memory, make: MakeClient = Client) -> Trained:
        before = self.real.total
        trained = super().train(job, order, memory, make)
        cost, name = trained.record.cost, getattr(job.function, "__name__", "?")
        who = f"client {order.client} in {name} of round {job.round}"
        self.entries.append(Entry(who, self.real.total - before, cost.flops, cost.executed_flops))
        return trained


class WatchedPool(LocalPool):
    """A pool of one such worker."""

    def __init__(self, place: Workplace, real: RealFlops) -> None:
        super().__init__(place)
        self.worker: WatchedWorker = WatchedWorker(place, real)


def begin(method: Method, architecture: Architecture, real: RealFlops) -> Server:
    server = small.server(
        method,
        schedule=Schedule(ROUNDS, cohort=4),
        server_rows=60,
        data=small.dataset(300),
        architecture=architecture,
        devices=[DENSE],
        pool=partial(WatchedPool, real=real),
    )
    server.side = replace(server.side, profile=replace(DENSE, name="server"))
    evaluate = server.evaluate

    def free(examples: Examples, client: int | None = None) -> Outcome:
        """Evaluate for the report: that is the experimenter's; what a method asks for goes past this."""
        before = real.total
        outcome = evaluate(examples, client)
        real.total = before
        return outcome

    server.evaluate = free  # type: ignore[method-assign]
    return server


def entries(method: Method, architecture: Architecture = small.MLP) -> list[Entry]:
    """Run a method, and return what each call on a device and each round of the server came to."""
    real, found = RealFlops(), list[Entry]()
    server = begin(method, architecture, real)
    assert isinstance(server.pool, WatchedPool)
    for make in (server.setup, *[server.step] * ROUNDS):
        real.total = 0.0
        with real:
            report = make()
        clients = server.pool.worker.entries
        own = real.total - sum(entry.real for entry in clients)
        executed = report.metrics["time/server_s"] * DENSE.flops_per_s
        who = f"the server in round {report.round}"
        found += [*clients, Entry(who, own, report.metrics["flops/server"], executed)]
        clients.clear()
    return found


def faults(method: Method, architecture: Architecture = small.MLP) -> list[str]:
    return [entry.fault for entry in entries(method, architecture) if entry.fault]


# ── the methods of the table


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_the_meter_moves_when_a_method_computes_and_only_then(name: str, architecture: Architecture) -> None:
    method = METHODS[name]()
    assert method.check(small.setting(architecture=architecture, rounds=ROUNDS)) is None
    assert faults(method, architecture) == []


# ── the count itself

# forward, gradients of the weights, and of all inputs but the images: multiply-adds of each example
BY_HAND = {
    "mlp": 2 * ((128 + 24) + (128 + 24) + 24),
    "cnn": 2 * (2 * (36 * 16 + 216 * 4 + 72) + (216 * 4 + 72)),  # of 16 and 4 pixels
}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"local_epochs": 2}], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_training_really_takes_is_counted_as_by_hand(name: str, options: dict[str, Any]) -> None:
    found = entries(Method(**options), ARCHITECTURES[name])
    sizes = {entry.flops: entry.real for entry in found if entry.real}
    assert len(sizes) > 2, "clients have unequal numbers of examples"
    dense = {"mlp": 2 * 152, "cnn": 2 * (36 * 16 + 216 * 4 + 72)}[name]
    for charged, real in sizes.items():
        examples = charged / (3 * dense)
        assert examples == round(examples) > 0
        assert real == examples * BY_HAND[name]
    assert all(entry.real == 0 for entry in found if entry.who.startswith("the server"))


# ── whoever goes past the meter is found


def by_hand(task: Task, client: Client) -> Tensor:
    """Return a gradient that nobody metered."""
    module = client.model.bind(task.params.flat.clone())
    value = cross_entropy(module(client.x), client.y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


class TrainsACopy(Method):
    """Makes a step of its own on the device."""

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        trained = task.params.clone()
        trained.flat.sub_(by_hand(task, client), alpha=self.lr)
        return ClientUpdate(trained, task.mask)


class TrainsACopyBesides(Method):
    """Trains as it should, and looks at a gradient of its own before."""

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        by_hand(task, client)
        return super().client_update(task, client)


class AsksATeacher(Method):
    """Asks a second model for its opinion of every batch."""

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        teacher = client.model.bind(task.params.flat.clone())

        def distilled(step: Step) -> Tensor:
            with torch.no_grad():
                opinion = teacher(step.x).softmax(1)
            return cross_entropy(step.logits, opinion)

        return ClientUpdate(client.sgd(task.params, task.mask, loss=distilled), task.mask)


class TurnsTheMeterBack(Method):
    """Trains as it should, and pays nothing."""

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        update = super().client_update(task, client)
        client.meter.flops = client.meter.executed_flops = 0.0
        return update


class ChargesForNothing(Method):
    """Trains as it should, and lets a client that sat out pay too."""

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        ctx.ask(self.idle, {0: Task(state.params, state.mask)})
        return state

    def idle(self, task: Task, client: Client) -> ClientUpdate:
        client.meter.flops = client.meter.executed_flops = 1.0
        return ClientUpdate(task.params, Mask.none(task.mask.layout))


class ScoresInSetup(Method):
    """Asks for a gradient of its own before round 1."""

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        ctx.ask(self.score, {client: Task(state.params, state.mask) for client in (0, 1)})
        return state

    def score(self, task: Task, client: Client) -> ClientUpdate:
        return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"g": by_hand(task, client)})


class TrainsOnTheServer(Method):
    """Takes the server's examples, and a gradient of its own."""

    uses_server_data: ClassVar[bool] = True

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        by_hand(Task(state.params, state.mask), ctx.server)
        return state


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (TrainsACopy, "client 1 in client_update of round 1 computed 28,864 FLOPs, and its meter says 0"),
        (TrainsACopyBesides, "but was charged for"),
        (AsksATeacher, "but was charged for"),
        (TurnsTheMeterBack, "and its meter says 0"),
        (ChargesForNothing, "client 0 in idle of round 0 computed 0 FLOPs, and its meter says 1"),
        (ScoresInSetup, "client 1 in score of round 0 computed"),
        (TrainsOnTheServer, "the server in round 2 computed"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_going_past_the_meter_is_found(method: type[Method], found: str) -> None:
    assert any(found in fault for fault in faults(method())), faults(method())
