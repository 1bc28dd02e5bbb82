"""Sequences of tokens: reviews of 12 words, praise or blame.  A data set and a model with attention.

    fedray run tune_configs/quickstart.yaml --import examples/tokens.py data.name=reviews model=attention \
        method.optimizer=adam method.lr=0.01

The reviews are made up: of 30 words a third praise, a third blame, and the others say nothing. Tokens are
whole numbers below `tokens`; the model embeds as many. FLOPs of attention count as they are (docs/costs.md).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedray import DATASETS, MODELS, Architecture, Dataset, DatasetSpec, Examples

WORDS, LENGTH, TRAIN, TEST = 30, 12, 1200, 300


def load(root: Path | None) -> Dataset:
    """Draw the reviews: each word is one of praise, of blame or neither, with other shares in each class."""
    rng, count = np.random.default_rng(0), TRAIN + TEST
    y = rng.integers(2, size=count)  # 0 praise, 1 blame
    shares = np.array([[0.4, 0.15, 0.45], [0.15, 0.4, 0.45]])
    kind = (rng.random((count, LENGTH, 1)) > shares.cumsum(axis=1)[y][:, None]).sum(axis=2)
    words = 3 * rng.integers(WORDS // 3, size=(count, LENGTH)) + kind  # int64
    train, test = Examples(words[:TRAIN], y[:TRAIN]), Examples(words[TRAIN:], y[TRAIN:])
    return Dataset("reviews", train, test, num_classes=2, input_shape=(LENGTH,), tokens=WORDS)


class Attention(nn.Module):
    """Embedding with positions, one layer of attention, and a linear layer on the mean over positions."""

    def __init__(self, length: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.attention = nn.MultiheadAttention(width, num_heads=2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits (n, classes) of reviews, int64 (n, length)."""
        x = self.embedding(words) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the network for reviews of a given length."""
    (length,) = input_shape
    return Attention(length, num_classes)


DATASETS["reviews"] = DatasetSpec(
    load=load, input_shape=(LENGTH,), num_classes=2, train_examples=TRAIN, test_examples=TEST, tokens=WORDS
)
MODELS["attention"] = Architecture(
    build, source="this file", summary="embedding 16, attention with 2 heads, fc classes", tokens=WORDS
)
