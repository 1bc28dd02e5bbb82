"""Scores: the importance of each weight, as a flat float32 vector (size,); higher is more important."""

from math import inf, sqrt
from typing import Literal

import numpy as np
from torch import Tensor

from fedray.shares import floor_of
from fedray.types import Layout, Mask, Params

Scaling = Literal["minmax", "robust"]


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


def loss_deviation(initial: Params, trained: Params) -> Tensor:
    """Return (trained − initial)²: how far training on some examples has moved each weight.

    Its mean over clients is the guidance of AutoFLIP, Internò et al., 2024, before it is scaled.
    """
    return (trained.flat - initial.flat).square()


def scaled_per_layer(scores: Tensor, layout: Layout, scaling: Scaling) -> Tensor:
    """Bring the scores of each prunable tensor to a common range.

    A tensor whose scores are all equal, as in a layer that did not move, gets infinity: its entries cannot be
    ranked, and removing all of them would cut the network in two.

    Args:
        scores: (size,), finite; those of entries that are not prunable stay unchanged.
        layout: the model's layout.
        scaling: `minmax`: (s − min) / (max − min), in [0, 1]; `robust`: (s − median) / IQR, without bounds,
            over max − min instead where the quartiles coincide. Of an even number of scores the median is
            the mean of the two in the middle, as in scikit-learn's RobustScaler; AutoFLIP's published code
            takes the lower of the two.
    """
    scaled = scores.clone()
    for name in layout.prunable_names:
        span = layout.spans[name]
        low, high = (float(bound) for bound in scores[span].aminmax())
        if low == high:
            scaled[span] = inf
        elif scaling == "minmax":
            scaled[span] = (scores[span] - low) / (high - low)
        else:
            q1, median, q3 = np.quantile(scores[span].numpy(), (0.25, 0.5, 0.75)).tolist()
            scaled[span] = (scores[span] - median) / (q3 - q1 or high - low)
    return scaled


def above_quantile(scores: Tensor, share: float) -> Tensor:
    """Return a bool vector (n,): the scores above their quantile.

    Without ties, ⌊share · (n − 1)⌋ + 1 scores are not above it. All that tie with it are not above, unless
    they are the highest: at least one score always is. Infinite scores are above, and do not count.

    Args:
        scores: (n,).
        share: of the quantile, in [0, 1).
    """
    finite = scores[scores.isfinite()]
    if not len(finite):
        return scores == inf
    cut = finite.kthvalue(1 + floor_of(share, len(finite) - 1)).values
    return (scores > cut) | (scores == finite.max())


def l2_distance(first: Params, second: Params) -> float:
    """Return ‖first − second‖₂ over all tensors of two or more dimensions, pruned weights (zeros)
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
