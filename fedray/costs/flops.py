"""FLOPs of a model under a mask, per example.

Conventions:

* Only products count (`costs/products.py`): of a weight and activations (linear, convolutional and recurrent
  layers, projections of attention), and of activations with each other (attention). Biases, normalisation,
  embeddings, activation functions and pooling do not, as usual in the literature on pruning: they are little
  beside the products.
* One multiply-add is 2 FLOPs. A weight takes part in one multiply-add for each position of its layer's
  output: height × width for a convolution (also where the window lies on padding), one for a linear layer.
* Training costs three forward passes: forward, gradient of the inputs, gradient of the weights. The first
  layer needs no gradient of its inputs; that is not deducted.
* A gradient taken outside the mask, as regrowth needs it, is charged as dense: one forward pass under the
  mask and two dense ones. Evci et al. charge the gradient of the weights alone as dense.
* A network with early exits (`models/fedlp_cnn.py`) runs as a whole, and its exits' heads cost nothing. If
  the mask holds nothing of its classifier, it is left early: then any device runs the layers of which the
  mask holds something, heads included.

Sources: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, appendix on FLOPs; for
dense gradients the accounting in Huang et al., "FedRTS", NeurIPS 2025, arXiv 2501.19122.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from fedray.costs.products import products_of
from fedray.randomness import borrowed
from fedray.types import Exploits, Layout, Mask

CACHED_MASKS = 4096
"""Masks whose counts a model remembers, at some 300 bytes each."""


@dataclass(frozen=True)
class FlopModel:
    """The FLOPs of each weight of a model.

    Args:
        layout: the model's layout.
        positions: name of a weight tensor → number of multiply-adds that each of its weights takes part in,
            per example, in the order of a forward pass. Other tensors cost nothing.
        exits: the same for tensors that only an early exit runs.
        fixed: FLOPs of a forward pass, per example, that no mask removes: products of activations, as in
            attention.
    """

    layout: Layout
    positions: Mapping[str, float]
    exits: Mapping[str, float] = field(default_factory=dict)
    fixed: float = 0.0
    _counted: dict[bytes, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def trace(
        cls, module: nn.Module, input_shape: tuple[int, ...], layout: Layout, *, tokens: int = 0
    ) -> "FlopModel":
        """Count positions by sending a few examples through a copy of the module.

        Args:
            module: takes examples (n, *input_shape). On the CPU; tensors without values (on the meta device)
                are taken as zeros. Its attribute `exits`, if it has one, names the modules that each early
                exit calls one after the other.
            input_shape: shape of one example.
            layout: the module's layout.
            tokens: 0 if the module takes float32; else it takes int64 in 0..tokens − 1.

        Raises:
            ConfigError: if the FLOPs of an operation with a weight are unknown.
            ValueError: if a weight that takes part is not in the layout.
        """
        # not on the meta device, whose kernels import sympy and much else for three seconds
        probe = with_memory(module).eval()

        def examples(count: int) -> Tensor:
            shape = (count, *input_shape)
            return torch.randint(tokens, shape) if tokens else torch.zeros(shape)

        with torch.no_grad(), borrowed(0):
            positions, fixed = products_of(probe, probe, examples)
            exits: dict[str, float] = {}
            for path in getattr(probe, "exits", ()):
                ways, _ = products_of(probe, partial(_along, probe, path), examples)
                exits |= {name: n for name, n in ways.items() if name not in positions}
        for name in (*positions, *exits):
            if name not in layout.spans:
                raise ValueError(f"{name} is in the module, not in the layout; give the module's own layout")
        return cls(layout, positions, exits, fixed)

    def dense(self) -> float:
        """Return the FLOPs of a forward pass through the whole network with all weights."""
        return self._all_of(self.positions)

    def forward(self, mask: Mask) -> float:
        """Return the FLOPs of a forward pass with the weights that are held: the theoretical count."""
        return self._count(mask)[0]

    def structured(self, mask: Mask) -> float:
        """Return the FLOPs of a forward pass on a device that can skip whole rows and whole input channels.

        Rows (dim 0) and input channels (dim 1) of a tensor (out, in, …) that hold nothing do not count:
        `forward(mask)` ≤ this ≤ `dense()`. Each tensor counts by itself: without a row, the input channel
        that it fed is free only if the next tensor's mask holds nothing of it.
        """
        return self._count(mask)[1]

    def train(self, mask: Mask, *, dense_gradient: bool = False) -> float:
        """Return the theoretical FLOPs of training on one example.

        Args:
            mask: the weights that are held.
            dense_gradient: whether gradients are taken for the masked weights too.
        """
        return self._with_backward(self.forward(mask), mask, dense_gradient)

    def executed(self, mask: Mask, exploits: Exploits, *, dense_gradient: bool = False) -> float:
        """Return the FLOPs that a device really runs to train on one example; they drive its clock.

        Args:
            mask: the weights that are held.
            exploits: which zeros the device can skip.
            dense_gradient: whether gradients are taken for the masked weights too.
        """
        return self._with_backward(self.executed_forward(mask, exploits), mask, dense_gradient)

    def executed_forward(self, mask: Mask, exploits: Exploits) -> float:
        """Return the FLOPs that a device really runs in a forward pass, per example.

        Args:
            mask: the weights that are held.
            exploits: which zeros the device can skip.
        """
        if exploits == "nothing":
            return self._all_of(self._run(mask))
        return self.structured(mask) if exploits == "structured" else self.forward(mask)

    def _with_backward(self, forward: float, mask: Mask, dense_gradient: bool) -> float:
        return forward + 2 * (self._all_of(self._run(mask)) if dense_gradient else forward)

    def _run(self, mask: Mask) -> Mapping[str, float]:
        """Return the positions that a forward pass runs: of the whole network, or of its held layers."""
        if not self.exits or bool(mask[list(self.positions)[-1]].any()):
            return self.positions
        return {name: n for name, n in {**self.positions, **self.exits}.items() if bool(mask[name].any())}

    def _all_of(self, positions: Mapping[str, float]) -> float:
        return 2.0 * sum(n * prod(self.layout.shape_of[name]) for name, n in positions.items()) + self.fixed

    def _count(self, mask: Mask) -> tuple[float, float]:
        """Return the unstructured and the structured count of a forward pass."""
        if mask.is_full:
            return self.dense(), self.dense()
        if mask.digest in self._counted:
            return self._counted[mask.digest]
        weights = structured = 0.0
        for name, positions in self._run(mask).items():
            _, channels, *kernel = self.layout.shape_of[name]
            held = mask[name].flatten(1).numpy()  # (out, in · kernel)
            rows_kept = int(held.any(axis=1).sum())
            channels_kept = int(held.any(axis=0).reshape(channels, -1).any(axis=1).sum())
            weights += positions * int(np.count_nonzero(held))
            structured += positions * rows_kept * channels_kept * prod(kernel)
        if len(self._counted) >= CACHED_MASKS:
            del self._counted[next(iter(self._counted))]  # the oldest
        self._counted[mask.digest] = (2.0 * weights + self.fixed, 2.0 * structured + self.fixed)
        return self._counted[mask.digest]


def with_memory(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers have values and share no storage."""
    memo: dict[int, Tensor] = {}  # deepcopy takes a tensor that it finds in its memo as the copy
    for tensor in chain(module.parameters(), module.buffers()):
        value = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().clone()
        memo[id(tensor)] = (
            nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        )
    return deepcopy(module, memo)


def _along(module: nn.Module, path: Sequence[str], x: Tensor) -> Tensor:
    """Send examples through some modules of a network, in sequence."""
    for name in path:
        x = module.get_submodule(name)(x)
    return x
