"""Training examples that stay on a GPU: batches are gathered there, and no client's examples are copied."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedray.data.datasets import Dataset

SHARE = 1 / 8
"""Of the card's free memory that examples may take; several workers may share the card."""
ROWS = 10_000
"""Examples that are normalised at once."""


@dataclass(frozen=True)
class Resident:
    """All training examples of a data set on one device.

    Args:
        x: (n, …), normalised.
        y: (n,) int64.
    """

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> "Resident | None":
        """Put the training examples on a GPU; None on a CPU, or where they take too much of the memory.

        A data set that is prepared by a user's function stays on the CPU: the function may draw random
        numbers for each client.
        """
        if device.type == "cpu" or dataset.prepare is not None:
            return None
        entries = len(dataset.train) * int(np.prod(dataset.input_shape))
        free, _ = torch.cuda.mem_get_info(device)
        if entries * (8 if dataset.tokens else 4) > SHARE * free:
            return None
        return cls.on(dataset, device)

    @classmethod
    def on(cls, dataset: Dataset, device: torch.device) -> "Resident":
        """Put the training examples on a device."""
        train = dataset.train
        dtype = torch.int64 if dataset.tokens else torch.float32
        x = torch.empty(len(train), *dataset.input_shape, dtype=dtype, device=device)
        for start in range(0, len(train), ROWS):
            x[start : start + ROWS] = dataset.normalise(train.x[start : start + ROWS])
        return cls(x, torch.from_numpy(np.array(train.y)).to(device))


@dataclass(frozen=True)
class Share:
    """The examples of one client among those that stay on a device.

    Args:
        of: all examples.
        rows: (n,) int64 on the CPU, the client's.
    """

    of: Resident
    rows: Tensor

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some examples, by their place among the client's, in fresh memory on the device."""
        there = self.rows.index_select(0, rows).to(self.of.x.device)
        return self.of.x.index_select(0, there), self.of.y.index_select(0, there)
