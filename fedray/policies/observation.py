"""The observation of a stage policy: the situation and the history as numbers in [−1, 1].

Every feature is dimensionless and independent of the model: shares, ratios, and the rise of the validation
loss if the model were pruned now (probes). So one agent serves models and data that it never saw. The
preference λ, the points of accuracy that a share of the traffic is worth, is a feature: one agent gives a
whole front.
"""

from math import isfinite, isinf, isnan, log, log10

import numpy as np
from numpy.typing import NDArray

from fedray.comparing import as_loss
from fedray.policies.history import History
from fedray.policies.situation import PROBES, Situation
from fedray.policies.stages import ACTIONS
from fedray.policies.trained import PolicyInterface

PROCESS = "stages"
"""Name of the process among trained policies."""

VERSION = 2
"""Raise it when an observation or an action changes its meaning: older policies are then refused."""

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
    *(f"probe {share:g}" for share in PROBES),
    "spread of losses",
    "participation",
    "on the wire",
    "sparsest layer",
    "spread of layers",
    "smaller half",
    "preference",
)
"""Names of an observation's numbers, in order."""

INTERFACE = PolicyInterface(PROCESS, VERSION, len(FEATURES), ACTIONS)


def observe(now: Situation, history: History) -> NDArray[np.float32]:
    """Return the observation (len(FEATURES),) of a situation, every feature in [−1, 1]."""
    before = history.last.situation if history.last else now
    factor = history.last.factor if history.last else 1.0
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
        _fall(as_loss(before.loss), as_loss(now.loss)),
        5 * (history.best - accuracy),
        log10(max(factor, 0.1)),
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
        1 + log10(history.preference) / 2,
    )
    return np.clip(np.nan_to_num(np.array(features, dtype=np.float32), nan=1.0), -1.0, 1.0)


def _fall(before: float, now: float) -> float:
    """Return by which share of itself a loss has fallen."""
    if isinf(now):
        return 0.0 if isinf(before) else -1.0
    return 1 - now / before if before > 0 else 0.0


def _gap(loss: float, train_loss: float) -> float:
    """Return the difference of validation and training loss over their sum."""
    both = loss + train_loss
    if isinf(as_loss(loss)) and isfinite(train_loss):
        return 1.0
    return (loss - train_loss) / both if isfinite(both) and both > 0 else 0.0
