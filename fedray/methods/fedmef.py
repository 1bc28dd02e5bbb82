"""FedMef: towards memory-efficient federated dynamic pruning.  Huang et al., CVPR 2024.

The model is sparse from the start: a random mask, with layer densities by ERK. In an adjustment round each
layer exchanges its smallest weights for as many new ones, where the gradient is largest. Before, clients
squeeze the smallest weights towards zero, so that the others take over their information (budget-aware
extrusion: a penalty, and a learning rate that follows the norm of those weights). For small memories, weights
of convolutions are standardised (NSConv), and layers keep only their largest inputs for the backward pass
(scaled activation pruning).

Differs from the paper (readings of unclear points, with the flag that restores the other one):
* in the paper standardised weights replace BatchNorm; here a model keeps its normalisation: `nsconv=false`
  for plain convolutions (the run's `weight_standardization` overrides it). Weights are ranked by their size
  before standardisation;
* η of the step's learning rate is that of the round and η0 that of the first, so ψ = 1 raises it only where
  `lr_decay` has lowered it: `boost` is ψ, and 0 leaves the learning rate alone;
* new weights are ranked by |Σ n_k g_k| over the cohort, g taken after the local training at the weights that
  the forward pass uses, on one batch;
* a layer exchanges no more weights than it has pruned ones, so that full layers stay as they are;
* the published code's unsquared norm without λ, its penalty on masked zeros and in every round, and its
  learning rate that cannot fall are not reproduced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import tanh
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Step
from fedray.federation.method import MOST_RATE, Method, ServerContext, Setting
from fedray.models.sparse_layers import PrunedActivations
from fedray.pruning.masks import erk, grow_per_layer, random, top_k_per_layer
from fedray.pruning.schedules import adjust_rate, events
from fedray.pruning.scores import magnitude
from fedray.shares import floor_of
from fedray.types import (
    ClientInfo,
    ClientUpdate,
    Density,
    Fraction,
    Mask,
    NonNegativeFloat,
    Params,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)


@dataclass(frozen=True)
class FedMefMemory:
    """The server's memory.

    Args:
        shares: adjustment round → share of its weights that a layer exchanges at its end, in (0, 1].
        done: the last round with an exchange; 0 before the first.
    """

    shares: Mapping[int, float]
    done: int = 0

    def share(self, round: int) -> float | None:
        """Return the share of a round's adjustment, or of an earlier one without an update; else None."""
        pending = [event for event in self.shares if self.done < event <= round]
        return self.shares[max(pending)] if pending else None


@dataclass(frozen=True, kw_only=True)
class FedMef(Method[FedMefMemory]):
    """Exchange the smallest weights for promising ones, at a constant density.

    Args:
        density: share of the prunable weights that is held throughout the run.
        interval: rounds between adjustments; None: a fifth of the run, at most 10.
        until: end of the adjustments, as a share of the run's rounds (R_stop).
        adjust: share of a layer's weights that the first adjustment exchanges (α); it falls as a cosine to 0
            at `until`.
        extrusion: weight of the penalty on the weights to be removed (λ); 0 turns the extrusion off.
        boost: factor ψ of the learning rate in the extrusion; 0 leaves the learning rate as it is.
        max_lr: the learning rate's upper bound ξ in the extrusion; None: ten times `lr`.
        nsconv: standardise the weights of convolutions, unless the run's `weight_standardization` is given.
        activation_pruning: share of each layer's inputs that is not stored for the backward pass (γ).
    """

    citation: ClassVar[str] = "Huang et al., CVPR 2024"
    prunes: ClassVar[bool] = True

    density: Density = 0.1
    interval: PositiveInt | None = None
    until: Fraction = 0.6
    adjust: Fraction = 0.2
    extrusion: NonNegativeFloat = 1e-3
    boost: NonNegativeFloat = 1.0
    max_lr: Annotated[PositiveFloat, Field(le=MOST_RATE)] | None = None
    nsconv: bool = True
    activation_pruning: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def target(self) -> float | None:
        """The option `density`."""
        return self.density

    @property
    def standardizes(self) -> bool:
        """The option `nsconv`."""
        return self.nsconv

    def events(self, rounds: int) -> range:
        """Return the adjustment rounds of a run."""
        return events(rounds, self.interval, self.until, parts=5, most=10, before=True)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    def check(self, setting: Setting) -> str | None:
        """Refuse an interval that leaves no adjustment."""
        found, stop = self.events(setting.rounds), self.until * setting.rounds
        if self.interval is not None and stop and not found:
            return (
                f"method.interval={found.step} puts the first adjustment after the end of adjustments, which "
                f"is round {stop:g} (method.until={self.until} of {setting.rounds} rounds)"
            )
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The end of the adjustments."""
        return "method.until is a share of the run's rounds"

    def setup(self, state: ServerState[FedMefMemory], ctx: ServerContext) -> ServerState[FedMefMemory]:
        """Draw the first mask; fix the adjustment rounds."""
        mask = random(ctx.layout, erk(ctx.layout, self.density), ctx.rng, min_layer=self.min_layer)
        stop = self.until * ctx.rounds
        shares = {t: adjust_rate(t, stop, self.adjust) for t in self.events(ctx.rounds)}
        return replace(state, params=state.params.masked(mask), mask=mask, memory=FedMefMemory(shares))

    def configure(self, state: ServerState[FedMefMemory], client: ClientInfo) -> Task:
        """In an adjustment round, send the share that will be exchanged."""
        share = state.memory.share(state.round)
        return Task(state.params, state.mask, extras={} if share is None else {"adjust": share})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: SGD with pruned activations; in an adjustment round extrude, and send gradients."""
        params, mask = task.params, task.mask
        forward = PrunedActivations(self.activation_pruning) if self.activation_pruning else None
        if "adjust" not in task.extras:
            return ClientUpdate(client.sgd(params, mask, forward=forward), mask)
        share = task.extra("adjust", float)
        low = Mask(mask.flat & ~self.largest(params, mask, share).flat, mask.layout)
        if self.extrusion and low.count:
            squeeze = Extrusion(self, client, params, low)
            params = client.sgd(params, mask, forward=forward, loss=squeeze.loss, lr=squeeze.lr)
        else:
            params = client.sgd(params, mask, forward=forward)
        # NaN if training diverged: the server leaves out the update because of its params
        gradient = client.grad(params, mask, batches=1).nan_to_num(0.0, 0.0, 0.0)
        best = grow_per_layer(gradient.abs(), self.exchanged(mask, share), mask.layout, within=mask)
        positions = (best.flat & ~mask.flat).nonzero().squeeze(1)
        return ClientUpdate(
            params, mask, each={"gradient": gradient[positions], "positions": positions.int()}
        )

    def prune(
        self, state: ServerState[FedMefMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[FedMefMemory]:
        """After an adjustment round, exchange each layer's smallest weights; new ones start from zero."""
        share = state.memory.share(state.round)
        if share is None or not cohort.folded:
            return state
        kept = self.largest(state.params, state.mask, share)
        gradient = torch.zeros(ctx.layout.size)
        for record in cohort.folded:
            sent = cohort.each[record.client]
            gradient.index_add_(0, sent["positions"], sent["gradient"], alpha=record.num_examples)
        scores = gradient.abs()
        scores[state.mask.flat] = -1.0  # a removed weight must not return where no gradient was sent
        mask = grow_per_layer(scores, self.exchanged(state.mask, share), ctx.layout, within=kept)
        memory = replace(state.memory, done=state.round)
        return replace(state, params=state.params.masked(kept), mask=mask, memory=memory)

    def exchanged(self, mask: Mask, share: float) -> dict[str, int]:
        """Return the number of weights that each layer exchanges: min(⌊share·|M_l|⌋, pruned weights)."""
        held = {name: int(mask[name].count_nonzero()) for name in mask.layout.prunable_names}
        return {name: min(floor_of(share, n), mask[name].numel() - n) for name, n in held.items()}

    def largest(self, params: Params, mask: Mask, share: float) -> Mask:
        """Return the mask without each layer's a_l smallest weights."""
        going = self.exchanged(mask, share)
        left = {n: (int(mask[n].count_nonzero()) - k) / mask[n].numel() for n, k in going.items()}
        return top_k_per_layer(magnitude(params), left, mask.layout, within=mask)


class Extrusion:
    """One local training that squeezes θ_low, the weights to be removed, towards zero.

    Args:
        method: with the options.
        client: of the training.
        params: start of the training.
        low: mask of the weights to be removed.
    """

    def __init__(self, method: FedMef, client: Client, params: Params, low: Mask) -> None:
        self.method, self.round_lr = method, client.lr
        self.steps = method.local_steps(client.num_examples)
        self.low = {n: low[n].flatten().nonzero().squeeze(1) for n in low.layout.prunable_names}
        self.weights: Mapping[str, Tensor] = params

    def theta(self) -> Tensor:
        """Return θ_low now."""
        return torch.cat([self.weights[name].flatten()[where] for name, where in self.low.items()])

    def loss(self, step: Step) -> Tensor:
        """Return L + λ‖θ_low‖²."""
        self.weights = step.weights  # changed in place by every step
        return cross_entropy(step.logits, step.y) + self.method.extrusion * self.theta().square().sum()

    @torch.no_grad()
    def lr(self, step: int) -> float:
        """Return η_b = min(ξ, max(η, ψ η0 (2B − 2b)/(2B − b) (2σ(‖θ_low‖₁) − 1))) in step b of B."""
        method, steps = self.method, self.steps
        most = 10 * method.lr if method.max_lr is None else method.max_lr
        left = (2 * steps - 2 * step) / (2 * steps - step)
        squeezed = tanh(float(self.theta().abs().sum()) / 2)  # 2σ(x) − 1
        return min(most, max(self.round_lr, method.boost * method.lr * left * squeezed))
