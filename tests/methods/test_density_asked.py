"""A density that is asked for is reached, made up for, or refused: never missed in silence."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.federation.exchange import Answer, Job
from fedray.federation.method import Method
from fedray.federation.pool import LocalPool
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules, Workplace
from fedray.methods import METHODS
from fedray.methods.ceafl import CEAFL
from fedray.methods.fedmef import FedMef
from fedray.methods.prunefl import PruneFL
from fedray.methods.staged import Staged
from fedray.models import MODELS
from fedray.models.spec import Architecture, InputShape
from fedray.types import ServerState
from tests import small
from tests.experiment import tiny

PRUNING = [name for name, method in METHODS.items() if method.prunes]


def refused(changes: dict[str, Any]) -> str:
    """Return why a tiny run cannot be made."""
    with pytest.raises(ConfigError) as caught:
        tiny.config({"data.server_fraction": 0.1} | changes)
    return str(caught.value)


# ── what cannot be reached is refused before the start


def test_the_methods_that_prune() -> None:
    assert set(METHODS) - set(PRUNING) == {
        *("fedavg", "fedavg_server", "fedavg_warm", "fedlp", "heterofl", "fedrolex")
    }
    assert [name for name in METHODS if METHODS[name]().target is not None] == [
        *("fedavg_small", "random_mask", "staged", "snip", "fedmef")
    ]
    assert METHODS["pqsu"](density=0.5).target == 0.5  # type: ignore[call-arg]


@pytest.mark.parametrize("name", PRUNING)
def test_a_model_without_anything_to_prune(name: str) -> None:
    message = refused({"method.name": name, "prune_first": False})
    assert message == (
        "method (config): prune_first and prune_last leave no weight of model=mlp that may be pruned: they "
        "say whether the first and the last of its layers may be, and it has 2. Set one of them to true, or "
        "take a model with more layers"
    )
    assert tiny.config({"data.server_fraction": 0.1, "method.name": name, "prune_last": True})


def test_the_input_of_the_issue() -> None:
    asked = {"method.name": "staged", "method.density": 0.1, "method.until": 1}
    assert "prune_first and prune_last" in refused(asked | {"prune_first": False})
    assert tiny.config(asked | {"prune_first": False, "model": "lenet5"})
    assert tiny.config(asked | {"prune_first": False, "method.density": 1.0})  # nothing is asked for
    for name in ("fedavg", "fedlp", "fedavg_warm"):
        assert tiny.config({"method.name": name, "prune_first": False})


def _conv1d(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4 * (prod(input_shape) - 2), num_classes)
    )


class Scale(nn.Module):
    """Logits are a tensor of its own times the first pixels; a vector, or a matrix."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, : self.by.shape[0]]
        return x * self.by if self.by.dim() == 1 else x @ self.by


def test_a_model_of_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(name: str, build: Callable[[InputShape, int], nn.Module]) -> None:
        monkeypatch.setitem(MODELS, name, Architecture(build, lambda shape: None, "made up", "a layer"))

    add("vector", lambda shape, classes: Scale(classes))
    add("matrix", lambda shape, classes: Scale(classes, classes))
    add("signal", _conv1d)
    for name in ("staged", "snip", "frlp"):
        message = refused({"method.name": name, "model": "vector"})
        assert "model=vector has no weight that may be pruned: biases, normalisation" in message
    for name in ("staged", "ceafl", "pqsu"):
        message = refused({"method.name": name, "model": "matrix"})
        assert "no weight of model=matrix that may be pruned" in message and "it has 1." in message
        message = refused({"method.name": name, "model": "signal", "prune_first": False})
        assert "no weight of model=signal that may be pruned" in message and "it has 2." in message
    assert tiny.config({"method.name": "staged", "model": "matrix", "prune_last": True})
    assert tiny.config({"method.name": "staged", "model": "signal"})


@pytest.mark.parametrize(
    ("changes", "lowest"),
    [
        ({"method.name": "staged", "method.density": 0.0001}, 5),
        ({"method.name": "snip", "method.density": 0.0005, "method.min_layer": 20}, 86),
        ({"method.name": "random_mask", "method.density": 0.0001}, 5),
        ({"method.name": "fedmef", "method.density": 0.01, "method.min_layer": 1000}, None),
    ],
)
def test_a_density_below_the_minima_of_the_layers(changes: dict[str, Any], lowest: int | None) -> None:
    message = refused(changes | {"model": "lenet5"})
    assert f"method.density={changes['method.density']} cannot be reached: method.min_layer=" in message
    found = float(message.split("The lowest possible density is ")[1].split(";")[0])
    at_that = tiny.config(changes | {"model": "lenet5", "method.density": found})
    assert at_that.method.options.target == found
    refused(changes | {"model": "lenet5", "method.density": round(found * 0.8, 9)})
    assert tiny.config(changes | {"model": "lenet5", "method.min_layer": 0})


@pytest.mark.parametrize(
    "options",
    [
        {"method.name": "pqsu", "method.channels": 0.1},
        {"method.name": "pqsu", "method.density": 0.03},
        {"method.name": "fedavg_small", "method.density": 0.03},
    ],
)
def test_channels_that_leave_less_than_the_minimum_of_a_layer(options: dict[str, Any]) -> None:
    changes = options | {"model": "lenet5", "data.server_fraction": 0.1}
    message = refused(changes | {"method.min_layer": 50})
    # conv1 has 6 channels of 25 weights, and keeps one of them
    assert "method.min_layer=50 is more than the 25 of 150 weights that conv1.weight keeps" in message
    assert tiny.config(changes | {"method.min_layer": 25})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.name": "frlp", "rounds": 1}, "method.until=0.6 of 1 round(s) ends before round 1"),
        ({"method.name": "frlp", "method.until": 0}, "method.until=0 of 3 round(s) ends before round 1"),
        ({"method.name": "frlp", "method.interval": 2}, "method.until=0.6 of 3 round(s) ends before round 2"),
        ({"method.name": "frlp", "method.prune_rounds": []}, "method.prune_rounds=[] never prunes"),
        ({"method.name": "frlp", "method.single_shot": 0}, "method.single_shot=0 lets no event prune"),
        (
            {"method.name": "ceafl", "method.interval": 2},
            "method.until=0.6 of 3 round(s) ends before round 2",
        ),
        (
            {"method.name": "fedmef", "method.interval": 2},
            "method.interval=2 puts the first adjustment after",
        ),
        (
            {"method.name": "prunefl", "method.initial_max_rounds": 0, "method.interval": 3},
            "method.initial_max_rounds=0 leaves out the first pruning, and no mask is rebuilt in 3 round(s)",
        ),
        (
            {"method.name": "staged", "method.policy": "bandit", "method.min_density": 1.0},
            "method.min_density=1.0 is not below method.initial_density=1.0",
        ),
        (
            {
                "method.name": "staged",
                "method.threshold": 1,
                "method.initial_density": 0.3,
                "method.min_density": 0.5,
            },
            "method.min_density=0.5 is not below method.initial_density=0.3",
        ),
        (
            {"method.name": "staged", "method.policy": "agent", "method.steepest": 0.95},
            "method.steepest=0.95 lets a policy prune nothing: its mildest action keeps 0.9",
        ),
        (
            {"method.name": "staged", "method.density": 0.5, "method.initial_density": 0.3},
            "method.density=0.5 is above method.initial_density=0.3",
        ),
    ],
)
def test_a_schedule_that_never_prunes(changes: dict[str, Any], said: str) -> None:
    assert said in refused({"rounds": 3} | changes)


@pytest.mark.parametrize("name", [name for name in PRUNING if name != "frlp"])
def test_a_single_round_is_enough_for_what_prunes_before_it_or_after_it(name: str) -> None:
    assert tiny.config({"method.name": name, "rounds": 1, "data.server_fraction": 0.1}).rounds == 1


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 10])
def test_stages_of_a_short_run_end_at_the_density(rounds: int) -> None:
    for options in (
        {},
        {"until": 1.0},
        {"start": 1.0, "until": 1.0},
        {"stages": 12},
        {"until": 0.0, "start": 0.0},
    ):
        server = small.server(Staged(density=0.25, **options), schedule=Schedule(rounds, 4))
        last = small.run(server)[-1]
        assert last.metrics["density/global"] == last.metrics["density/asked"] == 0.25
        assert not last.notes


# ── what shows only in the run is made up at the next chance


class Deaf(LocalPool):
    """A pool that loses all answers of some rounds of training."""

    silent: tuple[int, ...] = ()

    def __init__(self, place: Workplace) -> None:
        super().__init__(place)
        self.hears = place.rules

    def run(self, job: Job, chunks: Any) -> Answer:
        lost = job.training and job.round in self.silent
        self.worker.place = replace(self.worker.place, rules=Rules(deadline_s=1e-9) if lost else self.hears)
        return super().run(job, chunks)


def deaf_in(*rounds: int) -> type[Deaf]:
    return type("DeafIn", (Deaf,), {"silent": rounds})


@dataclass
class Watched:
    """The masks after each round, and the reports."""

    server: Server
    masks: list[Any] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)

    @property
    def asked(self) -> list[float]:
        return [report.metrics["density/asked"] for report in self.reports]

    @property
    def density(self) -> list[float]:
        return [report.metrics["density/global"] for report in self.reports]

    @property
    def moved(self) -> list[int]:
        """The rounds after which the mask is another one."""
        return [i for i, (a, b) in enumerate(zip(self.masks, self.masks[1:], strict=False), 1) if a != b]


def watch(method: Method, *silent: int, rounds: int = 8, **place: Any) -> Watched:
    server = small.server(
        method, schedule=Schedule(rounds, 4), pool=deaf_in(*silent), data=small.dataset(400), **place
    )
    found = Watched(server)
    for make in (server.setup, *[server.step] * rounds):
        found.reports.append(make())
        found.masks.append(server.state.mask)
    return found


@pytest.mark.parametrize("importance", ["magnitude", "gradient"])
def test_a_stage_without_an_answer_is_made_up_in_the_next_round_with_one(importance: Any) -> None:
    method = Staged(density=0.25, stages=3, start=0.25, until=0.75, schedule="linear", importance=importance)
    assert watch(method).moved == [2, 4, 6]
    late = watch(method, 4, 5)
    assert late.moved == [2, 6]  # both stages at once
    assert watch(method, 6).moved == [2, 4, 7]
    assert watch(method, 2, 3, 4, 5, 6, 7).moved == [8]
    for run_ in (late, watch(method, 6), watch(method, 2, 3, 4, 5, 6, 7)):
        assert run_.density[-1] == run_.asked[-1] == 0.25
        assert not run_.reports[-1].notes
    assert late.asked == [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert late.density == [1, 1, 0.75, 0.75, 0.75, 0.75, 0.25, 0.25, 0.25]


def test_a_stage_that_cannot_be_made_up_is_a_warning() -> None:
    method = Staged(density=0.25, stages=3, start=0.25, until=0.75, schedule="linear")
    found = watch(method, 6, 7, 8)
    assert (found.density[-1], found.asked[-1]) == (0.5, 0.25)
    assert found.reports[-1].notes == (
        "the run ends at density 0.5, above the 0.25 that its options ask for: no round carried out the last "
        "pruning",
    )
    assert not any("the run ends" in note for report in found.reports[:-1] for note in report.notes)


@pytest.mark.parametrize("policy", ["bandit", "threshold"])
def test_so_is_a_decision_of_a_policy_or_a_cut(policy: str) -> None:
    if policy == "bandit":
        method = Staged(policy="bandit", stages=3, start=0.25, until=0.75, rollback=99.0, min_density=0.001)
        acted = [
            [
                r
                for r, report in enumerate(watch(method, *silent).reports)
                if report.metrics.get("method/action") is not None
            ]
            for silent in ((), (4,), (6,), (4, 5, 6))
        ]
        assert acted == [[2, 4, 6], [2, 5, 6], [2, 4, 7], [2, 7]]
        return
    cut = Staged(threshold=0.5, stages=1, start=0.5)
    assert watch(cut).moved == [4]
    assert watch(cut, 4, 5).moved == [6]


def test_an_adjustment_of_fedmef_is_made_up() -> None:
    method = FedMef(density=0.3, interval=2, until=1.0, adjust=0.4, nsconv=False, lr=0.3)
    assert watch(method).moved == [2, 4, 6]
    assert watch(method, 4).moved == [2, 5, 6]
    found = watch(method, 4, 5, 6)
    assert found.moved == [2, 7]
    assert set(found.asked) == {0.3}


TIMES: dict[str, Any] = {"layer_times_s": {"fc1.weight": 1.0}, "constant_s": 1.0}


@pytest.mark.parametrize("gather", ["interval", "round"])
def test_a_reconfiguration_of_prunefl_is_made_up(gather: Any) -> None:
    method = PruneFL(interval=3, gather=gather, initial_max_rounds=0, **TIMES)
    assert watch(method).moved == [3, 6]
    late = watch(method, 3, 4)
    assert late.moved == [5, 6]
    assert watch(method, 6).moved == [3, 7]
    assert not watch(method, 6).server.checkpoint.memories


def test_what_clients_gathered_before_the_silence_counts_in_the_round_that_makes_up() -> None:
    method = PruneFL(interval=3, initial_max_rounds=0, **TIMES)

    def since(state: ServerState) -> list[Any]:
        return [
            method.configure(state, small.workplace(method).population[0]).extras.get(k)
            for k in ("since", "upload")
        ]

    server = small.server(method, schedule=Schedule(8, 4), pool=deaf_in(3), data=small.dataset(400))
    server.setup()
    seen = []
    while server.state.round <= 8:
        seen.append(since(server.state))
        server.step()
    assert seen == [
        *([0, False], [0, False], [0, True]),  # no answer
        *([0, True], [4, False], [4, True]),
        *([None, None], [None, None]),
    ]


def test_an_event_of_ceafl_and_its_lesson_are_made_up() -> None:
    method = CEAFL(interval=3, until=0.75, rollback=99.0, lr=0.1)
    assert watch(method).moved == [3, 6]
    assert watch(method, 3, 4).moved == [5, 6]
    late = watch(method, 6)
    assert late.moved == [3, 7]
    assert not late.server.checkpoint.memories
    assert late.server.state.memory.finetune == 8
    # the round of the lesson brings no answer: the next one has it
    taught = [watch(method, *silent, rounds=5) for silent in ((), (4,))]
    assert [run_.server.state.memory.finetune for run_ in taught] == [4, 5]
    assert all(run_.server.state.memory.teacher is None for run_ in taught)


# ── what is reported


def test_the_result_has_both_densities(tmp_path: Path) -> None:
    config = tiny.config(
        {"method.name": "staged", "method.density": 0.2, "rounds": 2, "clients.dropout": 0.999}
    )
    history = run(config, out=tmp_path / "r")
    assert history.result["density/asked"] == pytest.approx(0.2)
    if history.result["density/global"] > 0.21:
        assert "above the 0.2 that its options ask for" in (tmp_path / "r" / "warnings.txt").read_text()
    assert [line["density/asked"] for line in history.rounds][-1] == history.result["density/asked"]
    plain = run(tiny.config({"rounds": 1}), out=tmp_path / "s")
    assert "density/asked" not in plain.result


@pytest.mark.parametrize("name", PRUNING)
def test_a_method_that_reaches_its_density_has_no_warning(name: str) -> None:
    server = small.server(METHODS[name](), schedule=Schedule(3, 4), server_rows=60, data=small.dataset(400))
    last = small.run(server)[-1]
    assert not [note for note in last.notes if "the run ends" in note]
    assert last.metrics.get("density/asked") == METHODS[name]().target
