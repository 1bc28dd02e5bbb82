"""Batch normalisation in a federation: one policy for a run, declared in its config.

average   scale, shift and running statistics are entries like others: sent, averaged, evaluated with
local     they stay with each client and are never sent (FedBN: Li et al., ICLR 2021). The global model
          has no statistics then, and normalises each batch by the batch's own
static    no statistics are tracked in training; whenever the model is evaluated, the round's clients are
          asked for them first (sBN of HeteroFL: Diao et al., ICLR 2021)
group     each BatchNorm2d is a GroupNorm, which has no running statistics (Wu and He, ECCV 2018; for
          federations Hsieh et al., ICML 2020)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.types import Layout, Mask, Params

Norm = Literal["average", "local", "static", "group"]
"""A policy for the normalisation of a run."""

MOST_GROUPS = 32
"""A GroupNorm has gcd(32, channels) groups; Wu and He use 32."""

CACHED_MASKS = 8
"""The shared parts of this many masks are remembered, the latest ones."""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def batch_norms(module: nn.Module) -> list[tuple[str, BatchNorm]]:
    """Return the BatchNorm layers of a module with their dotted names."""
    return [(n, m) for n, m in module.named_modules() if isinstance(m, BATCH_NORMS)]


def under_policy(module: nn.Module, norm: Norm) -> nn.Module:
    """Apply a policy to a newly built module, in place, and return it.

    Raises:
        ConfigError: if a BatchNorm of another kind than BatchNorm2d would become a GroupNorm.
    """
    for name, layer in batch_norms(module):
        if norm == "group":
            if not isinstance(layer, nn.BatchNorm2d):
                kind = type(layer).__name__
                raise ConfigError(f"norm: group replaces BatchNorm2d only, and {name} is a {kind}")
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, _group_norm(layer))
        elif norm == "static":
            # the buffers stay: training then leaves them alone, and evaluation still reads them
            layer.track_running_stats = False
    return module


def overlaid(params: Params, index: Tensor, values: Tensor, mask: Mask | None = None) -> Params:
    """Return a copy with other values at those of some entries that the mask holds.

    Args:
        params: not changed.
        index: (k,) int64, positions.
        values: (k,) float32.
        mask: None: all are held.
    """
    flat = params.flat.clone()
    flat[index] = values if mask is None else torch.where(mask.flat[index], values, flat[index])
    return Params(flat, params.layout)


@dataclass(frozen=True)
class Norms:
    """The positions of a model's BatchNorm in its vector, and which of them clients share.

    Args:
        policy: of the run.
        layout: of the whole model.
        names: tensors of BatchNorm: scale, shift, running mean and variance.
        tracked: layers that have running statistics.
    """

    policy: Norm
    layout: Layout
    names: tuple[str, ...]
    tracked: tuple[str, ...]
    _shared: dict[bytes, tuple[Mask, Mask]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, module: nn.Module, layout: Layout, policy: Norm) -> "Norms":
        """Find the BatchNorm of a module."""
        layers = batch_norms(module)
        tensors = [f"{name}.{n}" for name, layer in layers for n in layer.state_dict()]
        return cls(
            policy,
            layout,
            tuple(name for name in tensors if name in layout.spans),
            tuple(name for name, _ in layers if f"{name}.running_var" in layout.spans),
        )

    @property
    def private(self) -> bool:
        """Whether the norms stay with the clients."""
        return self.policy == "local" and bool(self.names)

    @property
    def queried(self) -> bool:
        """Whether clients are asked for the statistics of a model that is evaluated."""
        return self.policy == "static" and bool(self.tracked)

    @cached_property
    def entries(self) -> Tensor:
        """Positions of the norms: (k,) int64."""
        return self._index(self.names)

    @cached_property
    def statistics(self) -> Tensor:
        """Positions of the running statistics: (s,) int64."""
        return self._index(
            [f"{layer}.{n}" for layer in self.tracked for n in ("running_mean", "running_var")]
        )

    # ── the wire: both sides know which entries stay behind, so not even their positions are sent ────────

    @cached_property
    def sent_layout(self) -> Layout:
        """The layout of the vector that is sent."""
        if not self.private:
            return self.layout
        whole, stays = self.layout, set(self.names)
        travels = [name not in stays for name in whole.names]
        return Layout(
            names=tuple(compress(whole.names, travels)),
            shapes=tuple(compress(whole.shapes, travels)),
            prunable=tuple(compress(whole.prunable, travels)),
            trainable=tuple(compress(whole.trainable, travels)),
        )

    def sent_mask(self, mask: Mask) -> Mask:
        """Return a mask in the layout of the wire."""
        return self._split(mask)[0] if self.private else mask

    def sent(self, params: Params) -> Params:
        """Return weights in the layout of the wire."""
        return Params(params.flat[self._travels], self.sent_layout) if self.private else params

    def received(self, params: Params) -> Params:
        """Return weights of the wire in the layout of the model, zero where nothing was sent."""
        if not self.private:
            return params
        flat = torch.zeros(self.layout.size)
        flat[self._travels] = params.flat
        return Params(flat, self.layout)

    # ── and the masks that follow from it ────────────────────────────────────────────────────────────────

    def shared_mask(self, mask: Mask) -> Mask:
        """Return a mask without the entries that stay with the clients: an update vouches for the others."""
        return self._split(mask)[1] if self.private else mask

    def global_mask(self, mask: Mask) -> Mask:
        """Return the mask that the model is evaluated with: without statistics if only clients have them."""
        if not self.private:
            return mask
        flat = mask.flat.clone()
        flat[self.statistics] = False
        return Mask(flat, self.layout)

    def _split(self, mask: Mask) -> tuple[Mask, Mask]:
        """Return the shared part of a mask in the layout of the wire, and in that of the model."""
        if mask.digest not in self._shared:
            if len(self._shared) >= CACHED_MASKS:
                del self._shared[next(iter(self._shared))]  # the oldest
            flat = mask.flat.clone()
            flat[self.entries] = False
            sent = Mask(flat[self._travels], self.sent_layout)
            self._shared[mask.digest] = sent, Mask(flat, self.layout)
        return self._shared[mask.digest]

    @cached_property
    def _travels(self) -> Tensor:
        """Positions of the entries that are sent in the whole vector: int64."""
        return self._index(self.sent_layout.names)

    def _index(self, names: Sequence[str]) -> Tensor:
        spans = [self.layout.spans[name] for name in names]
        return torch.cat(
            [torch.arange(s.start, s.stop) for s in spans] or [torch.zeros(0, dtype=torch.int64)]
        )


def _group_norm(layer: nn.BatchNorm2d) -> nn.GroupNorm:
    """Return a GroupNorm with the scale and shift of a BatchNorm."""
    channels = layer.num_features
    norm = nn.GroupNorm(gcd(MOST_GROUPS, channels), channels, eps=layer.eps, affine=layer.affine)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm
