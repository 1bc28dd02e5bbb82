"""A method: hyper-parameters and five hooks, in the order a round calls them. The defaults are FedAvg.

    setup → configure → client_update → aggregate → prune

A method is a frozen dataclass that subclasses `Method` directly. Its fields are its hyper-parameters. Its
state between rounds lives in `ServerState.memory` and `client.memory`, never in the object. It counts neither
bytes nor FLOPs: the wire and the engine meter them. It never sees the config, the clock, the tracker or the
test set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Generic, Literal

import numpy as np
from pydantic import ConfigDict, Field

from fedray.costs.codec import Codec, ValueKind
from fedray.costs.flops import FlopModel
from fedray.errors import MethodError
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.client import Client, ClientFunction
from fedray.models.spec import ModelSpec
from fedray.pruning.channels import removed_entries
from fedray.training.optimizers import Optimizer
from fedray.types import (
    ChannelGroup,
    ClientInfo,
    ClientUpdate,
    Layout,
    M,
    Mask,
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)

ZeroPolicy = Literal["enforce", "regrow", "reprune"]
"""What clients do with pruned weights."""

MOST_RATE = 1e18
"""The product of two such numbers is still a float32."""


@dataclass(frozen=True)
class Setting:
    """The setting of a run, known before anything starts: model, population, cohort, rounds.

    Args:
        model: the model's structure, without weights.
        population: registered clients.
        cohort: clients whose training is asked for in a round.
        rounds: planned rounds.
    """

    model: ModelSpec
    population: int
    cohort: int
    rounds: int


@dataclass(frozen=True)
class ServerContext:
    """The tools of a hook on the server: clients, their answers, the server's data, validation.

    Args:
        round: the round of the call; 0 in `setup`.
        model: the model's structure, without weights.
        flops: FLOPs of (model, mask).
        clients: all registered clients; looking one up is cheap, walking over all of them is not.
        rng: a generator of this hook in this round.
    """

    round: int
    model: ModelSpec
    flops: FlopModel
    clients: Sequence[ClientInfo]
    rng: np.random.Generator
    _rounds: Callable[[], int]
    _sample: Callable[[int], tuple[int, ...]]
    _ask: Callable[[ClientFunction, Mapping[int, Task], bool, int | None], CohortUpdate]
    _server: Callable[[], Client]
    _validate: Callable[[Params, Mask], tuple[float, float]]

    @property
    def rounds(self) -> int:
        """The number of planned rounds; a run whose method has asked cannot be given more."""
        return self._rounds()

    @property
    def layout(self) -> Layout:
        """The model's layout."""
        return self.model.layout

    def sample(self, count: int) -> tuple[int, ...]:
        """Draw up to `count` different clients that are available now; their ids, sorted.

        If none is available, the server looks again until one is, as it does before a round, and the wait is
        charged.

        Raises:
            RunError: if no client becomes available.
        """
        return self._sample(count)

    def ask(
        self,
        function: ClientFunction,
        tasks: Mapping[int, Task],
        *,
        keep_updates: bool = False,
        among: int | None = None,
    ) -> CohortUpdate:
        """Run `function(task, client)` on clients outside the round's training; metered like a round.

        No client is late or drops out here. The seconds of the slowest one are added to the round's. For
        clients that were neither in the round's cohort nor drawn by `sample` in it, the server waits until
        they are available, and the wait is charged. The answer lacks clients that never become available.

        Args:
            function: a method's bound method, or any function that can be pickled.
            tasks: client id → task.
            keep_updates: keep every client's model in `.updates`.
            among: of how many clients these are a part, if a hook asks them in turn; `clients.max_failed` is
                then a share of these.

        Raises:
            MethodError: if there is no task, or one for a client that does not exist.
            RunError: if none of the clients becomes available, or more of them fail than may.
            ClientError: if the code of more of them raises than may fail.
        """
        return self._ask(function, tasks, keep_updates, among)

    @property
    def server(self) -> Client:
        """The server as one more client, with its own data and device; metered like any.

        Raises:
            MethodError: unless the method declares `uses_server_data` and the config gives it a share.
        """
        return self._server()

    def validate(self, params: Params, mask: Mask) -> tuple[float, float]:
        """Return (accuracy, mean loss) of `params ⊙ mask` on validation data.

        Raises:
            MethodError: if there is no validation data; a method that declares `uses_validation_data` is
                refused before the start then.
        """
        return self._validate(params, mask)


@dataclass(frozen=True, kw_only=True)
class Method(Generic[M]):
    """FedAvg, with the options that all methods share. Subclasses override hooks.

    Args:
        local_epochs: passes of a client over its examples in a round.
        steps: mini-batches of a client in a round, in place of `local_epochs`.
        lr: learning rate of a client.
        lr_decay: factor of the learning rate from round to round.
        optimizer: of a client; its state starts from zero in every round.
        batch_size: examples in a step; the last batch of an epoch may be smaller.
        momentum: of a client's SGD.
        weight_decay: L2 penalty of a client's training.
        min_layer: weights that each prunable layer keeps at least (all, if it has fewer), however low they
            score; the other layers lose as many more, so that a density stays as asked. 0: a layer may
            lose all.
        uplink_values: how a client's weights are written: exact, half precision, or 8 bits per tensor.
        downlink_values: the same for the server's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    uses_server_data: ClassVar[bool] = False
    """Whether it trains on the server's own examples; refused before the start where there are none."""
    prunes: ClassVar[bool] = False
    """Whether it removes weights; refused before the start where a model has none that may be pruned."""
    slices: ClassVar[bool] = False
    """Whether its models are slices, networks with fewer channels: they are evaluated as such."""
    may_change: ClassVar[frozenset[str]] = frozenset({"lr", "momentum", "weight_decay"})
    """Options of which a running federation may take other values: they are read anew in every round."""
    needs: ClassVar[str] = ""
    """Its requirement on the model, for the list of methods; `check` refuses."""
    citation: ClassVar[str] = ""

    local_epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    lr: Annotated[PositiveFloat, Field(le=MOST_RATE)] = 0.05
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    optimizer: Optimizer = "sgd"
    batch_size: PositiveInt = 20
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[NonNegativeFloat, Field(le=MOST_RATE)] = 0.0
    min_layer: NonNegativeInt = 1
    uplink_values: ValueKind = "fp32"
    downlink_values: ValueKind = "fp32"

    @property
    def uplink(self) -> Codec:
        """The codec of updates."""
        return Codec(values=self.uplink_values)

    @property
    def downlink(self) -> Codec:
        """The codec of tasks."""
        return Codec(values=self.downlink_values)

    @property
    def fold(self) -> Fold:
        """The rule by which updates are summed."""
        return Fold()

    @property
    def zero_policy(self) -> ZeroPolicy:
        """What clients do with pruned weights; recorded with the run."""
        return "enforce"

    @property
    def uses_validation_data(self) -> bool:
        """Whether it decides by validation data, with these options; refused before the start without any."""
        return False

    @property
    def metric_names(self) -> tuple[str, ...] | None:
        """The method's own metrics: `method/<name>` of `measures`, `train/<name>` of its clients' updates.

        A sweep refuses to compare by any other. None, the default of a class that overrides `measures` or
        `client_update`, says that they are not known before a run.
        """
        own = type(self)
        silent = own.measures is Method.measures and own.client_update is Method.client_update
        return () if silent else None

    @property
    def target(self) -> float | None:
        """The density that the model shall end with, by these options; None: they set no such target.

        Refused before the start where it cannot be reached.
        """
        return None

    def check(self, setting: Setting) -> str | None:
        """Return why this cannot run in such a setting, beginning with the key to change; or None.

        Called before anything starts.
        """
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The reason why a round depends on the number of planned rounds, beginning with a key; or None.

        A run of a method that depends on them cannot be given more rounds.
        """
        return None

    def local_steps(self, num_examples: int) -> int:
        """Return how many SGD steps a client makes; over-selection predicts from it."""
        return self.steps or self.local_epochs * -(-num_examples // self.batch_size)

    def setup(self, state: ServerState[M], ctx: ServerContext) -> ServerState[M]:
        """Once, before round 1: initial pruning, exploration, pre-training."""
        return state

    def configure(self, state: ServerState[M], client: ClientInfo) -> Task:
        """Return the task of a client.

        Return the state's own params and mask for all, and they are sent as one.
        """
        return Task(state.params, state.mask)

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: masked local SGD."""
        return ClientUpdate(client.sgd(task.params, task.mask), task.mask)

    def aggregate(self, state: ServerState[M], cohort: CohortUpdate) -> ServerState[M]:
        """Merge the updates: the mask-aware mean, and the server's value where no client holds a weight."""
        return replace(state, params=cohort.mean(otherwise=state.params))

    def prune(self, state: ServerState[M], cohort: CohortUpdate, ctx: ServerContext) -> ServerState[M]:
        """Move the mask; only here does it move."""
        return state

    def forgets(self, state: ServerState[M]) -> bool:
        """Tell, after `prune`, whether nothing that clients remember is of use from the next round on.

        The server then drops all of `client.memory`, also of clients that it has not asked for long; else it
        keeps them, and every checkpoint holds them.
        """
        return False

    def density_asked(self, state: ServerState[M]) -> float | None:
        """Return the density that the options ask for after the state's round; None: they ask for none.

        It stands in the report as `density/asked`; a run that ends above it has a warning.
        """
        return self.target

    def eval_params(self, state: ServerState[M]) -> Params:
        """Return the weights that are evaluated and saved as the model (under the state's mask).

        Where the model standardises its weights, that follows.
        """
        return state.params

    @property
    def standardizes(self) -> bool:
        """Whether weights of convolutions are standardised where `weight_standardization` is not given."""
        return False

    def measures(self, state: ServerState[M]) -> Mapping[str, float]:
        """Return metrics for the round's report, named `method/<name>` there; called after `prune`."""
        return {}


def check_finite(params: Params, mask: Mask, where: str) -> None:
    """Refuse a model with NaN or infinity: its clients would be blamed for what it does to their training.

    Args:
        params: of the server's state.
        mask: entries outside it are not read.
        where: the method's hook.

    Raises:
        MethodError: with the tensors.
    """
    if params.is_finite() or (held := params.masked(mask)).is_finite():
        return
    spoilt = [name for name, tensor in held.items() if not bool(tensor.isfinite().all())]
    raise MethodError(
        f"the model that {where} returned has NaN or infinity in {', '.join(spoilt[:5])}, though every "
        "update that counted is finite; lower method.lr, or check what it computes and its clients' sums"
    )


def check_mask(mask: Mask, groups: Sequence[ChannelGroup], where: str) -> Mask:
    """Return the mask if it holds all that is not prunable, channels aside that were removed as a whole.

    Raises:
        MethodError: otherwise, with how many entries are missing.
    """
    absent = ~mask.flat & ~mask.layout.prunable_flat
    if bool(absent.any()):
        absent &= ~removed_entries(mask, groups)
    missing = int(absent.count_nonzero())
    if missing:
        raise MethodError(
            f"the mask that {where} returned is False on {missing:,} entries that are not prunable "
            "(biases, norms, the last layer); a server's mask must be True there, except in channels that it "
            "removed as a whole (`fedray.pruning.channels.channel_mask`)"
        )
    return mask
