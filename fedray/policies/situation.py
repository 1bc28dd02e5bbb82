"""The situation of a stage: the measurements of a run that a policy gets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan, log, nan, sqrt

import numpy as np
import torch

from fedray.costs.clock import seconds
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params, ServerState

PROBES = (0.75, 0.5, 0.3, 0.1)
"""Shares of the weights held at which a situation gives the rise of the validation loss."""

MOVED = "moved"
"""Metric of a client: its squared relative movement ‖w_k − w‖² / ‖w‖²."""


@dataclass(frozen=True)
class Situation:
    """The measurements of one stage. Shares are in [0, 1], ratios ≥ 0.

    Args:
        progress: share of the run's rounds that are over.
        stages_left: share of the run's stages that follow.
        spent_bytes: traffic so far, as a share of the dense model's traffic in the whole run.
        spent_flops: the clients' training FLOPs so far, in the same unit.
        bytes_now: traffic of this round, as a share of the dense model's.
        density: of the mask.
        accuracy: on validation data.
        loss: on validation data, in units of ln(classes), the loss of a guess.
        train_loss: mean over the round's clients, in the same unit; NaN if no client trained.
        probes: validation loss at PROBES of the weights held, over the loss without pruning.
        moved: ‖Δw‖ / ‖w‖ of the mean model in the round.
        agreement: ‖mean Δ‖² / mean ‖Δ_k‖² over the cohort; 1 if all clients move alike.
        loss_spread: standard deviation over mean of the clients' training losses.
        participation: share of the asked clients whose update counts.
        on_the_wire: mean share of the clients' seconds that is transfer.
        sparsest_layer: smallest density of a prunable layer.
        layer_spread: standard deviation of the layers' densities.
        smaller_half: share of the squared norm in the smaller half of the weights held.
    """

    progress: float
    stages_left: float
    spent_bytes: float
    spent_flops: float
    bytes_now: float
    density: float
    accuracy: float
    loss: float
    train_loss: float
    probes: tuple[float, ...]
    moved: float
    agreement: float
    loss_spread: float
    participation: float
    on_the_wire: float
    sparsest_layer: float
    layer_spread: float
    smaller_half: float


@dataclass(frozen=True)
class Spent:
    """Traffic and training FLOPs of a run so far, as shares of the dense model's in all rounds.

    The dense model's are those of the same clients: 4 bytes per weight each way, and as many
    steps.
    """

    bytes: float = 0.0
    flops: float = 0.0

    def plus(self, state: ServerState[object], cohort: CohortUpdate, ctx: ServerContext) -> "Spent":
        """Add a round."""
        dense = ctx.flops.train(Mask.full(ctx.layout))
        return Spent(
            self.bytes + bytes_share(cohort, ctx) / ctx.rounds,
            self.flops + ctx.flops.train(state.mask) / dense / ctx.rounds,
        )


def look(
    state: ServerState[object],
    cohort: CohortUpdate,
    ctx: ServerContext,
    *,
    stages_left: float,
    spent: Spent,
    sent: Params | None,
) -> Situation:
    """Measure the situation after a round whose clients reported MOVED.

    The model is evaluated on validation data: once as it is, and once for each of PROBES.

    Args:
        state: after aggregation.
        cohort: of the round.
        ctx: of the round.
        stages_left: share of the run's stages that follow.
        spent: this round included.
        sent: the model that the clients were sent; None: its movement counts as 0.
    """
    params, mask = state.params, state.mask
    accuracy, loss = ctx.validate(params, mask)
    guess = log(ctx.model.num_classes)
    scores = magnitude(params)
    probed = [top_k(scores, mask.density * share, ctx.layout, within=mask) for share in PROBES]
    records = cohort.folded
    known = [(record.loss, record.num_examples) for record in records if not isnan(record.loss)]
    trained = sum(x * n for x, n in known) / sum(n for _, n in known) if known else nan
    moved = distance(sent, params, mask) if sent is not None else 0.0
    of_clients = cohort.metrics.get(MOVED, 0.0)
    sparsest, layer_spread, smaller_half = layer_summary(params, mask)
    return Situation(
        progress=state.round / ctx.rounds,
        stages_left=stages_left,
        spent_bytes=spent.bytes,
        spent_flops=spent.flops,
        bytes_now=bytes_share(cohort, ctx),
        density=mask.density,
        accuracy=accuracy,
        loss=loss / guess,
        train_loss=trained / guess,
        probes=tuple(ratio(ctx.validate(params, probe)[1], loss) for probe in probed),
        moved=sqrt(moved),
        agreement=0.0 if isnan(of_clients) else min(1.0, ratio(moved, of_clients)),
        loss_spread=spread([record.loss for record in records]),
        participation=len(records) / len(cohort.records) if cohort.records else 0.0,
        on_the_wire=_on_the_wire(cohort, ctx),
        sparsest_layer=sparsest,
        layer_spread=layer_spread,
        smaller_half=smaller_half,
    )


def distance(before: Params, after: Params, mask: Mask) -> float:
    """Return ‖after − before‖² / ‖before‖² over the weights held; 0 if they are all zero."""
    old = before.flat[mask.flat].double()
    square = float(old.square().sum())
    return float((after.flat[mask.flat].double() - old).square().sum()) / square if square > 0 else 0.0


def bytes_share(cohort: CohortUpdate, ctx: ServerContext) -> float:
    """Return a round's traffic over that of the dense model with the same clients."""
    dense = 2 * 4 * ctx.layout.size * len(cohort.records)
    return (cohort.cost.bytes_up + cohort.cost.bytes_down) / dense if dense else 0.0


def layer_summary(params: Params, mask: Mask) -> tuple[float, float, float]:
    """Return smallest layer density, standard deviation of layer densities, and the smaller half's share.

    The smaller half's share is the part of the squared norm of the prunable weights held that lies in the
    smaller half of them, in [0, 0.5].
    """
    layout = mask.layout
    densities = [float(mask.flat[layout.spans[name]].float().mean()) for name in layout.prunable_names]
    squares = params.flat[mask.flat & layout.prunable_flat].double().square()
    if len(squares) < 2 or not densities:
        return min(densities, default=1.0), 0.0, 0.5
    half = torch.topk(squares, len(squares) // 2, largest=False, sorted=False).values.sum()
    total = float(squares.sum())
    return min(densities), float(np.std(densities)), float(half) / total if total > 0 else 0.5


def spread(values: Sequence[float]) -> float:
    """Return standard deviation over mean of the finite values; 0 if there are none, or their mean is ≤ 0."""
    known = [value for value in values if isfinite(value)]
    mean = sum(known) / len(known) if known else 0.0
    if mean <= 0:
        return 0.0
    return sqrt(sum((value - mean) ** 2 for value in known) / len(known)) / mean


def ratio(above: float, below: float) -> float:
    """Return a quotient: infinite over zero, and 1 if both are zero."""
    if below > 0:
        return above / below
    return 1.0 if above <= 0 else inf


def _on_the_wire(cohort: CohortUpdate, ctx: ServerContext) -> float:
    """Return the mean share of the clients' seconds in which bytes travel.

    Without the overheads of steps and exchanges, which no pruning shortens, and which the trained policies
    have not seen.
    """
    shares = []
    for record in cohort.folded:
        device = ctx.clients[record.client].profile
        link = seconds(replace(record.cost, steps=0, executed_flops=0.0), device) - device.round_s
        total = link + record.cost.executed_flops / device.flops_per_s
        shares.append(link / total if total > 0 else 0.0)
    return sum(shares) / len(shares) if shares else 0.0
