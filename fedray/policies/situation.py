"""What a decision at a stage looks at, gathered from a round: state, folded cohort, validation data."""

from dataclasses import replace
from math import isnan, log, nan, sqrt

from fedray.costs.devices import seconds
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.policies.observation import PROBES, Journey, Situation, layer_summary, ratio, spread
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params, ServerState

MOVED = "moved"
"""Metric by which a client says how far it moved: ‖w_k − w‖² / ‖w‖²."""


def distance(before: Params, after: Params, mask: Mask) -> float:
    """Return ‖after − before‖² / ‖before‖² over the entries held; 0 where there is nothing."""
    old = before.flat[mask.flat].double()
    square = float(old.square().sum())
    return float((after.flat[mask.flat].double() - old).square().sum()) / square if square > 0 else 0.0


def travelled(journey: Journey, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> Journey:
    """Add a round's traffic and FLOPs to a journey, as shares of what the dense model takes in all rounds.

    The dense model's are those of the same clients: 4 bytes for each weight both ways, and as many steps.
    """
    dense = ctx.flops.train(Mask.full(ctx.layout))
    return replace(
        journey,
        spent_bytes=journey.spent_bytes + bytes_share(cohort, ctx) / ctx.rounds,
        spent_flops=journey.spent_flops + ctx.flops.train(state.mask) / dense / ctx.rounds,
    )


def bytes_share(cohort: CohortUpdate, ctx: ServerContext) -> float:
    """Return the traffic of a round over that of the dense model with the same clients."""
    dense = 2 * 4 * ctx.layout.size * len(cohort.records)
    return (cohort.cost.bytes_up + cohort.cost.bytes_down) / dense if dense else 0.0


def look(
    state: ServerState, cohort: CohortUpdate, ctx: ServerContext, journey: Journey, stages_left: float
) -> Situation:
    """Return the situation after a round whose clients reported how far they moved.

    The model is evaluated on validation data once as it is, and once for each of PROBES.
    """
    params, mask = state.params, state.mask
    accuracy, loss = ctx.validate(params, mask)
    guess = log(ctx.model.num_classes)
    scores = magnitude(params)
    probed = [top_k(scores, mask.density * share, ctx.layout, within=mask) for share in PROBES]
    records = cohort.folded
    losses = [record.loss for record in records]
    known = [(record.loss, record.num_examples) for record in records if not isnan(record.loss)]
    trained = sum(x * n for x, n in known) / sum(n for _, n in known) if known else nan
    moved = distance(journey.sent, params, mask) if journey.sent is not None else 0.0
    apart = cohort.metrics.get(MOVED, 0.0)
    sparsest, layer_spread, smaller_half = layer_summary(params, mask)
    return Situation(
        progress=state.round / ctx.rounds,
        stages_left=stages_left,
        spent_bytes=journey.spent_bytes,
        spent_flops=journey.spent_flops,
        bytes_now=bytes_share(cohort, ctx),
        density=mask.density,
        accuracy=accuracy,
        loss=loss / guess,
        train_loss=trained / guess,
        probes=tuple(ratio(ctx.validate(params, probe)[1], loss) for probe in probed),
        moved=sqrt(moved),
        agreement=0.0 if isnan(apart) else min(1.0, ratio(moved, apart)),
        loss_spread=spread(losses),
        participation=len(records) / len(cohort.records) if cohort.records else 0.0,
        on_the_wire=_on_the_wire(cohort, ctx),
        sparsest_layer=sparsest,
        layer_spread=layer_spread,
        smaller_half=smaller_half,
    )


def _on_the_wire(cohort: CohortUpdate, ctx: ServerContext) -> float:
    """Return the mean share of the clients' seconds in which they do not compute."""
    shares = []
    for record in cohort.folded:
        idle = seconds(replace(record.cost, executed_flops=0.0), ctx.clients[record.client].profile)
        shares.append(idle / record.cost.seconds if record.cost.seconds > 0 else 0.0)
    return sum(shares) / len(shares) if shares else 0.0
