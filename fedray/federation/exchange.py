"""One exchange with clients as it travels: the job, its chunks of clients, their answers.

Jobs and chunks go to the workers; partial sums, records, memories and faults come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedray.federation.aggregate import Node, Partial
from fedray.federation.client import ClientFunction
from fedray.federation.columns import Records, orders_in, orders_of
from fedray.federation.faults import check_raised
from fedray.federation.wire import Memory, Order
from fedray.types import ClientRecord, ClientUpdate, Fault, Task


@dataclass(frozen=True)
class Job:
    """One exchange with clients: a round's training, or a function given to `ctx.ask`.

    Args:
        round: the round it belongs to.
        function: what runs on the device.
        tasks: the different tasks of the exchange, as the devices decode them.
        training: False for exchanges outside the round's training, in which no client is late or drops out.
        keep_updates: keep every model in the partial.
        may_fail: clients, at most, that may fail.
        failed: clients that failed before, where a hook asks some in turn.
    """

    round: int
    function: ClientFunction
    tasks: tuple[Task, ...]
    training: bool = True
    keep_updates: bool = False
    may_fail: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Chunk:
    """Clients that are folded together, in order of id.

    Args:
        index: place among the chunks of the job.
        group: number of the group of workers that may train it; 0 without groups.
        orders: one for each client.
        memories: client → its memory, unless it is empty.
        num_examples: of all its clients; what chunks are dealt by.
    """

    index: int
    group: int
    orders: tuple[Order, ...]
    memories: Mapping[int, Memory]
    num_examples: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the orders as columns."""
        orders = orders_in(self.orders)
        return _chunk, (self.index, self.group, orders, self.memories, self.num_examples)


def _chunk(index: int, group: int, orders: np.ndarray, *rest: Any) -> Chunk:
    return Chunk(index, group, orders_of(orders), *rest)


@dataclass
class Answer:
    """The result of some chunks: partial folds by node of the tree, client records, memories, faults."""

    partials: dict[Node, Partial] = field(default_factory=dict)
    records: list[ClientRecord] = field(default_factory=list)
    memories: dict[int, Memory] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def join(self, other: "Answer") -> None:
        """Take in another answer to the same job."""
        self.partials |= other.partials
        self.records += other.records
        self.memories |= other.memories
        self.faults += other.faults

    def check(self, job: Job) -> None:
        """Refuse more clients whose code raised than the job lets fail.

        Raises:
            ClientError: of the first of them.
        """
        check_raised(job.round, self.faults, job.may_fail, job.failed)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the records as columns."""
        return _answer, (self.partials, Records.of(self.records), self.memories, self.faults)


def _answer(partials: dict[Node, Partial], records: Records, *rest: Any) -> Answer:
    return Answer(partials, records.rows(), *rest)


@dataclass(frozen=True)
class Trained:
    """One client's answer: its record, and its update and memory if they count; else its fault, if any."""

    record: ClientRecord
    update: ClientUpdate | None
    memory: Memory | None
    fault: Fault | None = None
