"""FedAvg with server data: an FRLP that prunes nothing, to the bit; and what it costs beside FedAvg."""

from typing import Any

import pytest

from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError, MethodError
from fedray.federation.method import Method
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedavg_server import FedAvgServer
from fedray.methods.frlp import FRLP
from fedray.models.spec import Architecture
from fedray.types import Mask
from tests import small

ROUNDS, OWN = 5, 60
"""Rounds of a run, and examples of the server."""
KEEPS_ALL: dict[str, Any] = {"single_shot": 1e-6}
"""FRLP's range is less than a weight wide: it has its events and candidates, and all of these are whole."""


def begin(
    method: Method,
    rounds: int = ROUNDS,
    rules: Rules = small.RULES,
    architecture: Architecture = small.MLP,
) -> Server:
    return small.server(
        method,
        schedule=Schedule(rounds, cohort=4),
        server_rows=OWN,
        rules=rules,
        architecture=architecture,
        data=small.dataset(400),
    )


def models(server: Server) -> list[str]:
    """Run, and return the SHA-256 of the model after the set-up and after each round."""
    found = []
    for make in (server.setup, *[server.step] * server.schedule.rounds):
        make()
        found.append(server.state.params.sha256)
    return found


# ── what it is the control of


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (small.MLP, {}),
        (small.MLP, {"interval": 2, "until": 1.0}),
        (small.MLP, {"pretrain_epochs": 0, "finetune_epochs": 3}),
        (small.MLP, {"finetune_epochs": 0}),
        (small.MLP, {"optimizer": "adam", "lr": 0.005}),
        (small.CNN, {"uplink_values": "int8", "downlink_values": "fp16"}),
        (small.CNN, {"momentum": 0.5, "weight_decay": 0.01, "lr_decay": 0.8}),
    ],
    ids=lambda value: value.summary if isinstance(value, Architecture) else str(value),
)
def test_it_is_an_frlp_whose_candidates_keep_all_weights(
    architecture: Architecture, options: dict[str, Any]
) -> None:
    control = begin(FedAvgServer(**options), architecture=architecture)
    frlp = begin(FRLP(**KEEPS_ALL, **options), architecture=architecture)
    assert models(control) == models(frlp)
    assert frlp.state.mask.is_full
    assert control.state.mask.is_full


def test_rounds_that_are_named_are_those_of_frlp() -> None:
    control = begin(FedAvgServer(finetune_rounds=(1, 4)))
    assert models(control) == models(begin(FRLP(prune_rounds=(1, 4), **KEEPS_ALL)))


def test_an_frlp_at_its_floor_has_no_events_at_all() -> None:
    """Which is why `min_density=1` is not the control: it only keeps the pre-training."""
    pretrained = models(begin(FedAvgServer(finetune_rounds=())))
    assert models(begin(FRLP(min_density=1.0))) == pretrained
    assert models(begin(FedAvgServer()))[-1] != pretrained[-1]


def test_without_the_servers_part_it_is_fedavg() -> None:
    assert models(begin(FedAvgServer(pretrain_epochs=0, finetune_rounds=()))) == models(begin(FedAvg()))


def test_the_server_works_also_in_a_round_that_nobody_answers() -> None:
    """As FRLP does; what it trains is then the model of before."""
    nobody = Rules(deadline_s=1e-6)
    control = models(begin(FedAvgServer(finetune_rounds=(2,)), rules=nobody))
    assert control == models(begin(FRLP(prune_rounds=(2,), **KEEPS_ALL), rules=nobody))
    assert control[0] == control[1] != control[2] == control[-1]


# ── when


@pytest.mark.parametrize(
    ("rounds", "options", "events"),
    [
        (100, {}, (20, 40, 60)),
        (450, {}, tuple(range(20, 271, 20))),
        (10, {}, (2, 4, 6)),
        (3, {}, (1,)),
        (100, {"interval": 30, "until": 1.0}, (30, 60, 90)),
        (100, {"until": 0.0}, ()),
        (7, {"until": 1.0}, tuple(range(1, 8))),
    ],
)
def test_events_are_those_of_frlp(rounds: int, options: dict[str, Any], events: tuple[int, ...]) -> None:
    control, frlp = (begin(cls(pretrain_epochs=0, **options), rounds) for cls in (FedAvgServer, FRLP))
    control.setup()
    frlp.setup()
    assert control.state.memory.events == frlp.state.memory.events == events


# ── what it costs


def test_the_server_is_charged_one_pass_for_each_epoch_and_only_at_events() -> None:
    server = begin(FedAvgServer(finetune_rounds=(2, 4), pretrain_epochs=3, finetune_epochs=2))
    passes = server.place.flops.train(Mask.full(server.place.model.layout)) * OWN
    spent = [report.metrics["flops/server"] for report in small.run(server)]
    assert spent == [3 * passes, 0, 2 * passes, 0, 2 * passes, 0]


def test_frlp_pays_for_a_search_beside_it() -> None:
    control, frlp = (
        small.run(begin(method))[1].metrics
        for method in (FedAvgServer(interval=1), FRLP(interval=1, samples=6, **KEEPS_ALL))
    )
    assert frlp["flops/server"] == 6 * control["flops/server"] > 0
    assert frlp["bytes/down"] == control["bytes/down"]


def test_clients_pay_what_they_pay_in_fedavg() -> None:
    control, plain = small.run(begin(FedAvgServer(interval=1))), small.run(begin(FedAvg()))
    for cost in ("bytes/up", "bytes/down", "flops/clients"):
        assert [r.metrics[cost] for r in control] == [r.metrics[cost] for r in plain]
    waited = [r.metrics["time/simulated_s"] for r in control], [r.metrics["time/simulated_s"] for r in plain]
    assert waited[0][0] > waited[1][0], "but the server's time is the run's"


# ── what it needs


def test_without_server_data_it_does_not_start() -> None:
    tree = {"method": {"name": "fedavg_server"}, "tracking": {"uri": "none"}}
    with pytest.raises(ConfigError, match=r"data\.server_fraction.*fedavg_server trains on the server's own"):
        RunConfig.from_tree(tree)
    with pytest.raises(MethodError, match=r"set data\.server_fraction above 0"):
        small.server(FedAvgServer()).setup()


def test_rounds_that_the_run_does_not_reach_are_refused() -> None:
    problem = FedAvgServer(finetune_rounds=(10, 11, 20)).check(small.setting(rounds=10))
    assert problem is not None
    assert problem.startswith("method.finetune_rounds")
    assert "after round(s) 11, 20, but the run has 10" in problem
    assert FedAvgServer(finetune_rounds=(1, 10)).check(small.setting(rounds=10)) is None
    assert FedAvgServer().check(small.setting(rounds=1)) is None
