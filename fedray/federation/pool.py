"""Where clients train: in this process, or hosted by Ray actors. The same worker code, and the same bits.

Thousands of clients are rows of state, not processes. `RayPool` keeps a few `ClientActor`s, broadcasts by one
`ray.put` an exchange, and makes one call per actor: chunks in, partial sums out. An actor that dies is
created again and gets its chunks again; nothing that must survive lives in an actor.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from fedray.data.datasets import Examples
from fedray.errors import FedrayError, RunError
from fedray.federation.actor import ClientActor, PackedJob, Prepare, keep_freed_memory
from fedray.federation.aggregate import share
from fedray.federation.client import Outcome
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.worker import EVALUATION_SHARD, Worker, Workplace, fold_chunk, masks_of
from fedray.types import Task

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)


class ClientPool(Protocol):
    """Where clients train."""

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold all chunks."""

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        """Classify examples with a model."""

    def close(self) -> None:
        """Free all resources."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside: with more, sums have other bits (and small models train slower)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LocalPool:
    """Everything in this process.

    Args:
        place: the workplace.
        device: where clients train, as torch names it.
    """

    def __init__(self, place: Workplace, device: str = "cpu") -> None:
        keep_freed_memory()
        self.worker = Worker(place, device)

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold all chunks."""
        with one_thread():
            return self.worker.run(job, chunks)

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        """Classify examples with a model."""
        with one_thread():
            return _joined(self.worker.evaluate(task, examples))

    def close(self) -> None:
        """Do nothing; there are no actors."""


@dataclass(frozen=True)
class ActorOptions:
    """The resources that one client actor asks of Ray.

    Args:
        cpu: CPUs, may be a fraction. gpu: GPUs, may be a fraction.
        custom: custom resources by name.
        labels: Ray's label selector, e.g. `{"tier": "fast"}`.
    """

    cpu: float = 1.0
    gpu: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """The resources as a bundle of a placement group."""
        return {k: v for k, v in {"CPU": self.cpu, "GPU": self.gpu, **self.custom}.items() if v}

    def to_ray(self) -> dict[str, Any]:
        """The resources as options of a Ray actor."""
        options: dict[str, Any] = {"num_cpus": self.cpu, "num_gpus": self.gpu}
        if self.custom:
            options["resources"] = dict(self.custom)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options


@dataclass(frozen=True)
class Group:
    """A number of equal actors, and the resources of each."""

    actors: int
    options: ActorOptions = ActorOptions()


FAN_IN = 8
"""Parts of a fold that one process merges. With more actors than this, actors merge for the driver."""


class Call(NamedTuple):
    """An actor's method and its arguments.

    With `keeps`, the method returns two values, of which the second one stays in the object store.
    """

    method: str
    arguments: tuple[Any, ...]
    keeps: bool = False


class RayPool:
    """Clients hosted by Ray actors.

    Args:
        place: the workplace of every worker; put into the object store once.
        groups: actors by group; a chunk goes to its group.
        per_client: one actor for each client of the population, in one group; updates are folded here.
        ready_timeout_s: how long placing and starting the actors may take.
        max_deaths: how many deaths of actors one exchange survives.
        prepare: called in each actor before the workplace reaches it.
    """

    def __init__(
        self,
        place: Workplace,
        groups: Sequence[Group],
        *,
        per_client: bool = False,
        ready_timeout_s: float = 300.0,
        max_deaths: int = 20,
        prepare: Prepare | None = None,
    ) -> None:
        import ray

        keep_freed_memory()
        self.place, self.groups, self.per_client = place, tuple(groups), per_client
        self.prepare = prepare
        self.ready_timeout_s, self.max_deaths = ready_timeout_s, max_deaths
        self.deaths = 0
        self._ray = ray
        self._place_ref = ray.put(place)
        self._examples: dict[int, tuple[Examples, ObjectRef]] = {}
        self._members = [g for g, group in enumerate(self.groups) for _ in range(group.actors)]
        self.actors: list[ActorHandle] = [self._create(group) for group in self._members]
        self._are_ready = False

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold all chunks: one broadcast, one call per actor."""
        job_ref = self._ray.put(PackedJob.pack(job))
        if self.per_client:
            return self._run_per_client(job, job_ref, chunks)
        calls: dict[int, Call] = {}
        for group in range(len(self.groups)):
            own = [chunk for chunk in chunks if chunk.group == group]
            workers = [w for w, member in enumerate(self._members) if member == group]
            dealt = share([chunk.num_examples for chunk in own], len(workers))
            for worker, part in zip(workers, dealt, strict=True):
                if part:
                    calls[worker] = Call("run", (job_ref, own[part.start : part.stop]))
        parts = self._call_all(calls) if len(calls) <= FAN_IN else self._fold_in_actors(job_ref, calls)
        answer, masks = Answer(), masks_of(self.place.model, job.tasks)
        for _, part_of in sorted(parts.items()):
            for partial in part_of.partials.values():
                partial.arrived(self.place.model.layout, masks)
            answer.join(part_of)
        return answer

    def _fold_in_actors(self, job_ref: "ObjectRef", calls: Mapping[int, Call]) -> dict[int, Answer]:
        """Make the calls of a job, and let actors merge the partials of FAN_IN actors at a time.

        Partials travel from actor to actor; the driver receives those of FAN_IN actors at most.
        """
        calls = {worker: Call("fold", call.arguments, keeps=True) for worker, call in calls.items()}
        for _ in range(self.max_deaths + 1):
            try:
                trained = self._call_all(calls)
                kept = {worker: partials for worker, (_, partials) in trained.items()}
                while len(kept) > FAN_IN:
                    workers = sorted(kept)
                    teams = [workers[i : i + FAN_IN] for i in range(0, len(workers), FAN_IN)]
                    merges = {
                        team[0]: Call("merge", (job_ref, *(kept[w] for w in team)), keeps=True)
                        for team in teams
                    }
                    kept = {worker: partials for worker, (_, partials) in self._call_all(merges).items()}
                merged = dict(zip(kept, self._ray.get(list(kept.values())), strict=True))
            except self._ray.exceptions.ObjectLostError as error:
                logger.warning(
                    "partial sums were lost with their node (%s): trained again", _first_line(error)
                )
                continue
            for worker, (answer, _) in trained.items():
                answer.partials = merged.get(worker, {})
            return {worker: answer for worker, (answer, _) in trained.items()}
        raise RunError(f"partial sums were lost {self.max_deaths + 1} times in one exchange")

    def _run_per_client(self, job: Job, job_ref: "ObjectRef", chunks: Sequence[Chunk]) -> Answer:
        orders = [(order, chunk.memories.get(order.client, {})) for chunk in chunks for order in chunk.orders]
        calls = {o.client: Call("train", (job_ref, [(o, memory)])) for o, memory in orders}
        trained = self._call_all(calls)
        answer = Answer()
        for chunk in chunks:
            results = (trained[order.client][0] for order in chunk.orders)
            answer.join(fold_chunk(self.place, job, chunk.index, results))
            answer.check(job)
        return answer

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        """Classify examples with a model; shards are of one size on any number of actors."""
        job = Job(round=0, function=_no_training, tasks=(task,), training=False)
        job_ref, data_ref = self._ray.put(PackedJob.pack(job)), self._shipped(examples)
        shards = -(-len(examples) // EVALUATION_SHARD)
        calls = {
            worker: Call(
                "evaluate",
                (job_ref, data_ref, part.start * EVALUATION_SHARD, part.stop * EVALUATION_SHARD),
            )
            for worker, part in enumerate(share([1.0] * shards, len(self.actors)))
            if part
        }
        answers = self._call_all(calls)
        return _joined([outcome for worker in sorted(answers) for outcome in answers[worker]])

    def close(self) -> None:
        """End the actors and drop the references to shipped examples."""
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors, self._examples = [], {}

    def _shipped(self, examples: Examples) -> "ObjectRef":
        if id(examples) not in self._examples:
            self._examples[id(examples)] = (examples, self._ray.put(examples))
        return self._examples[id(examples)][1]

    def _call_all(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """Make one call per actor and collect the answers.

        An actor that dies is created again and called again.
        """
        self._await_start()
        pending = {self._submit(worker, call): worker for worker, call in calls.items()}
        answers: dict[int, Any] = {}
        deaths = 0
        while pending:
            (done, *_), _ = self._ray.wait([refs[0] for refs in pending], num_returns=1)
            refs = next(refs for refs in pending if refs[0] == done)
            worker = pending.pop(refs)
            try:
                value = self._ray.get(done)
                answers[worker] = (value, refs[1]) if calls[worker].keeps else value
            except self._ray.exceptions.RayActorError as error:
                deaths += 1
                self.deaths += 1
                if deaths > self.max_deaths:
                    raise RunError(f"{deaths} actors died in one exchange, the last one: {error}") from error
                logger.warning(
                    "client actor %d died (%s); its chunks are trained again", worker, _first_line(error)
                )
                self.actors[worker] = self._create(self._members[worker])
                self._await_ready([self.actors[worker]])
                pending[self._submit(worker, calls[worker])] = worker
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, FedrayError | self._ray.exceptions.ObjectLostError):
                    raise error.cause from None
                raise
        return answers

    def _submit(self, worker: int, call: Call) -> "tuple[ObjectRef, ...]":
        """Make a call; return references to the values that its method returns."""
        method = getattr(self.actors[worker], call.method)
        if call.keeps:
            return tuple(method.options(num_returns=2).remote(*call.arguments))
        return (method.remote(*call.arguments),)

    def _create(self, group: int) -> "ActorHandle":
        options = self.groups[group].options.to_ray()
        # Nothing is retried behind our back: a restarted actor would be empty, and its clients' memory is in
        # the run.
        hosted = self._ray.remote(max_restarts=0, max_task_retries=0, **options)(ClientActor)
        device = "cuda" if options["num_gpus"] else "cpu"
        return hosted.remote([self._place_ref], device, self.prepare)

    def _await_start(self) -> None:
        """Wait for the actors once, before the first call: the caller has other things to start."""
        if not self._are_ready:
            self._await_ready(self.actors)
            self._are_ready = True

    def _await_ready(self, actors: Iterable["ActorHandle"]) -> None:
        waiting = [actor.ready.remote() for actor in actors]
        try:
            self._ray.get(waiting, timeout=self.ready_timeout_s)
        except self._ray.exceptions.GetTimeoutError as error:
            wanted = [f"{group.actors} × {group.options.bundle}" for group in self.groups]
            raise RunError(
                f"the client actors were not placed within {self.ready_timeout_s:.0f} s: wanted are "
                f"{', '.join(wanted)}; the cluster has {self._ray.cluster_resources()}, free are "
                f"{self._ray.available_resources()}. Lower clients.actors or clients.resources"
            ) from error


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    if not outcomes:
        return Outcome(np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.float32))
    return Outcome(
        np.concatenate([outcome.right for outcome in outcomes]),
        np.concatenate([outcome.losses for outcome in outcomes]),
    )


def _no_training(task: Task, client: Any) -> Any:
    raise RunError("an evaluation trains nobody")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


PoolFactory = Callable[[Workplace], ClientPool]
"""A function from the workplace of a run to its pool."""
