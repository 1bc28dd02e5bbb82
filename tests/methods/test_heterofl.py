"""HeteroFL: who trains which channels, the mean over owners, absent classes, and what a slice costs."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedray.costs.codec import HEADER_BYTES
from fedray.data.partition import Dealt, Partition
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.federation.slices import SliceMemory, dropped
from fedray.methods.heterofl import HeteroFL
from fedray.pruning.widths import RATES, slice_mask
from fedray.types import ClientInfo, Mask, Params, ServerState, Task
from tests import small

EVERYBODY = Schedule(rounds=3, cohort=6)


@dataclass(frozen=True, kw_only=True)
class Watched(HeteroFL):
    """HeteroFL that keeps all updates, and remembers each round: the state before its mean, and what came."""

    seen: list[tuple[ServerState, CohortUpdate]] = field(default_factory=list, compare=False)

    @property
    def fold(self) -> Fold:
        return replace(super().fold, keep_updates=True)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        self.seen.append((state, cohort))
        return super().aggregate(state, cohort)


def begun(method: Method, **place: Any) -> ServerState:
    server = small.server(method, architecture=small.CNN, schedule=EVERYBODY, **place)
    server.setup()
    return server.state


def rates(method: HeteroFL, clients: int, round: int = 1, speeds: tuple[float, ...] = (1.0,)) -> list[float]:
    memory = SliceMemory((), clients, 7, speeds)
    device = small.DEVICE
    return [
        memory.rate(method.mix, method.assignment, ClientInfo(k, 10, device), round) for k in range(clients)
    ]


# ── who has which level


def test_fixed_levels_follow_the_clients_numbers() -> None:
    found = rates(HeteroFL(levels="a2-e8", assignment="fixed"), 10)
    assert found == [1.0] * 2 + [RATES["e"]] * 8
    assert found == rates(HeteroFL(levels="a2-e8", assignment="fixed"), 10, round=5)


def test_dynamic_levels_are_drawn_anew_in_each_round_in_their_shares() -> None:
    method = HeteroFL(levels="c-d-e")
    found = rates(method, 3000)
    for level in "cde":
        assert found.count(RATES[level]) == pytest.approx(1000, abs=4 * np.sqrt(3000 * 2 / 9))
    again = rates(method, 3000, round=2)
    assert rates(method, 3000) == found
    assert np.mean(np.array(found) == np.array(again)) == pytest.approx(1 / 3, abs=0.05)


def test_faster_devices_are_wider_and_equal_ones_all_the_widest() -> None:
    method = HeteroFL(levels="a-c", assignment="device")
    memory = SliceMemory((), 4, 7, (1.0, 1.0, 3.0, 3.0))
    slow, fast = (ClientInfo(0, 10, replace(small.DEVICE, flops_per_s=speed)) for speed in (1.0, 3.0))
    assert memory.rate(method.mix, "device", fast, 1) == 1.0
    assert memory.rate(method.mix, "device", slow, 1) == 0.25
    assert rates(method, 4, speeds=(small.DEVICE.flops_per_s,) * 4) == [1.0] * 4


# ── the slices


def test_the_server_has_the_widest_level_in_use_and_clients_the_first_of_its_channels() -> None:
    method = HeteroFL(levels="b-d", assignment="fixed")
    state = begun(method, clients=6)
    groups = state.memory.groups
    assert state.mask == slice_mask(state.mask.layout, groups, 0.5)
    wide, narrow = (method.configure(state, ClientInfo(k, 10, small.DEVICE)) for k in (0, 5))
    assert wide.mask == state.mask
    assert wide.extras == {"rate": 1.0}
    assert narrow.extras == {"rate": 0.25}
    # ⌈4/8⌉ = 1 channel of conv1, ⌈6/8⌉ = 1 of conv2
    assert {
        n: int(narrow.mask[n].count_nonzero()) for n in ("conv1.weight", "conv2.weight", "fc.weight")
    } == {
        "conv1.weight": 9,
        "conv2.weight": 9,
        "fc.weight": 3 * 4,
    }
    assert not bool((narrow.mask.flat & ~state.mask.flat).any())
    assert method.configure(state, ClientInfo(4, 10, small.DEVICE)).mask is narrow.mask  # sent once


def test_the_start_is_that_of_a_network_of_this_width() -> None:
    """conv2 takes 2 of 4 channels: PyTorch draws from ±1/√fan_in."""
    state, whole = begun(HeteroFL(levels="b")), begun(HeteroFL(levels="a"))
    torch.testing.assert_close(
        state.params["conv2.weight"][:3, :2], whole.params["conv2.weight"][:3, :2] * 2**0.5
    )
    assert torch.equal(state.params["conv1.weight"], whole.params["conv1.weight"])


def test_one_level_with_everything_off_is_fedavg_of_that_width() -> None:
    plain: dict[str, Any] = {"lr": 0.1, "batch_size": 10}
    method = HeteroFL(levels="a", masked_loss=False, clip=None, weighting="examples", **plain)
    server, fedavg = (
        small.server(m, architecture=small.CNN, schedule=EVERYBODY) for m in (method, Method(**plain))
    )
    small.run(server), small.run(fedavg)
    assert server.state.params.sha256 == fedavg.state.params.sha256


# ── the mean


def test_each_weight_is_the_mean_over_its_owners_and_stays_where_there_is_none() -> None:
    method = Watched(levels="a1-b1-d1", assignment="fixed", masked_loss=False)
    server = small.server(method, architecture=small.CNN, schedule=replace(EVERYBODY, cohort=3), clients=3)
    server.setup()
    server.step()
    before, cohort = method.seen[0]
    updates = [cohort.updates[k] for k in range(3)]
    name = "conv2.bias"  # 6 channels: held by clients of 6, 3 and 1
    sent = [update.params[name] for update in updates]
    after = server.state.params[name]
    expected = [
        float(sent[0][0] + sent[1][0] + sent[2][0]) / 3,
        *[float(sent[0][i] + sent[1][i]) / 2 for i in (1, 2)],
        *[float(sent[0][i]) for i in (3, 4, 5)],
    ]
    assert after.tolist() == pytest.approx(expected, abs=1e-6)
    assert sorted({len(u.mask[name].nonzero()) for u in updates}) == [1, 3, 6]
    assert before.round == 1


def test_a_weight_that_nobody_had_stays_as_it_is() -> None:
    method = Watched(levels="d", masked_loss=False)
    server = small.server(method, architecture=small.CNN, schedule=EVERYBODY)
    server.setup()
    server.step()
    _, cohort = method.seen[0]
    wide = begun(HeteroFL(levels="a9-d1"))
    mean = HeteroFL(levels="a9-d1").aggregate(wide, cohort).params
    held = cohort.updates[0].mask.flat
    assert torch.equal(mean.flat[~held], wide.params.flat[~held])
    assert not torch.equal(mean.flat[held], wide.params.flat[held])


def split(y: np.ndarray, *, without: int) -> Partition:
    """Deal examples so that client 0 has none of a class."""
    rows = np.arange(len(y) - small.VALIDATION)
    first = rows[y[rows] != without][:40]
    rest = np.setdiff1d(rows, first)
    order = np.concatenate([first, rest])
    return Dealt(order, np.repeat([0, 1], [len(first), len(rest)]), 2)


def test_rows_of_absent_classes_do_not_count_and_are_not_sent() -> None:
    data = small.dataset()
    place: dict[str, Any] = {
        "data": data,
        "partition": split(data.train.y, without=1),
        "architecture": small.CNN,
    }
    method = Watched(levels="a", weight_decay=0.5, lr=0.1)
    server = small.server(method, schedule=Schedule(rounds=1, cohort=2), **place)
    small.run(server)
    _, cohort = method.seen[0]
    lacking, whole = cohort.updates[0], cohort.updates[1]
    assert not bool(lacking.mask["fc.weight"][1].any()) and not bool(lacking.mask["fc.bias"][1])
    assert bool(lacking.mask["fc.weight"][[0, 2]].all()) and bool(lacking.mask["fc.bias"][[0, 2]].all())
    assert whole.mask.is_full
    torch.testing.assert_close(server.state.params["fc.weight"][1], whole.params["fc.weight"][1])
    up = {record.client: record.cost.bytes_up for record in cohort.records}
    assert up[1] == HEADER_BYTES + 4 * whole.mask.count
    assert up[0] > HEADER_BYTES + 4 * lacking.mask.count  # and the positions
    unmasked = small.client(replace(method, masked_loss=False), **place)
    task = Task(server.state.params, server.state.mask, extras={"rate": 1.0})
    assert method.client_update(task, small.client(method, **place)).mask != server.state.mask
    assert replace(method, masked_loss=False).client_update(task, unmasked).mask is server.state.mask


# ── what it costs


def test_a_client_pays_for_its_slice_alone() -> None:
    method = Watched(levels="a1-d1", assignment="fixed", masked_loss=False, steps=2, batch_size=5)
    server = small.server(method, architecture=small.CNN, schedule=replace(EVERYBODY, cohort=2), clients=2)
    server.setup()
    server.step()
    wide, narrow = server.place.population[0], server.place.population[1]
    assert wide.id == 0 and narrow.id == 1
    _, cohort = method.seen[0]
    first, second = cohort.records
    layout, groups = server.state.mask.layout, server.state.memory.groups
    count = slice_mask(layout, groups, RATES["d"]).count
    # 9 of conv1, 4 of its BatchNorm, 9 and 1 of conv2, 12 and 3 of fc
    assert count == 9 + 4 + 10 + 15
    assert second.cost.bytes_up == HEADER_BYTES + 8 + 4 * count  # and the name of the mask
    assert first.cost.bytes_up == HEADER_BYTES + 4 * layout.size
    # multiply-adds: 16 positions of 9, 4 of 9, 12; two FLOPs each, three passes, 2 steps of 5
    assert second.cost.flops == 6 * (16 * 9 + 4 * 9 + 12) * 10
    assert first.cost.flops == 6 * (16 * 36 + 4 * 216 + 72) * 10


def test_the_servers_narrow_model_is_evaluated_as_such() -> None:
    server = small.server(HeteroFL(levels="b"), architecture=small.CNN, schedule=EVERYBODY, norm="static")
    small.run(server)
    found = server.evaluate(server.side.validation)
    assert any(part is not None for part in server.pool.worker.engine._smaller.values())  # type: ignore[attr-defined]
    plain = small.server(Method(), architecture=small.CNN, norm="static")
    whole = plain.pool.worker.engine  # type: ignore[attr-defined]
    x = torch.from_numpy(server.side.validation.x).float()
    one = whole.evaluate(server.model, server.state.mask, x, torch.from_numpy(server.side.validation.y))
    whole.narrow = True
    other = whole.evaluate(server.model, server.state.mask, x, torch.from_numpy(server.side.validation.y))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4, atol=1e-5)
    assert np.isfinite(found.loss)


def test_static_statistics_are_those_of_the_narrow_model() -> None:
    """The mean of a channel over the clients' batches; zero in channels that the server does not have."""
    server = small.server(
        HeteroFL(levels="b", batch_size=1000), architecture=small.CNN, schedule=EVERYBODY, norm="static"
    )
    small.run(server)
    params = server.state.params
    weighted, total = torch.zeros(2), 0
    for client in range(6):
        rows = server.place.population.partition.rows(client)
        x = server.place.dataset.normalise(server.place.dataset.train.x[rows])
        out = torch.nn.functional.conv2d(x, params["conv1.weight"][:2], padding=1)
        weighted += out.mean((0, 2, 3)) * len(rows)
        total += len(rows)
    torch.testing.assert_close(params["bn1.running_mean"][:2], weighted / total, rtol=1e-4, atol=1e-5)
    assert not bool(server.state.mask["bn1.running_mean"][2:].any())


# ── options


def test_the_learning_rate_falls_after_each_milestone() -> None:
    assert [dropped(round, (2, 3), 0.1) for round in (1, 2, 3, 4)] == pytest.approx([1, 1, 0.1, 0.01])
    place: dict[str, Any] = {"architecture": small.CNN}
    method = HeteroFL(levels="a", milestones=(1,), lr=0.1, clip=None, masked_loss=False)

    def moved(round: int, by: HeteroFL) -> Params:
        client = small.client(by, round=round, **place)
        params = client.model.init(0)
        task = Task(params, Mask.full(params.layout), extras={"rate": 1.0})
        return by.client_update(task, client).params

    assert moved(2, method) == moved(2, replace(method, milestones=(), lr=0.1 * 0.1))
    assert moved(1, method) == moved(1, replace(method, milestones=()))


def test_what_it_refuses() -> None:
    flat = small.setting(architecture=small.LINEAR)
    reason = HeteroFL().check(flat)
    assert reason is not None and reason.startswith("model=small has no channels that can be removed")
    narrow = HeteroFL(min_layer=100).check(small.setting(architecture=small.CNN))
    assert narrow is not None and narrow.startswith("method.min_layer=100 is more than the")
    assert HeteroFL().check(small.setting(architecture=small.CNN)) is None
    setting = small.setting(architecture=small.CNN)
    standardised = replace(setting, model=replace(setting.model, standardize=True))
    reason = HeteroFL().check(standardised)
    assert reason is not None and reason.startswith("method.scaler=true divides weights that weight_stand")
    assert HeteroFL(scaler=False).check(standardised) is None
