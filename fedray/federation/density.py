"""Checks on density: targets that a model cannot reach, targets that a run missed, and empty layers."""

from collections.abc import Sequence
from math import prod

from fedray.federation.method import Method, Setting
from fedray.models import layout_of
from fedray.pruning.channels import removed_entries
from fedray.pruning.masks import lowest_density
from fedray.shares import ceil_of
from fedray.types import ChannelGroup, Layout, Mask

MICRO = 10**6


def cannot_start(method: Method, setting: Setting) -> str | None:
    """Return why a method's options do not fit the model, beginning with the key; or None.

    First comes a model without prunable weights, then the method's own `check`, then a density below the
    minima of the layers: a method that prunes channels knows a larger minimum, so its own message is better.
    """
    return _nothing_prunable(method, setting) or method.check(setting) or _too_sparse(method, setting)


def _too_sparse(method: Method, setting: Setting) -> str | None:
    layout, target = setting.model.layout, method.target
    lowest = lowest_density(layout, method.min_layer)
    least = round(lowest * layout.prunable_count)
    if target is None or round(target * layout.prunable_count) >= least:
        return None
    return (
        f"method.density={target} cannot be reached: method.min_layer={method.min_layer} keeps {least:,} of "
        f"the {layout.prunable_count:,} prunable weights of {setting.model.name}, in "
        f"{len(layout.prunable_names)} layers. The lowest possible density is "
        f"{ceil_of(lowest, MICRO) / MICRO:g}; method.min_layer=0 lets layers lose all their weights"
    )


def _nothing_prunable(method: Method, setting: Setting) -> str | None:
    model = setting.model
    if model.layout.prunable_count or method.target == 1 or not (method.prunes or method.target):
        return None
    layers = len(layout_of(model.module, prune_first=True, prune_last=True).prunable_names)
    if not layers:
        return (
            f"model={model.name} has no weight that may be pruned: biases, normalisation and other vectors "
            "are kept. Take another model, or method.name=fedavg"
        )
    return (
        f"prune_first and prune_last leave no weight of model={model.name} that may be pruned: they say "
        f"whether the first and the last of its layers may be, and it has {layers}. Set one of them to true, "
        "or take a model with more layers"
    )


def above_asked(asked: float | None, mask: Mask, groups: Sequence[ChannelGroup]) -> str | None:
    """Return a note if a run ends above the density that its options ask for; or None.

    One weight more in a layer is rounding. If whole channels were removed, one channel more in a group is.
    """
    if asked is None:
        return None
    layout = mask.layout
    more = round(mask.density * layout.prunable_count) - round(asked * layout.prunable_count)
    channels = bool(removed_entries(mask, groups).any())
    rounding = sum(_channel(group, layout) for group in groups) if channels else len(layout.prunable_names)
    if more <= rounding:
        return None
    return (
        f"the run ends at density {mask.density:.4g}, above the {asked:.4g} that its options ask for: "
        "no round carried out the last pruning"
    )


def _channel(group: ChannelGroup, layout: Layout) -> int:
    """Return the number of prunable weights in one channel of a group."""
    prunable = set(layout.prunable_names)
    weights = sum(prod(layout.shape_of[name]) for name in {*group.rows, group.columns} & prunable)
    return -(-weights // group.size)


def emptied(layers: Sequence[str]) -> list[str]:
    """Return a note for each layer that lost all its weights; `layers` are names of tensors."""
    return [f"{name} has no weight left: its layer gives the same output for every input" for name in layers]
