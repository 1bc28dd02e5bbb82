"""What a decision at a stage looks at, against numbers worked out from the round's own records."""

from copy import deepcopy
from dataclasses import dataclass, replace
from math import log, nan

import numpy as np
import pytest
import torch

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.federation.server import Schedule
from fedray.methods.staged import Staged
from fedray.policies.situation import PROBES, Situation, Spent, bytes_share, distance, look
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params, ServerState
from tests import small


@dataclass(frozen=True, kw_only=True)
class Looking(Staged):
    """Looks at every stage, and keeps what it saw with; never prunes."""

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        history = state.memory.history.spend(state, cohort, ctx)
        state = replace(state, memory=replace(state.memory, history=history))
        now = look(state, cohort, ctx, stages_left=0.5, spent=history.spent, sent=history.sent)
        SEEN.append((state, cohort, ctx, now))
        return state


SEEN: list[tuple[ServerState, CohortUpdate, ServerContext, Situation]] = []


@pytest.fixture
def seen() -> tuple[ServerState, CohortUpdate, ServerContext, Situation]:
    SEEN.clear()
    method = Looking(policy="bandit", initial_density=0.5, stages=2)
    server = small.server(method, schedule=Schedule(rounds=2, cohort=4))
    server.setup()
    server.step()
    return SEEN[0]


def test_distance_by_hand() -> None:
    layout = small.server(Staged()).place.model.layout
    before = Params(torch.ones(layout.size), layout)
    after = Params(torch.full((layout.size,), 1.5), layout)
    assert distance(before, after, Mask.full(layout)) == pytest.approx(0.25)
    assert distance(before, after, Mask.none(layout)) == 0.0


def test_the_model_is_seen_as_it_is_and_as_it_would_be(seen) -> None:
    state, _, ctx, now = seen
    accuracy, loss = ctx.validate(state.params, state.mask)
    assert (now.accuracy, now.loss) == pytest.approx((accuracy, loss / log(small.CLASSES)))
    for share, probe in zip(PROBES, now.probes, strict=True):
        mask = top_k(magnitude(state.params), 0.5 * share, ctx.layout, within=state.mask)
        assert probe == pytest.approx(ctx.validate(state.params, mask)[1] / loss)
    assert now.density == 0.5 and now.progress == 0.5 and now.stages_left == 0.5


def test_the_cohort_is_seen_from_its_records(seen) -> None:
    _, cohort, _, now = seen
    losses = np.array([record.loss for record in cohort.folded])
    sizes = np.array([record.num_examples for record in cohort.folded])
    assert now.train_loss == pytest.approx(np.average(losses, weights=sizes) / log(small.CLASSES))
    assert now.loss_spread == pytest.approx(losses.std() / losses.mean())
    assert now.participation == 1.0
    profile = small.DEVICE
    idle = [
        profile.latency_s + r.cost.bytes_down / profile.downlink_bytes_per_s
        + r.cost.bytes_up / profile.uplink_bytes_per_s
        for r in cohort.folded
    ]  # fmt: skip
    shares = [i / r.cost.seconds for i, r in zip(idle, cohort.folded, strict=True)]
    assert now.on_the_wire == pytest.approx(np.mean(shares))


def test_movement_and_agreement(seen) -> None:
    state, cohort, _, now = seen
    sent = state.memory.history.sent
    assert sent is not None
    squared = distance(sent, state.params, state.mask)
    assert now.moved == pytest.approx(squared**0.5) and now.moved > 0
    assert now.agreement == pytest.approx(squared / cohort.metrics["moved"]) and 0 < now.agreement <= 1


def test_what_was_spent_is_a_share_of_the_dense_run(seen) -> None:
    state, cohort, ctx, now = seen
    dense = 2 * 4 * ctx.layout.size * 4
    share = (cohort.cost.bytes_up + cohort.cost.bytes_down) / dense
    assert bytes_share(cohort, ctx) == now.bytes_now == pytest.approx(share)
    assert now.spent_bytes == pytest.approx(share / 2)  # one of two rounds
    assert now.spent_flops == pytest.approx(
        ctx.flops.train(state.mask) / ctx.flops.train(Mask.full(ctx.layout)) / 2
    )


def test_what_a_client_does_not_know_is_left_out_and_is_no_agreement(seen) -> None:
    state, cohort, ctx, _ = seen
    first, *rest = cohort.records
    partial = deepcopy(cohort.partial)
    partial.metrics["moved"] = (nan, 1.0)
    lacking = CohortUpdate(partial, (replace(first, loss=nan), *rest))
    now = look(state, lacking, ctx, stages_left=0.5, spent=Spent(), sent=state.params)
    losses, sizes = [r.loss for r in rest], [r.num_examples for r in rest]
    assert now.train_loss == pytest.approx(np.average(losses, weights=sizes) / log(small.CLASSES))
    assert now.agreement == 0.0
