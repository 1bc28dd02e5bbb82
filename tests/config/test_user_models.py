"""Networks of a user's own in a run: refused with the key before anything starts, one broken one alone."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedray.cli import app
from fedray.errors import ConfigError, DataError
from fedray.experiment.run import Federation, run
from fedray.models import MODELS, Architecture, InputShape
from tests.experiment import tiny


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def raising(*_: Any) -> Any:
    raise RuntimeError("a bug in this model")


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add a model named `mine` to the table."""

    def put(build: Callable[[], nn.Module], accepts: Any = lambda shape: None, name: str = "mine") -> None:
        architecture = Architecture(lambda shape, classes: build(), accepts, "this test", "made up")
        monkeypatch.setitem(MODELS, name, architecture)

    return put


def nothing_accepted(shape: InputShape) -> str | None:
    raise RuntimeError("a bug in accepts")


class Whitened(nn.Module):
    """An operation with a weight whose FLOPs are unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.system, self.head = nn.Parameter(torch.eye(64)), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.linalg.solve(self.system, x.flatten(1).t()).t())
        return logits


BROKEN: list[tuple[Callable[[], nn.Module], Any, str]] = [
    (
        raising,
        None,
        "mine cannot be built for images of 1×8×8 and 10 classes: RuntimeError: a bug in this model",
    ),
    (lambda: flat(nn.Linear(64, 3)), None, r"mine returns a tensor of shape \(2, 3\); expected are logits"),
    (lambda: flat(nn.Linear(63, 10)), None, r"mine fails on 2 images of 1×8×8 .* in 1 \(Linear\)"),
    (
        lambda: flat(nn.Linear(64, 10)),
        nothing_accepted,
        "its `accepts` raised RuntimeError: a bug in accepts",
    ),
    (Whitened, None, r"mine: the FLOPs of .*solve.* with system cannot be counted; use matrix products"),
]


@pytest.mark.parametrize(("build", "accepts", "message"), BROKEN)
def test_a_broken_model_is_refused_by_its_key(
    build: Callable[[], nn.Module], accepts: Any, message: str, add: Callable[..., None]
) -> None:
    add(build, accepts or (lambda shape: None))
    with pytest.raises(ConfigError, match=rf"(?s)^model \(config\): .*{message}"):
        tiny.config({"model": "mine"})


@pytest.mark.parametrize(("build", "accepts", "message"), BROKEN)
def test_a_broken_model_is_no_matter_to_the_others(
    build: Callable[[], nn.Module], accepts: Any, message: str, add: Callable[..., None]
) -> None:
    add(build, accepts or (lambda shape: None))
    assert tiny.config({"model": "resnet18", "norm": "static"}).model == "resnet18"
    with pytest.raises(ConfigError, match="mlp has no BatchNorm") as error:
        tiny.config({"model": "mlp", "norm": "static"})
    assert "mine" not in str(error.value)
    with pytest.raises(ConfigError, match="vgg11 halves the image"):
        tiny.config({"model": "vgg11"})


@pytest.mark.parametrize(
    ("build", "accepts"), [(raising, None), (lambda: nn.Flatten(), None), (raising, nothing_accepted)]
)
def test_the_list_of_models_says_what_is_broken(
    build: Callable[[], nn.Module], accepts: Any, add: Callable[..., None]
) -> None:
    add(build, accepts or (lambda shape: None))
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0, done.output
    assert "mine" in done.output
    assert "resnet18" in done.output
    assert ("broken" in done.output) == (accepts is None)


NORMED = {
    "batch norm 1d": lambda: flat(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
    "one pixel": lambda: nn.Sequential(nn.Conv2d(1, 9, 8), nn.BatchNorm2d(9), nn.Flatten(), nn.Linear(9, 10)),
    "lazy": lambda: flat(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(10)),
}


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("norm", ["average", "local", "static"])
def test_a_run_with_last_batches_of_one(name: str, norm: str, add: Callable[..., None], in_tmp: Any) -> None:
    add(NORMED[name])
    sizes = Federation.of(tiny.config()).place.population.partition.sizes
    config = tiny.config({"model": "mine", "norm": norm, "method.batch_size": int(sizes[0]) - 1})
    first, again = run(config), run(config)
    assert first.result["status"] == "finished"
    assert first.weights_sha256 == again.weights_sha256


@pytest.mark.parametrize("name", NORMED)
def test_batches_of_one_are_refused_before_anything_starts(
    name: str, add: Callable[..., None], in_tmp: Any
) -> None:
    add(NORMED[name])
    with pytest.raises(
        ConfigError, match=r"^method\.batch_size: 1, but mine cannot be trained on one example"
    ):
        run(tiny.config({"model": "mine", "method.batch_size": 1}))
    options = {"data.partition.kind": "bootstrap", "data.partition.examples": 1}
    with pytest.raises(
        DataError, match=r"^data\.partition: 10 client\(s\) have one example \(clients \[0, 1"
    ):
        run(tiny.config(options | {"model": "mine", "clients.population": 10}))
    assert list(in_tmp.iterdir()) == []
    assert (
        run(tiny.config(options | {"model": "mlp", "clients.population": 10})).result["status"] == "finished"
    )


def test_a_model_that_draws_runs_alike(add: Callable[..., None], in_tmp: Any) -> None:
    add(lambda: flat(nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10)))
    config = tiny.config({"model": "mine"})
    torch.manual_seed(1)
    first = run(config)
    assert re.fullmatch("[0-9a-f]{64}", first.weights_sha256)
    assert {run(config).weights_sha256 for _ in range(2)} == {first.weights_sha256}
