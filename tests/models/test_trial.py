"""Networks of users: a broken one is refused by name before anything starts; others train."""

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedray.errors import ConfigError, MethodError
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.models import Architecture, ModelSpec
from fedray.models.trial import fault
from fedray.types import Mask
from tests import small

Layers = Callable[[], nn.Module]


def architecture(network: Layers) -> Architecture:
    return Architecture(lambda shape, classes: network(), lambda shape: None, "this test", "made up")


def spec(network: Layers) -> ModelSpec:
    return ModelSpec.of("mine", architecture(network), small.SHAPE, small.CLASSES)


class Own(nn.Module):
    """A linear layer, and whatever a test does to its logits (n, 3)."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(16, 3), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.fc(x.flatten(1)))


class Holding(nn.Module):
    """A network that holds something beside its parameters."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        self.inner.what = what

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def frozen() -> nn.Module:
    return flat(nn.Linear(16, 3)).requires_grad_(False)


def exploding() -> nn.Module:
    module = flat(nn.Linear(16, 3))
    nn.init.constant_(module[1].weight, float("nan"))  # type: ignore[index]
    return module


def only_at(mode: bool, last: Callable[[Tensor], Any]) -> Layers:
    """Return a network that does something in training only, or in evaluation only."""

    class Network(Own):
        def forward(self, x: Tensor) -> Any:
            logits = self.fc(x.flatten(1))
            return last(logits) if self.training == mode else logits

    return lambda: Network(lambda logits: logits)


BROKEN: list[tuple[Layers, str]] = [
    (
        lambda: flat(nn.Linear(15, 3)),
        r"fails on 2 images of 1×4×4 in evaluation: RuntimeError: .*in 1 \(Linear\)",
    ),
    (lambda: nn.Conv2d(3, 3, 1), r"fails on 2 images of 1×4×4 in evaluation: RuntimeError: .*channels"),
    (lambda: flat(nn.Linear(16, 4)), r"returns a tensor of shape \(2, 4\); expected are logits"),
    (
        lambda: nn.Linear(4, 3),
        r"returns a tensor of shape \(2, 1, 4, 3\); expected are logits, float32 \(2, 3\)",
    ),
    (lambda: Own(lambda x: (x, x)), r"returns tuple; expected are logits"),
    (lambda: Own(lambda x: {"out": x}), r"returns dict; expected"),
    (lambda: Own(lambda x: x.double()), r"returns float64; expected"),
    (lambda: Own(lambda x: x.sum(1)), r"returns a tensor of shape \(2,\)"),
    (only_at(True, lambda x: (x, x)), r"returns tuple; .* in training"),
    (only_at(False, lambda x: x.argmax(1)), r"returns a tensor of shape \(2,\); .* in evaluation"),
    (only_at(True, lambda x: x / 0), "returns NaN or infinity .* in training"),
    (exploding, "returns NaN or infinity"),
    (lambda: Own(lambda x: x.detach()), "logits that do not depend on any parameter"),
    (frozen, "has no parameters that can be trained"),
    (lambda: Own(lambda x: (x - x.detach()).sqrt()), "gradient of NaN or infinity at fc.weight"),
    (lambda: Holding(torch.Generator()), r"holds inner\.what, a generator"),
    (lambda: Holding(np.random.default_rng(0)), r"holds inner\.what, a generator"),
    (lambda: Holding(torch.ones(3, requires_grad=True)), r"holds inner\.what, a tensor that is trained"),
]


@pytest.mark.parametrize(("network", "message"), BROKEN)
def test_what_cannot_be_trained_is_said(network: Layers, message: str) -> None:
    found = fault(spec(network))
    assert found is not None
    assert re.match(rf"mine .*{message}", found), found


REFUSED: list[tuple[Layers, str]] = [
    (lambda: 1 / 0, r"mine cannot be built for images of 1×4×4 and 3 classes: ZeroDivisionError"),  # type: ignore[list-item, return-value]
    (lambda: nn.Conv2d(0, 3, 1, bias=False), r"weight of shape \(3, 0, 1, 1\) has no entries"),
    (lambda: flat(nn.Linear(16, 3, dtype=torch.float64)), r"1\.weight is torch\.float64"),
    (lambda: flat(nn.Linear(16, 3, dtype=torch.complex64)), r"1\.weight is torch\.complex64"),
    (lambda: Holding(threading.Lock()), "Holding cannot be copied for each worker"),
    (lambda: Holding(torch.ones(2, requires_grad=True) * 2), "Holding cannot be copied for each worker"),
    (nn.Flatten, "mine has no parameters"),
    (lambda: "a network", "`build` returned str, not an nn.Module"),  # type: ignore[list-item, return-value]
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("network", "message"), REFUSED)
def test_what_is_no_model_is_refused(network: Layers, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model: .*{message}"):
        spec(network)


# ── sound networks ───────────────────────────────────────────────────────────────────────────────────────


class Shared(nn.Module):
    """Two layers with one weight, a parameter that takes no part, a constant and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.fc2.weight = self.fc1.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.calls, Tensor) and isinstance(self.scale, Tensor)
        self.calls += 1
        hidden = self.fc2(self.fc1(x.flatten(1)).relu()).relu() * self.scale
        logits: Tensor = self.fc3(hidden) / self.calls
        return logits


RIGHT: dict[str, Layers] = {
    "lazy": lambda: flat(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3)),
    "lazy convolution": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3)),
    "batch norm 1d": lambda: flat(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "squeezed": lambda: Own(lambda x: x.squeeze()),
    "conv 1d": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(1, 3, 4), nn.GroupNorm(3, 3), nn.Flatten()),
    "shared": Shared,
    "nothing to prune": lambda: flat(nn.BatchNorm1d(16), nn.Linear(16, 3)),
    "no linear layer": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "dropout by default": lambda: Own(nn.functional.dropout),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("norm", ["average", "local", "static"])
def test_what_is_right_trains_on_clients_whose_last_batch_is_of_one(name: str, norm: Any) -> None:
    assert fault(spec(RIGHT[name])) is None
    shas = []
    for _ in range(2):
        server = small.server(
            Method(batch_size=5, lr=0.1),
            architecture=architecture(RIGHT[name]),
            norm=norm,
            schedule=Schedule(rounds=2, cohort=3),
            partition=small.dealt(11, 6, 12),
        )
        reports = small.run(server)
        assert {record.fate for report in reports for record in report.clients} == {"folded"}
        assert np.isfinite(reports[-1].metrics["val/loss"])
        shas.append(server.model.sha256)
    assert shas[0] == shas[1]


def test_a_lazy_model_starts_alike_for_the_same_seed() -> None:
    lazy = spec(RIGHT["lazy"])
    assert lazy.layout.shape_of["1.weight"] == (8, 16)
    assert lazy.init(1) == lazy.init(1) != lazy.init(2)


def test_a_lazy_layer_that_takes_no_part_is_refused() -> None:
    class Idle(Own):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.idle = nn.LazyLinear(4)

    with pytest.raises(ConfigError, match=r"model: idle\.weight has no shape after a forward pass"):
        spec(Idle)


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("lazy", {"train"}),
        ("batch norm 1d", {"train"}),
        ("squeezed", {"train", "eval"}),
        ("group norm", {"train", "eval"}),
        ("conv 1d", set()),
        ("shared", set()),
    ],
)
def test_who_needs_two_examples(name: str, modes: set[str]) -> None:
    assert spec(RIGHT[name]).pairs == modes


@pytest.mark.parametrize(
    ("examples", "batch_size", "sizes"),
    [(11, 5, [5, 6]), (10, 5, [5, 5]), (6, 5, [6]), (12, 5, [5, 5, 2]), (3, 2, [3]), (4, 9, [4])],
)
def test_a_last_batch_of_one_is_joined_to_the_one_before(
    examples: int, batch_size: int, sizes: list[int]
) -> None:
    method = Method(batch_size=batch_size)
    for name, expected in (("batch norm 1d", sizes), ("conv 1d", None)):
        client = small.client(method, architecture=architecture(RIGHT[name]), partition=small.dealt(examples))
        found = [len(y) for _, y in client._batches(client.rng, 1, None)]
        whole = [min(batch_size, examples - start) for start in range(0, examples, batch_size)]
        assert found == (whole if expected is None else expected)


@pytest.mark.parametrize(("examples", "batch_size"), [(1, 5), (6, 1)])
def test_one_example_at_a_time_is_refused(examples: int, batch_size: int) -> None:
    client = small.client(
        Method(batch_size=batch_size),
        architecture=architecture(RIGHT["batch norm 1d"]),
        partition=small.dealt(examples),
    )
    params = client.model.init(0)
    for ask in (client.sgd, client.grad):
        with pytest.raises(
            MethodError, match="small cannot be trained on one example at a time, and client 0"
        ):
            ask(params, Mask.full(params.layout))


def test_a_single_example_can_be_classified() -> None:
    for name in ("squeezed", "group norm", "batch norm 1d"):
        client = small.client(
            Method(), architecture=architecture(RIGHT[name]), norm="local", partition=small.dealt(1)
        )
        params = client.model.init(0)
        mask = client.model.norms.global_mask(Mask.full(params.layout))
        assert np.isfinite(client.evaluate(params, mask).losses).all()
