"""Layers in sparse training: standardised weights, and activations that are stored in part.

Both leave the model as it is. `standardised` maps weights to the ones that the forward pass uses, and
`PrunedActivations` is another way to call a module; they fit `view=` and `forward=` of a client's SGD.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

RELU_GAIN = sqrt(2 / (1 - 1 / pi))
"""Gain that keeps a signal's variance through standardised weights and a ReLU: Brock et al., ICLR 2021."""
SMALLEST_SQUARES = 1e-4
"""Below this sum of squares a channel's scale is held: Brock et al., ICLR 2021, in the code of the paper."""

_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def standardised(
    weights: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    gain: float = RELU_GAIN,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Standardise the weights of convolutions, each output channel over the weights it holds.

        Ŵ = gain · (W − μ) / (σ √N)   where the mask is True, and 0 elsewhere

    N, μ and σ are number, mean and standard deviation of a channel's held weights. A channel that holds fewer
    than two has nothing to standardise, and keeps its weights. It can be differentiated by the weights.

    Args:
        weights: name → weight, (out, …); those that are not standardised are returned as they are.
        mask: name → bool, of the same shapes; names beyond those of the weights do not matter.
        gain: of the activation that follows.
        names: of the weights to standardise; None: those of four dimensions (out, in, kh, kw).

    Source: NSConv in Huang et al., "FedMef", CVPR 2024, after scaled weight standardisation, Brock et al.,
        ICLR 2021.
    """
    return {
        name: _standardise(weight, mask[name].to(weight.device), gain)
        if (weight.dim() == 4 if names is None else name in names)
        else weight
        for name, weight in weights.items()
    }


def kernels_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a module's convolutions: those that standardisation is defined for.

    A weight of four dimensions that is no layer's of torch counts as one, since a user's module may call
    `conv2d` with it. Those of transposed convolutions do not: their rows are inputs.
    """
    found = []
    for prefix, layer in module.named_modules():
        convolves = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        foreign = not type(layer).__module__.startswith("torch.")
        for name, weight in layer.named_parameters(prefix, recurse=False):
            own = name.rpartition(".")[2]
            if (convolves and own == "weight") or (foreign and not convolves and _like_kernel(weight)):
                found.append(name)
    return tuple(found)


def _like_kernel(weight: Tensor) -> bool:
    """Tell whether a user's parameter has the shape of a kernel; a shift of shape (1, c, 1, 1) has not."""
    return weight.dim() == 4 and sum(size > 1 for size in weight.shape) > 1


def _standardise(weight: Tensor, held: Tensor, gain: float) -> Tensor:
    rows, held = weight.flatten(1), held.flatten(1)
    count = held.sum(1, keepdim=True)
    own = torch.where(held, rows, 0.0)
    centred = torch.where(held, own - own.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    squares = centred.square().sum(1, keepdim=True)  # N σ²
    scaled = gain * centred * squares.clamp(min=SMALLEST_SQUARES).rsqrt()
    return torch.where(count < 2, own, scaled).view_as(weight)


@dataclass(frozen=True)
class PrunedActivations:
    """Compute logits with all activations, and keep the largest ones alone for the backward pass.

    The gradient of a convolution's or linear layer's weights needs the layer's input. The input's smallest
    entries are not stored and count as zeros there; the gradients of inputs and biases are exact.

    Args:
        share: share of each layer's input, over the whole batch, that is not stored; in [0, 1).

    Source: scaled activation pruning in Huang et al., "FedMef", CVPR 2024, after Jiang et al., "Back Razor",
        NeurIPS 2022.
    """

    share: float

    def __call__(self, module: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the logits of examples `x` by a module with other weights, name → tensor."""
        with _PrunedInputs(self.share):
            logits: Tensor = torch.func.functional_call(module, dict(weights), (x,))
        return logits


class _PrunedInputs(TorchFunctionMode):
    """Let convolutions and linear layers, in any module, store their inputs in part."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func not in (functional.conv2d, functional.linear):
            return func(*args, **given)
        weight = given["weight"] if "weight" in given else args[1]
        of_weight = weight.untyped_storage().data_ptr()

        def pack(saved: Tensor) -> "Tensor | Stored":
            # both save two tensors: the weight, which the gradient of the input needs, and the input
            is_weight = saved.untyped_storage().data_ptr() == of_weight
            return saved if is_weight else store(saved, self.share)

        with saved_tensors_hooks(pack, restore):
            return func(*args, **given)


class Stored(NamedTuple):
    """A tensor's largest entries, and a bit for each entry that marks them."""

    values: Tensor
    bits: Tensor
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of values and bits."""
        return self.values.nbytes + self.bits.nbytes


def store(x: Tensor, share: float) -> Stored:
    """Store the entries of largest magnitude; zeros are never stored.

    Args:
        x: float32 of any shape.
        share: share of its entries that is left out at least, in [0, 1); met to one entry. Of equal entries
            the first ones in memory are stored.
    """
    x = x.detach()
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    flat = x.as_strided((x.numel(),), (1,))  # in order of memory: no copy where channels come last
    kept = _largest(flat.abs(), round((1 - share) * x.numel()))
    padded = functional.pad(kept, (0, -len(kept) % 8)).view(-1, 8)
    bits = (padded * _BITS.to(x.device)).sum(1, dtype=torch.uint8)
    return Stored(flat[kept], bits, x.shape, x.stride())


def restore(stored: "Tensor | Stored") -> Tensor:
    """Return a stored tensor with zeros for the entries left out; return a tensor unchanged."""
    if isinstance(stored, Tensor):
        return stored
    kept = (stored.bits.unsqueeze(1) & _BITS.to(stored.bits.device)) != 0
    flat = torch.zeros(stored.shape.numel(), dtype=stored.values.dtype, device=stored.values.device)
    flat[kept.flatten()[: len(flat)]] = stored.values
    return flat.as_strided(stored.shape, stored.stride)


def _largest(sizes: Tensor, count: int) -> Tensor:
    """Return a bool vector, True for the `count` largest of `sizes` ≥ 0, but for none that is 0."""
    if count >= len(sizes):
        return sizes > 0
    if count == 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    threshold = sizes.kthvalue(len(sizes) - count + 1).values
    kept = sizes > threshold
    if threshold > 0:
        ties = (sizes == threshold).nonzero().squeeze(1)
        kept[ties[: count - int(kept.count_nonzero())]] = True
    return kept
