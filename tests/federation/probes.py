"""What shows how a server works: methods that do what a test says, and a pool that keeps what was sent."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from fedray.data.datasets import Examples
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import LocalPool
from fedray.federation.server import Server
from fedray.pruning import masks
from fedray.types import ClientInfo, ClientUpdate, Layout, Mask, Params, RoundReport, ServerState, Task
from tests import small

WEIGHTS = 163
"""Of `small.MLP`."""
DENSE = 2 * (8 * 16 + 3 * 8)
"""FLOPs of an example in its forward pass."""
CLOCKS = tuple(f"{total}time/{clock}" for total in ("", "total/") for clock in ("wall_s", "server_wall_s"))
"""Metrics that no two runs share."""
SLOW = replace(small.DEVICE, name="slow", flops_per_s=100.0)
"""A device that computes ten times as slowly as `small.DEVICE`."""


class SpyPool(LocalPool):
    """A local pool that keeps copies of the jobs that it was given, and checks that nobody changes them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.jobs: list[tuple[Job, tuple[Chunk, ...]]] = []
        self.evaluated: list[Task] = []

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Keep the job and run it."""
        before = deepcopy(job.tasks)
        self.jobs.append((replace(job, tasks=before), tuple(chunks)))
        answer = super().run(job, chunks)
        assert job.tasks == before, "what is broadcast stays as it was"
        return answer

    def evaluate(self, task: Task, examples: Examples) -> Any:
        """Keep the task and evaluate."""
        self.evaluated.append(task)
        return super().evaluate(task, examples)

    @property
    def tasks(self) -> list[Task]:
        """Every task that was sent, in order."""
        return [task for job, _ in self.jobs for task in job.tasks]


def spied(server: Server) -> SpyPool:
    """Return the spying pool of a server that has one."""
    assert isinstance(server.pool, SpyPool)
    return server.pool


def half(layout: Layout, seed: int = 0) -> Mask:
    """Return a mask with half of what is prunable pruned, at random."""
    return masks.random(layout, 0.5, np.random.default_rng(seed))


def pruned_half() -> tuple[int, ...]:
    """Return the entries that `half` prunes."""
    return tuple((~half(small.workplace(Method()).model.layout).flat).nonzero().flatten().tolist())


def without_clocks(report: RoundReport) -> RoundReport:
    """Return a report without its metrics that no two runs share."""
    return replace(report, metrics={k: v for k, v in report.metrics.items() if k not in CLOCKS})


@dataclass(frozen=True, kw_only=True)
class Pruned(Method):
    """Start with some entries pruned."""

    pruned: tuple[int, ...] = ()

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Take the entries out of the mask."""
        mask = state.mask.clone()
        mask.flat[list(self.pruned)] = False
        return replace(state, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Recording(Method):
    """Write down which hook is called, in which round, and with how many threads torch may work."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def note(self, hook: str, round: int) -> None:
        """Write down a call."""
        self.calls.append((hook, round))
        self.threads.add(torch.get_num_threads())

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Note the call."""
        assert ctx.round == state.round
        self.note("setup", state.round)
        return super().setup(state, ctx)

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        """Note the call; tell the client the round."""
        self.note(f"configure {client.id}", state.round)
        return replace(super().configure(state, client), extras={"round": state.round})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """Note the call."""
        round = task.extras["round"]
        assert isinstance(round, int)
        self.note(f"client_update {client.id}", round)
        return super().client_update(task, client)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        """Note the call."""
        self.note("aggregate", state.round)
        return super().aggregate(state, cohort)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Note the call."""
        assert ctx.round == state.round
        self.note("prune", state.round)
        return super().prune(state, cohort, ctx)

    def eval_params(self, state: ServerState) -> Params:
        """Note the call, with the round that the state has advanced to."""
        self.note("eval_params", state.round)
        return super().eval_params(state)


@dataclass(frozen=True, kw_only=True)
class Moving(Method):
    """Prune half before training, and another half after round 2."""

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Prune half."""
        return replace(state, mask=half(ctx.layout))

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Prune another half."""
        return replace(state, mask=half(ctx.layout, seed=1)) if state.round == 2 else state


@dataclass(frozen=True, kw_only=True)
class Hooked(Method):
    """Do something in `setup`, something in `prune`."""

    at_setup: Callable[[ServerState, ServerContext], Any] | None = None
    at_prune: Callable[[ServerState, ServerContext], Any] | None = None

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Do the first thing."""
        if self.at_setup:
            self.at_setup(state, ctx)
        return state

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Do the second thing."""
        if self.at_prune:
            self.at_prune(state, ctx)
        return state


@dataclass(frozen=True, kw_only=True)
class HookedWithData(Hooked):
    """The same, with data on the server."""

    uses_server_data: ClassVar[bool] = True


def train_at_server(state: ServerState, ctx: ServerContext) -> Params:
    """Train for two epochs on the server's own examples."""
    return ctx.server.sgd(state.params, state.mask, epochs=2)


def score(task: Task, client: Client) -> ClientUpdate:
    """Send a gradient and no weights."""
    gradient = client.grad(task.params, task.mask)
    return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"gradient": gradient})
