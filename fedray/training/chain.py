"""Plain SGD on small sequential networks without autograd.

For linear layers, ReLU, max-pooling and convolutions with few patches, under cross-entropy, the backward pass
is a few matrix products (`layers.py`). Each product is added to the weights directly, so no gradient is
written to memory. A small network trains about twice as fast on a CPU. Results equal those of autograd to
rounding. The choice depends only on the model and the options of the call, so a run keeps its bits.
"""

import re
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from fedray.models.channels import is_sequence
from fedray.training.layers import (
    Convolution,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    ReLU,
    Standardised,
    patches_of,
)

MOST_PATCHES = 2**19
"""Numbers in the patches of a batch, up to which they stay in a cache, and beat torch's own convolution."""
FEW = 16
"""Examples of a batch with fewer patches, without which a chain is not worth its calls."""

LINEAR, MAPS = "F?L(R?L)*", "C[CRP]*F(R?L)+"
"""Patterns of a chain, by the first letters of its layers (pooling: P)."""


class Chain:
    """The layers of a network; their weights are views of a working vector.

    Args:
        layers: in the order of the network; the last one makes the logits.
        one_hot: (classes, classes), the identity.
        at_once: the largest batch for which it is the faster way; None for any.
        kernels: name of a weight → its convolution.
    """

    def __init__(
        self, layers: list[Layer], one_hot: Tensor, at_once: int | None, kernels: Mapping[str, Convolution]
    ) -> None:
        self.layers, self.at_once, self._one_hot, self._kernels = layers, at_once, one_hot, kernels
        self._of_maps = isinstance(layers[0], Convolution)

    @classmethod
    def of(cls, module: nn.Module, input_shape: tuple[int, ...], device: torch.device) -> Self | None:
        """Return the chain of a module for examples of a shape, or None if the module is not one.

        On a GPU only linear layers make a chain: torch's convolutions are faster there.
        """
        if not is_sequence(module) or any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return None
        assert isinstance(module, nn.Sequential)
        modules = list(module)  # children() would list a layer that is called twice only once
        kinds = "".join(_letter(m) for m in modules)
        # parameters() lists a tied weight once; a step would write it before its last read
        parameters = list(module.parameters())
        trained = all(p.requires_grad for p in parameters)
        if not trained or len(parameters) != 2 * len(re.findall("[CL]", kinds)):
            return None
        if not re.fullmatch(f"{LINEAR}|{MAPS}", kinds):
            return None
        at_once = MOST_PATCHES // _most_patches(modules, input_shape) if kinds[0] == "C" else None
        if at_once is not None and (at_once < FEW or device.type != "cpu"):
            return None
        layers = [_layer(m, first=index == 0) for index, m in enumerate(modules[kinds[0] == "F" :])]
        one_hot = torch.eye(_outputs(modules[-1]), device=device)
        names = (f"{name}.weight" for name, m in module.named_children() if isinstance(m, nn.Conv2d))
        convolutions = (layer for layer in layers if isinstance(layer, Convolution))
        return cls(layers, one_hot, at_once, dict(zip(names, convolutions, strict=True)))

    def takes(self, batch_size: int) -> bool:
        """Tell whether it is the faster way to train on batches of a size."""
        return self.at_once is None or batch_size <= self.at_once

    def standardise(self, held: Mapping[str, Tensor]) -> None:
        """Standardise some weights from here on, name → bool of their shapes; use the others as they are."""
        for name, layer in self._kernels.items():
            layer.standardised = Standardised(held[name]) if name in held else None

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes) of examples (batch, …), float32."""
        x = x.permute(1, 2, 3, 0) if self._of_maps else x.flatten(1)
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def step(self, x: Tensor, y: Tensor, lr: float, weight_decay: float) -> Tensor:
        """Make one SGD step on a batch, in place, without autograd; return the mean loss before it.

        Args:
            x: (batch, …) float32.
            y: (batch,) int64.
            lr: learning rate.
            weight_decay: L2 penalty, as in torch.optim.SGD.
        """
        batch = y.shape[0]  # len(y) takes ten times as long
        log_p = self.logits(x).log_softmax(1)
        loss = nll_loss(log_p, y)
        delta = log_p.exp_().div_(batch).sub_(self._one_hot.index_select(0, y), alpha=1 / batch)
        keep = 1 - lr * weight_decay
        for layer in reversed(self.layers):
            delta = layer.backward(delta, lr, keep)
        return loss


def _letter(module: nn.Module) -> str:
    """Return the letter of a layer that a chain may have; a question mark for others."""
    if type(module) is nn.Flatten:
        return "F" if (module.start_dim, module.end_dim) == (1, -1) else "?"
    if type(module) is nn.Conv2d:
        whole = module.groups == 1 and module.bias is not None and module.padding_mode == "zeros"
        dense = {*module.stride, *module.dilation} == {1} and not isinstance(module.padding, str)
        return "C" if whole and dense else "?"
    if type(module) is nn.MaxPool2d:
        return "?" if module.return_indices else "P"
    if type(module) is nn.Linear:
        return "L" if module.bias is not None else "?"
    return "R" if type(module) is nn.ReLU else "?"


def _layer(module: nn.Module, *, first: bool) -> Layer:
    """Return the layer of a chain that computes as a module."""
    if isinstance(module, nn.Linear):
        return Linear(module, first=first)
    if isinstance(module, nn.Conv2d):
        return Convolution(module, first=first)
    if isinstance(module, nn.MaxPool2d):
        return MaxPool(module)
    return Flatten() if isinstance(module, nn.Flatten) else ReLU()


@torch.no_grad()
def _most_patches(modules: list[nn.Module], input_shape: tuple[int, ...]) -> int:
    """Return how many numbers the patches of an example have in the convolution with the most."""
    most, x = 0, next(modules[0].parameters()).new_zeros(1, *input_shape)
    for module in modules:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            most = max(most, patches_of(module, *x.shape[2:]))
    return most


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else 0
