"""How clients of arbitrary code are trained together: they rehearse up to their first plain SGD.

    rehearse    each client's function runs until it calls `client.sgd`, and is left there
    train       these calls are trained together (`stacked.py`)
    run         each function runs from its start, with the result at hand when it calls `client.sgd`

The function of a client is a method's, and knows nothing of this. Its second run finds the same generators,
memory and task, so it comes to the same call; if it does not, or calls something else first, the client
trains alone. A call that is no plain SGD (a loss or hook of the method's) is always trained alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from fedray.errors import ClientError
from fedray.federation.client import Client
from fedray.training.dropout import generator_on
from fedray.training.plan import Answer, Request
from fedray.training.stacked import Stack, stream_of
from fedray.types import Mask, Params

MakeClient = Callable[..., Client]
"""Makes a client from the arguments of `Client`."""
Given = TypeVar("Given")
T = TypeVar("T")


class Asked(BaseException):
    """Leaves a client's function at its first plain SGD. No error: nothing but `together` catches it."""


@dataclass
class Part:
    """A client's part in training together.

    Args:
        client: as it asked.
        request: the call of plain SGD; None if the client asked for none.
        answer: its result.
    """

    client: Client | None = None
    request: Request | None = None
    answer: Answer | None = None


@dataclass
class StandIn(Client):
    """A client whose first metered call, if it is a plain SGD, is trained elsewhere."""

    _part: Part = field(default_factory=Part)

    def _elsewhere(
        self,
        params: Params,
        mask: Mask,
        epochs: int | None,
        steps: int | None,
        rate: float | Callable[[int], float],
        seed: int | None,
    ) -> Params | None:
        """Ask for the training and raise Asked; or return its result, if it is there.

        Raises:
            Asked: if there is no result yet.
        """
        if self.meter.wall_s:
            return None  # a second run would do the earlier work again
        before = self.rng.bit_generator.state
        rng = self.rng if seed is None else self._generator(seed)
        batches = tuple(chain.from_iterable(self._passes(rng, epochs, steps)))
        rates = tuple(rate(i) if callable(rate) else rate for i in range(len(batches)))
        request = Request(params, mask, batches, rates, stream_of(self._engine))
        part = self._part
        if part.answer is None:
            part.client, part.request = self, request
            raise Asked
        if part.request is None or not part.request.same_as(request):
            self.rng.bit_generator.state = before
            return None
        return self._take(part.answer, request)

    def _take(self, answer: Answer, request: Request) -> Params:
        """Charge a training and return a copy of its result."""
        self._charge(request.examples, len(request.batches), request.mask, 0.0, dense_gradient=False)
        self.meter.wall_s = answer.wall_s
        self.meter.loss, self.meter.last_loss = answer.loss, answer.last_loss
        if answer.stream is not None:
            generator_on(self._engine.device).set_state(answer.stream)
        return Params(answer.flat.clone(), self._engine.layout)


def together(
    orders: Sequence[Given], train: Callable[[Given, MakeClient], T], most: int, *, pads: bool
) -> Iterator[T]:
    """Train clients, and yield their results in order.

    Args:
        orders: one for each client.
        train: runs the function of one client, with a client that it makes by the given function. Raises
            ClientError.
        most: clients that are trained together; 1 trains one after the other, without a rehearsal.
        pads: whether batches of different sizes are filled up.
    """
    if most == 1:
        yield from (train(order, Client) for order in orders)
        return
    for start in range(0, len(orders), most):
        window = orders[start : start + most]
        found = [_rehearsed(order, train) for order in window]
        _answer([part for part in found if isinstance(part, Part) and part.request is not None], pads=pads)
        for order, part in zip(window, found, strict=True):
            if not isinstance(part, Part):
                yield part  # it never asked
            elif part.answer is None:
                yield train(order, Client)
            else:
                yield train(order, partial(StandIn, _part=part))


def _rehearsed(order: Given, train: Callable[[Given, MakeClient], T]) -> T | Part:
    """Run the function of a client up to its first plain SGD; return its result if it makes none."""
    part = Part()
    try:
        done = train(order, partial(StandIn, _part=part))
    except Asked:
        return part
    except ClientError:
        return Part()  # it is raised again in its turn
    return done if part.request is None else part  # it caught what was not meant for it


def _answer(parts: Sequence[Part], *, pads: bool) -> None:
    """Train what clients ask for; a client whose mask no other has gets no answer."""
    groups: dict[bytes, list[Part]] = {}
    for part in parts:
        assert part.request is not None
        groups.setdefault(part.request.mask.digest, []).append(part)
    for group in groups.values():
        if len(group) > 1:
            _train(group, pads=pads)


def _train(group: Sequence[Part], *, pads: bool) -> None:
    """Train requests of one mask together."""
    clients = [part.client for part in group if part.client is not None]
    engine, (x, y, rows) = clients[0]._engine, _examples(clients)
    requests = [
        replace(part.request, batches=tuple(where.index_select(0, batch) for batch in part.request.batches))
        for part, where in zip(group, rows, strict=True)
        if part.request is not None
    ]
    stack = Stack(engine.smaller(requests[0].mask), pads=pads)
    answers = stack.train(requests, x, y, clients[0]._training, engine.layout.size)
    for part, answer in zip(group, answers, strict=True):
        part.answer, part.client = answer, None


def _examples(clients: Sequence[Client]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return examples and labels on the clients' device, and for each client where its own are."""
    shares = [client._share for client in clients if client._share is not None]
    if shares:
        return shares[0].of.x, shares[0].of.y, [share.rows for share in shares]
    device = clients[0]._engine.device
    x, y = (torch.cat(parts).to(device) for parts in ([c.x for c in clients], [c.y for c in clients]))
    return x, y, list(torch.split(torch.arange(len(y)), [client.num_examples for client in clients]))
