"""Channels: which to take out, the mask that takes them out, and the physically smaller model that is left.

A channel goes as a whole: its row in the layer that makes it, its bias and normalisation, its columns in the
layer that takes it in, and all of these entries are then False in the mask, prunable or not. What is left is
an ordinary smaller network, and `shrink` says where each of its entries lies in the whole one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from fedray.types import ChannelGroup, Layout, Mask

WORTHWHILE = 0.75
"""A model is trained as a smaller one if at most this share of its entries is left."""


def channel_scores(scores: Tensor, group: ChannelGroup, layout: Layout) -> Tensor:
    """Return a score for each channel (group.size,): the sum over the weights that make it.

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
    """
    count = max(1, ceil(share * len(scores) - 1e-9))
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def channel_mask(
    layout: Layout, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor], *, within: Mask | None = None
) -> Mask:
    """Return the mask without all entries of the channels that are not kept.

    Args:
        layout: the model's layout.
        groups: the model's.
        kept: name of a group → bool (group.size,); a group that is not named keeps all.
        within: what is held of the rest; None: everything.
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


@dataclass(frozen=True)
class Shrunken:
    """A physically smaller model.

    Args:
        layout: of the smaller model.
        index: (layout.size,) int64, where each of its entries lies in the whole model's vector.
    """

    layout: Layout
    index: Tensor


def shrink(mask: Mask, groups: Sequence[ChannelGroup]) -> Shrunken | None:
    """Return the smaller model without the removed channels, or None if that would save too little.

    Entries that the mask does not hold in channels that stay are kept; they have to be masked there too.

    Args:
        mask: of the whole model.
        groups: the model's.
    """
    gone = removed_entries(mask, groups)
    left = mask.layout.size - int(gone.count_nonzero())
    if left > WORTHWHILE * mask.layout.size:
        return None
    shapes = {name: list(shape) for name, shape in mask.layout.shape_of.items()}
    for group in groups:
        count = int(removed_channels(mask, group).count_nonzero())
        for name in group.rows:
            shapes[name][0] -= count
        shapes[group.columns][1] -= count * group.spread
    layout = replace(mask.layout, shapes=tuple(tuple(shapes[name]) for name in mask.layout.names))
    return Shrunken(layout, (~gone).nonzero().squeeze(1))


def _entries(layout: Layout, group: ChannelGroup, channels: Tensor) -> Tensor:
    """Return a bool vector (size,): all entries of some channels, given as bool (group.size,)."""
    flat = torch.zeros(layout.size, dtype=torch.bool)
    for name in group.rows:
        flat[layout.spans[name]].view(group.size, -1)[channels] = True
    shape = layout.shape_of[group.columns]
    flat[layout.spans[group.columns]].view(shape[0], group.size, -1)[:, channels] = True
    return flat
