"""Whole channels: which to remove, the mask that removes them, and the physically smaller model.

A channel is removed as a whole: its row in the layer that computes it, its bias and normalisation, its
columns in the next layer. The mask is False on all these entries, prunable or not. The rest is an ordinary
smaller network; `shrink` returns the position of each of its entries in the whole one.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

import torch
from torch import Tensor

from fedray.errors import MethodError
from fedray.shares import ceil_of
from fedray.types import ChannelGroup, Layout, Mask, Params

WORTHWHILE = 0.75
"""A smaller model is trained if it has at most this share of the entries."""


def channel_scores(scores: Tensor, group: ChannelGroup, layout: Layout) -> Tensor:
    """Return a score for each channel (group.size,): the sum over the weights that compute it.

    With |w| as scores this is the L1 norm of Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.

    Args:
        scores: (size,) of each weight.
        group: whose channels.
        layout: the model's layout.
    """
    rows = scores[layout.spans[group.rows[0]]].view(group.size, -1)
    return rows.sum(1)


def best_channels(scores: Tensor, share: float) -> Tensor:
    """Return a bool vector with the ⌈share · n⌉ highest scores, at least one; ties go to the lower index.

    Args:
        scores: (n,).
        share: of the channels that are kept, in (0, 1].

    Raises:
        MethodError: if a score is NaN.
    """
    if count := int(scores.isnan().sum()):
        raise MethodError(f"{count:,} of {len(scores):,} channels score NaN: they cannot be ranked")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[: channels_at(share, len(scores))]] = True
    return kept


def channels_at(share: float, size: int) -> int:
    """Return ⌈share · size⌉, the number of channels for a share in [0, 1] of `size`; at least one."""
    return max(1, ceil_of(share, size))


def density_at(share: float, layout: Layout, groups: Sequence[ChannelGroup]) -> float:
    """Return the density of the model if each group keeps a share of its channels.

    Args:
        share: in [0, 1]; at 0 each group keeps one channel.
        layout: the model's layout.
        groups: the model's.
    """
    kept = {group.name: channels_at(share, group.size) for group in groups}
    shapes = _shapes(layout, groups, kept)
    prunable = layout.prunable_count
    return sum(prod(shapes[name]) for name in layout.prunable_names) / prunable if prunable else 1.0


def too_narrow(share: float, layout: Layout, groups: Sequence[ChannelGroup], min_layer: int) -> str | None:
    """Return which prunable layer would keep fewer than `min_layer` weights (or than it has); or None.

    Args:
        share: share of its channels that each group keeps, in [0, 1]; at least one channel.
        layout: the model's layout.
        groups: the model's.
        min_layer: weights that each prunable layer keeps at least.
    """
    shapes = _shapes(layout, groups, {group.name: channels_at(share, group.size) for group in groups})
    for name in layout.prunable_names:
        smaller, whole = prod(shapes[name]), prod(layout.shape_of[name])
        if smaller < min(min_layer, whole):
            return (
                f"method.min_layer={min_layer} is more than the {smaller:,} of {whole:,} weights that {name} "
                "keeps with these channels; lower it, or keep more channels"
            )
    return None


def share_for(density: float, layout: Layout, groups: Sequence[ChannelGroup]) -> float:
    """Return the share of channels, the same in each group, whose `density_at` is nearest to a density.

    Found by bisection: the density grows with the share, in steps, and only at shares k / size of a group. Of
    two that are as near, the smaller is returned.

    Args:
        density: share of the prunable weights, in (0, 1].
        layout: the model's layout.
        groups: the model's, at least one.
    """
    shares = sorted({k / group.size for group in groups for k in range(1, group.size + 1)})
    above = bisect_left(shares, density, key=lambda share: density_at(share, layout, groups))
    near = shares[max(0, above - 1) : above + 1]
    return min(near, key=lambda share: abs(density_at(share, layout, groups) - density))


def channel_mask(
    layout: Layout, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor], *, within: Mask | None = None
) -> Mask:
    """Return the mask without all entries of the channels that are not kept.

    Args:
        layout: the model's layout.
        groups: the model's.
        kept: name of a group → bool (group.size,); a group that is not named keeps all.
        within: mask of the other entries; None: all are held.
    """
    flat = torch.ones(layout.size, dtype=torch.bool) if within is None else within.flat.clone()
    for group in groups:
        if group.name in kept:
            flat &= ~_entries(layout, group, ~kept[group.name])
    return Mask(flat, layout)


def removed_channels(mask: Mask, group: ChannelGroup) -> Tensor:
    """Return a bool vector (group.size,): the channels of which the mask holds nothing at all."""
    held = mask[group.columns].flatten(1)
    held = held.any(0).view(group.size, -1).any(1)
    for name in group.rows:
        held = held | mask[name].reshape(group.size, -1).any(1)
    return ~held


def removed_entries(mask: Mask, groups: Sequence[ChannelGroup]) -> Tensor:
    """Return a bool vector (size,): the entries that belong to channels of which the mask holds nothing."""
    gone = torch.zeros(mask.layout.size, dtype=torch.bool)
    for group in groups:
        removed = removed_channels(mask, group)
        if bool(removed.any()):
            gone |= _entries(mask.layout, group, removed)
    return gone


def cannot_narrow(
    model: str,
    layout: Layout,
    groups: Sequence[ChannelGroup],
    density: float,
    why: str = "none go from one layer to the next",
) -> str | None:
    """Return why removing channels cannot reach a density, beginning with the key to change; or None.

    Args:
        model: its name.
        layout: its layout.
        groups: its channels.
        density: target share of the prunable weights; at 1 the model only needs channels to remove.
        why: reason for having no channels, if it has none.
    """
    if not groups:
        return (
            f"model={model} has no channels that can be removed as a whole: {why}. There are some in mlp, "
            "lenet5, cnn, vgg11, and with BatchNorm in vgg19_bn and resnet18"
        )
    narrowest = density_at(0, layout, groups)
    if narrowest > density:
        return (
            f"method.density={density} cannot be reached: with a single channel left in each layer that can "
            f"lose any, {model} has {narrowest:.3g} of its prunable weights"
        )
    return None


def as_initialised(params: Params, mask: Mask, groups: Sequence[ChannelGroup]) -> Params:
    """Return initial weights in the scale of the smaller model's own initialisation.

    PyTorch draws a layer's weights and biases from ±1/√fan_in. A layer that lost input channels has a smaller
    fan_in, so its weights and bias are multiplied by √(fan_in before / fan_in after).

    Args:
        params: of the whole model, freshly initialised.
        mask: the whole model's, without the removed channels; each group keeps at least one.
        groups: the model's.
    """
    scaled = params.clone()
    for group in groups:
        kept = group.size - int(removed_channels(mask, group).count_nonzero())
        bias = f"{group.columns.removesuffix('weight')}bias"
        for name in {group.columns, bias} & scaled.keys():
            scaled[name].mul_(sqrt(group.size / kept))
    return scaled


@dataclass(frozen=True)
class Shrunken:
    """A physically smaller model.

    Args:
        layout: of the smaller model.
        index: (layout.size,) int64, position of each entry in the whole model's vector.
    """

    layout: Layout
    index: Tensor


def shrink(mask: Mask, groups: Sequence[ChannelGroup]) -> Shrunken | None:
    """Return the smaller model without the removed channels, or None if that would save too little.

    Also None if a group lost all its channels: there are no layers of width zero. The smaller model keeps the
    masked entries of its channels; the caller has to mask them.

    Args:
        mask: of the whole model.
        groups: the model's.
    """
    gone = removed_entries(mask, groups)
    smaller = mask.layout.size - int(gone.count_nonzero())
    kept = {g.name: g.size - int(removed_channels(mask, g).count_nonzero()) for g in groups}
    if smaller > WORTHWHILE * mask.layout.size or 0 in kept.values():
        return None
    shapes = _shapes(mask.layout, groups, kept)
    layout = replace(mask.layout, shapes=tuple(shapes[name] for name in mask.layout.names))
    return Shrunken(layout, (~gone).nonzero().squeeze(1))


def _shapes(
    layout: Layout, groups: Sequence[ChannelGroup], kept: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return name → shape if each group keeps `kept` channels."""
    shapes = {name: list(shape) for name, shape in layout.shape_of.items()}
    for group in groups:
        for name in group.rows:
            # a BatchNorm behind a flattening has several entries for each channel
            shapes[name][0] = shapes[name][0] // group.size * kept[group.name]
        shapes[group.columns][1] -= (group.size - kept[group.name]) * group.spread
    return {name: tuple(shape) for name, shape in shapes.items()}


def _entries(layout: Layout, group: ChannelGroup, channels: Tensor) -> Tensor:
    """Return a bool vector (size,): all entries of some channels, given as bool (group.size,)."""
    flat = torch.zeros(layout.size, dtype=torch.bool)
    for name in group.rows:
        flat[layout.spans[name]].view(group.size, -1)[channels] = True
    shape = layout.shape_of[group.columns]
    flat[layout.spans[group.columns]].view(shape[0], group.size, -1)[:, channels] = True
    return flat
