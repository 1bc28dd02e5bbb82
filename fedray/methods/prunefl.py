"""PruneFL: model pruning enables efficient federated learning on edge devices.  Jiang et al., TNNLS 2022.

One client prunes the model first, on its own examples. Later, every `interval` rounds, the mask is rebuilt:
the smallest weights are dropped; of all weights not held, those are admitted whose squared gradient is worth
the time that they add to a round. Γ = Σ g² / T is maximised greedily; T is linear in the weights held.
Clients gather the squared gradients as they train, those of pruned weights included.

Differs from the paper and its code (jiangyuang/PruneFL), with the flag that restores the other reading:
* initial pruning is charged (bytes, FLOPs, time), as round 0; the published time axis leaves it out;
* clients train for epochs, on the cross-entropy; published are `steps=5` and `loss="bce"`;
* times come from the devices of the run: `time_model`;
* the first client is the one with most examples of ten, not client 0 (`initial_client`), and uses all its
  examples, not 200 of them;
* runs under 250 rounds have shorter intervals: `interval=50`; after the last round the mask stays;
* each client gathers its own gradients; those not uploaded by the end of the interval are forgotten;
* `max_density` also limits the weights that survive the drop, which is then larger; published: admission
  only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from fedray.costs.layer_times import (
    MEASURED,
    LayerTimes,
    MeasuredName,
    mean_steps,
    mismatch,
    of_devices,
    published,
)
from fedray.errors import MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Step
from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.greedy import rebuild, settled
from fedray.pruning.masks import RegrowFrom
from fedray.pruning.schedules import due, events
from fedray.types import (
    ClientInfo,
    ClientUpdate,
    Density,
    Fraction,
    Mask,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)

START = 1.5
"""Initial pruning waits until the accuracy on the client's examples is this many times that of guessing."""
ASKED = 10
"""Available clients from which the first one is chosen."""


@dataclass(frozen=True)
class PruneFLMemory:
    """The server's memory.

    Args:
        times: the time of a round.
        events: rounds after which the mask is rebuilt.
        done: the last round in which it was rebuilt; 0 before the first.
    """

    times: LayerTimes
    events: tuple[int, ...]
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class PruneFL(Method[PruneFLMemory]):
    """Prune at one client, then rebuild the mask now and then from gathered squared gradients.

    Args:
        interval: rounds between reconfigurations, in both phases; None: 50, at most a fifth of the run.
        drop: share of each layer's held weights that a reconfiguration drops, unless they pay for themselves;
            during the rounds of the federation it decays.
        half_life: rounds in which `drop` halves.
        loss: of the logits; `bce`, as published, compares each of them with 0 or 1.
        gather: squared gradients over the whole interval, or in the reconfiguring round only. The latter
            costs one dense backward pass per interval instead of one in each round, and no memory on clients.
        regrow_value: value of a weight that is admitted again: its last value, or zero.
        max_density: largest density after a reconfiguration; None: no limit.
        time_model: the devices of the run, or the published times of VGG-11 or Conv-2.
        layer_times_s: in place of `time_model`: name of a weight tensor → seconds that each of its weights
            held adds to a round; with `constant_s`.
        constant_s: seconds of a round without any weight held.
        initial_client: client that prunes first, 0 as published; None: of ten available clients the one with
            most examples.
        initial_batches: batches in a round of initial pruning, at most a pass over the client's examples.
        initial_max_rounds: largest number of rounds of initial pruning; 0 leaves it out.
    """

    citation: ClassVar[str] = "Jiang et al., TNNLS 2022"
    prunes: ClassVar[bool] = True
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"drop", "max_density"}

    interval: PositiveInt | None = None
    drop: Fraction = 0.3
    half_life: PositiveFloat = 10_000.0
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    gather: Literal["interval", "round"] = "interval"
    regrow_value: RegrowFrom = "shadow"
    max_density: Density | None = None
    time_model: Literal["profile", MeasuredName] = "profile"
    layer_times_s: Mapping[str, PositiveFloat] | None = None
    constant_s: PositiveFloat | None = None
    initial_client: NonNegativeInt | None = None
    initial_batches: PositiveInt = 10
    initial_max_rounds: NonNegativeInt = 1000

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    def check(self, setting: Setting) -> str | None:
        """Reject wrong layer times, an unknown `initial_client`, and a run that never prunes."""
        if self.initial_client is not None and self.initial_client >= setting.population:
            return f"method.initial_client={self.initial_client}, but there are {setting.population} clients"
        rebuilt = self.events(setting.rounds)
        if not self.initial_max_rounds and not rebuilt:
            return (
                "method.initial_max_rounds=0 leaves out the first pruning, and no mask is rebuilt in "
                f"{setting.rounds} round(s) with an interval of {rebuilt.step}: the model is never pruned"
            )
        if (self.layer_times_s is None) != (self.constant_s is None):
            return "method.constant_s and method.layer_times_s go together: give both, or neither"
        layout, fault = setting.model.layout, None
        if self.layer_times_s is not None:
            fault = mismatch(self.layer_times_s, layout)
            return f"method.layer_times_s: {fault}" if fault else None
        if self.time_model != "profile":
            fault = mismatch(MEASURED[self.time_model].per_weight_s, layout, complete=True)
        return f"method.time_model={self.time_model}: {fault}" if fault else None

    @property
    def depends_on_rounds(self) -> str | None:
        """The last reconfiguration, and the rounds in which clients gather for it."""
        return "method.interval: no reconfiguration follows the last round, and clients gather for none"

    def processed(self, num_examples: int) -> int:
        """Return how many examples a client of this size processes per round."""
        passes, steps = divmod(self.local_steps(num_examples), -(-num_examples // self.batch_size))
        return passes * num_examples + steps * self.batch_size  # only the last batch of a pass is short

    def events(self, rounds: int) -> range:
        """Return the rounds after which the mask is rebuilt."""
        return events(rounds, self.interval, parts=5, most=50, before=True)

    def setup(self, state: ServerState[PruneFLMemory], ctx: ServerContext) -> ServerState[PruneFLMemory]:
        """Fix times and rounds; let one client prune."""
        times, rebuilt = self.layer_times(ctx), self.events(ctx.rounds)
        state = replace(state, memory=PruneFLMemory(times, tuple(rebuilt)))
        if not self.initial_max_rounds:
            return state
        first = self.initial_client
        if first is None:
            first = max(ctx.sample(ASKED), key=lambda k: ctx.clients[k].num_examples)
        vector, every = times.vector(ctx.layout), rebuilt.step
        task = Task(state.params, state.mask, extras={"times": vector, "interval": every})
        answer = ctx.ask(self.prune_at_client, {first: task}, keep_updates=True)
        if not answer.folded:
            raise MethodError(f"initial pruning diverged at client {first}; lower method.lr")
        pruned = answer.updates[first]
        gone = ctx.layout.prunable_flat & ~pruned.mask.flat
        # the client's own norms (norm: local) were not sent, and are not pruned
        flat = torch.where(pruned.mask.flat | gone, pruned.params.flat, state.params.flat)
        if first in answer.each:
            flat[gone] = answer.each[first]["behind"]
        return replace(state, params=Params(flat, ctx.layout), mask=Mask(~gone, ctx.layout))

    def prune_at_client(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: train and prune in turn until the size settles; pruned weights stay pruned."""
        params, mask, every = task.params, task.mask, task.extra("interval", int)
        times = LayerTimes.of_vector(task.extra("times", Tensor), mask.layout)
        batches = min(self.initial_batches, -(-client.num_examples // self.batch_size))
        squares, counts = torch.zeros_like(params.flat), list[int]()

        def gather(gradient: Tensor) -> None:
            squares.addcmul_(gradient, gradient)

        for rounds_left in range(self.initial_max_rounds, 0, -every):
            steps = min(every, rounds_left) * batches
            trained = client.sgd(params, mask, steps=steps, loss=self.objective, on_grad=gather)
            params = Params(torch.where(mask.flat, trained.flat, params.flat), mask.layout)
            if not params.is_finite():
                break  # the server leaves the update out
            if not counts and client.evaluate(params, mask).accuracy < START / client.model.num_classes:
                continue
            squares *= mask.flat
            mask = rebuild(params, mask, squares, times, self.drop, self.max_density, self.min_layer)
            squares.zero_()
            counts.append(mask.count)
            if settled(counts):
                break
        gone = mask.layout.prunable_flat & ~mask.flat
        shadow = self.regrow_value == "shadow" and bool(gone.any())
        return ClientUpdate(params, mask, each={"behind": params.flat[gone]} if shadow else {})

    def configure(self, state: ServerState[PruneFLMemory], client: ClientInfo) -> Task:
        """Ask clients to gather before a reconfiguration, and to upload in its round."""
        memory = state.memory
        upload = due(memory.events, memory.done, state.round)
        ahead = bool(memory.events) and state.round < memory.events[-1]
        if not upload and (not ahead or self.gather == "round"):
            return Task(state.params, state.mask)
        return Task(state.params, state.mask, extras={"since": memory.done, "upload": upload})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: masked local SGD; gather the square of the sum of its gradients."""
        mask, since = task.mask, task.extras.get("since")
        total = torch.zeros_like(task.params.flat)

        def gather(gradient: Tensor) -> None:
            total.add_(gradient)

        on_grad = None if since is None else gather
        params = client.sgd(task.params, mask, loss=self.objective, on_grad=on_grad)
        if since is None:
            return ClientUpdate(params, mask)
        importance = total.square_().mul_(self.processed(client.num_examples))
        past = client.recall("importance", Tensor)
        if past is not None and client.recall("since", int) == since:
            importance += past
        client.memory.clear()
        if task.extra("upload", bool):
            return ClientUpdate(params, mask, sums={"importance": importance})
        client.memory.update(since=since, importance=importance)
        return ClientUpdate(params, mask)

    # aggregate: the default. Behind the mask the server keeps the value that a weight had when it was pruned.

    def prune(
        self, state: ServerState[PruneFLMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[PruneFLMemory]:
        """Every interval, rebuild the mask from the cohort's squared gradients."""
        if not due(state.memory.events, state.memory.done, state.round) or not cohort.folded:
            return state
        drop = self.drop * 0.5 ** (state.round / self.half_life)
        params, importance, times = state.params, cohort.sum("importance"), state.memory.times
        mask = rebuild(params, state.mask, importance, times, drop, self.max_density, self.min_layer)
        if self.regrow_value == "zero":
            params = Params(torch.where(mask.flat & ~state.mask.flat, 0.0, params.flat), ctx.layout)
        return replace(state, params=params, mask=mask, memory=replace(state.memory, done=state.round))

    def forgets(self, state: ServerState[PruneFLMemory]) -> bool:
        """Whether an interval has just ended: its squared gradients are of no use after it."""
        return state.memory.done == state.round

    def layer_times(self, ctx: ServerContext) -> LayerTimes:
        """Return the time model of the options."""
        if self.layer_times_s is not None and self.constant_s is not None:
            return LayerTimes(self.constant_s, self.layer_times_s)
        if self.time_model != "profile":
            return published(self.time_model, mean_steps(ctx.clients, self.local_steps))
        dense = self.gather == "interval"
        work = self.processed, self.local_steps
        return of_devices(ctx.clients, ctx.flops, *work, self.downlink, self.uplink, dense)

    @property
    def objective(self) -> Callable[[Step], Tensor] | None:
        """Loss of the clients; None is the cross-entropy."""
        return binary_cross_entropy if self.loss == "bce" else None


def binary_cross_entropy(step: Step) -> Tensor:
    """Return the binary cross-entropy, averaged over examples and classes."""
    target = one_hot(step.y, step.logits.shape[1]).to(step.logits.dtype)
    return binary_cross_entropy_with_logits(step.logits, target)
