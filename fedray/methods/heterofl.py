"""HeteroFL: computation and communication efficient federated learning for heterogeneous clients.  Diao et
al., ICLR 2021.

Each client trains as wide a model as it can: the first channels of each layer, a share of them that its level
says (a: all, b: 1/2, … e: 1/16). The server averages each weight over the clients that had it, and keeps its
own where none did, so weights of the narrow models are trained by all. What a layer computes is divided by
the slice's share in training (the scaler); the loss leaves out classes that the client has no example of, and
so does the update. Static BatchNorm, `norm: static`, is an option of the run.

Differs from the paper (readings, with the flag that restores the other one):
* an option says who has which level; the paper draws it anew in each round for mixtures of levels, and fixes
  it where it compares shares of two: `assignment`;
* where channels are added up (the branches of a ResNet), a layer keeps them all: only channels inside of
  branches are cut;
* the published code clips the norm of each step's gradient at 1, which the paper does not say: `clip=null`
  for none;
* uploads leave out the rows of the classifier that do not count.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedray.federation.aggregate import Fold, Weight
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.federation.slices import Assignment, SliceMemory, begin, dropped, refusal, train_slice
from fedray.pruning.widths import Levels, Mix, mix_of, slice_mask
from fedray.types import ClientInfo, ClientUpdate, PositiveFloat, PositiveInt, ServerState, Task


@dataclass(frozen=True, kw_only=True)
class HeteroFL(Method[SliceMemory]):
    """Clients train the first channels of each layer, as many as their level says.

    Args:
        levels: levels of the clients, a (all channels), b (1/2) to e (1/16): `a-c-e` in equal parts, `a2-e8`
            in these. The server's model has the widest.
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

    citation: ClassVar[str] = "Diao et al., ICLR 2021"
    needs: ClassVar[str] = "a model with channels"
    slices: ClassVar[bool] = True

    levels: Levels = "a-b-c-d-e"
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
        """Refuse models that cannot be cut, or not so narrow."""
        return refusal(
            setting,
            self.mix.rates,
            self.min_layer,
            scaler=self.scaler,
            masked_loss=self.masked_loss,
        )

    def setup(self, state: ServerState[SliceMemory], ctx: ServerContext) -> ServerState[SliceMemory]:
        """Give the server's model the width of the widest level, at the initial scale of that width."""
        return begin(state, ctx, self.mix.widest)

    def configure(self, state: ServerState[SliceMemory], client: ClientInfo) -> Task:
        """Send the first channels of each layer."""
        mix, memory = self.mix, state.memory
        rate = memory.rate(mix, self.assignment, client, state.round)
        mask = slice_mask(state.mask.layout, memory.groups, rate, within=mix.widest)
        return Task(state.params, mask, extras={"rate": rate / mix.widest})

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
