"""FedAvg from a warm start: where AutoFLIP's code starts, bit for bit; then FedAvg; and what it costs."""

from typing import Any

import pytest

from fedray.costs.codec import HEADER_BYTES
from fedray.errors import MethodError
from fedray.federation.method import Method
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.autoflip import AutoFLIP
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedavg_warm import FedAvgWarm
from fedray.models.spec import Architecture
from fedray.types import Mask, ServerState
from tests import small

SIZE = 163
"""Weights of small.MLP."""
ALIASED: dict[str, Any] = {"scouts": "aliased", "warm_start": True}


def begin(method: Method, rounds: int = 4, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort=4), data=small.dataset(400), **place)


def costs(server: Server) -> dict[str, float]:
    """Return what the set-up cost, wall time aside."""
    metrics = server.setup().metrics
    return {k: v for k, v in metrics.items() if k.startswith(("bytes/", "flops/", "time/sim"))}


# ── what it is the control of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"explorers": 0.5, "explore_epochs": 3},
        {"explore_epochs": 20, "patience": 2},
        {"momentum": 0.5, "weight_decay": 0.01, "batch_size": 7},
        {"lr": 1e15, "partition": small.dealt(50, 20, 50)},  # all but one diverge
        {"uplink_values": "int8", "downlink_values": "fp16"},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
def test_it_starts_where_an_autoflip_with_aliased_scouts_starts(
    options: dict[str, Any], architecture: Architecture
) -> None:
    options = dict(options)
    place: dict[str, Any] = {"architecture": architecture, "partition": options.pop("partition", None)}
    place["rules"] = Rules(max_failed=0.67, max_change=None)
    control = begin(FedAvgWarm(**options), **place)
    autoflip = begin(AutoFLIP(**ALIASED, **options), **place)
    assert costs(control) == costs(autoflip)
    assert control.state.params.sha256 == autoflip.state.params.sha256
    assert control.state.mask.is_full and not autoflip.state.mask.is_full


@pytest.mark.parametrize("rounds", [1, 30, 60])
def test_it_trains_as_long_as_autoflip_explores(rounds: int) -> None:
    control, autoflip = begin(FedAvgWarm(), rounds), begin(AutoFLIP(**ALIASED), rounds)
    assert costs(control) == costs(autoflip)


def test_from_there_it_is_fedavg() -> None:
    control = begin(FedAvgWarm())
    control.setup()
    start = control.state.params
    plain = begin(FedAvg(), checkpoint=Checkpoint(ServerState(1, start, Mask.full(start.layout))))
    small.run(control)
    small.run(plain)
    assert control.state.params.sha256 == plain.state.params.sha256 != start.sha256


# ── what it costs, and what the start is worth


def test_clients_train_one_after_the_other_and_pay_for_it() -> None:
    server = begin(FedAvgWarm(explore_epochs=3))
    spent = costs(server)
    examples = server.place.population.partition.sizes.sum()
    flops = 3 * examples * server.place.flops.train(Mask.full(server.place.model.layout))
    assert spent["flops/clients"] == flops
    assert spent["bytes/up"] == 6 * (HEADER_BYTES + 4 * SIZE)
    device = small.DEVICE
    waited = 6 * device.latency_s + flops / device.flops_per_s
    waited += spent["bytes/down"] / device.downlink_bytes_per_s
    waited += spent["bytes/up"] / device.uplink_bytes_per_s
    assert spent["time/simulated_s"] == pytest.approx(waited)


def test_if_all_diverge_there_is_no_start() -> None:
    with pytest.raises(MethodError, match=r"all 6 explorers diverged; lower method\.lr"):
        begin(FedAvgWarm(explore_epochs=3, lr=1e30), rules=Rules(max_failed=1)).setup()


def test_the_start_is_better_than_none() -> None:
    warm, cold = begin(FedAvgWarm(explore_epochs=5)), begin(FedAvg())
    assert warm.setup().metrics["val/loss"] < cold.setup().metrics["val/loss"]


def test_a_deadline_of_the_rounds_does_not_end_the_start() -> None:
    server = begin(FedAvgWarm(), rules=Rules(deadline_s=1e-6))
    before = server.state.params.sha256
    server.setup()
    after = server.state.params.sha256
    assert after != before
    server.step()
    assert server.state.params.sha256 == after
