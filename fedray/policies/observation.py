"""What a decision at a stage looks at: numbers of one stage, what came before, and an observation of both.

Everything is dimensionless and knows no model: shares, ratios, and how much the validation loss would rise if
the model were pruned now (probes). So one agent serves models and data that it never saw. The preference λ,
how many points of accuracy a share of the traffic is worth, is one of the features: one agent gives a whole
front.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isinf, isnan, log, log10, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from fedray.comparing import as_loss
from fedray.types import Mask, Params

VERSION = 2
"""Of the observation and of what actions do; a policy that was trained on another one cannot be used."""

PROBES = (0.75, 0.5, 0.3, 0.1)
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
    "probe 0.1",
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
        tried: each action so far and the reward that it brought; one that was asked for and refused, too.
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
    accuracy, accuracy_before = (0.0 if isnan(seen.accuracy) else seen.accuracy for seen in (now, before))
    features = (
        now.progress,
        now.stages_left,
        now.spent_bytes,
        now.bytes_now,
        now.density,
        1 + log10(max(now.density, 1e-3)) / 3,
        accuracy,
        as_loss(now.loss) / 2,
        5 * (accuracy - accuracy_before),
        _fallen(as_loss(before.loss), as_loss(now.loss)),
        5 * (journey.best - accuracy),
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


def _fallen(before: float, now: float) -> float:
    if isinf(now):
        return 0.0 if isinf(before) else -1.0
    return 1 - now / before if before > 0 else 0.0


def _gap(loss: float, train_loss: float) -> float:
    both = loss + train_loss
    if isinf(as_loss(loss)) and isfinite(train_loss):
        return 1.0
    return (loss - train_loss) / both if isfinite(both) and both > 0 else 0.0
