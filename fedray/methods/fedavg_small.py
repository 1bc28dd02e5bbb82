"""FedAvg of a narrower dense model: the control that a pruned model has to beat.  Liu et al., ICLR 2019.

The model has the same layers with fewer channels, and the parameter count of a pruned model. It starts from a
random initialisation and trains like FedAvg. Nothing is scored, searched or masked: the gain of a pruned
model over this one is the value of choosing its weights.

Differs from the paper (Liu et al., "Rethinking the value of network pruning"; trained as by McMahan et al.,
AISTATS 2017): it runs in a federation; every layer keeps the same share of its channels, in the paper those
of the pruned model; it trains for as many rounds as the pruned model, not for as many FLOPs. In fedray the
narrower model is the first channels of the whole one, under a mask that removes the others: it trains, and
travels, as a physically smaller model.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.channels import (
    as_initialised,
    cannot_narrow,
    channel_mask,
    channels_at,
    share_for,
    too_narrow,
)
from fedray.types import Density, ServerState


@dataclass(frozen=True, kw_only=True)
class FedAvgSmall(Method[None]):
    """FedAvg of the same model with fewer channels.

    Args:
        density: prunable weights of the narrower model, as a share of the whole model's; met to the nearest
            number of channels. All layers that can lose channels keep the same share of them.
    """

    citation: ClassVar[str] = "Liu et al., ICLR 2019; McMahan et al., AISTATS 2017"
    prunes: ClassVar[bool] = True
    needs: ClassVar[str] = "a model with channels"

    density: Density = 0.25

    @property
    def target(self) -> float | None:
        """The option `density`."""
        return self.density

    def check(self, setting: Setting) -> str | None:
        """Refuse models that cannot be made so narrow."""
        model = setting.model
        groups, why = model.channel_groups, model.without_channels
        if fault := cannot_narrow(model.name, model.layout, groups, self.density, why):
            return fault
        share = share_for(self.density, model.layout, groups)
        return too_narrow(share, model.layout, groups, self.min_layer)

    def setup(self, state: ServerState[None], ctx: ServerContext) -> ServerState[None]:
        """Keep the first channels of each layer, at the initial scale of a model of that width."""
        groups = ctx.model.channel_groups
        share = share_for(self.density, ctx.layout, groups)
        kept = {g.name: torch.arange(g.size) < channels_at(share, g.size) for g in groups}
        mask = channel_mask(ctx.layout, groups, kept)
        return replace(state, params=as_initialised(state.params, mask, groups), mask=mask)
