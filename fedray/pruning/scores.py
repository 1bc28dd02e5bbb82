"""How much each weight matters. Every score is a flat float32 vector (size,), higher is more important."""

from math import sqrt

from torch import Tensor

from fedray.types import Mask, Params


def magnitude(params: Params) -> Tensor:
    """Return |w|."""
    return params.flat.abs()


def sensitivity(params: Params, gradient: Tensor) -> Tensor:
    """Return |g·w|, the first-order change of the loss when the weight is removed.

    Source: connection sensitivity, Lee et al., "SNIP", ICLR 2019 (without its normalisation, which does not
        change the order).
    """
    return (params.flat * gradient).abs()


def in_units_of_layer(scores: Tensor, mask: Mask) -> Tensor:
    """Divide each prunable tensor's scores by their mean over the entries held, so that 1 is the tensor's
    average.

    Layers differ in scale by orders of magnitude; a threshold on these scores means the same in each of them.
    A tensor whose mean is zero, or that holds nothing, keeps its scores.
    """
    scaled = scores.clone()
    for name in mask.layout.prunable_names:
        span = mask.layout.spans[name]
        held = scores[span][mask.flat[span]]
        mean = float(held.mean()) if len(held) else 0.0
        if mean > 0:
            scaled[span] /= mean
    return scaled


def l2_distance(first: Params, second: Params) -> float:
    """Return ‖first − second‖₂ over all weights of convolutions and linear layers, pruned ones (zeros)
    included.

    Running statistics, biases and affine parameters of norms are left out: they would dominate.

    Source: learning distance, He et al., "Sparse Double Descent", ICML 2022, as FRLP uses it.
    """
    layout = first.layout
    total = 0.0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if len(shape) >= 2:
            total += float((first[name] - second[name]).double().square().sum())
    return sqrt(total)
