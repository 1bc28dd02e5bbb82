"""What training a slice of a model changes: the scaler, and cross-entropy over the client's own classes.

Both are arguments of `client.sgd`. Diao et al. (HeteroFL), ICLR 2021.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedray.training.engine import Step, Weights
from fedray.types import ChannelGroup


@dataclass(frozen=True)
class Scaler:
    """Divide what each sliced layer computes by the slice's rate, as dropout does with what it keeps.

    A layer's output is linear in its weight and bias, so these are divided. The model that is evaluated has
    none of it.

    Args:
        tensors: names of weights and biases.
        rate: share of the server's channels that the slice has, in (0, 1].
    """

    tensors: frozenset[str]
    rate: float

    @classmethod
    def of(cls, groups: Collection[ChannelGroup], rate: float) -> "Scaler":
        """Return the scaler of the layers that compute the channels of some groups."""
        own = {name for g in groups for name in g.rows if name in (f"{g.name}.weight", f"{g.name}.bias")}
        return cls(frozenset(own), rate)

    def __call__(self, weights: Weights) -> Mapping[str, Tensor]:
        """Return the weights of the forward pass."""
        return {name: w / self.rate if name in self.tensors else w for name, w in weights.items()}


@dataclass(frozen=True)
class MaskedCrossEntropy:
    """Cross-entropy where the logits of absent classes are zero: they get no gradient.

    Args:
        absent: bool (classes,).
    """

    absent: Tensor

    def __call__(self, step: Step) -> Tensor:
        """Return the mean over the batch."""
        return cross_entropy(step.logits.masked_fill(self.absent.to(step.logits.device), 0.0), step.y)


def absent_classes(y: Tensor, num_classes: int) -> Tensor:
    """Return a bool vector (num_classes,): the classes of which there is no example in `y`."""
    absent = torch.ones(num_classes, dtype=torch.bool)
    absent[y] = False
    return absent
