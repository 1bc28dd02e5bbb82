"""Which models can be stacked, found out by a trial."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedray.federation.method import Method
from fedray.federation.worker import Worker
from fedray.models.spec import Architecture
from fedray.training.agreement import Way, way_of
from tests import small


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify by the last output."""
        logits: Tensor = self.head(self.lstm(x.flatten(1).view(-1, 4, 4))[0][:, -1])
        return logits


class Tied(nn.Module):
    """Two layers with one weight, a frozen layer, and a buffer that counts."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Count, and classify."""
        self.calls += 1
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))
        return logits


class Writing(nn.Module):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve in place."""
        return x.mul_(0.5)


def _convolution(*layers: nn.Module, head: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.Flatten(), nn.Linear(head, 3))


def _linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.Linear(8, 3))


MODELS: list[tuple[Way, Callable[[], nn.Module]]] = [
    ("padded", lambda: _linear(nn.LayerNorm(8), nn.GELU())),
    ("padded", lambda: _linear(nn.PReLU())),
    ("padded", lambda: _convolution(nn.GroupNorm(2, 4), head=16)),
    ("padded", lambda: _convolution(nn.AdaptiveMaxPool2d(1), head=4)),
    (
        "padded",
        lambda: nn.Sequential(Writing(), nn.ConvTranspose2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
    ),
    ("padded", Tied),
    ("equal", lambda: _linear(nn.BatchNorm1d(8), nn.ReLU(inplace=True))),
    ("equal", lambda: _linear(nn.BatchNorm1d(8, affine=False))),
    ("equal", lambda: _convolution(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), head=16)),
    ("equal", lambda: _linear(nn.AlphaDropout(0.3))),
    ("alone", lambda: _linear(nn.BatchNorm1d(8, momentum=None))),  # it reads its counter as a number
    ("alone", lambda: _linear(nn.RReLU())),
    ("alone", Recurrent),
]


@pytest.mark.parametrize(("way", "build"), MODELS, ids=[str(k) for k in range(len(MODELS))])
def test_a_trial_finds_the_way(way: Way, build: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture):
    architecture = Architecture(lambda shape, classes: build(), lambda shape: None, "made up", "made up")
    engine = Worker(small.workplace(Method(), architecture=architecture)).engine
    with caplog.at_level(logging.WARNING):
        assert way_of(engine) == way
    assert ("cannot be stacked" in caplog.text) == (way == "alone")
