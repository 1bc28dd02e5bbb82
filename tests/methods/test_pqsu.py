"""FL-PQSU: the channels of largest L1 norm, 8 bits with exact vectors, and who uploads."""

from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedray.config.run_config import RunConfig
from fedray.costs.codec import DIGEST_BYTES, HEADER_BYTES, Codec
from fedray.errors import ConfigError, WireError
from fedray.federation.aggregate import CohortUpdate, Fold, Partial
from fedray.federation.client import Client, Step
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.pqsu import PQSU, PQSUMemory
from fedray.models.spec import ModelSpec
from fedray.types import ClientRecord, ClientUpdate, Cost, Layout, Mask, Params, ServerState, Task
from tests import small

DATA = small.dataset(400)
PROPERTY = settings(deadline=None, max_examples=50)
MLP, CNN = (ModelSpec.of("small", a, small.SHAPE, small.CLASSES) for a in (small.MLP, small.CNN))


def begin(method: PQSU, rounds: int = 4, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort=4), server_rows=60, data=DATA, **place)


# ── structured pruning


def by_hand(params: Params, name: str, count: int) -> list[int]:
    """Return the channels of a layer that have the largest L1 norms."""
    norms = np.abs(params[name].numpy()).reshape(len(params[name]), -1).sum(1)
    return sorted(np.argsort(-norms)[:count].tolist())


@pytest.mark.parametrize("channels", [0.2, 0.5, 0.51, 1.0])
def test_each_layer_keeps_its_channels_of_largest_norm_after_pre_training(channels: float) -> None:
    server = begin(PQSU(channels=channels, pretrain_epochs=3), architecture=small.CNN)
    initial = server.state.params
    assert server.setup().metrics["flops/server"] > 0
    mask, trained = server.state.mask, server.state.params
    assert not trained.flat.equal(initial.flat)
    for layer, size in (("conv1", 4), ("conv2", 6)):
        kept = by_hand(trained, f"{layer}.weight", ceil(channels * size))
        assert mask[f"{layer}.weight"].flatten(1).any(1).nonzero().flatten().tolist() == kept
    assert torch.equal(mask["bn1.running_var"], mask["bn1.weight"])
    assert torch.equal(mask["bn1.weight"], mask["conv1.weight"].flatten(1).any(1))
    assert bool(mask["fc.bias"].all())


def test_the_server_pre_trains_and_is_charged_for_the_whole_model() -> None:
    server = begin(PQSU(pretrain_epochs=2, channels=0.25))
    report, full = server.setup(), Mask.full(server.place.model.layout)
    assert report.metrics["flops/server"] == 2 * 60 * server.place.flops.train(full)
    assert report.metrics["bytes/down"] == report.metrics["bytes/up"] == 0


@pytest.mark.parametrize(("density", "units"), [(0.25, 2), (0.3, 2), (0.5, 4)])
def test_channels_can_be_told_by_the_density_that_is_left(density: float, units: int) -> None:
    server = begin(PQSU(density=density, channels=1.0))
    server.setup()
    assert server.state.mask["fc1.bias"].sum() == units


def test_the_mask_stays_and_the_model_learns() -> None:
    server = begin(PQSU(channels=0.5, pretrain_epochs=0))
    reports = small.run(server)
    assert {report.metrics["density/global"] for report in reports} == {0.5}
    assert reports[-1].metrics["val/loss"] < reports[0].metrics["val/loss"]


# ── selective updating


def updated(method: PQSU, **options: Any) -> tuple[Client, ClientUpdate, Task]:
    """Return a client, what it uploads in its round, and the task that it got."""
    client = small.client(method, **options)
    layout = client.model.layout
    task = Task(small.workplace(method).model.init(0), Mask.full(layout))
    return client, method.client_update(task, client), task


def test_a_first_loss_is_uploaded_and_remembered() -> None:
    client, update, task = updated(PQSU())
    assert update.mask is task.mask
    assert client.memory == {"loss": client.meter.loss}


@pytest.mark.parametrize("better", [True, False])
def test_an_upload_needs_a_lower_loss_than_the_upload_before(better: bool) -> None:
    loss = updated(PQSU())[0].meter.loss
    before = np.nextafter(loss, 100.0) if better else loss  # an equal loss is not lower
    client, update, task = updated(PQSU(), memory={"loss": before})
    assert client.meter.loss == loss
    assert update.mask.count == (task.mask.count if better else 0)
    assert client.memory == {"loss": loss if better else before}


@pytest.mark.parametrize("first", [{}, {"loss": 3.0}])
def test_a_loss_that_is_not_a_number_stays_at_home(first: dict[str, float]) -> None:
    client, update, _ = updated(PQSU(lr=1e30, local_epochs=3), memory=dict(first))
    assert np.isnan(client.meter.loss)
    assert update.mask.count == 0 and client.memory == first


def test_without_selection_everybody_uploads_and_remembers_nothing() -> None:
    client, update, task = updated(PQSU(selective="none"), memory={})
    assert update.mask is task.mask and client.memory == {}


def test_the_last_batch_instead_of_the_mean() -> None:
    method = PQSU(selective="last_batch", batch_size=7, lr=0.5)
    client, _, task = updated(method)
    losses: list[tuple[float, int]] = []

    def noted(step: Step) -> Tensor:
        value = cross_entropy(step.logits, step.y)
        losses.append((float(value.detach()), len(step.y)))
        return value

    small.client(method).sgd(task.params, task.mask, loss=noted)
    last, total = losses[-1][0], sum(n for _, n in losses)
    mean = sum(value * n for value, n in losses) / total
    assert client.memory["loss"] == client.meter.last_loss == pytest.approx(last, abs=1e-6)
    assert client.meter.loss == pytest.approx(mean, abs=1e-6)
    assert abs(mean - last) > 1e-3  # or else nothing was shown


def test_a_silent_client_costs_a_header() -> None:
    # nothing is learnt at this rate: from their second round on, about half of them have no lower loss
    server = begin(PQSU(lr=1e-9, pretrain_epochs=0), rounds=8)
    records = [record for report in small.run(server) for record in report.clients]
    silent = [record for record in records if record.density == 0]
    assert len(silent) >= 5
    assert {record.cost.bytes_up for record in silent} == {HEADER_BYTES}
    assert {record.fate for record in records} == {"folded"}


def test_an_upload_that_came_too_late_is_none() -> None:
    server = begin(PQSU(), rules=Rules(deadline_s=1e-6))
    small.run(server)
    assert server.checkpoint.memories == {}


# ── the mean


@dataclass(frozen=True, kw_only=True)
class Watched(PQSU):
    """PQSU that keeps all updates, and remembers each cohort and what came of it."""

    seen: list[tuple[ServerState, CohortUpdate, ServerState]] = field(default_factory=list, compare=False)

    @property
    def fold(self) -> Fold:
        return replace(super().fold, keep_updates=True)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        after = super().aggregate(state, cohort)
        self.seen.append((state, cohort, after))
        return after


def test_the_mean_is_that_of_the_uploads_each_counting_alike() -> None:
    method = Watched(lr=1e-6, stale="skip")  # so little is learnt that some losses do not fall
    small.run(begin(method, rounds=8))
    silent = 0
    for before, cohort, after in method.seen:
        uploads = [u.params.flat.double() for u in cohort.updates.values() if u.mask.count]
        silent += len(cohort.updates) - len(uploads)
        held = before.mask.flat
        expected = torch.stack(uploads).mean(0) if uploads else before.params.flat.double()
        np.testing.assert_allclose(after.params.flat[held].numpy(), expected[held].numpy(), atol=1e-6)
    assert silent


HAND = Layout(("w.weight",), ((1, 3),), (True,), (True,))
HELD = Mask(torch.tensor([True, True, False]), HAND)


def cohort_of(fold: Fold, **uploads: float | None) -> CohortUpdate:
    """Return a folded cohort: client → the value that it uploads everywhere; None if it is silent."""
    partial, records = Partial(HAND, fold, {HELD.digest: HELD}), []
    for name, value in uploads.items():
        client = int(name.removeprefix("c"))
        mask = Mask.none(HAND) if value is None else HELD
        partial.add(client, 10 * client, ClientUpdate(Params(torch.full((3,), value or 0.0), HAND), mask))
        records.append(ClientRecord(client, "device", 10 * client, "folded", Cost(), mask.density, 1.0))
    return CohortUpdate(partial, tuple(records))


def means(stale: Literal["skip", "reuse"], *cohorts: dict[str, float | None]) -> list[float]:
    """Return the server's weight after each cohort; it starts from 9."""
    method, found = PQSU(stale=stale), []
    state = ServerState(1, Params(torch.full((3,), 9.0), HAND), HELD, PQSUMemory())
    for uploads in cohorts:
        state = method.aggregate(state, cohort_of(method.fold, **uploads))
        first, second, behind_the_mask = state.params.flat.tolist()
        assert first == second and behind_the_mask == 9.0
        found.append(first)
    return found


COHORTS: tuple[dict[str, float | None], ...] = (
    {"c1": None, "c2": None},
    {"c1": 1.0, "c2": 3.0},
    {"c1": None, "c2": 5.0},
    {"c2": None, "c3": None},
    {"c2": None, "c3": 7.0},
    {},
)


def test_silent_clients_are_skipped() -> None:
    assert means("skip", *COHORTS) == [9.0, 2.0, 5.0, 5.0, 7.0, 7.0]


def test_or_their_last_uploads_are_used_again() -> None:
    # round 3: 1 (stale) and 5; round 4: only client 2 ever uploaded; round 5: 5 (stale) and 7
    assert means("reuse", *COHORTS) == [9.0, 2.0, 3.0, 5.0, 6.0, 6.0]


def test_only_with_reuse_the_server_keeps_models() -> None:
    for stale, kept in (("skip", 0), ("reuse", 6)):
        server = begin(PQSU(stale=stale, channels=0.25), rounds=6)  # type: ignore[arg-type]
        small.run(server)
        latest = server.state.memory.latest
        assert len(latest) == kept
        assert all(len(weights) == server.state.mask.count for weights in latest.values())


def test_reuse_goes_on_from_a_checkpoint() -> None:
    method = PQSU(stale="reuse", lr=0.2)
    first = begin(method)
    first.setup()
    first.step()
    first.step()
    point = first.checkpoint
    memories = {client: dict(memory) for client, memory in point.memories.items()}
    second = begin(
        method, checkpoint=Checkpoint(point.state, memories, dict(point.holds), dict(point.totals))
    )
    small.run(first)
    small.run(second)
    assert first.model == second.model


# ── quantisation


def test_an_upload_is_a_byte_for_a_weight_and_four_for_a_bias() -> None:
    server = begin(PQSU(channels=0.5, selective="none"))
    server.setup()
    first, second = server.step(), server.step()
    # 4 units: fc1 has 4 · 16 weights and 4 biases, fc2 3 · 4 and 3; a scale and a zero point for each tensor
    payload = HEADER_BYTES + 4 + 4 * (4 + 3) + (64 + 12) + 5 * 4 + DIGEST_BYTES
    assert {record.cost.bytes_up for record in first.clients} == {payload}
    assert min(record.cost.bytes_down for record in second.clients) == payload
    literal = begin(PQSU(channels=0.5, selective="none", quantise_vectors=True))
    literal.setup()
    payload = HEADER_BYTES + (64 + 12 + 4 + 3) + 5 * 4 + DIGEST_BYTES
    assert {record.cost.bytes_up for record in literal.step().clients} == {payload}


def weights(layout: Layout, seed: int) -> Params:
    flat = np.random.default_rng(seed).standard_normal(layout.size, np.float32)
    return Params(torch.from_numpy(flat), layout)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from(["int8", "fp16"]))
@PROPERTY
def test_vectors_arrive_exactly_and_all_else_as_without(
    seed: int, density: float, values: Literal["int8", "fp16"]
) -> None:
    layout = CNN.layout
    params = weights(layout, seed)
    mask = Mask(torch.from_numpy(np.random.default_rng(seed).random(layout.size) < density), layout)
    codec = Codec(values, exact_vectors=True)
    payload = codec.encode(params, mask)
    assert len(payload) == codec.size(mask)
    assert mask.count or len(payload) == HEADER_BYTES
    decoded, coarse = (
        codec.decode(payload, layout),
        Codec(values).decode(Codec(values).encode(params, mask), layout),
    )
    assert decoded.mask == mask
    assert Codec().decode(payload, layout).params == decoded.params  # any codec reads it
    held = params.masked(mask)
    for name, shape in layout.shape_of.items():
        expected = held if len(shape) == 1 else coarse.params
        assert torch.equal(decoded.params[name], expected[name])


def test_a_small_variance_is_not_rounded_to_zero() -> None:
    params, mask = weights(CNN.layout, 0), Mask.full(CNN.layout)
    params["bn1.running_var"][:] = torch.tensor([50.0, 1.0, 0.01, 0.001])
    coarse = Codec("int8").decode(Codec("int8").encode(params, mask), CNN.layout).params
    assert coarse["bn1.running_var"].tolist()[2:] == [0.0, 0.0]
    codec = PQSU().uplink
    exact = codec.decode(codec.encode(params, mask), CNN.layout).params
    assert exact["bn1.running_var"].equal(params["bn1.running_var"])
    assert PQSU(quantise_vectors=True).downlink == Codec("int8")
    assert PQSU(uplink_values="fp32").uplink.lossless


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_payload_decodes_or_is_refused(data: st.DataObject) -> None:
    codec, layout = Codec("int8", exact_vectors=True), MLP.layout
    mask = Mask(torch.arange(layout.size) % 3 > 0, layout)
    payload = bytearray(codec.encode(weights(layout, 0), mask))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, HEADER_BYTES + 4))
        if data.draw(st.booleans()):
            payload[at] = data.draw(st.integers(0, 255))
        else:
            del payload[at : at + data.draw(st.integers(1, 9))]
    try:
        decoded = codec.decode(bytes(payload), layout)
    except WireError:
        return
    assert not decoded.params.flat[~decoded.mask.flat].any()


def test_a_count_that_is_not_that_of_the_vectors_is_refused() -> None:
    codec, layout = Codec("int8", exact_vectors=True), MLP.layout
    payload = bytearray(codec.encode(weights(layout, 0), Mask.full(layout)))
    assert payload[HEADER_BYTES] == 11  # 8 and 3 biases
    payload[HEADER_BYTES : HEADER_BYTES + 4] = (10**9).to_bytes(4, "little")
    with pytest.raises(WireError, match="exact entries: found 1000000000, expected at most 163"):
        codec.decode(bytes(payload), layout)
    payload[HEADER_BYTES : HEADER_BYTES + 4] = (10).to_bytes(4, "little")
    with pytest.raises(WireError, match="found"):
        codec.decode(bytes(payload), layout)


# ── what it needs


def test_models_without_channels_and_densities_out_of_reach_are_refused() -> None:
    said = PQSU().check(small.setting(architecture=small.LINEAR))
    assert said is not None and said.startswith("model=small has no channels")
    said = PQSU(density=0.1).check(small.setting())
    assert said is not None and said.startswith("method.density=0.1 cannot be reached")
    assert PQSU(channels=0.001).check(small.setting()) is None  # one channel stays


def test_without_server_data_it_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"data\.server_fraction.*pqsu trains on the server's own"):
        RunConfig.from_tree({"method": {"name": "pqsu"}, "tracking": {"uri": "none"}})
