"""What client actors are asked to do: chunks of clients, in smaller parts where an actor is lost.

    chunks of an actor → one chunk → the clients of one stack → one client

Dividing them changes no bit: a chunk is folded in order of client wherever its clients trained, and chunks
are merged along a fixed tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fedray.costs.clock import clocked
from fedray.federation.actor import Partials
from fedray.federation.crew import STRIKES, Key, Work
from fedray.federation.exchange import Answer, Chunk, Job, Trained
from fedray.federation.faults import check_raised
from fedray.federation.losses import Loss
from fedray.federation.patience import Size
from fedray.federation.wire import Order
from fedray.federation.worker import EVALUATION_SHARD, Workplace, fold_chunk, masks_of
from fedray.types import ClientRecord, Cost, Fault

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class Works:
    """The works of one job.

    Args:
        place: the workplace.
        job: the job.
        job_ref: refers to it, packed.
        chunks: all its chunks.
        keeps: partials stay in the object store.
        suspects: clients that were given up before; given up once more after a single loss. Grows.
        given_up: faults of the clients that were given up in this job.
    """

    place: Workplace
    job: Job
    job_ref: "ObjectRef"
    chunks: tuple[Chunk, ...]
    keeps: bool = False
    suspects: set[int] = field(default_factory=set)
    given_up: list[Fault] = field(default_factory=list)

    def of(self, chunks: Sequence[Chunk]) -> Work:
        """Return the work to train and fold chunks of one group, none of which `is_suspect`."""
        parts = partial(self._one_by_one, chunks) if len(chunks) > 1 else partial(self.apart, chunks[0])
        return Work(
            (chunks[0].index,),
            "fold" if self.keeps else "run",
            (self.job_ref, list(chunks)),
            self._size(chunks),
            group=chunks[0].group,
            keeps=self.keeps,
            parts=parts,
        )

    def is_suspect(self, chunk: Chunk) -> bool:
        """Tell whether a chunk has a client that was given up before."""
        return bool(self.suspects) and any(order.client in self.suspects for order in chunk.orders)

    def apart(self, chunk: Chunk) -> list[Work]:
        """Return the works to train a chunk's clients stack by stack; in stacks with suspects one by one."""
        works = []
        size, end = self.place.stack, len(chunk.orders)
        for start in range(0, end, size):
            which = range(start, min(start + size, end))
            is_suspect = any(chunk.orders[i].client in self.suspects for i in which)
            works += self._alone(chunk, which) if is_suspect else [self._clients(chunk, which)]
        return works

    def by_client(self) -> list[Work]:
        """Return a work for each client, for the actor with its number."""
        return [
            replace(work, seat=chunk.orders[start].client)
            for chunk in self.chunks
            for start, work in enumerate(self._alone(chunk, range(len(chunk.orders))))
        ]

    def merging(self, teams: Sequence[Sequence[Any]]) -> list[Work]:
        """Return a work for each team of references to partials: merge them."""
        size = Size("merge", 1, 1)
        return [
            Work((number,), "merge", (self.job_ref, *team), size, keeps=True, tries=STRIKES)
            for number, team in enumerate(teams)
        ]

    def joined(self, done: Mapping[Key, Any], merged: Sequence[Partials] = ()) -> Answer:
        """Join the answers of works, and the partials that actors merged; fold clients that came alone."""
        answer, masks = Answer(), masks_of(self.place.model, self.job.tasks)
        alone: dict[int, list[Trained]] = {}
        for key in sorted(done):
            value = done[key]
            if isinstance(value, list):
                alone.setdefault(key[0], []).extend(value)
            else:
                answer.join(value[0] if self.keeps else value)
        for partials in merged:
            answer.partials |= partials
        for part in answer.partials.values():
            part.arrived(self.place.model.layout, masks)
        for index, trained in alone.items():
            answer.join(fold_chunk(self.place, self.job, index, trained))
        return answer

    def _one_by_one(self, chunks: Sequence[Chunk]) -> list[Work]:
        return [self.of([chunk]) for chunk in chunks]

    def _clients(self, chunk: Chunk, which: range) -> Work:
        orders = chunk.orders[which.start : which.stop]
        clients = [order.client for order in orders]
        part = replace(
            chunk,
            orders=orders,
            memories={k: chunk.memories[k] for k in clients if k in chunk.memories},
            num_examples=int(self.place.population.partition.sizes[clients].sum()),
        )
        work = Work(
            (chunk.index, which.start),
            "train",
            (self.job_ref, part),
            self._size([part]),
            group=chunk.group,
        )
        if len(which) == 1:
            tries = 1 if clients[0] in self.suspects else STRIKES
            return replace(work, tries=tries, abandon=partial(self._give_up, orders[0], tries))
        # alone, the clients of a stack have other last bits: the stack is tried as a whole first
        alone = partial(self._alone, chunk, which)
        return replace(work, tries=STRIKES, parts=alone)

    def _alone(self, chunk: Chunk, which: range) -> list[Work]:
        return [self._clients(chunk, range(i, i + 1)) for i in which]

    def _give_up(self, order: Order, tries: int, loss: Loss) -> list[Trained]:
        """Leave out a client to which actors are lost.

        Raises:
            ClientError: if more clients failed than may.
        """
        info = self.place.population[order.client]
        times = "once more" if tries == 1 else f"{tries} times"
        cause = f"its actor {loss.how} {times} while it trained alone"
        fault = Fault(order.client, "failed", cause, f"{cause}: {loss.said}")
        self.suspects.add(order.client)
        self.given_up.append(fault)
        check_raised(self.job.round, self.given_up, self.job.may_fail)
        cost = clocked(Cost(bytes_down=order.bytes_down), info.profile)
        unknown = float("nan")
        record = ClientRecord(
            order.client, info.profile.name, info.num_examples, "failed", cost, unknown, unknown
        )
        return [Trained(record, None, None, fault)]

    def _size(self, chunks: Sequence[Chunk]) -> Size:
        function = self.job.function
        kind = getattr(function, "__qualname__", type(function).__name__)
        return Size(kind, sum(len(c.orders) for c in chunks), sum(c.num_examples for c in chunks))


def evaluating(job_ref: "ObjectRef", data_ref: "ObjectRef", shards: range) -> Work:
    """Return the work to classify some shards of examples."""
    bounds = shards.start * EVALUATION_SHARD, shards.stop * EVALUATION_SHARD
    parts = partial(_shard_by_shard, job_ref, data_ref, shards) if len(shards) > 1 else None
    size = Size("evaluate", 1, len(shards) * EVALUATION_SHARD)
    return Work((shards.start,), "evaluate", (job_ref, data_ref, *bounds), size, parts=parts, tries=STRIKES)


def _shard_by_shard(job_ref: "ObjectRef", data_ref: "ObjectRef", shards: range) -> list[Work]:
    return [evaluating(job_ref, data_ref, range(i, i + 1)) for i in shards]
