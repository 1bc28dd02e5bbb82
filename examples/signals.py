"""Signals: sine, square or sawtooth, 64 samples with noise.  A data set and a Conv1d model in one file.

    fedray run tune_configs/quickstart.yaml --import examples/signals.py data.name=waves model=conv1d

The waves are made up. They are float32 (channels, length), and need no normalisation.
"""

from pathlib import Path

import numpy as np
from torch import nn

from fedray import DATASETS, MODELS, Architecture, Dataset, DatasetSpec, Examples

LENGTH, TRAIN, TEST = 64, 1200, 300


def load(root: Path | None) -> Dataset:
    """Draw waves of different frequency and phase."""
    rng, count = np.random.default_rng(0), TRAIN + TEST
    frequency, phase = rng.uniform(2, 5, (count, 1)), rng.uniform(0, 1, (count, 1))
    turns = frequency * np.arange(LENGTH) / LENGTH + phase
    y = rng.integers(3, size=count)
    shapes = np.stack([np.sin(2 * np.pi * turns), np.sign(np.sin(2 * np.pi * turns)), 2 * (turns % 1) - 1])
    waves = shapes[y, np.arange(count)] + rng.normal(0, 0.1, (count, LENGTH))
    x = waves[:, None].astype(np.float32)  # one channel
    train, test = Examples(x[:TRAIN], y[:TRAIN]), Examples(x[TRAIN:], y[TRAIN:])
    return Dataset("waves", train, test, num_classes=3, input_shape=(1, LENGTH))


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return two convolutions along time, and a linear layer on the largest value of each channel."""
    channels, _ = input_shape
    return nn.Sequential(
        nn.Conv1d(channels, 16, 7, padding=3),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 32, 7, padding=3),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


DATASETS["waves"] = DatasetSpec(
    load=load, input_shape=(1, LENGTH), num_classes=3, train_examples=TRAIN, test_examples=TEST
)
MODELS["conv1d"] = Architecture(
    build, source="this file", summary="2 conv1d of 7 (16, 32) with BatchNorm, maximum, fc classes; ReLU"
)
