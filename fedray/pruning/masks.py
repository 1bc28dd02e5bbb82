"""Masks from scores: keep entries at a density, above a threshold, or at random; grow entries again.

Every function returns a `Mask` that is True on all that is not prunable. Scores are flat float32 vectors
(size,) in the layout of the model; only their prunable entries are looked at. Ties go to the lower index, so
that every way of computing a mask keeps the same set and masks of falling density are nested.

`min_layer` is the number of entries that each prunable tensor keeps at least, its best ones (all candidates,
if it has fewer). The total stays the one asked for: other tensors lose their lowest entries instead. Only if
the minima add up to more than the total is more kept; `lowest_density` returns that limit.
"""

from collections.abc import Mapping
from math import isnan, prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedray.errors import MethodError
from fedray.types import Layout, Mask, Params

RegrowFrom = Literal["zero", "shadow"]
"""Value of a weight that a mask holds again: zero, or its last value, from behind the mask."""


def top_k(
    scores: Tensor, density: float, layout: Layout, *, within: Mask | None = None, min_layer: int = 0
) -> Mask:
    """Keep the highest-scored prunable entries of the whole model.

    Args:
        scores: (size,), higher is kept.
        density: share of the prunable entries to keep, in [0, 1]; met to one entry.
        layout: the model's layout.
        within: entries that may be kept; if they are fewer than asked for, all are kept.
        min_layer: entries that each tensor keeps at least.

    Raises:
        MethodError: if a score is NaN among candidates that have to be ranked.
    """
    candidates = layout.prunable_flat if within is None else layout.prunable_flat & within.flat
    kept = _highest(scores, candidates, round(density * layout.prunable_count))
    return _with_kept(_exchanged(kept, scores, candidates, layout, min_layer), layout)


def top_k_per_layer(
    scores: Tensor,
    densities: Mapping[str, float],
    layout: Layout,
    *,
    within: Mask | None = None,
    min_layer: int = 0,
) -> Mask:
    """Keep the highest-scored entries of each prunable tensor, at its own density in [0, 1]."""
    everything = layout.prunable_flat if within is None else layout.prunable_flat & within.flat
    kept = torch.zeros(layout.size, dtype=torch.bool)
    for name in layout.prunable_names:
        span = layout.spans[name]
        length = span.stop - span.start
        candidates = torch.ones(length, dtype=torch.bool) if within is None else within.flat[span]
        kept[span] = _highest(scores[span], candidates, round(densities[name] * length))
    return _with_kept(_exchanged(kept, scores, everything, layout, min_layer), layout)


def at_least(
    scores: Tensor,
    threshold: float,
    layout: Layout,
    *,
    within: Mask,
    min_density: float = 0.0,
    min_layer: int = 0,
) -> Mask:
    """Keep the entries of `within` that score `threshold` or more, and at least the `min_density` best.

    The total is not fixed, so the entries for `min_layer` are kept in addition.

    Raises:
        MethodError: if a score among the prunable entries of `within` is NaN.
    """
    candidates = within.flat & layout.prunable_flat
    _refuse_nan(scores[candidates])
    kept = (scores >= threshold) & candidates
    mask = filled(_with_kept(kept, layout), scores, min_layer, among=candidates)
    if mask.density >= min_density:
        return mask
    return top_k(scores, min_density, layout, within=within, min_layer=min_layer)


def filled(mask: Mask, scores: Tensor, min_layer: int, *, among: Tensor | None = None) -> Mask:
    """Return the mask with the best other entries in each prunable tensor that holds fewer than `min_layer`.

    Args:
        mask: the mask to fill.
        scores: (size,), higher is taken first.
        min_layer: entries of each tensor.
        among: (size,) bool, what may be taken; None: every prunable entry.
    """
    layout, flat = mask.layout, mask.flat.clone()
    candidates = layout.prunable_flat if among is None else layout.prunable_flat & among
    for name in _short(flat, candidates, layout, min_layer):
        span = layout.spans[name]
        missing = min_layer - int(flat[span].count_nonzero())
        flat[span] |= _highest(scores[span], candidates[span] & ~flat[span], missing)
    return Mask(flat, layout)


def lowest_density(layout: Layout, min_layer: int) -> float:
    """Return the density of a mask that holds `min_layer` entries of each prunable tensor; 1 without any."""
    sizes = [prod(layout.shape_of[name]) for name in layout.prunable_names]
    return sum(min(min_layer, size) for size in sizes) / sum(sizes) if sizes else 1.0


def empty_layers(mask: Mask) -> list[str]:
    """Return the names of the prunable tensors of which the mask holds nothing."""
    return [name for name in mask.layout.prunable_names if not bool(mask[name].any())]


def grow(scores: Tensor, count: int, layout: Layout, *, within: Mask) -> Mask:
    """Keep all of `within`, and add the highest-scored prunable entries outside it.

    Args:
        scores: (size,), higher is added first.
        count: number of entries to add, ≥ 0; if fewer are outside, all are added.
        layout: the model's layout.
        within: entries that stay.

    Raises:
        MethodError: if a score is NaN among entries that have to be ranked.
    """
    outside = layout.prunable_flat & ~within.flat
    return _with_kept(within.flat | _highest(scores, outside, count), layout)


def grow_per_layer(scores: Tensor, counts: Mapping[str, int], layout: Layout, *, within: Mask) -> Mask:
    """Keep all of `within`, and add to each prunable tensor its own number of highest-scored entries.

    A tensor that `counts` does not name gets none.
    """
    kept = within.flat.clone()
    for name in layout.prunable_names:
        span = layout.spans[name]
        kept[span] |= _highest(scores[span], ~within.flat[span], counts.get(name, 0))
    return _with_kept(kept, layout)


def random(
    layout: Layout, densities: float | Mapping[str, float], rng: np.random.Generator, *, min_layer: int = 0
) -> Mask:
    """Keep entries drawn uniformly: over the whole model at one density, or per tensor at its own."""
    scores = torch.from_numpy(rng.random(layout.size, dtype=np.float32))
    if isinstance(densities, Mapping):
        return top_k_per_layer(scores, densities, layout, min_layer=min_layer)
    return top_k(scores, densities, layout, min_layer=min_layer)


def erk(layout: Layout, density: float) -> dict[str, float]:
    """Share a density among the prunable tensors as Erdős–Rényi-Kernel does.

    A tensor's density is proportional to Σ dims / Π dims; tensors that would exceed 1 are kept dense and the
    rest is solved again.

    Returns:
        Name → density in (0, 1]; the mean weighted by size is `density`.

    Source: Evci et al., "Rigging the Lottery", ICML 2020; Mocanu et al., 2018.
    """
    sizes = {n: prod(layout.shape_of[n]) for n in layout.prunable_names}
    raw = {n: sum(layout.shape_of[n]) / sizes[n] for n in sizes}
    dense: set[str] = set()
    while True:
        budget = density * sum(sizes.values()) - sum(sizes[n] for n in dense)
        divisor = sum(raw[n] * sizes[n] for n in sizes if n not in dense)
        scale = budget / divisor if divisor else 0.0
        too_dense = {n for n in sizes if n not in dense and scale * raw[n] > 1}
        if not too_dense:
            return {n: 1.0 if n in dense else scale * raw[n] for n in sizes}
        dense |= too_dense


def union(first: Mask, second: Mask) -> Mask:
    """Hold what either holds."""
    return Mask(first.flat | second.flat, first.layout)


def support(params: Params) -> Mask:
    """Hold the prunable entries that are not zero (and all that is not prunable): the literal `w ≠ 0`."""
    return _with_kept((params.flat != 0) & params.layout.prunable_flat, params.layout)


def _with_kept(kept: Tensor, layout: Layout) -> Mask:
    """Return the mask of the kept prunable entries and all that is not prunable."""
    return Mask(kept | ~layout.prunable_flat, layout)


def _exchanged(kept: Tensor, scores: Tensor, candidates: Tensor, layout: Layout, min_layer: int) -> Tensor:
    """Return a bool vector with the same number of entries, and at least `min_layer` of each tensor."""
    if not _short(kept, candidates, layout, min_layer):
        return kept
    best = torch.zeros_like(kept)
    for name in layout.prunable_names:
        span = layout.spans[name]
        best[span] = _highest(scores[span], candidates[span], min_layer)
    others = int(kept.count_nonzero()) - int(best.count_nonzero())
    return best | _highest(scores, kept & ~best, others)


def _short(kept: Tensor, candidates: Tensor, layout: Layout, min_layer: int) -> list[str]:
    """Return the prunable tensors of which fewer than `min_layer` entries are kept, though there are more."""
    spans = {name: layout.spans[name] for name in layout.prunable_names} if min_layer else {}
    return [
        name
        for name, span in spans.items()
        if int(kept[span].count_nonzero()) < min(min_layer, int(candidates[span].count_nonzero()))
    ]


def _highest(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return a bool vector with the `count` highest-scored candidates; ties go to the lower index."""
    total = int(candidates.count_nonzero())
    if count >= total:
        return candidates.clone()
    if count <= 0:
        return torch.zeros_like(candidates)
    values = scores if total == len(scores) else torch.where(candidates, scores, -torch.inf)
    _refuse_nan(values, total)
    # numpy partitions vectors several times as fast as torch finds a k-th value; the value is the same
    place = len(values) - count
    threshold = float(np.partition(values.numpy(), place)[place])
    kept = (scores > threshold) & candidates
    ties = ((scores == threshold) & candidates).nonzero().squeeze(1)
    kept[ties[: count - int(kept.count_nonzero())]] = True
    return kept


def _refuse_nan(scores: Tensor, candidates: int | None = None) -> None:
    if not isnan(float(scores.sum())):  # one pass without a temporary
        return
    if count := int(scores.isnan().sum()):
        among = len(scores) if candidates is None else candidates
        raise MethodError(f"{count:,} of {among:,} scores are NaN: nothing can be ranked")
