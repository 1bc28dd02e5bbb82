"""Masks that buy the most importance for their time: drop what is small, admit what pays for itself.

With the importance Δ(M) = Σ_{j∈M} g_j² and the time of a round T(M) = c + Σ_{j∈M} t_j, the mask that
maximises

    Γ(M) = Δ(M) / T(M)

over all supersets of what is kept takes candidates in the order of g_j²/t_j, as long as that exceeds the Γ
reached so far: each of them raises Γ, and every later one would lower it.

Source: Jiang et al. (PruneFL), TNNLS 2022.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fedray.errors import MethodError
from fedray.pruning.masks import top_k, top_k_per_layer
from fedray.pruning.scores import magnitude
from fedray.shares import floor_of
from fedray.types import Mask, Params


class Times(Protocol):
    """T, as `fedray.costs.layer_times` has it."""

    @property
    def constant_s(self) -> float:
        """Seconds that pass whatever is held, > 0."""

    @property
    def per_weight_s(self) -> Mapping[str, float]:
        """Name of a tensor → seconds that each held entry adds; what is not named adds nothing."""


def rebuild(
    params: Params,
    mask: Mask,
    importance: Tensor,
    times: Times,
    drop: float,
    max_density: float | None = None,
    min_layer: int = 0,
) -> Mask:
    """Return PruneFL's next mask: without the smallest weights, and with whatever pays for its time.

    Args:
        params: the weights.
        mask: what is held now.
        importance: (size,) ≥ 0, of each weight, held or not.
        times: of a round.
        drop: share of each layer's held weights that is dropped before the search, in [0, 1].
        max_density: the mask never holds more, whatever pays. Where more than that would be left after the
            drop, each layer drops a larger share, the same in all of them, so that what is left just fits.
        min_layer: weights that each layer keeps at least, of those that it holds.
    """
    cap = 1.0 if max_density is None else max_density
    kept = drop_smallest(params, drop, within=mask, min_layer=min_layer)
    if round(kept.density * mask.layout.prunable_count) > round(cap * mask.layout.prunable_count):
        larger = max(drop, 1 - cap / mask.density)
        kept = drop_smallest(params, larger, within=mask, min_layer=min_layer)
        # shares are rounded down, so a few weights may be left over
        kept = top_k(magnitude(params), cap, mask.layout, within=kept, min_layer=min_layer)
    return maximise_ratio(importance, kept, times, max_density=cap)


def drop_smallest(params: Params, share: float, *, within: Mask, min_layer: int = 0) -> Mask:
    """Return the mask without the weights of smallest magnitude, the same share of each layer's held ones.

    Args:
        params: the weights; only those under the mask are looked at.
        share: in [0, 1]; of n held weights of a layer, ⌊share · n⌋ go.
        within: what is held before.
        min_layer: a layer keeps so many, or as many as it holds.
    """
    kept = {}
    for name in within.layout.prunable_names:
        held = int(within[name].count_nonzero())
        left = max(held - floor_of(share, held), min(min_layer, held))
        kept[name] = left / within[name].numel()
    return top_k_per_layer(magnitude(params), kept, within.layout, within=within)


def maximise_ratio(
    importance: Tensor,
    kept: Mask,
    times: Times,
    *,
    max_density: float = 1.0,
) -> Mask:
    """Return the superset of a mask with the highest ratio Γ of importance to time.

    Ties go to the lower index, and a candidate that would leave Γ as it is is not admitted.

    Args:
        importance: (size,) ≥ 0, e.g. squared gradients; any positive factor of it gives the same mask.
        kept: what is held in any case; all prunable entries that it does not hold are candidates.
        times: T; every prunable tensor must take time.
        max_density: nothing is admitted beyond this share of the prunable entries.

    Raises:
        MethodError: if an importance is not finite, or a prunable tensor has no time.
    """
    layout = kept.layout
    if not bool(torch.isfinite(importance).all()):
        raise MethodError("some importance is not finite: nothing can be ranked; lower the learning rate")
    seconds = torch.zeros(layout.size, dtype=torch.float64)
    for name, weight_s in times.per_weight_s.items():
        seconds[layout.spans[name]] = weight_s
    if bool((seconds[layout.prunable_flat] <= 0).any()):
        raise MethodError("a prunable layer takes no time: Γ has no maximum")
    gain = importance.double()
    total, time = float(gain[kept.flat].sum()), times.constant_s + float(seconds[kept.flat].sum())
    candidates = (layout.prunable_flat & ~kept.flat).nonzero().squeeze(1)
    ratios = gain[candidates] / seconds[candidates]
    better = ratios > total / time  # Γ only rises, so the others are out already
    candidates, ratios = candidates[better], ratios[better]
    order = ratios.sort(descending=True, stable=True).indices
    candidates, ratios = candidates[order], ratios[order]
    # Γ before each candidate, if all before it were admitted; the first that does not exceed it ends the walk
    before = (total + gain[candidates].cumsum(0) - gain[candidates]) / (
        time + seconds[candidates].cumsum(0) - seconds[candidates]
    )
    pays = int((ratios > before).cumprod(0).sum())
    held = int((kept.flat & layout.prunable_flat).count_nonzero())
    room = max(0, round(max_density * layout.prunable_count) - held)
    mask = kept.flat.clone()
    mask[candidates[: min(pays, room)]] = True
    return Mask(mask, layout)


def settled(counts: Sequence[int], change: float = 0.1, times: int = 5) -> bool:
    """Tell whether each of the last sizes differs from the one before by a share of at most `change`.

    Args:
        counts: sizes of a model in the order in which it had them, > 0.
        change: in [0, 1].
        times: how many changes are looked at; fewer are not enough.
    """
    changes = [abs(after / before - 1) for before, after in pairwise(counts)]
    return len(changes) >= times and max(changes[-times:]) <= change
