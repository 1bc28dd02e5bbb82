"""The stage process: at every stage of a federated run somebody decides how much of the model goes.

    situation → observation (see `observation.py`) → who decides → action, as far as it is safe → mask

The environment that trains an agent and the server of a run step these very functions.

Source: the decision process is ours (FRLP's own reduces to a line search, see `policies.py`); actions that
    multiply the density follow AMC (He et al., ECCV 2018) and FedMP (Jiang et al., ICDE 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp

import numpy as np

from fedray.comparing import as_gain, no_worse
from fedray.policies.observation import FEATURES, PREFERENCES, VERSION, Journey, Situation
from fedray.policies.trained import PolicyInterface
from fedray.pruning.masks import grow, top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params

PROCESS = "stages"
"""Name of the process among trained policies."""

FACTORS = (1.0, 0.9, 0.75, 0.5, 0.3, 1.25)
"""The actions: factors of the density. Their order is the order of a policy's outputs; 1 holds."""

ACTIONS = tuple("hold" if factor == 1 else f"×{factor:g}" for factor in FACTORS)
"""Names of the actions, by index."""

HOLD = FACTORS.index(1.0)
MILDEST = max(factor for factor in FACTORS if factor < 1)
"""Factor of the action that prunes least."""

INTERFACE = PolicyInterface(PROCESS, VERSION, len(FEATURES), ACTIONS)


def prunes(action: int) -> bool:
    """Whether an action lowers the density."""
    return FACTORS[action] < 1


def grows(action: int) -> bool:
    """Whether an action raises the density."""
    return FACTORS[action] > 1


def milder(action: int, steepest: float) -> list[int]:
    """Return the actions that prune at most as much as `action` and keep at least `steepest`; hardest first.

    Args:
        action: one that prunes.
        steepest: smallest factor of the density, in [0, 1].
    """
    least = max(FACTORS[action], steepest)
    found = [other for other in range(len(FACTORS)) if prunes(other) and FACTORS[other] >= least]
    return sorted(found, key=lambda other: FACTORS[other])


def allowed(steepest: float) -> tuple[int, ...]:
    """Return the actions that keep at least `steepest` of the weights held; no other is carried out."""
    return tuple(a for a, factor in enumerate(FACTORS) if factor >= min(steepest, 1.0))


def possible(density: float, min_density: float, steepest: float) -> tuple[int, ...]:
    """Return HOLD and the allowed actions that can change a mask of this density.

    No action prunes at or below `min_density`, and none grows a mask that holds every weight.
    """
    can_prune, can_grow = density > min_density, density < 1
    return tuple(
        a for a in allowed(steepest) if a == HOLD or (prunes(a) and can_prune) or (grows(a) and can_grow)
    )


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


def wanted(action: int, params: Params, mask: Mask, min_density: float, min_layer: int = 0) -> Mask:
    """Return the mask that an action asks for, by global magnitude.

    Args:
        action: index into ACTIONS.
        params: the weights; what is regrown is the largest of what stands behind the mask.
        mask: what is held.
        min_density: not less is kept, nor is anything removed below it.
        min_layer: entries that each layer keeps at least.
    """
    scores, layout = magnitude(params), mask.layout
    if grows(action):
        held = round(mask.density * layout.prunable_count)
        return grow(scores, max(1, round((FACTORS[action] - 1) * held)), layout, within=mask)
    target = max(mask.density * FACTORS[action], min(min_density, mask.density))
    if target >= mask.density:
        return mask
    return top_k(scores, target, layout, within=mask, min_layer=min_layer)


def safe(
    action: int,
    params: Params,
    mask: Mask,
    loss: Callable[[Mask], float],
    *,
    min_density: float,
    rollback: float,
    steepest: float = 0.0,
    min_layer: int = 0,
) -> tuple[int, Mask]:
    """Return the action that is carried out, and its mask: the one asked for, or the next milder safe one.

    Safe is what keeps at least `steepest` of what is held and leaves the validation loss within `rollback`
    times the loss without pruning; holding and regrowing always are. An action that leaves the mask as it is,
    for want of anything to prune or to bring back, is holding.

    Args:
        action: what was asked for.
        params: as in `wanted`.
        mask: as in `wanted`.
        loss: validation loss of the model under a mask.
        min_density: as in `wanted`.
        rollback: ≥ 1.
        steepest: smallest factor of the density at once, in [0, 1].
        min_layer: as in `wanted`.
    """
    if not prunes(action):
        moved = wanted(action, params, mask, min_density)
        return (action, moved) if moved.count != mask.count else (HOLD, mask)
    bound = rollback * loss(mask)
    for candidate in milder(action, steepest):
        moved = wanted(candidate, params, mask, min_density, min_layer)
        if moved.count == mask.count:
            break
        if no_worse(loss(moved), bound):
            return candidate, moved
    return HOLD, mask


def regrown(params: Params, before: Mask, after: Mask) -> Params:
    """Return the weights after a mask has moved, with zeros in what comes back.

    A value from behind the mask belongs to an earlier model; a zero leaves what the model computes as it is.
    """
    back = after.flat & ~before.flat
    if not bool(back.any()):
        return params
    flat = params.flat.clone()
    flat[back] = 0.0
    return Params(flat, params.layout)


def bandit(
    tried: Sequence[tuple[int, float]],
    open_to: Sequence[int] = tuple(range(len(ACTIONS))),
    explore: float = 0.05,
) -> int:
    """Return the action with the highest upper confidence bound (UCB1); each is tried once first.

    The partner of a trained agent: it knows nothing of the situation and learns within the run alone. It
    chooses among the actions that are possible now, as in sleeping bandits, and learns what `told` notes: the
    reward of what was carried out, and the same for what was asked for and refused.

    Args:
        tried: actions and what they brought, in order.
        open_to: the actions that are possible now, at least one.
        explore: scale of the bonus, in points of reward.

    Source: Auer et al., "Finite-time analysis of the multiarmed bandit problem", 2002; Kleinberg et al.,
        "Regret bounds for sleeping experts and bandits", 2010; as FedMP uses bandits.
    """
    counts, sums = np.zeros(len(ACTIONS)), np.zeros(len(ACTIONS))
    for action, brought in tried:
        counts[action] += 1
        sums[action] += as_gain(brought)
    choices = np.array(open_to)
    counts, sums = counts[choices], sums[choices]
    if not counts.all():
        return int(choices[np.argmin(counts)])
    bonus = explore * np.sqrt(2 * np.log(len(tried)) / counts)
    return int(choices[np.argmax(sums / counts + bonus)])


def told(journey: Journey, now: Situation, preference: float) -> Journey:
    """Return the journey with what the last decision brought, as the situation now shows it.

    It is credited to the action that was carried out. If that was milder than what had been asked for, asking
    for that came to the same, and is noted too: else a bandit would ask for ever for what is never done.

    Source: Mannor and Shamir, "From bandits to experts: on the value of side-observations", NeurIPS 2011, for
        one reward that tells of two actions.
    """
    if journey.before is None:
        return journey
    brought = reward(journey.before, now, preference)
    credited = dict.fromkeys((journey.action, journey.chosen), brought)
    return replace(journey, tried=(*journey.tried, *credited.items()))


def after(journey: Journey, round: int, now: Situation, chosen: int, action: int, factor: float) -> Journey:
    """Return the journey after a decision in a round, with what the one before it brought."""
    return replace(
        journey,
        decided=round,
        before=now,
        best=max(journey.best, as_gain(now.accuracy)),
        chosen=chosen,
        action=action,
        factor=factor,
        sent=None,
    )
