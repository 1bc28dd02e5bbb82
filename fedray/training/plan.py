"""What clients ask of a stack, and the steps that it makes: which clients step together, on which rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedray.types import Mask, Params

Rows = slice | Tensor
"""Some clients of a stack: a range, or their positions (int64)."""


@dataclass(frozen=True)
class Request:
    """One call of plain SGD: where it starts, and the batch and the learning rate of each step.

    Args:
        params: where to start.
        mask: which entries are trained and kept.
        batches: for each step, rows of the client's examples, (batch,) int64.
        rates: for each step, the learning rate.
        stream: where the global generator of the device stands, if layers draw from it; else None.
    """

    params: Params
    mask: Mask
    batches: tuple[Tensor, ...]
    rates: tuple[float, ...]
    stream: Tensor | None = None

    @property
    def examples(self) -> int:
        """Number of examples that it sees."""
        return sum(len(rows) for rows in self.batches)

    def same_as(self, other: "Request") -> bool:
        """Tell whether two calls train the same weights on the same batches."""
        a, b = self.params.flat, other.params.flat
        return (
            self.rates == other.rates
            and len(self.batches) == len(other.batches)
            and all(map(torch.equal, self.batches, other.batches))
            and self.mask.digest == other.mask.digest
            and (self.stream is None or (other.stream is not None and torch.equal(self.stream, other.stream)))
            and (a is b or torch.equal(a.view(torch.int32), b.view(torch.int32)))
        )


@dataclass(frozen=True)
class Answer:
    """The result of a request.

    Args:
        flat: the trained weights (size,) on the CPU, a row of a matrix that all clients of the stack share.
        loss: mean loss of the examples that were seen; NaN without steps.
        last_loss: mean loss of the last batch.
        wall_s: the client's share of the measured seconds.
        stream: where the generator stands after the training; None without one in the request.
    """

    flat: Tensor
    loss: float
    last_loss: float
    wall_s: float
    stream: Tensor | None


@dataclass(frozen=True)
class StackStep:
    """A step that some clients make together.

    Args:
        index: number of the step.
        rate: learning rate.
        clients: positions in the stack.
        batches: rows of examples (clients, batch); a shorter batch is filled up with its first row.
        lengths: (clients,) int64, rows that count in each batch.
        is_padded: whether some batches are filled up.
    """

    index: int
    rate: float
    clients: tuple[int, ...]
    batches: Tensor
    lengths: Tensor
    is_padded: bool

    @property
    def rows(self) -> Rows:
        """Its clients as a range if they are one, so that their tensors are views and not copies."""
        first, last = self.clients[0], self.clients[-1]
        adjacent = last - first + 1 == len(self.clients)
        return slice(first, last + 1) if adjacent else torch.tensor(self.clients)

    @property
    def weights(self) -> Tensor:
        """The weight of each row in the mean loss of its batch: (clients, batch), 0 where it is filled up."""
        places = torch.arange(self.batches.shape[1], device=self.lengths.device)
        counts = self.lengths.unsqueeze(1)
        return (places < counts) / counts


def plan(requests: Sequence[Request], device: torch.device, *, pads: bool) -> Iterator[StackStep]:
    """Yield the steps in order, their rows on a device, to which all go in one copy.

    Args:
        requests: one for each client.
        device: where the examples are.
        pads: whether batches of different sizes are filled up; else clients whose batches have one size step
            together.
    """
    steps = list(_steps(requests, pads=pads))
    if not steps:
        return
    parts = [part for step in steps for part in (step.batches.flatten(), step.lengths)]
    there = iter(torch.split(torch.cat(parts).to(device), [len(part) for part in parts]))
    for step in steps:
        batches, lengths = next(there).view(step.batches.shape), next(there)
        yield StackStep(step.index, step.rate, step.clients, batches, lengths, step.is_padded)


def _steps(requests: Sequence[Request], *, pads: bool) -> Iterator[StackStep]:
    for index in range(max(len(request.batches) for request in requests)):
        together: dict[tuple[int, float], list[int]] = {}
        for k, request in enumerate(requests):
            if index < len(request.batches):
                size = 0 if pads else len(request.batches[index])
                together.setdefault((size, request.rates[index]), []).append(k)
        for (_, rate), clients in together.items():
            batches = [requests[k].batches[index] for k in clients]
            lengths = [len(rows) for rows in batches]
            filled = torch.stack([_filled(rows, max(lengths)) for rows in batches])
            is_padded = min(lengths) < max(lengths)
            yield StackStep(index, rate, tuple(clients), filled, torch.tensor(lengths), is_padded)


def _filled(rows: Tensor, size: int) -> Tensor:
    """Return rows, and the first one again until there are `size`."""
    missing = size - len(rows)
    return torch.cat([rows, rows[:1].expand(missing)]) if missing else rows
