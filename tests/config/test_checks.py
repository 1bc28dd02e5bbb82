"""What keeps a well-formed config from running: options that exclude each other, what a method refuses."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from fedray.config.trees import Tree
from fedray.errors import ConfigError
from fedray.experiment.run import Federation
from fedray.federation.method import Method, Setting
from fedray.federation.pool import LocalPool
from fedray.federation.server import Server
from fedray.methods import METHODS
from fedray.models import MODELS, Architecture, InputShape
from tests import small
from tests.experiment import tiny

every_method = pytest.mark.parametrize("name", METHODS)


def refused(changes: Tree) -> str:
    """Return why a tiny run with dotted keys changed cannot be made."""
    with pytest.raises(ConfigError) as caught:
        tiny.config(changes)
    return str(caught.value)


# ── optimisers


@every_method
def test_adam_with_momentum_is_refused(name: str) -> None:
    options = {"method.name": name, "data.server_fraction": 0.1, "method.optimizer": "adam"}
    message = refused(options | {"method.momentum": 0.9})
    assert message == "method.momentum (config): 0.9, but Adam does not use momentum; set it to 0"
    assert tiny.config(options).method.options.optimizer == "adam"
    assert tiny.config(options | {"method.momentum": 0}).method.options.momentum == 0


def test_either_alone_is_fine() -> None:
    assert tiny.config({"method.momentum": 0.9}).method.options.momentum == 0.9
    assert tiny.config({"method.optimizer": "adam", "method.weight_decay": 0.1}).method.options.momentum == 0


# ── methods that decide by validation data


DECIDING = {
    "ceafl": {"method.name": "ceafl"},
    "agent": {"method.name": "staged", "method.policy": "agent"},
    "bandit": {"method.name": "staged", "method.policy": "bandit"},
}


@pytest.mark.parametrize("who", DECIDING)
def test_whoever_decides_by_validation_data_needs_some(who: str) -> None:
    message = refused(DECIDING[who] | {"data.validation_fraction": 0})
    assert message.startswith(
        f"data.validation_fraction (config): 0, but {DECIDING[who]['method.name']} uses"
    )
    assert tiny.config(DECIDING[who] | {"data.validation_fraction": 0.01}).method.options.uses_validation_data


@every_method
def test_what_a_method_asks_of_validation_data_is_declared(name: str) -> None:
    """Every method runs without validation data with its defaults, or is refused before it starts."""
    options = {"method.name": name, "data.server_fraction": 0.1, "data.validation_fraction": 0, "rounds": 10}
    if METHODS[name]().uses_validation_data:
        assert refused(options).startswith("data.validation_fraction")
        return
    config = tiny.config(options)
    federation = Federation.of(config)
    server = Server(federation.place, LocalPool(federation.place), federation.schedule, federation.side)
    small.run(server)


# ── methods that need channels


class Blocks(nn.Module):
    """A network in which no channels can be told apart: its layers are added up."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(pixels, 4), nn.Linear(pixels, 4), nn.Linear(4, classes)

    def forward(self, x):
        return self.head((self.one(x.flatten(1)) + self.two(x.flatten(1))).relu())


def blocks(input_shape: InputShape, num_classes: int) -> nn.Module:
    return Blocks(input_shape[1] * input_shape[2], num_classes)


@pytest.fixture
def without_channels(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """A model of the table, named `blocks`, without channels that could be removed."""
    architecture = Architecture(blocks, lambda shape: None, "made up", "two layers that are added up")
    monkeypatch.setitem(MODELS, "blocks", architecture)
    return architecture


@pytest.mark.parametrize("name", ["fedavg_small", "pqsu"])
def test_a_method_that_removes_channels_refuses_a_model_without_any(
    name: str, without_channels: Architecture
) -> None:
    options = {"method.name": name, "data.server_fraction": 0.1}
    message = refused(options | {"model": "blocks"})
    assert message.startswith("method (config): model=blocks has no channels that can be removed as a whole")
    assert "mlp, lenet5, cnn" in message, "it says which have"
    assert tiny.config(options | {"model": "mlp"}).method.name == name


@every_method
def test_every_method_runs_without_channels_or_says_which_key_to_change(
    name: str, without_channels: Architecture
) -> None:
    problem = METHODS[name]().check(small.setting(architecture=without_channels))
    assert problem is None or problem.startswith(("model=", "method."))
    assert METHODS[name]().check(small.setting(architecture=small.CNN)) is None


# ── what a method is asked


@dataclass(frozen=True, kw_only=True)
class Picky(Method):
    """Remembers what it was asked, and refuses long runs."""

    citation: ClassVar[str] = "Nobody, 2024"
    asked: ClassVar[list[Setting]] = []

    most: int = 10

    def check(self, setting: Setting) -> str | None:
        self.asked.append(setting)
        return f"method.most={self.most} is below {setting.rounds}" if setting.rounds > self.most else None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    monkeypatch.setitem(METHODS, "picky", Picky)
    Picky.asked.clear()
    return Picky.asked


def test_a_method_is_asked_with_the_model_the_clients_and_the_rounds(asked: list[Setting]) -> None:
    tiny.config(
        {"method.name": "picky", "rounds": 7, "clients.population": 9, "clients.cohort": 2, "model": "cnn"}
    )
    setting = asked[-1]
    assert (setting.rounds, setting.population, setting.cohort) == (7, 9, 2)
    assert (setting.model.name, setting.model.input_shape, setting.model.num_classes) == (
        "cnn",
        (1, 8, 8),
        10,
    )
    assert len(setting.model.channel_groups) == 3


def test_what_it_answers_is_what_is_said(asked: list[Setting]) -> None:
    message = refused({"method.name": "picky", "rounds": 11})
    assert message == "method (config): method.most=10 is below 11"
    assert tiny.config({"method.name": "picky", "rounds": 11, "method.most": 11}).rounds == 11


def test_it_is_not_asked_about_a_model_that_is_refused_anyway(asked: list[Setting]) -> None:
    for changes in ({"model": "nothing"}, {"model": "vgg11"}, {"data.name": "nothing"}):
        message = refused({"method.name": "picky", "rounds": 11} | changes)
        assert "method.most" not in message
    assert not asked


# ── shares of the examples


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.3, 0.57])
def test_a_population_may_use_every_example_that_is_left(fraction: float) -> None:
    changes = {"data.validation_fraction": fraction}
    left = len(Federation.of(tiny.config(changes)).deal.splits.train)
    config = tiny.config(changes | {"clients.population": left})
    assert len(Federation.of(config).place.population) == left
    message = refused(changes | {"clients.population": left + 1})
    assert f"digits leaves about {left:,} training examples" in message
