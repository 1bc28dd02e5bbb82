"""Rounds under each policy for BatchNorm: what moves, what stays, and what it costs to the byte."""

import pickle
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedray.costs.codec import HEADER_BYTES
from fedray.costs.extras import extras_size
from fedray.data.datasets import Examples
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import ActorOptions, Group, RayPool
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.federation.wire import OWN_NORMS
from fedray.federation.worker import Rules
from fedray.models.norms import Norm
from fedray.models.spec import Architecture, InputShape
from fedray.pruning.channels import channel_mask
from fedray.types import ClientUpdate, Mask, ServerState, Task
from tests import small

POLICIES: tuple[Norm, ...] = ("average", "local", "static", "group")
NORM_BYTES = 16 * 4
"""small.CNN has scale, shift, running mean and variance of four channels."""
STATISTICS = ("bn1.running_mean", "bn1.running_var")
EVERYBODY = Schedule(rounds=3, cohort=6)


def federation(norm: Norm, method: Method | None = None, **given: Any) -> Server:
    parts: dict[str, Any] = {"schedule": EVERYBODY, "architecture": small.CNN} | given
    return small.server(method or Method(), norm=norm, **parts)


def own_norms(server: Server) -> dict[int, torch.Tensor]:
    return {k: memory[OWN_NORMS] for k, memory in sorted(server.checkpoint.memories.items())}


@dataclass(frozen=True, kw_only=True)
class Seen(Method):
    """FedAvg that keeps what clients were given and what came back."""

    citation: ClassVar[str] = "made up"

    @property
    def fold(self) -> Fold:
        return Fold(keep_updates=True)

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        assert OWN_NORMS not in client.memory
        client.memory.clear()
        update = super().client_update(task, client)
        client.memory["given"], client.memory["trained"] = task.params, update.params
        return update

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        return replace(super().aggregate(state, cohort), memory=dict(cohort.updates))


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("norm", POLICIES)
def test_a_run_learns_and_goes_on_from_a_checkpoint_with_the_same_bits(norm):
    server = federation(norm, Method(lr=0.1), schedule=replace(EVERYBODY, cohort=4))
    reports = small.run(server)
    assert reports[-1].metrics["val/loss"] < reports[0].metrics["val/loss"]
    half = federation(norm, Method(lr=0.1), schedule=replace(EVERYBODY, cohort=4))
    half.setup()
    half.step()
    checkpoint: Checkpoint = pickle.loads(pickle.dumps(half.checkpoint))
    again = federation(norm, Method(lr=0.1), schedule=half.schedule, checkpoint=checkpoint)
    later = small.run(again)
    assert again.model.sha256 == server.model.sha256
    for one, other in zip(reports[2:], later, strict=True):
        assert one.clients == other.clients
        assert {k: v for k, v in one.metrics.items() if "wall" not in k} == {
            k: v for k, v in other.metrics.items() if "wall" not in k
        }


@pytest.mark.parametrize("norm", ["local", pytest.param("static", marks=pytest.mark.slow)])
def test_two_actors_give_the_bits_of_one_process(norm, ray_local):
    method = Method(lr=0.1, uplink_values="int8")
    here = federation(norm, method)
    there = federation(norm, method, pool=lambda place: RayPool(place, [Group(2, ActorOptions(cpu=0.5))]))
    reports = small.run(here), small.run(there)
    outcomes = here.evaluate(here.side.validation, 2), there.evaluate(there.side.validation, 2)
    there.pool.close()
    assert here.model.sha256 == there.model.sha256
    assert reports[0][-1].metrics["val/loss"] == reports[1][-1].metrics["val/loss"]
    assert reports[0][-1].metrics["total/bytes/up"] == reports[1][-1].metrics["total/bytes/up"]
    assert outcomes[0].losses.tolist() == outcomes[1].losses.tolist()


@pytest.mark.parametrize("norm", POLICIES)
def test_a_model_without_batch_norm_is_the_same_under_every_policy(norm):
    server = federation(norm, architecture=small.MLP)
    usual = federation("average", architecture=small.MLP)
    mine, theirs = small.run(server), small.run(usual)
    assert server.model == usual.model
    assert mine[-1].metrics["total/bytes/down"] == theirs[-1].metrics["total/bytes/down"]


def test_average_takes_the_mean_of_the_statistics():
    server = federation("average", Seen(), schedule=replace(EVERYBODY, rounds=1))
    small.run(server)
    updates, sizes = server.state.memory, {k: server.population[k].num_examples for k in range(6)}
    for name in STATISTICS:
        mean = sum(u.params[name] * sizes[k] for k, u in updates.items()) / sum(sizes.values())
        torch.testing.assert_close(server.model[name], mean)
        assert all(not torch.equal(u.params[name], server.model[name]) for u in updates.values())


# ── local ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("values", "saved"), [("fp32", NORM_BYTES), ("int8", 16 * 1 + 4 * 5)])
def test_local_saves_the_bytes_of_the_norms_each_way(values, saved):
    """To the byte: 16 values, and with int8 the range of each of the four tensors. No positions are sent."""
    method = Method(uplink_values=values, downlink_values=values)
    pairs = zip(small.run(federation("local", method)), small.run(federation("average", method)), strict=True)
    for local, average in pairs:
        for mine, theirs in zip(local.clients, average.clients, strict=True):
            assert theirs.cost.bytes_down - mine.cost.bytes_down == saved
            assert theirs.cost.bytes_up - mine.cost.bytes_up == saved
            assert mine.cost.flops == theirs.cost.flops
    assert (
        local.clients[0].cost.bytes_up
        == HEADER_BYTES + (349 * 4 if values == "fp32" else 349 + 5 * 9) - saved
    )


def test_local_norms_are_each_clients_own():
    server = federation("local", Seen(), schedule=replace(EVERYBODY, rounds=2))
    server.setup()
    first = server.place.model.init(0).flat[server.place.model.norms.entries]
    server.step()
    after_one = own_norms(server)
    assert len(after_one) == 6
    for client, norms in after_one.items():
        memory = server.checkpoint.memories[client]
        entries = server.place.model.norms.entries
        assert torch.equal(memory["given"].flat[entries], first), "everybody starts from the initial ones"
        assert torch.equal(memory["trained"].flat[entries], norms)
    assert not torch.equal(after_one[0], after_one[1])
    server.step()
    for client, memory in server.checkpoint.memories.items():
        assert torch.equal(memory["given"].flat[entries], after_one[client]), "and goes on with its own"
    assert torch.equal(server.model.flat[entries], first), "the server never learns of them"
    shared = Mask.full(server.model.layout).flat
    shared[entries] = False
    for update in server.state.memory.values():
        assert torch.equal(update.mask.flat, shared), "an update does not vouch for norms"


@dataclass(frozen=True, kw_only=True)
class Careless(Method):
    """Puts zeros where nobody vouches for anything."""

    citation: ClassVar[str] = "made up"

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        return replace(state, params=cohort.mean())


def test_a_method_that_knows_nothing_of_local_norms_does_no_harm():
    server, usual = federation("local", Careless()), federation("local")
    small.run(server), small.run(usual)
    assert server.model == usual.model


def test_without_statistics_the_global_model_normalises_by_the_batch():
    server = federation("local", schedule=replace(EVERYBODY, rounds=1))
    report = small.run(server)[-1]
    module = server.place.model.bind(server.model.flat).train()
    dataset, validation = server.place.dataset, server.side.validation
    with torch.no_grad():
        logits = module(dataset.normalise(validation.x))
    loss = float(cross_entropy(logits, torch.from_numpy(validation.y)))
    assert report.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_client_evaluates_with_its_own_norms():
    server = federation("local", schedule=Schedule(rounds=1, cohort=3))
    small.run(server)
    there, away = sorted(own_norms(server)), [k for k in range(6) if k not in own_norms(server)]
    assert len(there) == 3
    examples = server.side.validation
    model, norms = server.place.model, server.place.model.norms
    params = server.model.clone()
    params.flat[norms.entries] = own_norms(server)[there[0]]
    with torch.no_grad():
        logits = model.bind(params.flat).eval()(server.place.dataset.normalise(examples.x))
    losses = cross_entropy(logits, torch.from_numpy(examples.y), reduction="none")
    np.testing.assert_allclose(server.evaluate(examples, there[0]).losses, losses.numpy(), rtol=1e-4)
    plain = server.evaluate(examples).losses.tolist()
    assert server.evaluate(examples, away[0]).losses.tolist() == plain, "it was never asked: it has none"
    assert server.evaluate(examples, there[0]).losses.tolist() != plain


@pytest.mark.parametrize("rules", [Rules(deadline_s=0.1), Rules(dropout=0.999999)])
def test_who_does_not_count_keeps_no_norms(rules):
    server = federation("local", rules=rules)
    small.run(server)
    assert not server.checkpoint.memories
    assert server.model == federation("local").model


@dataclass(frozen=True, kw_only=True)
class Asking(Method):
    """Asks for a gradient before the first round, without training anybody."""

    citation: ClassVar[str] = "made up"

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        ctx.ask(self.score, {client: Task(state.params, state.mask) for client in range(6)})
        return state

    def score(self, task: Task, client: Client) -> ClientUpdate:
        return ClientUpdate(task.params, task.mask, sums={"gradient": client.grad(task.params, task.mask)})


def test_who_trained_nothing_keeps_no_norms():
    server = federation("local", Asking())
    server.setup()
    assert not server.checkpoint.memories


@dataclass(frozen=True, kw_only=True)
class Narrow(Method):
    """Takes the first two channels out before training."""

    citation: ClassVar[str] = "made up"

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        kept = {"conv1": torch.tensor([False, False, True, True])}
        return replace(state, mask=channel_mask(ctx.layout, ctx.model.channel_groups, kept))


def test_norms_of_removed_channels_stay_as_they_were():
    server = federation("local", Narrow())
    small.run(server)
    first = server.place.model.init(0).flat[server.place.model.norms.entries].view(4, 4)
    for norms in own_norms(server).values():  # scale, shift, mean and variance of the channels
        assert torch.equal(norms.view(4, 4)[:, :2], first[:, :2])
        assert not torch.isclose(norms.view(4, 4)[:, 2:], first[:, 2:]).any()
    assert not server.state.mask["bn1.weight"][:2].any()


# ── static ───────────────────────────────────────────────────────────────────────────────────────────────


def _normed(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, num_classes))


def test_static_statistics_by_hand():
    """Client 0 has pixels 0 and 2; client 1 has 0, 3, 6 and, in a second batch, 1 and 5.

    Mean 1 and variance 2; mean 3 and variances 9 and 8. Over batches by examples client 1 has the variance
    (3·9 + 2·8) / 5 = 8.6; over clients by examples that is (2·1 + 5·3) / 7 and (2·2 + 5·8.6) / 7.
    """
    server = federation(
        "static",
        Method(batch_size=3),
        schedule=Schedule(rounds=1, cohort=2),
        architecture=Architecture(_normed, small.CNN.accepts, "made up", "batch norm, fc"),
        data=small.pixels([0, 2, 0, 3, 6, 1, 5], [0, 1, 0, 1, 0, 1, 0], classes=2),
        partition=small.dealt(2, 5),
    )
    server.side = replace(server.side, validation=Examples(server.side.validation.x[:0], np.zeros(0, int)))
    small.run(server)
    assert server.model["0.running_mean"].item() == pytest.approx(17 / 7)
    assert server.model["0.running_var"].item() == pytest.approx(47 / 7)


def test_static_trains_without_statistics_and_is_asked_for_them_only_to_evaluate():
    server = federation("static", Seen(), schedule=Schedule(rounds=3, cohort=6, eval_every=2))
    server.setup()
    initial = {name: server.model[name].clone() for name in STATISTICS}
    server.step()
    for name in STATISTICS:
        assert all(torch.equal(u.params[name], initial[name]) for u in server.state.memory.values())
        torch.testing.assert_close(server.model[name], initial[name])
    server.step()
    assert not any(torch.allclose(server.model[name], initial[name]) for name in STATISTICS)
    second = {name: server.model[name].clone() for name in STATISTICS}
    server.step()  # the last one is evaluated in any case
    assert not any(torch.allclose(server.model[name], second[name]) for name in STATISTICS)


def test_static_charges_the_query():
    server = federation("static", schedule=Schedule(rounds=3, cohort=6, eval_every=2))
    setup, silent, asked, _ = small.run(server)
    assert "val/loss" in setup.metrics and setup.metrics["bytes/down"] == 0, "round 0 has no cohort to ask"
    model = HEADER_BYTES + 349 * 4
    sums = HEADER_BYTES + extras_size({"sums.statistics": torch.zeros(8)})
    assert sums == 144, "8 values of 4 bytes, their name, a header"
    examples = [server.population[k].num_examples for k in range(6)]
    forward = server.place.flops.dense() * sum(examples)
    trained = 3 * forward
    for report, queries in ((silent, 0), (asked, 1)):
        assert report.metrics["bytes/down"] == 6 * model * (1 + queries)
        assert report.metrics["bytes/up"] == 6 * model + 6 * sums * queries
        assert report.metrics["flops/clients"] == pytest.approx(trained + forward * queries)
    device = small.DEVICE
    slowest = max(examples) * server.place.flops.dense() / device.flops_per_s
    wire = model / device.downlink_bytes_per_s + sums / device.uplink_bytes_per_s
    longer = asked.metrics["time/simulated_s"] - silent.metrics["time/simulated_s"]
    assert longer == pytest.approx(device.latency_s + wire + slowest)
    assert {r.fate for r in asked.clients} == {"folded"} and len(asked.clients) == 6


def test_a_round_that_nobody_answers_asks_nobody():
    server = federation("static", rules=Rules(deadline_s=0.1))
    reports = small.run(server)
    assert server.model == federation("static").model
    assert all(
        r.metrics["bytes/up"] == r.metrics["clients/selected"] * (HEADER_BYTES + 349 * 4) for r in reports
    )


def test_statistics_of_removed_channels_stay_as_they_were():
    server = federation("static", Narrow())
    small.run(server)
    assert server.state.params["bn1.running_var"][:2].tolist() == [1.0, 1.0]
    assert not torch.isclose(server.state.params["bn1.running_var"][2:], torch.ones(2)).any()
    assert server.model["bn1.running_var"][:2].tolist() == [0.0, 0.0], "what is saved is under the mask"


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Evaluates other weights than it trains."""

    citation: ClassVar[str] = "made up"

    def eval_params(self, state: ServerState) -> Any:
        params = state.params.clone()
        params.flat.mul_(0.5)
        return params


def test_static_statistics_are_those_of_what_is_evaluated():
    """Half of the first layer's weights: half of the mean, a quarter of the variance."""
    one, other = (
        federation("static", m, schedule=replace(EVERYBODY, rounds=1)) for m in (Method(), Halved())
    )
    small.run(one), small.run(other)
    torch.testing.assert_close(other.model["bn1.running_mean"], one.model["bn1.running_mean"] / 2)
    torch.testing.assert_close(other.model["bn1.running_var"], one.model["bn1.running_var"] / 4)
