"""The same bits: from the same seed, from a checkpoint, and nearly so from other chunks."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.server import Schedule, Server
from fedray.federation.wire import OWN_NORMS
from fedray.federation.worker import Rules
from fedray.models.norms import Norm
from fedray.types import ClientUpdate, Params, ServerState, Task
from tests import small
from tests.federation.probes import Moving, SpyPool, score, spied, without_clocks


@dataclass(frozen=True, kw_only=True)
class Everything(Moving):
    """Everything that may depend on chance, on memory or on the order of things."""

    uses_server_data: ClassVar[bool] = True

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: remember the last model, and start half way to it."""
        last = client.memory.get("last", task.params.flat)
        start = Params((task.params.flat + last) / 2, task.params.layout)
        params = client.sgd(start, task.mask)
        client.memory["last"] = params.flat
        return ClientUpdate(params, task.mask, metrics={"draw": float(client.rng.random())})

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Move the mask, train at the server, ask a client; remember a number."""
        state = super().prune(state, cohort, ctx)
        asked = ctx.ask(score, {k: Task(state.params, state.mask) for k in ctx.sample(2)})
        step = Params(state.params.flat - 0.1 * asked.sum("gradient"), ctx.layout)
        params = ctx.server.sgd(step, state.mask)
        return replace(state, params=params, memory=(state.memory or 0.0) + float(ctx.rng.random()))


def everything(**options: Any) -> Server:
    usual: dict[str, Any] = {
        "server_rows": 12,
        "rules": Rules(dropout=0.2),
        "schedule": Schedule(rounds=4, cohort=4),
    }
    return small.server(Everything(batch_size=5, momentum=0.5), **usual | options)


def test_the_same_seed_gives_the_same_bits():
    first, again, other = everything(), everything(), everything(seed=1)
    reports = [[without_clocks(report) for report in small.run(server)] for server in (first, again, other)]
    assert reports[0] == reports[1] != reports[2]
    assert first.model.sha256 == again.model.sha256 != other.model.sha256
    assert first.state == again.state


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_other_chunks_give_almost_the_same_numbers(chunk: int):
    whole = everything(schedule=Schedule(rounds=4, cohort=4, chunk=4))
    cut = everything(schedule=Schedule(rounds=4, cohort=4, chunk=chunk))
    for a, b in zip(small.run(whole), small.run(cut), strict=True):
        assert [(r.client, r.fate, r.cost) for r in a.clients] == [
            (r.client, r.fate, r.cost) for r in b.clients
        ]
        assert a.metrics["val/loss"] == pytest.approx(b.metrics["val/loss"], rel=1e-4)
    np.testing.assert_allclose(whole.model.flat.numpy(), cut.model.flat.numpy(), atol=1e-5)


def test_a_run_that_goes_on_from_a_checkpoint_equals_one_that_never_stopped():
    whole = everything()
    reports = small.run(whole)
    stopped = everything(schedule=Schedule(rounds=4, cohort=4))
    stopped.setup()
    stopped.step()
    stopped.step()
    saved = deepcopy(stopped.checkpoint)
    stopped.step()  # what happens after it was saved must not reach it
    resumed = everything(checkpoint=saved)
    rest = small.run(resumed)
    assert [report.round for report in rest] == [3, 4]
    assert list(map(without_clocks, rest)) == list(map(without_clocks, reports[3:]))
    assert resumed.state == whole.state
    assert resumed.checkpoint.holds == whole.checkpoint.holds
    assert resumed.checkpoint.memories.keys() == whole.checkpoint.memories.keys() != set()
    for client, memory in whole.checkpoint.memories.items():
        assert torch.equal(memory["last"], resumed.checkpoint.memories[client]["last"])


# ── what clients remember ─────────────────────────────────────────────────────────────────────────────────


def test_what_a_client_forgets_is_not_kept():
    @dataclass(frozen=True, kw_only=True)
    class Once(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            if client.memory:
                client.memory.clear()
            else:
                client.memory["met"] = True
            return super().client_update(task, client)

    server = small.server(Once(), schedule=Schedule(rounds=2, cohort=6))
    server.setup()
    server.step()
    assert server.checkpoint.memories == {k: {"met": True} for k in range(6)}
    server.step()
    assert server.checkpoint.memories == {}


@pytest.mark.parametrize("norm", ["average", "local"])
def test_the_server_drops_what_a_method_says_is_over(norm: Norm):
    @dataclass(frozen=True, kw_only=True)
    class Weekly(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            client.memory["seen"] = client.round
            return super().client_update(task, client)

        def forgets(self, state: ServerState) -> bool:
            return state.round == 2

    server = small.server(Weekly(), clients=30, norm=norm, architecture=small.CNN)
    server.setup()
    server.step()
    known = set(server.checkpoint.memories)
    server.step()
    memories = server.checkpoint.memories
    assert all(set(memory) == {OWN_NORMS} for memory in memories.values()), "norms are not the method's"
    assert (known <= set(memories)) if norm == "local" else memories == {}
    server.step()
    assert {m["seen"] for m in server.checkpoint.memories.values() if "seen" in m} == {3}


def test_memories_travel_with_the_chunk_of_their_client():
    server = everything(pool=SpyPool)
    small.run(server)
    for job, chunks in spied(server).jobs:
        for chunk in chunks:
            assert set(chunk.memories) <= {order.client for order in chunk.orders}
        assert job.round <= 4
    assert any(chunk.memories for _, chunks in spied(server).jobs for chunk in chunks)
