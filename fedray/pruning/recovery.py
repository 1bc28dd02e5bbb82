"""Recovery of a pruned model: a teacher that combines classifiers, and distillation from it.

A classifier is written as one matrix (classes, width + 1), with its bias in the last column.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax


def classifier(weights: Mapping[str, Tensor], head: str) -> Tensor:
    """Return a model's classifier as one matrix (classes, width + 1), a copy.

    Args:
        weights: name → weight, e.g. the model's params.
        head: the classifier's dotted name.
    """
    weight, bias = weights[f"{head}.weight"], weights.get(f"{head}.bias")
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, bias[:, None]], 1)


def classify(rows: Tensor, features: Tensor) -> Tensor:
    """Return the logits (n, classes) of a classifier for inputs (n, width)."""
    return linear(features, rows[:, :-1], rows[:, -1])


def ensemble(rows: Tensor, weights: Tensor, otherwise: Tensor) -> Tensor:
    """Return the classifier that equals an ensemble of classifiers.

    With logits z[c] = Σ_k a[k, c] (W_k φ + b_k)[c] and Σ_k a[k, c] = 1, an ensemble is linear in the features
    φ, and its row of class c is Σ_k a[k, c] · (row c of classifier k).

    Args:
        rows: (classes, width + 1), the members' rows, each times its weight, added up.
        weights: (classes,), the members' weights of each class, added up, each ≥ 0.
        otherwise: (classes, width + 1), rows for classes in which no member has a weight.
    """
    return torch.where(weights[:, None] > 0, rows / weights[:, None], otherwise)


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return τ² · KL(softmax(taught / τ) ‖ softmax(logits / τ)), the mean over the batch.

    Args:
        logits: (n, classes), of the student.
        taught: (n, classes), of the teacher; it gets no gradient.
        temperature: τ > 0.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    ours, theirs = (log_softmax(z / temperature, 1) for z in (logits, taught.detach()))
    return temperature**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)
