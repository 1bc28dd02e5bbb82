"""The layout of a module's flat vector: which tensors it has, in which order, and which may be pruned."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.types import Layout

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers of which the last one is the classifier."""
LAYERS = (
    *PRODUCTS,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers of which the first one is the input layer."""


def layout_of(module: nn.Module, *, prune_first: bool = True, prune_last: bool = False) -> Layout:
    """Return the layout of a module's flat vector: parameters, then float buffers that `state_dict` saves.

    Prunable is every parameter of two or more dimensions but those of normalisation and of the classifier
    (see `_weights`); never a bias or a running statistic. The flags are those of `ModelSpec.of`.

    Raises:
        ConfigError: if it is no module, if a tensor is not float32 or has no entries.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model: `build` returned {type(module).__name__}, not an nn.Module")
    named = list(tensors_of(module))
    for name, tensor in named:
        if not tensor.numel():
            raise ConfigError(f"model: {name} of shape {tuple(tensor.shape)} has no entries; leave it out")
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"model: {name} is {tensor.dtype}; a model is one float32 vector. Build it in torch.float32"
            )
    weights = _weights(module)
    fixed = (weights.first if not prune_first else set()) | (weights.last if not prune_last else set())
    prunable = weights.all - fixed
    return Layout(
        names=tuple(name for name, _ in named),
        shapes=tuple(tuple(tensor.shape) for _, tensor in named),
        prunable=tuple(id(tensor) in prunable for _, tensor in named),
        trainable=tuple(tensor.requires_grad for _, tensor in named),
    )


class _Weights(NamedTuple):
    """Ids of parameters: all weights, and those of the first and of the last layer that has some."""

    all: set[int]
    first: set[int]
    last: set[int]


def _weights(module: nn.Module) -> _Weights:
    """Return the parameters of two or more dimensions that belong to no normalisation.

    A parameter with at most one dimension longer than 1, such as a shift of shape (1, c, 1, 1), is a vector,
    unless it is the weight of a convolution or linear layer. The last layer, the classifier, is the last
    convolution or linear layer; where there is none, the last weight.
    """
    norms = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    products = [m for m in module.modules() if isinstance(m, PRODUCTS)]
    kernels = {id(m._parameters.get("weight")) for m in products}
    weights = [
        id(p)
        for p in module.parameters()
        if id(p) not in norms and p.dim() > 1 and (id(p) in kernels or sum(n > 1 for n in p.shape) > 1)
    ]

    def held(layer: nn.Module) -> list[int]:
        own = {id(p) for p in layer.parameters()}  # a parametrised layer keeps its weight in a child
        return [weight for weight in weights if weight in own]

    firsts = [held(m)[:1] for m in module.modules() if isinstance(m, LAYERS) and held(m)]
    lasts = [held(m) for m in products if held(m)]
    first, last = next(iter(firsts), weights[:1]), next(reversed(lasts), weights[-1:])
    return _Weights(set(weights), set(first), set(last))


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises: one of torch, or another whose class is named …Norm."""
    return not isinstance(module, LAYERS) and re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the flat vector, in its order; a tied tensor once, under its first name."""
    yield from module.named_parameters()
    saved = module.state_dict().keys()
    yield from ((n, b) for n, b in module.named_buffers() if b.is_floating_point() and n in saved)
