"""FRLP: when it prunes, how the rate is found, what happens to zeros, and FedSA: the mask-aware mean."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedray.config import yaml_text
from fedray.config.run_config import RunConfig
from fedray.costs.codec import HEADER_BYTES
from fedray.durable import as_mapping, read_mapping
from fedray.errors import ConfigError, MethodError
from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.client import Client
from fedray.federation.method import ServerContext
from fedray.federation.server import SERVER, Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.frlp import FRLP
from fedray.policies.line_search import Solver
from fedray.policies.rate_search import OBSERVATION_VERSION
from fedray.policies.trained import shipped
from fedray.types import Mask, Params, ServerState
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
DATA = small.dataset(400)
UNREACHABLE: dict[str, Any] = {"ratio": 100.0, "step": 0.05, "stride": 1, "samples": 2}
"""Distances never grow hundredfold: every event goes to its limit, and looks at few candidates."""


def begin(method: FRLP, rounds: int = 5, cohort: int = 4, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort), server_rows=60, data=DATA, **place)


def densities(server: Server) -> list[float]:
    return [report.metrics["density/global"] for report in small.run(server)]


@dataclass(frozen=True, kw_only=True)
class Watched(FRLP):
    """FRLP that keeps all updates, and remembers what each `prune` was given and left."""

    seen: list[tuple[ServerState, ServerState, CohortUpdate]] = field(default_factory=list, compare=False)
    look: Callable[[ServerState, ServerContext], None] | None = None

    @property
    def fold(self) -> Fold:
        return replace(super().fold, keep_updates=True)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        if self.look is not None and state.round in state.memory.events:
            self.look(state, ctx)
        after = super().prune(state, cohort, ctx)
        self.seen.append((state, after, cohort))
        return after


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect the density of each model that the server trains."""
    calls: list[float] = []
    sgd = Client.sgd

    def counted(self: Client, params: Params, mask: Mask, **options: Any) -> Params:
        if self.id == SERVER:
            calls.append(mask.density)
        return sgd(self, params, mask, **options)

    monkeypatch.setattr(Client, "sgd", counted)
    return calls


# ── when


@pytest.mark.parametrize(
    ("rounds", "options", "events"),
    [
        (100, {}, (20, 40, 60)),  # as in the design: every 20 rounds up to 0.6 of the run
        (450, {}, tuple(range(20, 271, 20))),
        (10, {}, (2, 4, 6)),
        (3, {}, (1,)),
        (100, {"interval": 30, "until": 1.0}, (30, 60, 90)),
        (100, {"until": 0.0}, ()),
        (100, {"prune_rounds": (7, 8)}, (7, 8)),
        (100, {"prune_rounds": ()}, ()),
    ],
)
def test_pruning_rounds(rounds: int, options: dict[str, Any], events: tuple[int, ...]) -> None:
    server = begin(FRLP(pretrain_epochs=0, **options), rounds)
    server.setup()
    assert server.state.memory.events == events


def test_the_mask_moves_at_events_only_and_only_there_the_server_trains(trained: list[float]) -> None:
    server = begin(FRLP(prune_rounds=(2, 4), single_shot=0.2, **UNREACHABLE))
    assert server.setup().metrics["flops/server"] > 0  # pre-training
    for round in range(1, 6):
        trained.clear()
        before, report = server.state.mask, server.step()
        event = round in (2, 4)
        assert (server.state.mask != before) == event
        assert (report.metrics["flops/server"] > 0) == event == bool(trained)


# ── how far


def by_hand(method: FRLP, state: ServerState, ctx: ServerContext, initial: Params) -> tuple[float, Params]:
    """Return density and fine-tuned model of one event as the paper's text has it: a plain line search."""

    def tuned(rate: float) -> Params:
        count = round((1 - rate) * WEIGHTS)
        weights = state.params.flat[:WEIGHTS].abs()  # fc1.weight comes first
        flat = torch.ones(SIZE, dtype=torch.bool)
        flat[:WEIGHTS] = False
        flat[weights.topk(count).indices] = True
        return ctx.server.sgd(state.params, Mask(flat, ctx.layout), epochs=1, seed=state.round)

    def distance(rate: float) -> float:
        model = tuned(rate)
        parts = [model[name] - initial[name] for name in ("fc1.weight", "fc2.weight")]
        return float(np.linalg.norm(np.concatenate([p.double().flatten().numpy() for p in parts])))

    samples = [i * method.single_shot / (method.samples - 1) for i in range(method.samples)]
    start = min(samples, key=distance)
    rate = start
    while (
        rate < method.single_shot and abs(distance(rate) / distance(start) - method.ratio) >= method.tolerance
    ):
        rate += method.step * method.stride
    rate = min(rate, method.single_shot)
    return 1 - rate, tuned(rate)


@pytest.mark.parametrize("winit", ["random", "pretrained", "preprune"])
@pytest.mark.parametrize("broadcast_finetuned", [True, False])
def test_an_event_is_the_papers_line_search(winit: Any, broadcast_finetuned: bool) -> None:
    expected: list[tuple[float, Params]] = []
    models: dict[str, Params] = {}

    def look(state: ServerState, ctx: ServerContext) -> None:
        initial = state.params if winit == "preprune" else models[winit]
        expected.append(by_hand(method, state, ctx, initial))

    method = Watched(
        solver="scan",
        winit=winit,
        broadcast_finetuned=broadcast_finetuned,
        prune_rounds=(2,),
        stride=20,
        look=look,
    )
    server = begin(method, rounds=2)
    models["random"] = server.state.params
    server.setup()
    models["pretrained"] = server.state.params
    server.step()
    server.step()
    ((density, model),) = expected
    assert 0.5 < density < 0.95  # neither end of the range: something was searched
    assert server.state.mask.density == pytest.approx(density, abs=1 / WEIGHTS)
    before, after, _ = method.seen[-1]
    sent = model if broadcast_finetuned else before.params.masked(after.mask)
    assert torch.equal(server.model.flat, sent.flat)


def test_the_readings_of_the_starting_point_differ() -> None:
    found = {
        winit: densities(begin(FRLP(winit=winit, prune_rounds=(2,)), rounds=2))[-1]
        for winit in ("random", "pretrained", "preprune")
    }
    assert len(set(found.values())) == 3


def test_events_stop_at_the_single_shot_limit_and_at_the_floor(trained: list[float]) -> None:
    method = FRLP(prune_rounds=(1, 2, 3, 4), single_shot=0.25, min_density=0.375, **UNREACHABLE)
    server = begin(method)
    found = densities(server)
    assert found == [1.0, 0.75, 0.5, 0.375, 0.375, 0.375]
    trained.clear()
    assert server.state.mask.density == 0.375  # and an event at the floor does not search
    assert [r.metrics["flops/server"] > 0 for r in small.run(begin(method))] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("ratio", [1.03, 1.05, 1.08, 1.12, 100.0])
def test_bisection_trains_sixteen_candidates_at_most(ratio: float, trained: list[float]) -> None:
    server = begin(FRLP(solver="bisect", ratio=ratio, prune_rounds=(1,)), rounds=1)
    server.setup()
    trained.clear()
    server.step()
    assert 0.5 <= server.state.mask.density < 0.95
    # 6 samples and ⌈log2 1001⌉ = 10 of the 1,000 states; the winner, wherever it came, is one of them
    assert len(trained) <= (6 if ratio == 100.0 else 16)


def test_the_agent_and_bisection_and_a_scan_of_every_state_agree(trained: list[float]) -> None:
    # a step of one weight, so that neighbouring states are different models
    options: dict[str, Any] = {"prune_rounds": (2,), "step": 1 / WEIGHTS, "stride": 1, "tolerance": 0.02}
    found: dict[str, tuple[list[float], str, int]] = {}
    for solver in get_args(Solver):
        trained.clear()
        server = begin(FRLP(solver=solver, **options), rounds=3)
        found[solver] = densities(server), server.model.sha256, len(trained)
    assert found["dqn"][:2] == found["scan"][:2] == found["bisect"][:2]
    assert 0.5 < found["dqn"][0][-1] < 0.95  # neither end of the range: something was searched
    assert found["dqn"][2] == found["scan"][2] > found["bisect"][2]


def test_an_agent_of_the_users_own_decides(tmp_path: Path, trained: list[float]) -> None:
    policy = shutil.copytree(shipped("rate_search"), tmp_path / "my policy")
    options: dict[str, Any] = {"prune_rounds": (1,), "stride": 50}
    ours, theirs = (
        begin(FRLP(solver="dqn", policy=path, **options), rounds=1) for path in (None, Path(policy))
    )
    assert densities(ours) == densities(theirs)
    assert ours.model.sha256 == theirs.model.sha256


def test_one_server_epoch_for_each_candidate_is_charged(trained: list[float]) -> None:
    server = begin(FRLP(prune_rounds=(1,), pretrain_epochs=3, single_shot=0.25, **UNREACHABLE), rounds=1)
    setup, event = small.run(server)
    flops, full = server.place.flops, Mask.full(server.place.model.layout)
    assert setup.metrics["flops/server"] == 3 * 60 * flops.train(full)  # 60 examples
    # fc2 costs 24 multiply-adds whatever is pruned, fc1 one for each weight held; training is three passes
    per_pass = [2 * (24 + density * WEIGHTS) for density in trained[1:]]
    assert event.metrics["flops/server"] == pytest.approx(60 * 3 * sum(per_pass))
    assert event.metrics["time/simulated_s"] > setup.metrics["time/simulated_s"] > 0


# ── zeros, and who holds a weight


def test_enforced_zeros_make_fedsa_the_mean_of_fedavg() -> None:
    method = Watched(prune_rounds=(1, 3), single_shot=0.3, **UNREACHABLE)
    small.run(begin(method))
    for state, _, cohort in method.seen:
        clients = {record.client: record.num_examples for record in cohort.records}
        total = sum(clients.values())
        mean = sum(n / total * cohort.updates[k].params.flat.double() for k, n in clients.items())
        assert isinstance(mean, torch.Tensor)
        np.testing.assert_allclose(state.params.flat.numpy(), mean.numpy(), atol=1e-6)


def test_by_mask_and_by_nonzero_are_one_where_zeros_are_enforced() -> None:
    by_mask, by_nonzero = (
        begin(FRLP(aggregation=aggregation, prune_rounds=(1, 3), single_shot=0.3, **UNREACHABLE))
        for aggregation in ("mask", "nonzero")
    )
    assert by_nonzero.method.fold == Fold(by="nonzero")
    small.run(by_mask)
    small.run(by_nonzero)
    assert by_mask.state.mask == by_nonzero.state.mask
    np.testing.assert_allclose(by_mask.model.flat.numpy(), by_nonzero.model.flat.numpy(), atol=1e-6)


def test_regrown_zeros_are_uploaded_and_held_again() -> None:
    server = begin(FRLP(zeros="regrow", prune_rounds=(2,), single_shot=0.5, **UNREACHABLE))
    reports = small.run(server)
    assert [r.metrics["density/global"] for r in reports] == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    for report in reports[1:]:
        assert report.metrics["density/client_mean"] == 1.0
        assert {r.cost.bytes_up for r in report.clients} == {HEADER_BYTES + 4 * SIZE}
    down = [report.metrics["bytes/down"] for report in reports]
    assert down[3] < down[2]  # only the broadcast after the event is sparse


@pytest.mark.parametrize("broadcast_finetuned", [True, False])
def test_repruned_updates_have_the_density_received_and_the_mask_is_their_union(
    broadcast_finetuned: bool,
) -> None:
    method = Watched(
        zeros="reprune",
        broadcast_finetuned=broadcast_finetuned,
        prune_rounds=(1,),
        single_shot=0.5,
        local_epochs=3,
        lr=2.0,  # far enough for clients to disagree about what is large
        **UNREACHABLE,
    )
    server = begin(method, cohort=6)
    reports = small.run(server)
    sent = [1.0, *(after.mask.density for _, after, _ in method.seen)]
    for report, received in zip(reports[1:], sent, strict=False):
        assert {round(r.density * WEIGHTS) for r in report.clients} == {round(received * WEIGHTS)}
    for (_, before, _), (_, after, cohort) in pairwise(method.seen):
        held = torch.stack([update.mask.flat for update in cohort.updates.values()]).any(0)
        assert torch.equal(after.mask.flat, held)
        assert before.mask.density <= after.mask.density < 1
    unions = [after.mask.density for _, after, _ in method.seen]
    assert unions[0] == 0.5 < unions[-1]  # clients did disagree


# ── what it needs


def test_without_server_data_it_does_not_start() -> None:
    tree = {"method": {"name": "frlp"}, "tracking": {"uri": "none"}}
    with pytest.raises(ConfigError, match=r"data\.server_fraction.*frlp trains on the server's own"):
        RunConfig.from_tree(tree)
    with pytest.raises(MethodError, match=r"set data\.server_fraction above 0"):
        small.server(FRLP()).setup()


def test_pruning_rounds_that_the_run_does_not_reach_are_refused() -> None:
    tree = {"rounds": 10, "data": {"server_fraction": 0.1}, "tracking": {"uri": "none"}}
    events = {"method": {"name": "frlp", "prune_rounds": [10, 11, 20]}}
    with pytest.raises(ConfigError, match=r"method\.prune_rounds.* after round\(s\) 11, 20.* has 10 round"):
        RunConfig.from_tree(tree | events)
    assert FRLP(prune_rounds=(1, 10)).check(small.setting(rounds=10)) is None
    assert FRLP().check(small.setting(rounds=2)) is None
    assert "round 1, the first after which" in (FRLP().check(small.setting(rounds=1)) or "")


def test_an_agent_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    tree = {"data": {"server_fraction": 0.1}, "tracking": {"uri": "none"}}

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_tree(tree | {"method": {"name": "frlp", **options}})

    absent, stranger = tmp_path / "absent", tmp_path / "stranger"
    refused(
        rf"method\.policy: policy {absent}: there is no policy\.json in it; train one with `fedray "
        r"agent train tune_configs/rl_rate_search\.yaml --out DIR`",
        solver="dqn",
        policy=str(absent),
    )
    shutil.copytree(shipped("rate_search"), stranger)
    about = read_mapping(stranger / "policy.json") or {}
    (stranger / "policy.json").write_bytes(as_mapping(about | {"version": OBSERVATION_VERSION + 1}))
    refused(
        "it reads observations of version 2, and rate_search has 1",
        solver="dqn",
        policy=str(stranger),
    )
    refused(
        r"method\.policy is the agent of method\.solver=dqn, but the solver is bisect", policy=str(absent)
    )
    assert FRLP(solver="dqn").check(small.setting()) is None


def test_the_path_of_a_policy_holds_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(shipped("rate_search"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    tree = {"data": {"server_fraction": 0.1}, "method": {"name": "frlp", "solver": "dqn", "policy": "mine"}}
    config = RunConfig.from_tree(tree | {"tracking": {"uri": "none"}})
    assert isinstance(config.method.options, FRLP)
    assert config.method.options.policy == tmp_path / "mine"
    assert RunConfig.from_tree(yaml_text.parse(yaml_text.dump(config.to_tree()), "")) == config


def test_an_event_at_which_everything_diverges_says_so() -> None:
    with pytest.raises(MethodError, match="fine-tuning diverged at all 2 sampled rates"):
        method = FRLP(lr=1e30, pretrain_epochs=0, prune_rounds=(1,), **UNREACHABLE)
        small.run(begin(method, rules=Rules(max_failed=1)))
