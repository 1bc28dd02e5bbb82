"""Orders and records as columns, while they travel between processes.

Pickle asks Python about every dataclass. With arrays the driver saves 2 µs for an order, 10 µs for a record.
"""

from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedray.federation.wire import Order
from fedray.types import ClientRecord, Cost, Fate


class Records(NamedTuple):
    """Client records by column.

    Args:
        whole: int64 (n, 6): client, examples, bytes down, bytes up, steps, bytes of memory.
        real: float64 (n, 6): FLOPs, executed FLOPs, seconds, joules, density, loss.
        device: names.
        fate: one for each client.
    """

    whole: NDArray[np.int64]
    real: NDArray[np.float64]
    device: list[str]
    fate: list[Fate]

    @classmethod
    def of(cls, records: Sequence[ClientRecord]) -> "Records":
        """Return records as columns."""
        costs = [r.cost for r in records]
        whole = [
            (r.client, r.num_examples, c.bytes_down, c.bytes_up, c.steps, r.memory_bytes)
            for r, c in zip(records, costs, strict=True)
        ]
        real = [
            (c.flops, c.executed_flops, c.seconds, c.energy_j, r.density, r.loss)
            for r, c in zip(records, costs, strict=True)
        ]
        return cls(
            np.array(whole, dtype=np.int64).reshape(-1, 6),
            np.array(real, dtype=np.float64).reshape(-1, 6),
            [r.device for r in records],
            [r.fate for r in records],
        )

    def rows(self) -> list[ClientRecord]:
        """Return the records."""
        return [
            ClientRecord(
                client,
                device,
                examples,
                fate,
                Cost(down, up, flops, executed, seconds, steps, joules),
                density,
                loss,
                memory,
            )
            for whole, real, device, fate in zip(
                self.whole.tolist(), self.real.tolist(), self.device, self.fate, strict=True
            )
            for client, examples, down, up, steps, memory in (whole,)
            for flops, executed, seconds, joules, density, loss in (real,)
        ]


def orders_in(orders: Sequence[Order]) -> NDArray[np.int64]:
    """Return orders as int64 (n, 3): client, task, bytes down."""
    whole = [(order.client, order.task, order.bytes_down) for order in orders]
    return np.array(whole, dtype=np.int64).reshape(-1, 3)


def orders_of(columns: NDArray[np.int64]) -> tuple[Order, ...]:
    """Return the orders of `orders_in`."""
    return tuple(starmap(Order, columns.tolist()))
