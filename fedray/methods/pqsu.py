"""FL-PQSU: structured pruning, quantisation, selective updating.  Xu et al., IEEE Access 2021.

The server trains the model once on its own data, and removes the channels with the smallest L1 norm from each
layer; the result is a physically smaller dense model. It travels in 8 bits per weight, both ways. A client
uploads only if its training loss is lower than at its last upload.

Differs from the paper (its code was read where the text is unclear; each with the flag that restores the
other reading):
* biases, batch normalisation and its running statistics stay in fp32, where the code writes every tensor in 8
  bits: `quantise_vectors`; the 8-bit range always includes 0, without which the code destroys a tensor;
* a client compares the mean loss of its training in the round, the code the loss of its last batch:
  `selective="last_batch"`;
* a silent client's last upload counts again, as in the code, but only if the client is in the cohort;
  `stale="skip"` leaves it out, and needs no memory of uploads;
* all layers keep the same share of their channels, given as such or by a `density`; the code has hand-picked
  widths;
* a kept channel keeps its bias, its normalisation and its index, which the code loses; the classifier's rows,
  the classes, are never pruned or sorted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from fedray.costs.codec import Codec, ValueKind
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.channels import (
    best_channels,
    cannot_narrow,
    channel_mask,
    channel_scores,
    share_for,
    too_narrow,
)
from fedray.pruning.scores import magnitude
from fedray.types import (
    ChannelGroup,
    ClientUpdate,
    Density,
    Layout,
    Mask,
    NonNegativeInt,
    Params,
    ServerState,
    Task,
)

FIRST_LOSS = 100.0
"""The loss that a client's first loss is compared with."""


@dataclass(frozen=True)
class PQSUMemory:
    """`stale="reuse"`: client → the weights of its latest upload, those under the mask."""

    latest: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PQSU(Method[PQSUMemory]):
    """Remove channels once on the server, send 8 bits per weight, upload only what improved.

    Args:
        channels: share of its channels that each layer keeps; at least one.
        density: share of the prunable weights after pruning, in place of `channels`; met to the nearest
            number of channels.
        pretrain_epochs: epochs of the server on its own data before it prunes.
        selective: loss that has to be lower than at the client's last upload: the mean over its training in
            the round, or that of its last batch; `none`: every client uploads.
        stale: reuse the last upload of a silent client, for which the server keeps a model per client, or
            skip the client in the mean.
        quantise_vectors: write biases and normalisation as coarsely as weights, not in fp32.
        uplink_values: as in every method; 8 bits by default.
        downlink_values: as in every method; 8 bits by default.
    """

    citation: ClassVar[str] = "Xu et al., IEEE Access 2021"
    prunes: ClassVar[bool] = True
    needs: ClassVar[str] = "a model with channels"
    uses_server_data: ClassVar[bool] = True

    uplink_values: ValueKind = "int8"
    downlink_values: ValueKind = "int8"
    channels: Density = 0.5
    density: Density | None = None
    pretrain_epochs: NonNegativeInt = 6
    selective: Literal["mean_loss", "last_batch", "none"] = "mean_loss"
    stale: Literal["reuse", "skip"] = "reuse"
    quantise_vectors: bool = False

    @property
    def uplink(self) -> Codec:
        """8 bits for weights, and exact vectors."""
        return Codec(self.uplink_values, exact_vectors=not self.quantise_vectors)

    @property
    def downlink(self) -> Codec:
        """8 bits for weights, and exact vectors."""
        return Codec(self.downlink_values, exact_vectors=not self.quantise_vectors)

    @property
    def fold(self) -> Fold:
        """The plain mean; to reuse uploads, the server needs each of them."""
        return Fold(weight="uniform", keep_updates=self.stale == "reuse")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    @property
    def target(self) -> float | None:
        """The option `density`; None if `channels` is used."""
        return self.density

    def check(self, setting: Setting) -> str | None:
        """Refuse models without channels, and shares that leave a layer with none."""
        model = setting.model
        groups, why = model.channel_groups, model.without_channels
        fault = cannot_narrow(model.name, model.layout, groups, self.density or 1.0, why)
        return fault or too_narrow(self.share(model.layout, groups), model.layout, groups, self.min_layer)

    def share(self, layout: Layout, groups: Sequence[ChannelGroup]) -> float:
        """Return the share of channels that each layer keeps."""
        return self.channels if self.density is None else share_for(self.density, layout, groups)

    def setup(self, state: ServerState[PQSUMemory], ctx: ServerContext) -> ServerState[PQSUMemory]:
        """Pre-train on the server's data, rank channels by their L1 norm, keep the best of each layer."""
        trained = ctx.server.sgd(state.params, state.mask, epochs=self.pretrain_epochs)
        groups, layout = ctx.model.channel_groups, ctx.layout
        norms = {g.name: channel_scores(magnitude(trained), g, layout) for g in groups}
        kept = {name: best_channels(norm, self.share(layout, groups)) for name, norm in norms.items()}
        return replace(state, params=trained, mask=channel_mask(layout, groups, kept), memory=PQSUMemory())

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: local SGD of the smaller model; no upload unless the loss fell."""
        params = client.sgd(task.params, task.mask)
        if self.selective == "none":
            return ClientUpdate(params, task.mask)
        loss = client.meter.loss if self.selective == "mean_loss" else client.meter.last_loss
        last = client.recall("loss", float)
        if not loss < (FIRST_LOSS if last is None else last):  # NaN is not lower either
            return ClientUpdate(params, Mask.none(task.mask.layout))
        client.memory["loss"] = loss
        return ClientUpdate(params, task.mask)

    def aggregate(self, state: ServerState[PQSUMemory], cohort: CohortUpdate) -> ServerState[PQSUMemory]:
        """Average the uploads of the round, or the latest one of each client in it."""
        if self.stale == "skip":
            return super().aggregate(state, cohort)
        held = state.mask.flat
        uploads = {k: update.params.flat[held] for k, update in cohort.updates.items() if update.mask.count}
        latest = {**state.memory.latest, **uploads}
        counted = [latest[r.client] for r in cohort.folded if r.client in latest]
        if not counted:
            return state
        flat = state.params.flat.clone()
        flat[held] = sum(counted[1:], counted[0]) / len(counted)
        return replace(state, params=Params(flat, state.params.layout), memory=PQSUMemory(latest))
