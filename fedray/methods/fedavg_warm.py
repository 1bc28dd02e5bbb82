"""FedAvg from a warm start: the control for AutoFLIP.  McMahan et al., 2017; Internò et al., 2024.

In AutoFLIP's published code the explorers train one model in turn, each for many epochs on its own examples,
and the rounds of the federation start from that model; FedAvg, with which it is compared, starts from random
weights. Here FedAvg gets the same start and nothing is pruned: the difference to AutoFLIP is the pruning, and
the gain over FedAvg is the value of the start.

Differs from the paper: AutoFLIP's has no such control. The start is charged as round 0, one client after the
other. It equals, bit for bit, that of an AutoFLIP with `scouts="aliased"` and `warm_start`: the same clients
in the same order, the same examples in each batch.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch

from fedray.comparing import as_loss
from fedray.errors import MethodError
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.pruning.schedules import part_of
from fedray.types import ClientUpdate, Density, Params, PositiveInt, ServerState, Task


@dataclass(frozen=True, kw_only=True)
class FedAvgWarm(Method[None]):
    """FedAvg from a model that clients trained in turn.

    Args:
        explorers: share of the clients that train it, of those available before round 1.
        explore_epochs: largest number of epochs of each of them; None: a twentieth of the run's rounds, from
            1 to 150.
        patience: a client stops after this many epochs without a new lowest loss of the last batch.
    """

    citation: ClassVar[str] = "McMahan et al., AISTATS 2017; Internò et al., arXiv 2405.10271, 2024"

    explorers: Density = 1.0
    explore_epochs: PositiveInt | None = None
    patience: PositiveInt = 40

    @property
    def depends_on_rounds(self) -> str | None:
        """The exploration, unless its epochs are given."""
        if self.explore_epochs is not None:
            return None
        return "method.explore_epochs is a twentieth of the run's rounds where it is not given"

    def setup(self, state: ServerState[None], ctx: ServerContext) -> ServerState[None]:
        """Pass one model from client to client."""
        epochs, params = self.explore_epochs or part_of(ctx.rounds, 20, 150), state.params
        explorers = ctx.sample(max(1, round(self.explorers * len(ctx.clients))))
        for client in explorers:
            task = Task(params, state.mask, extras={"epochs": epochs})
            answer = ctx.ask(self.take_turn, {client: task}, keep_updates=True, among=len(explorers))
            for update in answer.updates.values():  # none if it diverged
                flat = torch.where(update.mask.flat, update.params.flat, params.flat)
                params = Params(flat, ctx.layout)
        if params is state.params:
            raise MethodError(f"all {len(explorers)} explorers diverged; lower method.lr")
        return replace(state, params=params)

    def take_turn(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: train for some epochs, or until the loss has not fallen for a while."""
        params, best, waited = task.params, inf, 0
        for _ in range(task.extra("epochs", int)):
            params = client.sgd(params, task.mask, epochs=1)
            loss = as_loss(client.meter.last_loss)
            waited = 0 if loss < best else waited + 1
            best = min(best, loss)
            if waited == self.patience:
                break
        return ClientUpdate(params, task.mask)
