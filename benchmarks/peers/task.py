"""The federation that every framework gets: data, clients, initial model, hyper-parameters.

This module is loaded in the environments of the peers, which have torch, torchvision and numpy, not fedray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = "task.pt"


@dataclass(frozen=True)
class Task:
    """A federation: the clients draw from `x` and `y`, a cohort of them trains in each round.

    Args:
        x: float32 (n, *input shape), normalised.
        y: int64 (n,), labels.
        clients: for each registered client, its rows of `x` (int64).
        test_x: as `x`, for the accuracy.
        test_y: as `y`.
        cohort: clients of a round.
        batch: examples of an SGD step; each client makes one epoch.
        lr: learning rate of plain SGD.
        model: the network with its initial weights; copy it before you train it.
        name: the model by name, for the frameworks of this checkout.
        checking: whether it is the short training for the accuracy.
    """

    x: Tensor
    y: Tensor
    clients: Sequence[Tensor]
    test_x: Tensor
    test_y: Tensor
    cohort: int
    batch: int
    lr: float
    model: nn.Module
    name: str
    checking: bool

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        torch.save(vars(self), folder / FILE)

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test examples that a model classifies correctly; its mode stays."""
        training = model.training
        model.eval()
        with torch.no_grad():
            share: float = (model(self.test_x).argmax(1) == self.test_y).float().mean().item()
        model.train(training)
        return share


@cache
def load(folder: str) -> Task:
    """Read the federation of a folder, once a process; processes share the memory of the data."""
    return Task(**torch.load(Path(folder) / FILE, mmap=True, weights_only=False))


class CountedLoss(nn.CrossEntropyLoss):
    """Cross-entropy that counts the examples it has seen in this process."""

    seen = 0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        CountedLoss.seen += len(target)
        return super().forward(input, target)

    @classmethod
    def take(cls) -> int:
        """Return the number of examples since the last call."""
        seen, cls.seen = cls.seen, 0
        return seen
