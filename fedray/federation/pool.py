"""Where clients train: in this process, or hosted by Ray actors. The same worker code, and the same bits.

Thousands of clients are rows of state, not processes. `RayPool` keeps a few `ClientActor`s, broadcasts by one
`ray.put` an exchange, and makes one call per actor: chunks in, partial sums out. The chunks of an actor that
is lost are trained again by those that are left; nothing that must survive lives in an actor.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fedray.data.datasets import Examples
from fedray.errors import FedrayError, RunError
from fedray.federation.actor import ClientActor, PackedJob, Prepare, keep_freed_memory
from fedray.federation.aggregate import share
from fedray.federation.client import Outcome
from fedray.federation.crew import Crew, Head, Work
from fedray.federation.exchange import Answer, Chunk, Job
from fedray.federation.losses import first_line
from fedray.federation.patience import Patience
from fedray.federation.worker import EVALUATION_SHARD, Worker, Workplace
from fedray.federation.works import Works, evaluating
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


class RayPool:
    """Clients hosted by Ray actors.

    Args:
        place: the workplace of every worker; put into the object store once.
        groups: actors by group; a chunk goes to its group.
        per_client: one actor for each client of the population, in one group; updates are folded here.
        ready_timeout_s: how long placing and starting the actors may take.
        max_deaths: how many losses of actors one exchange survives.
        patience: how long a call to an actor may take.
        prepare: called in each actor before the workplace reaches it.
        busy: tells what an actor waits for, if other work holds its place; then the run waits, too.
        head: of the cluster, asked now and then.
    """

    def __init__(
        self,
        place: Workplace,
        groups: Sequence[Group],
        *,
        per_client: bool = False,
        ready_timeout_s: float = 300.0,
        max_deaths: int = 20,
        patience: Patience | None = None,
        prepare: Prepare | None = None,
        busy: "Callable[[ActorOptions, ActorHandle], str | None]" = lambda options, actor: None,
        head: Head | None = None,
    ) -> None:
        import ray

        keep_freed_memory()
        self.place, self.groups, self.per_client = place, tuple(groups), per_client
        self.prepare, self.max_deaths = prepare, max_deaths
        self._ray = ray
        self._place_ref = ray.put(place)
        self._examples: dict[int, tuple[Examples, ObjectRef]] = {}
        self._suspects: set[int] = set()
        self.crew = Crew(
            self._create,
            [g for g, group in enumerate(self.groups) for _ in range(group.actors)],
            patience=patience or Patience(),
            ready_timeout_s=ready_timeout_s,
            max_deaths=max_deaths,
            wanted=", ".join(f"{group.actors} × {group.options.bundle}" for group in self.groups),
            busy=lambda group, actor: busy(self.groups[group].options, actor),
            head=head,
        )

    @property
    def actors(self) -> "list[ActorHandle]":
        """The actors there are, ready or not."""
        return [seat.actor for seat in self.crew.seats if seat.actor is not None]

    @property
    def deaths(self) -> int:
        """Actors that were lost so far."""
        return self.crew.deaths

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Train and fold all chunks: one broadcast, one call per actor.

        Raises:
            RunError: if too many actors were lost, or the head of the cluster.
        """
        with self._headed():
            return self._run(job, chunks)

    @contextmanager
    def _headed(self) -> Iterator[None]:
        """Explain an error of Ray by the loss of the head, if it is lost."""
        try:
            yield
        except FedrayError:
            raise
        except Exception:
            self.crew.head.check(now=True)
            raise

    def _run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        self.crew.assemble()
        job_ref = self._ray.put(PackedJob.pack(job))
        works = Works(self.place, job, job_ref, tuple(chunks), suspects=self._suspects)
        if self.per_client:
            return works.joined(self.crew.do(works.by_client()))
        dealt = self._dealt(works)
        if len(dealt) <= FAN_IN:
            return works.joined(self.crew.do(dealt))
        return self._fold_in_actors(replace(works, keeps=True))

    def _dealt(self, works: Works) -> list[Work]:
        """Deal the chunks of each group to its actors, in order."""
        dealt = []
        for group in range(len(self.groups)):
            chunks = [chunk for chunk in works.chunks if chunk.group == group]
            own = [chunk for chunk in chunks if not works.is_suspect(chunk)]
            actors = max(1, len(self.crew.ready(group)))
            parts = share([chunk.num_examples for chunk in own], actors)
            dealt += [works.of(own[part.start : part.stop]) for part in parts if part]
            dealt += [work for chunk in chunks if works.is_suspect(chunk) for work in works.apart(chunk)]
        return dealt

    def _fold_in_actors(self, works: Works) -> Answer:
        """Do the works of a job, and let actors merge the partials of FAN_IN works at a time.

        Partials travel from actor to actor; the driver receives FAN_IN of them at most.
        """
        for _ in range(self.max_deaths + 1):
            works.given_up.clear()
            try:
                done = self.crew.do(self._dealt(works))
                partials = [done[key][1] for key in sorted(done) if isinstance(done[key], tuple)]
                while len(partials) > FAN_IN:
                    teams = [partials[i : i + FAN_IN] for i in range(0, len(partials), FAN_IN)]
                    merged = self.crew.do(works.merging(teams))
                    partials = [merged[key][1] for key in sorted(merged)]
                return works.joined(done, self._ray.get(partials))
            except self._ray.exceptions.ObjectLostError as error:
                logger.warning(
                    "partial sums were lost with their node (%s): trained again", first_line(error)
                )
        raise RunError(f"partial sums were lost {self.max_deaths + 1} times in one exchange")

    def evaluate(self, task: Task, examples: Examples) -> Outcome:
        """Classify examples with a model; shards are of one size on any number of actors."""
        with self._headed():
            return self._evaluate(task, examples)

    def _evaluate(self, task: Task, examples: Examples) -> Outcome:
        self.crew.assemble()
        job = Job(round=0, function=_no_training, tasks=(task,), training=False)
        job_ref, data_ref = self._ray.put(PackedJob.pack(job)), self._shipped(examples)
        shards = -(-len(examples) // EVALUATION_SHARD)
        actors = max(1, sum(seat.is_ready for seat in self.crew.seats))
        dealt = [evaluating(job_ref, data_ref, part) for part in share([1.0] * shards, actors) if part]
        answers = self.crew.do(dealt)
        return _joined([outcome for start in sorted(answers) for outcome in answers[start]])

    def close(self) -> None:
        """End the actors and drop the references to shipped examples."""
        self.crew.close()
        self._examples = {}

    def _shipped(self, examples: Examples) -> "ObjectRef":
        if id(examples) not in self._examples:
            self._examples[id(examples)] = (examples, self._ray.put(examples))
        return self._examples[id(examples)][1]

    def _create(self, group: int) -> "ActorHandle":
        options = self.groups[group].options.to_ray()
        # Nothing is retried behind our back: a restarted actor would be empty, and its clients' memory is in
        # the run.
        hosted = self._ray.remote(max_restarts=0, max_task_retries=0, **options)(ClientActor)
        device = "cuda" if options["num_gpus"] else "cpu"
        return hosted.remote([self._place_ref], device, self.prepare)


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    if not outcomes:
        return Outcome(np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.float32))
    return Outcome(
        np.concatenate([outcome.right for outcome in outcomes]),
        np.concatenate([outcome.losses for outcome in outcomes]),
    )


def _no_training(task: Task, client: Any) -> Any:
    raise RunError("an evaluation trains nobody")


PoolFactory = Callable[[Workplace], ClientPool]
"""A function from the workplace of a run to its pool."""
