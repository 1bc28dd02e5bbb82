"""The server, and with it a round: READ THIS FIRST.

`Server.step()` is one round, in six numbered steps:

    1 SAMPLE     the cohort
    2 CONFIGURE  a task for each client
    3 TRAIN      on the devices, through the wire
    4 AGGREGATE  the mask-aware mean
    5 PRUNE      only here the mask moves
    6 REPORT     its metrics

The server drives; a `ClientPool` trains. All that survives a round is in `ServerState`, the clients'
memories, the mask that each client holds and the running totals: together they are a `Checkpoint`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from math import nan
from typing import Any, TypeVar

import numpy as np

from fedray.costs.clock import at_home, seconds
from fedray.data.datasets import Examples
from fedray.errors import MethodError
from fedray.federation.accounts import TOTALS, Accounts, notes, without_power
from fedray.federation.aggregate import CohortUpdate, chunk_size, cut, merge_all
from fedray.federation.client import Client, ClientFunction, Outcome, norm_statistics
from fedray.federation.density import above_asked, emptied
from fedray.federation.exchange import Chunk, Job
from fedray.federation.faults import check_faults
from fedray.federation.method import ServerContext, check_finite, check_mask
from fedray.federation.pool import ClientPool, one_thread
from fedray.federation.population import none_came, wait_for_all, wait_for_any
from fedray.federation.sampling import Ids, Sampler, SamplerContext, expect_cohort, loss_of_model
from fedray.federation.wire import Memory, Order, reject_unknown, split_memory
from fedray.federation.worker import Worker, Workplace
from fedray.models.norms import overlaid
from fedray.pruning.masks import empty_layers
from fedray.randomness import borrowed, generator, seed_globals
from fedray.shares import floor_of
from fedray.types import (
    ClientInfo,
    Cost,
    DeviceProfile,
    Mask,
    Params,
    RoundReport,
    ServerState,
    Task,
)

UNIFORM = Sampler()
SERVER = -1
"""The server's id where it trains as a client."""


@dataclass(frozen=True)
class Schedule:
    """The number of rounds, the cohort of each, and how it is drawn and folded.

    Args:
        rounds: planned rounds.
        cohort: clients whose training is asked for in a round.
        eval_every: rounds between evaluations on validation data; the last round always has one.
        chunk: clients that are folded together; None makes at most 16 chunks of a cohort.
        groups: device names whose clients have their own workers; all others are group 0.
        sampler: draws the cohort of each round.
    """

    rounds: int
    cohort: int
    eval_every: int = 1
    chunk: int | None = None
    groups: tuple[str, ...] = ()
    sampler: Sampler = UNIFORM


@dataclass(frozen=True)
class ServerSide:
    """The server's own device, examples and validation data."""

    profile: DeviceProfile
    rows: np.ndarray
    validation: Examples


@dataclass
class Checkpoint:
    """All that must survive between two rounds.

    Args:
        state: the server's.
        memories: client → its memory.
        holds: client → digest of the mask that it decoded last.
        totals: metric → its sum over the rounds so far.
        rounds_matter: whether a hook has asked how many rounds are planned: the state then depends on it.
        sampler: the sampler's memory: the result of its last `learn`, or None.
    """

    state: ServerState
    memories: dict[int, Memory] = field(default_factory=dict)
    holds: dict[int, bytes] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    rounds_matter: bool = False
    sampler: Any = None

    def snapshot(self) -> "Checkpoint":
        """Return a copy that the next round does not change: its parts are replaced, never written into."""
        return replace(self, memories=dict(self.memories), holds=dict(self.holds), totals=dict(self.totals))


@dataclass(frozen=True)
class OpenRound:
    """A round between AGGREGATE and PRUNE.

    Args:
        state: after aggregation.
        cohort: the round's update.
        ctx: for the hook `prune`.
        started: on the clock of `time.perf_counter`.
    """

    state: ServerState
    cohort: CohortUpdate
    ctx: ServerContext
    started: float


Prune = Callable[[ServerState, CohortUpdate, ServerContext], ServerState]
"""The hook `Method.prune`, or a function in its place."""

_T = TypeVar("_T")


def _at_work(step: "Callable[[Server], _T]") -> "Callable[[Server], _T]":
    """Run a step on one torch thread; its hooks may draw from the global generators, seeded for its round."""

    @wraps(step)
    def inside(server: "Server") -> _T:
        server.visits = 0
        with server.at_work():
            return step(server)

    return inside


class Server:
    """A federation: the method's state on one side, the pool of clients on the other.

    Args:
        place: model, data, clients, method and seed, as the workers have them.
        pool: where clients train.
        schedule: how long, how many, how often.
        side: the server's own device, examples and validation data.
        checkpoint: the state to continue from; None starts from the model's seeded initialisation.
    """

    def __init__(
        self,
        place: Workplace,
        pool: ClientPool,
        schedule: Schedule,
        side: ServerSide,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.place, self.pool, self.schedule, self.side = place, pool, schedule, side
        self.method, self.population, self.wire = place.method, place.population, place.wire
        if checkpoint is None:
            layout = place.model.layout
            checkpoint = Checkpoint(ServerState(0, place.model.init(place.seed), Mask.full(layout)))
        self.checkpoint = checkpoint
        self.visits = 0
        self._own: Worker | None = None
        self._empty = set(empty_layers(checkpoint.state.mask))
        self._accounts = Accounts()

    @property
    def state(self) -> ServerState:
        """The state after the last round (or before the first)."""
        return self.checkpoint.state

    @_at_work
    def setup(self) -> RoundReport:
        """Let the method prepare.

        Initial pruning, exploration, pre-training. Reported, and charged, as round 0.
        """
        started, self._accounts = time.perf_counter(), Accounts()
        state = self.method.setup(self.state, self._context(purpose=0))
        self._check(state, "setup")
        self.checkpoint.state = replace(state, round=1)
        return self._report(0, None, started, evaluate=True)

    @_at_work
    def step(self) -> RoundReport:
        """Make one round and return its report."""
        return self._close(self._open(), self.method.prune)

    def _open(self) -> OpenRound:
        """Make a round up to its aggregation."""
        started, self._accounts = time.perf_counter(), Accounts()
        state, method = self.state, self.method

        # 1 SAMPLE: the sampler draws the cohort
        cohort = self._sample()

        # 2 CONFIGURE: a task for each client; equal tasks are sent as one
        tasks = {client: method.configure(state, self.population[client]) for client in cohort}

        # 3 TRAIN: on the devices; bytes, FLOPs and seconds are metered on the way
        update = self._exchange(method.client_update, tasks, training=True)
        self._learn(update)

        # 4 AGGREGATE: the mask-aware mean of the updates that count
        state = self.wire.keep_norms(state, method.aggregate(state, update))
        check_finite(state.params, state.mask, "aggregate")
        return OpenRound(state, update, self._context(purpose=1), started)

    def _close(self, opened: OpenRound, prune: Prune) -> RoundReport:
        """Finish a round and return its report."""
        # 5 PRUNE: only here the mask moves
        state, update = prune(opened.state, opened.cohort, opened.ctx), opened.cohort
        self._check(state, "prune")
        if self.method.forgets(state):
            self._forget()

        # 6 REPORT: the last round is evaluated in any case
        evaluate = state.round % self.schedule.eval_every == 0 or state.round == self.schedule.rounds
        if evaluate:
            state = self._with_statistics(state, update)
        self.checkpoint.state = replace(state, round=state.round + 1)
        return self._report(state.round, update, opened.started, evaluate=evaluate)

    def _check(self, state: ServerState, hook: str) -> None:
        """Refuse a state whose mask lacks what is not prunable, or whose model is not finite."""
        check_mask(state.mask, self.place.model.channel_groups, hook)
        check_finite(state.params, state.mask, hook)

    @_at_work
    def open_round(self) -> OpenRound:
        """Make a round up to its aggregation, for a caller that prunes in the place of the method.

        Call its `ctx` within `at_work` only. A method whose `aggregate` draws from the global generators gets
        other numbers in `prune` than by `step`.
        """
        return self._open()

    def close_round(self, opened: OpenRound, prune: Prune) -> RoundReport:
        """Finish a round that `open_round` began and return its report; `prune` moves the mask."""
        with self.at_work():
            return self._close(opened, prune)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Lend the global generators as within a round, and use one torch thread."""
        visits = (self.visits,) if self.visits else ()
        with borrowed(self.place.seed, self.state.round, *visits), one_thread():
            yield

    @property
    @one_thread()
    def model(self) -> Params:
        """The model as it is evaluated and saved: the forward pass of `eval_params`, under the mask."""
        mask = self.state.mask
        return self.place.model.forward_params(self._trained_model(), mask).masked(mask)

    def _trained_model(self) -> Params:
        """Return `eval_params` with the statistics that clients were asked for."""
        norms = self.place.model.norms
        with borrowed(self.place.seed, self.state.round, 0, 0):
            params = self.method.eval_params(self.state)
        if norms.queried:
            params = overlaid(params, norms.statistics, self.state.params.flat[norms.statistics])
        return params

    def evaluate(self, examples: Examples, client: int | None = None) -> Outcome:
        """Classify examples with the model; if given, with the norms that a client keeps for itself."""
        memory = None if client is None else self.checkpoint.memories.get(client)
        task = self.wire.evaluated(self.model, self.state.mask, memory)
        with borrowed(self.place.seed):
            return self.pool.evaluate(task, examples)

    # ── parts of the six steps ───────────────────────────────────────────────────────────────────────────

    def _sample(self) -> Ids:
        """Let the sampler draw the cohort; wait for drawn clients whose availability it did not ask."""
        sampler, accounts = self.schedule.sampler, self._accounts
        context = SamplerContext(
            round=self.state.round,
            cohort=self.schedule.cohort,
            clients=self.population,
            rng=generator(self.place.seed, "sample", self.state.round),
            predicted_seconds=self._predicted_seconds,
            losses=self._losses,
        )
        cohort = expect_cohort(sampler.draw(self.checkpoint.sampler, context), sampler, len(self.population))
        accounts.found(context.present.intersection(cohort), context.waited_s)
        return self._wait_for(cohort)

    def _learn(self, cohort: CohortUpdate) -> None:
        """Let the sampler learn from the records of its cohort."""
        memory, round = self.checkpoint.sampler, self.state.round
        self.checkpoint.sampler = self.schedule.sampler.learn(memory, cohort.records, round)

    def _losses(self, clients: Sequence[int]) -> dict[int, float]:
        """Ask clients for the loss of the current model on their examples; charge the round for it."""
        there = self._wait_for(clients)
        task = Task(self._trained_model().masked(self.state.mask), self.state.mask)
        answer = self._exchange(loss_of_model, dict.fromkeys(there, task))
        self._accounts.exchanged(answer)
        return {client: float(sent["loss"]) for client, sent in answer.each.items()}

    def _exchange(
        self,
        function: ClientFunction,
        tasks: Mapping[int, Task],
        *,
        training: bool = False,
        keep_updates: bool = False,
        among: int | None = None,
    ) -> CohortUpdate:
        """Send tasks, run `function` on the devices, fold the updates, store the clients' memories."""
        reject_unknown(tasks, len(self.population))
        sent, orders = self.wire.send(tasks, self.checkpoint.holds)
        before = self._accounts.in_turn if among else []
        may_fail = floor_of(self.place.rules.max_failed, among or len(orders))
        job = Job(self.state.round, function, sent, training, keep_updates, may_fail, len(before))
        chunks = self._chunks(orders)
        if not chunks:
            raise MethodError("an exchange with no clients: ask at least one")
        with self._visit():
            answer = self.pool.run(job, chunks)
        faults = sorted(answer.faults, key=lambda fault: fault.client)
        check_faults(job.round, [*before, *faults], among or len(orders), may_fail)
        before += faults
        self._accounts.faults += faults
        self.checkpoint.memories |= {k: m for k, m in answer.memories.items() if m}
        for client in [k for k, m in answer.memories.items() if not m]:
            self.checkpoint.memories.pop(client, None)
        records = tuple(sorted(answer.records, key=lambda record: record.client))
        return CohortUpdate(merge_all(answer.partials, len(chunks)), records)

    def _forget(self) -> None:
        """Drop the method's entries in the clients' memories; those of the link stay."""
        kept = {k: split_memory(memory)[1] for k, memory in self.checkpoint.memories.items()}
        self.checkpoint.memories = {k: memory for k, memory in kept.items() if memory}

    @contextmanager
    def _visit(self) -> Iterator[None]:
        """Seed the global generators after a visit to the pool, which may be in this process or not."""
        yield
        self.visits += 1
        seed_globals(self.place.seed, self.state.round, self.visits)

    def _chunks(self, orders: Mapping[int, Order]) -> list[Chunk]:
        """Cut the cohort by the config alone: by group of devices, then by id."""
        names = {name: number for number, name in enumerate(self.schedule.groups, start=1)}
        groups: dict[int, list[int]] = {}
        for client in sorted(orders):
            name = self.population[client].profile.name if names else ""
            groups.setdefault(names.get(name, 0), []).append(client)
        size = self.schedule.chunk or chunk_size(len(orders), self.place.stack)
        cuts = [(group, part) for group in sorted(groups) for part in cut(groups[group], size)]
        sizes, memories = self.population.partition.sizes, self.checkpoint.memories
        return [
            Chunk(
                index,
                group,
                tuple(orders[k] for k in part),
                {k: memories[k] for k in part if k in memories},
                int(sum(sizes[k] for k in part)),
            )
            for index, (group, part) in enumerate(cuts)
        ]

    def _predicted_seconds(self, client: int) -> float:
        """Predict a client's part from its profile, its number of examples and the mask it will get."""
        info = self.population[client]
        method = self.place.method_of(info)
        mask = self.method.configure(self.state, info).mask
        down, up = self.wire.predicted_bytes(mask, self.checkpoint.holds.get(client))
        steps_per_epoch = -(-info.num_examples // method.batch_size)
        epochs, steps = divmod(method.local_steps(info.num_examples), steps_per_epoch)
        # only the last batch of an epoch is short
        examples = epochs * info.num_examples + steps * method.batch_size
        flops = self.place.flops.executed(mask, info.profile.exploits) * examples
        made = method.local_steps(info.num_examples)
        return seconds(Cost(down, up, executed_flops=flops, steps=made), info.profile)

    def _with_statistics(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        """Return the state with the BatchNorm statistics of the model to be evaluated, where these are asked.

        Those clients answer whose updates counted in the round; it is charged like all that is asked.
        """
        norms = self.place.model.norms
        if not norms.queried or not cohort.folded:
            return state
        task = Task(self.method.eval_params(state), state.mask)
        answer = self._exchange(norm_statistics, {record.client: task for record in cohort.folded})
        self._accounts.exchanged(answer)
        if not answer.folded:
            return state
        mean = answer.sum("statistics") / answer.num_examples
        return replace(state, params=overlaid(state.params, norms.statistics, mean, state.mask))

    def _context(self, purpose: int) -> ServerContext:
        """Return the tools of a hook in this round; `purpose` separates the generators of two hooks."""
        state, place = self.state, self.place
        rng = generator(place.seed, "method", state.round, purpose)

        def draw(count: int) -> tuple[int, ...]:
            clients, waited_s = wait_for_any(self.population, count, rng)
            self._accounts.found(clients, waited_s)
            return clients

        def ask(
            function: ClientFunction, tasks: Mapping[int, Task], keep: bool, among: int | None
        ) -> CohortUpdate:
            answer = self._exchange(function, self._when_there(tasks), keep_updates=keep, among=among)
            self._accounts.exchanged(answer)
            return answer

        def validate(params: Params, mask: Mask) -> tuple[float, float]:
            if not len(self.side.validation):
                raise MethodError(
                    f"{type(self.method).__name__} decides by validation data, and there is none: set "
                    "data.validation_fraction above 0, e.g. 0.1"
                )
            params = place.model.forward_params(params, mask)
            task = Task(params.masked(mask), place.model.norms.global_mask(mask))
            with self._visit():
                outcome = self.pool.evaluate(task, self.side.validation)
            examples, profile = len(self.side.validation), self.side.profile
            executed = place.flops.executed_forward(mask, profile.exploits) * examples
            cost = Cost(flops=place.flops.forward(mask) * examples, executed_flops=executed)
            self._accounts.validated += at_home(cost, profile)
            return outcome.accuracy, outcome.loss

        def rounds() -> int:
            self.checkpoint.rounds_matter = True
            return self.schedule.rounds

        return ServerContext(
            round=state.round,
            model=place.model,
            flops=place.flops,
            clients=self.population,
            rng=rng,
            _rounds=rounds,
            _sample=draw,
            _ask=ask,
            _server=self._as_client,
            _validate=validate,
        )

    def _when_there(self, tasks: Mapping[int, Task]) -> Mapping[int, Task]:
        """Wait for clients as `_wait_for` does; return the tasks of those who come."""
        if not tasks:
            return tasks
        reject_unknown(tasks, len(self.population))
        return {client: tasks[client] for client in self._wait_for(tasks)}

    def _wait_for(self, clients: Collection[int]) -> Ids:
        """Wait for clients that were not available yet in this round; return those who come, as ordered.

        Raises:
            RunError: if none of them comes.
        """
        accounts, seed, round = self._accounts, self.place.seed, self.state.round
        missing = sorted(set(clients) - accounts.present)
        came, waited_s = wait_for_all(
            self.population, missing, lambda client: generator(seed, "wait", round, client)
        )
        accounts.found(came, waited_s)
        accounts.absent += sorted(set(missing) - set(came))
        there = tuple(client for client in clients if client in accounts.present)
        if not there:
            raise none_came(len(clients))
        return there

    def _as_client(self) -> Client:
        """Return the server as a client, one for each round."""
        if not self.method.uses_server_data:
            raise MethodError(
                f"{type(self.method).__name__} trains on server data without declaring it: set "
                "`uses_server_data: ClassVar[bool] = True` on the class"
            )
        if not len(self.side.rows):
            raise MethodError("the server has no examples: set data.server_fraction above 0")
        if self._accounts.server is None:
            if self._own is None:
                self._own = Worker(self.place)
            info = ClientInfo(SERVER, len(self.side.rows), self.side.profile)
            self._accounts.server = self._own.client(info, self.side.rows, self.state.round, {})
        return self._accounts.server

    def _report(
        self, round: int, cohort: CohortUpdate | None, started: float, *, evaluate: bool
    ) -> RoundReport:
        """Add up the costs of the round; evaluate the model if it is due."""
        metrics = {"density/global": self.state.mask.density}
        metrics |= self._accounts.metrics(cohort, self.place.rules.deadline_s)
        state = replace(self.state, round=round)
        asked = self.method.density_asked(state)
        metrics |= {} if asked is None else {"density/asked": asked}
        metrics |= {f"method/{name}": float(value) for name, value in self.method.measures(state).items()}
        if evaluate and len(self.side.validation):
            outcome = self.evaluate(self.side.validation)
            metrics |= {"val/accuracy": outcome.accuracy, "val/loss": outcome.loss}
        metrics["time/wall_s"] = time.perf_counter() - started
        metrics["time/server_wall_s"] = self._accounts.server_wall_s
        totals = self.checkpoint.totals
        unknown = nan if totals else 0.0  # the run began before the metric existed
        for name in TOTALS:
            totals[name] = totals.get(name, unknown) + metrics[name]
        metrics |= {f"total/{name}": value for name, value in totals.items()}
        records = cohort.records if cohort is not None else ()
        noted = [*notes(self._accounts, cohort), *self._density_notes(round, asked)]
        noted += without_power(self.population) if round == 0 else ()
        return RoundReport(round, metrics, records, tuple(noted), tuple(self._accounts.faults))

    def _density_notes(self, round: int, asked: float | None) -> Iterator[str]:
        """Yield notes on the mask: each layer that lost all its weights, once; a density not reached."""
        mask = self.state.mask
        lost = [name for name in empty_layers(mask) if name not in self._empty]
        self._empty.update(lost)
        yield from emptied(lost)
        if round == self.schedule.rounds and (
            note := above_asked(asked, mask, self.place.model.channel_groups)
        ):
            yield note
