"""FedRolex: model-heterogeneous federated learning with rolling sub-model extraction.  Alam et al., NeurIPS
2022.

HeteroFL with a window that rolls: in each round a client's slice begins one channel further, round the end,
so that all weights of the server's model are trained evenly, also those of a model that is wider than any
client's. The server averages each weight over the clients that had it, and keeps its own where none did.

Differs from the paper (readings, with the flag that restores the other one):
* the published code rolls the other way, and from HeteroFL it has the scaler, the masked loss and the clipped
  gradient, which here are options: `scaler`, `masked_loss`, `clip`;
* its mean over a part of the layers counts how often each weight was trained before; here, as in the paper,
  clients count alike;
* where channels are added up (the branches of a ResNet), a layer keeps them all.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedray.federation.aggregate import Fold, Weight
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.federation.slices import Assignment, SliceMemory, begin, dropped, refusal, train_slice
from fedray.pruning.widths import RATES, Level, Levels, Mix, mix_of, slice_mask
from fedray.types import ClientInfo, ClientUpdate, PositiveFloat, PositiveInt, ServerState, Task


@dataclass(frozen=True, kw_only=True)
class FedRolex(Method[SliceMemory]):
    """Clients train a window of the channels of each layer, which rolls on in each round.

    Args:
        levels: levels of the clients, a (all channels), b (1/2) to e (1/16): `a-c-e` in equal parts, `a2-e8`
            in these.
        server: level of the server's model; at least the widest of the clients'.
        assignment: who has which level: drawn anew in each round; the same for the whole run, in order of
            the clients' numbers; or by speed, the fastest the widest.
        scaler: divide what a sliced layer computes by the slice's share of the server's channels, in
            training.
        masked_loss: leave out classes that a client has no example of, in its loss and in its update.
        clip: largest norm of a step's gradient; null: any.
        milestones: rounds after which the learning rate is multiplied by `factor`.
        factor: of the learning rate at each milestone.
        weighting: of a client in the mean: the same for all, or its number of examples.
    """

    citation: ClassVar[str] = "Alam et al., NeurIPS 2022"
    needs: ClassVar[str] = "a model with channels"
    slices: ClassVar[bool] = True

    levels: Levels = "a-b-c-d-e"
    server: Level = "a"
    assignment: Assignment = "dynamic"
    scaler: bool = True
    masked_loss: bool = True
    clip: PositiveFloat | None = 1.0
    milestones: tuple[PositiveInt, ...] = ()
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    weighting: Weight = "uniform"

    @property
    def mix(self) -> Mix:
        """The levels, read."""
        return mix_of(self.levels)

    @property
    def fold(self) -> Fold:
        """The mean, weighted by the option `weighting`."""
        return Fold(weight=self.weighting)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    def check(self, setting: Setting) -> str | None:
        """Refuse a client that is wider than the server, and models that cannot be cut, or not so narrow."""
        if self.mix.widest > RATES[self.server]:
            return (
                f"method.server={self.server} is narrower than the widest of method.levels={self.levels}; "
                "give the server a level as wide, or the clients narrower ones"
            )
        return refusal(
            setting,
            self.mix.rates,
            self.min_layer,
            scaler=self.scaler,
            masked_loss=self.masked_loss,
        )

    def setup(self, state: ServerState[SliceMemory], ctx: ServerContext) -> ServerState[SliceMemory]:
        """Give the server's model its width, at the initial scale of that width."""
        return begin(state, ctx, RATES[self.server])

    def configure(self, state: ServerState[SliceMemory], client: ClientInfo) -> Task:
        """Send a window of the channels of each layer, which begins one further than in the round before."""
        within, memory = RATES[self.server], state.memory
        rate = memory.rate(self.mix, self.assignment, client, state.round)
        mask = slice_mask(
            state.mask.layout, memory.groups, rate, within=within, start=max(0, state.round - 1)
        )
        return Task(state.params, mask, extras={"rate": rate / within})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: train the slice."""
        return train_slice(
            task,
            client,
            lr=client.lr * dropped(client.round, self.milestones, self.factor),
            scaler=self.scaler,
            masked_loss=self.masked_loss,
            clip=self.clip,
        )
