"""Clients that train slices of the server's model: who has which width, and the training of a slice.

What HeteroFL and FedRolex share. They differ in which channels a slice has.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from fedray.federation.client import Client
from fedray.federation.method import ServerContext, Setting
from fedray.pruning.channels import as_initialised, cannot_narrow, too_narrow
from fedray.pruning.widths import Mix, slice_mask
from fedray.training.slices import MaskedCrossEntropy, Scaler, absent_classes
from fedray.types import ChannelGroup, ClientInfo, ClientUpdate, Layout, Mask, ServerState, Task

Assignment = Literal["dynamic", "fixed", "device"]
"""How clients get their levels."""

SPEEDS = 1000
"""Approximate number of clients with which a client's speed is compared."""


@dataclass(frozen=True)
class SliceMemory:
    """The server's memory.

    Args:
        groups: the model's channels.
        clients: registered clients.
        seed: of the draws of levels.
        speeds: FLOP/s of some clients, ascending.
    """

    groups: tuple[ChannelGroup, ...]
    clients: int
    seed: int
    speeds: tuple[float, ...]

    def rate(self, mix: Mix, assignment: Assignment, client: ClientInfo, round: int) -> float:
        """Return the share of channels that a client has in a round."""
        if assignment == "dynamic":
            rng = np.random.default_rng((self.seed, round, client.id))
            return mix.at(float(rng.random()))
        if assignment == "fixed":
            return mix.at(client.id / self.clients)
        faster = len(self.speeds) - bisect_right(self.speeds, client.profile.flops_per_s)
        return mix.at(faster / len(self.speeds))


def refusal(
    setting: Setting, rates: Sequence[float], min_layer: int, *, scaler: bool, masked_loss: bool
) -> str | None:
    """Return why a model cannot be cut to some widths, beginning with the key to change; or None."""
    model = setting.model
    groups, why = model.channel_groups, model.without_channels
    if fault := cannot_narrow(model.name, model.layout, groups, 1.0, why):
        return fault
    if scaler and model.kernels:
        return (
            "method.scaler=true divides weights that weight_standardization=true standardises after it, "
            "which undoes it; set method.scaler=false"
        )
    if masked_loss and not (model.has_head and _rows(model.layout, model.head) == model.num_classes):
        return (
            f"method.masked_loss=true leaves out rows of the classifier, and the last linear layer of "
            f"model={model.name} has no row for each class; set method.masked_loss=false"
        )
    return too_narrow(min(rates), model.layout, groups, min_layer)


def begin(state: ServerState[SliceMemory], ctx: ServerContext, within: float) -> ServerState[SliceMemory]:
    """Return the state before the first round: the server's model has a share `within` of the channels."""
    groups = ctx.model.channel_groups
    mask = slice_mask(ctx.layout, groups, within)
    every = -(-len(ctx.clients) // SPEEDS)
    speeds = sorted(ctx.clients[k].profile.flops_per_s for k in range(0, len(ctx.clients), every))
    memory = SliceMemory(groups, len(ctx.clients), int(ctx.rng.integers(2**32)), tuple(speeds))
    params = as_initialised(state.params, mask, groups)
    return replace(state, params=params, mask=mask, memory=memory)


def dropped(round: int, milestones: Sequence[int], factor: float) -> float:
    """Return what the learning rate of a round is multiplied by: `factor` for each milestone before it."""
    return factor ** sum(milestone < round for milestone in milestones)


def train_slice(
    task: Task, client: Client, *, lr: float, scaler: bool, masked_loss: bool, clip: float | None
) -> ClientUpdate:
    """ON THE DEVICE: train the slice of a task; what it says of absent classes does not count.

    Args:
        task: its extra `rate` is the slice's share of the server's channels.
        client: trains.
        lr: of the round.
        scaler: whether layers are scaled by the rate.
        masked_loss: whether the loss and the update leave out the classes that the client has no example of.
        clip: largest norm of a step's gradient; None: any.
    """
    model, rate = client.model, task.extra("rate", float)
    absent = absent_classes(client.y, model.num_classes)
    loss = MaskedCrossEntropy(absent) if masked_loss and bool(absent.any()) else None
    view = Scaler.of(model.channel_groups, rate) if scaler and rate < 1 else None
    params = client.sgd(task.params, task.mask, lr=lr, loss=loss, view=view, clip=clip, narrow=True)
    return ClientUpdate(params, without_rows(task.mask, model.head, absent) if loss else task.mask)


def _rows(layout: Layout, layer: str) -> int:
    return layout.shape_of[f"{layer}.weight"][0]


def without_rows(mask: Mask, head: str, rows: Tensor) -> Mask:
    """Return a mask without some rows of a linear layer, weights and bias.

    Args:
        mask: of the model.
        head: the layer's dotted name.
        rows: bool (out_features,).
    """
    flat = mask.flat.clone()
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in mask.layout.spans:
            flat[mask.layout.spans[name]].view(len(rows), -1)[rows] = False
    return Mask(flat, mask.layout)
