"""The stage process: at every stage of a federated run somebody decides how much of the model goes.

    Situation (numbers of one stage) → observe → observation → who decides → action → moved → mask

What a decision looks at is dimensionless and knows no model: shares, ratios, and how much the validation loss
would rise if the model were pruned now (probes). So one agent serves models and data that it never saw. The
preference λ, how many points of accuracy a share of the traffic is worth, is one of the features: one agent
gives a whole front. The environment that trains an agent and the server of a run step these very functions.

Source: the decision process is ours (FRLP's own reduces to a line search, see `policies.py`); actions that
    multiply the density follow AMC (He et al., ECCV 2018) and FedMP (Jiang et al., ICDE 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log, log10, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from fedray.pruning.masks import grow, top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params

VERSION = 1
"""Of the observation; a policy that was trained on another one cannot be used."""

FACTORS = (1.0, 0.9, 0.75, 0.5, 0.3)
"""What the first actions multiply the density with, the milder one first."""

REGROWN = 0.05
"""Share of the prunable weights that the last action brings back."""

ACTIONS = ("hold", "×0.9", "×0.75", "×0.5", "×0.3", "regrow")
REGROW = len(FACTORS)

PROBES = (0.75, 0.5, 0.3)
"""Shares of the held weights at which a situation tells how much the loss would rise."""

FEATURES = (
    "progress",
    "stages left",
    "bytes spent",
    "bytes now",
    "density",
    "log density",
    "accuracy",
    "loss",
    "accuracy gained",
    "loss fallen",
    "behind the best",
    "last factor",
    "moved",
    "agreement",
    "train loss gap",
    "probe 0.75",
    "probe 0.5",
    "probe 0.3",
    "spread of losses",
    "participation",
    "on the wire",
    "sparsest layer",
    "spread of layers",
    "smaller half",
    "preference",
)
"""What an observation holds, in its order."""

PREFERENCES = (0.01, 1.0)
"""Range of λ that an agent is trained for."""


@dataclass(frozen=True)
class Situation:
    """What a stage looks at. Shares are in [0, 1], ratios ≥ 0.

    Args:
        progress: rounds made, as a share of the run's.
        stages_left: stages that follow, as a share of all.
        spent_bytes: traffic so far, as a share of what the dense model takes in the whole run.
        spent_flops: the same for the clients' FLOPs.
        bytes_now: traffic of the last round, as a share of the dense model's.
        density: of the mask.
        accuracy: on validation data.
        loss: on validation data, in units of ln(classes), the loss of a guess.
        train_loss: mean over the round's clients, in the same unit; NaN where nobody trained.
        probes: validation loss at PROBES of the held weights, over the loss without pruning.
        moved: ‖Δw‖ / ‖w‖ of the mean model in the round.
        agreement: ‖mean Δ‖² / mean ‖Δ_k‖² over the cohort; 1 where all clients move alike.
        loss_spread: standard deviation over mean of the clients' training losses.
        participation: share of the asked clients whose update counts.
        on_the_wire: share of the clients' seconds that is transfer.
        sparsest_layer: smallest density of a prunable layer.
        layer_spread: standard deviation of the layers' densities.
        smaller_half: share of the squared norm in the smaller half of the held weights.
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
class Journey:
    """What the decisions of a run remember from stage to stage.

    Args:
        decided: the round of the last decision; 0 before the first.
        spent_bytes: as in Situation, up to the last round.
        spent_flops: as in Situation.
        before: the situation of the last stage.
        best: highest validation accuracy of a stage so far.
        action: what was done at the last stage, after safety.
        chosen: what was asked for there.
        factor: density after over density before, there.
        preference: λ of the last decision; 0 before the first.
        tried: each action so far and the reward that it brought.
        sent: the model that this round's clients were sent, until the round is aggregated.
    """

    decided: int = 0
    spent_bytes: float = 0.0
    spent_flops: float = 0.0
    before: Situation | None = None
    best: float = 0.0
    action: int = 0
    chosen: int = 0
    factor: float = 1.0
    preference: float = 0.0
    tried: tuple[tuple[int, float], ...] = ()
    sent: Params | None = None


def observe(now: Situation, journey: Journey, preference: float) -> NDArray[np.float32]:
    """Return the observation (len(FEATURES),) of a situation, every feature in [−1, 1].

    Args:
        now: the situation.
        journey: what came before.
        preference: λ > 0.
    """
    before = journey.before or now
    features = (
        now.progress,
        now.stages_left,
        now.spent_bytes,
        now.bytes_now,
        now.density,
        1 + log10(max(now.density, 1e-3)) / 3,
        now.accuracy,
        now.loss / 2,
        5 * (now.accuracy - before.accuracy),
        1 - now.loss / before.loss if before.loss > 0 else 0.0,
        5 * (journey.best - now.accuracy),
        log10(max(journey.factor, 0.1)),
        1 + log10(max(now.moved, 1e-4)) / 4,
        now.agreement,
        _gap(now.loss, now.train_loss),
        *(log(max(probe, 1e-3)) / 2 if isfinite(probe) else 1.0 for probe in now.probes),
        now.loss_spread,
        now.participation,
        now.on_the_wire,
        now.sparsest_layer,
        2 * now.layer_spread,
        2 * now.smaller_half,
        1 + log10(preference) / 2,
    )
    return np.clip(np.nan_to_num(np.array(features, dtype=np.float32), nan=1.0), -1.0, 1.0)


def reward(before: Situation, now: Situation, preference: float, flops_weight: float = 0.25) -> float:
    """Return what a decision brought: accuracy gained, less λ times the traffic and the FLOPs since.

    Over a run the rewards add up to final accuracy − λ · (bytes + flops_weight · FLOPs), both as shares of
    the dense model's, up to a constant. Validation accuracy; never test data.
    """
    bytes_since = now.spent_bytes - before.spent_bytes
    flops_since = now.spent_flops - before.spent_flops
    return now.accuracy - before.accuracy - preference * (bytes_since + flops_weight * flops_since)


def dual(preference: float, now: Situation, budget: float, step: float = 1.0) -> float:
    """Return λ for a decision under a budget: higher the more a run that held on from here would overspend.

        λ ← λ · exp(step · (projected / budget − 1)), kept within PREFERENCES

    Args:
        preference: λ of the decision before.
        now: the situation.
        budget: traffic of the whole run, as a share of the dense model's, > 0.
        step: > 0.

    Source: ascent on the dual variable of a constraint, as in constrained Markov decision processes (Altman,
        1999); on the logarithm, so that λ stays positive.
    """
    projected = now.spent_bytes + now.bytes_now * (1 - now.progress)
    low, high = PREFERENCES
    return min(high, max(low, preference * exp(step * min(2.0, projected / budget - 1))))


def wanted(action: int, params: Params, mask: Mask, min_density: float) -> Mask:
    """Return the mask that an action asks for, by global magnitude.

    Args:
        action: index into ACTIONS.
        params: the weights; what is regrown is the largest of what stands behind the mask.
        mask: what is held.
        min_density: not less is kept, nor is anything removed below it.
    """
    scores, layout = magnitude(params), mask.layout
    if action == REGROW:
        return grow(scores, round(REGROWN * layout.prunable_count), layout, within=mask)
    target = max(mask.density * FACTORS[action], min(min_density, mask.density))
    return mask if target >= mask.density else top_k(scores, target, layout, within=mask)


def safe(
    action: int,
    params: Params,
    mask: Mask,
    loss: Callable[[Mask], float],
    *,
    min_density: float,
    rollback: float,
) -> tuple[int, Mask]:
    """Return the action that is carried out, and its mask: the one asked for, or the next milder safe one.

    Safe is what leaves the validation loss within `rollback` times the loss without pruning; holding and
    regrowing always are.

    Args:
        action: what was asked for.
        params: as in `wanted`.
        mask: as in `wanted`.
        loss: validation loss of the model under a mask.
        min_density: as in `wanted`.
        rollback: ≥ 1.
    """
    if action in (0, REGROW):
        return action, wanted(action, params, mask, min_density)
    bound = rollback * loss(mask)
    for milder in range(action, 0, -1):
        moved = wanted(milder, params, mask, min_density)
        risen = loss(moved) if moved is not mask else 0.0
        if risen <= bound:  # false for NaN too
            return milder, moved
    return 0, mask


def bandit(tried: Sequence[tuple[int, float]], explore: float = 0.05) -> int:
    """Return the action with the highest upper confidence bound (UCB1); each is tried once first.

    The partner of a trained agent: it knows nothing of the situation and learns within the run alone.

    Args:
        tried: actions and what they brought, in order.
        explore: scale of the bonus, in points of reward.

    Source: Auer et al., "Finite-time analysis of the multiarmed bandit problem", 2002; as FedMP uses bandits.
    """
    counts, sums = np.zeros(len(ACTIONS)), np.zeros(len(ACTIONS))
    for action, brought in tried:
        counts[action] += 1
        sums[action] += brought
    if not counts.all():
        return int(np.argmin(counts))
    bonus = explore * np.sqrt(2 * np.log(len(tried)) / counts)
    return int(np.argmax(sums / counts + bonus))


def told(journey: Journey, now: Situation, preference: float) -> Journey:
    """Return the journey with what the last decision brought, as the situation now shows it."""
    if journey.before is None:
        return journey
    brought = (journey.action, reward(journey.before, now, preference))
    return replace(journey, tried=(*journey.tried, brought))


def after(journey: Journey, round: int, now: Situation, chosen: int, action: int, factor: float) -> Journey:
    """Return the journey after a decision in a round, with what the one before it brought."""
    return replace(
        journey,
        decided=round,
        before=now,
        best=max(journey.best, now.accuracy),
        chosen=chosen,
        action=action,
        factor=factor,
        sent=None,
    )


def layer_summary(params: Params, mask: Mask) -> tuple[float, float, float]:
    """Return smallest layer density, standard deviation of layer densities, and the smaller half's share.

    The last is the share of the squared norm of the held prunable weights that the smaller half of them has,
    in [0, 0.5].
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
    """Return standard deviation over mean; 0 where there is nothing to compare."""
    known = [value for value in values if isfinite(value)]
    mean = sum(known) / len(known) if known else 0.0
    if mean <= 0:
        return 0.0
    return sqrt(sum((value - mean) ** 2 for value in known) / len(known)) / mean


def ratio(above: float, below: float) -> float:
    """Return a quotient that may be infinite, and is 1 where both are zero."""
    if below > 0:
        return above / below
    return 1.0 if above <= 0 else inf


def _gap(loss: float, train_loss: float) -> float:
    both = loss + train_loss
    return (loss - train_loss) / both if isfinite(both) and both > 0 else 0.0
