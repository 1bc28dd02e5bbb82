"""The stage process: at each stage of a run, a policy chooses how much of the model to prune or restore.

    situation → observation → policy → action, as far as it is safe → mask

A run and the environment that trains an agent call these very functions.

Source: the decision process is ours (FRLP's own reduces to a line search, see `rate_search.py`); actions that
    multiply the density follow AMC (He et al., ECCV 2018) and FedMP (Jiang et al., ICDE 2022).
"""

from collections.abc import Callable, Sequence
from math import exp

import numpy as np

from fedray.comparing import as_gain, no_worse
from fedray.policies.situation import Situation
from fedray.pruning.masks import grow, top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params

FACTORS = (1.0, 0.9, 0.75, 0.5, 0.3, 1.25)
"""The actions: factors of the density. Their order is the order of a policy's outputs; 1 holds."""

ACTIONS = tuple("hold" if factor == 1 else f"×{factor:g}" for factor in FACTORS)
"""Names of the actions, by index."""

HOLD = FACTORS.index(1.0)
MILDEST = max(factor for factor in FACTORS if factor < 1)
"""Factor of the action that prunes least."""

PREFERENCES = (0.01, 1.0)
"""Range of λ that an agent is trained for."""


def prunes(action: int) -> bool:
    """Whether an action lowers the density."""
    return FACTORS[action] < 1


def grows(action: int) -> bool:
    """Whether an action raises the density."""
    return FACTORS[action] > 1


def allowed(steepest: float) -> tuple[int, ...]:
    """Return the actions that keep at least `steepest` of the weights held; no other is carried out."""
    return tuple(action for action, factor in enumerate(FACTORS) if factor >= steepest)


def possible(density: float, min_density: float, steepest: float) -> tuple[int, ...]:
    """Return HOLD and the allowed actions that can change a mask of this density.

    No action prunes at or below `min_density`, and none grows a mask that holds every weight.
    """
    can_prune, can_grow = density > min_density, density < 1
    return tuple(
        a for a in allowed(steepest) if a == HOLD or (prunes(a) and can_prune) or (grows(a) and can_grow)
    )


def milder(action: int, steepest: float) -> list[int]:
    """Return the actions that prune at most as much as `action` and keep at least `steepest`; hardest first.

    Args:
        action: one that prunes.
        steepest: smallest factor of the density, in [0, 1].
    """
    least = max(FACTORS[action], steepest)
    found = [other for other in range(len(FACTORS)) if prunes(other) and FACTORS[other] >= least]
    return sorted(found, key=lambda other: FACTORS[other])


def reward(before: Situation, now: Situation, preference: float, flops_weight: float = 0.25) -> float:
    """Return the reward of the action between two stages: accuracy gained, less λ times traffic and FLOPs.

    Over a run the rewards add up to final accuracy − λ · (bytes + flops_weight · FLOPs), both as shares of
    the dense model's, up to a constant. Validation accuracy; never test data.
    """
    bytes_since = now.spent_bytes - before.spent_bytes
    flops_since = now.spent_flops - before.spent_flops
    return now.accuracy - before.accuracy - preference * (bytes_since + flops_weight * flops_since)


def dual(preference: float, now: Situation, budget: float, step: float = 1.0) -> float:
    """Return λ for a decision under a budget: higher, the more a run that only holds would overspend.

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


def target_mask(action: int, params: Params, mask: Mask, min_density: float, min_layer: int = 0) -> Mask:
    """Return the mask that an action asks for, by global magnitude.

    Args:
        action: index into ACTIONS.
        params: the weights, with their values behind the mask; growth takes the largest of those.
        mask: the weights held.
        min_density: no action prunes below it, and none prunes a mask that is below it.
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
    """Return an action that is safe, and its mask: the one asked for, or the next milder safe one.

    An action is safe if it keeps at least `steepest` of the weights held and the validation loss stays within
    `rollback` times the loss without it. HOLD and growth always are. An action that leaves the mask as it is
    counts as HOLD.

    Args:
        action: asked for by the policy.
        params: as in `target_mask`.
        mask: as in `target_mask`.
        loss: validation loss of the model under a mask.
        min_density: as in `target_mask`.
        rollback: ≥ 1.
        steepest: smallest factor of the density, in [0, 1].
        min_layer: as in `target_mask`.
    """
    if not prunes(action):
        new = target_mask(action, params, mask, min_density)
        return (action, new) if new.count != mask.count else (HOLD, mask)
    bound = rollback * loss(mask)
    for candidate in milder(action, steepest):
        new = target_mask(candidate, params, mask, min_density, min_layer)
        if new.count == mask.count:
            break
        if no_worse(loss(new), bound):
            return candidate, new
    return HOLD, mask


def regrown(params: Params, before: Mask, after: Mask) -> Params:
    """Return the weights with newly unmasked entries set to zero.

    A value from behind the mask belongs to an earlier model; a zero leaves the model's output as it is.
    """
    back = after.flat & ~before.flat
    if not bool(back.any()):
        return params
    flat = params.flat.clone()
    flat[back] = 0.0
    return Params(flat, params.layout)


def bandit(
    tried: Sequence[tuple[int, float]],
    possible: Sequence[int] = tuple(range(len(ACTIONS))),
    explore: float = 0.05,
) -> int:
    """Return the action with the highest upper confidence bound (UCB1); each is tried once first.

    The control of a trained agent: it sees nothing of the situation and learns within the run alone. As in
    sleeping bandits, it chooses among the actions that are possible now.

    Args:
        tried: actions and their rewards, in order.
        possible: actions that are possible now, at least one.
        explore: scale of the bonus, in points of reward.

    Source: Auer et al., "Finite-time analysis of the multiarmed bandit problem", 2002; Kleinberg et al.,
        "Regret bounds for sleeping experts and bandits", 2010; as FedMP uses bandits.
    """
    counts, sums = np.zeros(len(ACTIONS)), np.zeros(len(ACTIONS))
    for action, gained in tried:
        counts[action] += 1
        sums[action] += as_gain(gained)
    choices = np.array(possible)
    counts, sums = counts[choices], sums[choices]
    if not counts.all():
        return int(choices[np.argmin(counts)])
    bonus = explore * np.sqrt(2 * np.log(len(tried)) / counts)
    return int(choices[np.argmax(sums / counts + bonus)])
