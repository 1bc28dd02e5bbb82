"""Masks with the most importance for their time: drop small weights, admit those that are worth their time.

With the importance Δ(M) = Σ_{j∈M} g_j² and the time of a round T(M) = c + Σ_{j∈M} t_j, the mask that
maximises

    Γ(M) = Δ(M) / T(M)

over all supersets of the kept weights admits candidates in the order of g_j²/t_j, as long as this ratio
exceeds the current Γ: each of them raises Γ, and every later one would lower it.

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
        """Seconds that no mask saves, > 0."""

    @property
    def per_weight_s(self) -> Mapping[str, float]:
        """Name of a tensor → seconds that each held entry adds; other tensors add nothing."""


def rebuild(
    params: Params,
    mask: Mask,
    importance: Tensor,
    times: Times,
    drop: float,
    max_density: float | None = None,
    min_layer: int = 0,
) -> Mask:
    """Return PruneFL's next mask: without the smallest weights, and with those that are worth their time.

    Args:
        params: the weights.
        mask: the current mask.
        importance: (size,) ≥ 0, of each weight, held or not.
        times: of a round.
        drop: share of each layer's held weights that is dropped before the search, in [0, 1].
        max_density: limit of the new mask. If the mask would exceed it after the drop, each layer drops a
            larger share, the same in all layers, that just fits.
        min_layer: weights that each layer keeps at least, of those that it holds.
    """
    cap = 1.0 if max_density is None else max_density
    kept = drop_smallest(params, drop, within=mask, min_layer=min_layer)
    if round(kept.density * mask.layout.prunable_count) > round(cap * mask.layout.prunable_count):
        larger = max(drop, 1 - cap / mask.density)
        kept = drop_smallest(params, larger, within=mask, min_layer=min_layer)
        # shares are rounded down, so a few weights may exceed the limit
        kept = top_k(magnitude(params), cap, mask.layout, within=kept, min_layer=min_layer)
    return maximise_ratio(importance, kept, times, max_density=cap)


def drop_smallest(params: Params, share: float, *, within: Mask, min_layer: int = 0) -> Mask:
    """Return the mask without the weights of smallest magnitude, the same share of each layer's held ones.

    Args:
        params: the weights; only those under the mask are looked at.
        share: in [0, 1]; of n held weights of a layer, ⌊share · n⌋ go.
        within: the mask before.
        min_layer: weights that each layer keeps at least, of those that it holds.
    """
    kept = {}
    for name in within.layout.prunable_names:
        held = int(within[name].count_nonzero())
        stays = max(held - floor_of(share, held), min(min_layer, held))
        kept[name] = stays / within[name].numel()
    return top_k_per_layer(magnitude(params), kept, within.layout, within=within)


def maximise_ratio(
    importance: Tensor,
    kept: Mask,
    times: Times,
    *,
    max_density: float = 1.0,
) -> Mask:
    """Return the superset of a mask with the highest ratio Γ of importance to time.

    Ties go to the lower index. A candidate that would not change Γ is not admitted.

    Args:
        importance: (size,) ≥ 0, e.g. squared gradients; any positive factor of it gives the same mask.
        kept: mask of the entries that stay; all other prunable entries are candidates.
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
        counts: sizes of a model, > 0, from the oldest to the latest.
        change: in [0, 1].
        times: number of latest changes that count; False if there are fewer.
    """
    changes = [abs(later / earlier - 1) for earlier, later in pairwise(counts)]
    return len(changes) >= times and max(changes[-times:]) <= change
