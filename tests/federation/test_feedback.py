"""Error feedback in a federation: a client's debt lives in its memory, whoever trains it, and is paid."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import fedray
from fedray.config.run_config import RunConfig
from fedray.costs.differences import STC, DeltaCodec, FedPAQ, Int8, TopK, UplinkCodec
from fedray.errors import ConfigError
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.server import Schedule, Server
from fedray.federation.wire import RESIDUAL, Wire
from fedray.federation.worker import Rules
from fedray.models.norms import Norm
from fedray.storage import checkpoint as stored
from fedray.types import ClientUpdate, Mask, Params, ServerState, Task
from tests import small
from tests.experiment import tiny
from tests.federation.probes import WEIGHTS, half, without_clocks

TENTH = TopK(share=0.1)


def federation(codec: UplinkCodec = TENTH, method: Method | None = None, **options: Any) -> Server:
    usual: dict[str, Any] = {"schedule": Schedule(rounds=4, cohort=3), "codec": codec} | options
    return small.server(method or Method(lr=0.1), **usual)


def residuals(server: Server) -> dict[int, torch.Tensor]:
    return {k: memory[RESIDUAL] for k, memory in sorted(server.checkpoint.memories.items())}


def wire(codec: UplinkCodec, **options: Any) -> Wire:
    return replace(small.workplace(Method(), **options), codec=codec).wire


def test_what_arrives_and_what_is_owed_add_up_to_every_difference():
    link = wire(TENTH)
    layout = link.model.layout
    mask, start = Mask.full(layout), Params(torch.zeros(layout.size), layout)
    kept: dict[str, Any] = {}
    arrived, due = torch.zeros(layout.size), torch.zeros(layout.size)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        moved = Params(torch.randint(-8, 9, (layout.size,), generator=generator).float(), layout)
        update, _, kept = link.upload(Task(start, mask), ClientUpdate(moved, mask), kept)
        assert update.params.flat.count_nonzero() <= 17  # a tenth of 163, rounded up
        arrived, due = arrived + update.params.flat, due + moved.flat
    assert torch.equal(arrived + kept[RESIDUAL], due)  # small whole numbers: exact
    assert (arrived != 0).float().mean() > 0.9, "every entry has its turn"


@pytest.mark.parametrize(
    "codec", [TENTH, STC(share=0.1), Int8(), FedPAQ(feedback=True), TopK(share=0.1, values="int8")]
)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "pruned"])
def test_what_arrives_and_what_is_owed_add_up_with_every_codec(codec: DeltaCodec, masked: bool):
    link = wire(codec)
    layout = link.model.layout
    mask, rng = half(layout) if masked else Mask.full(layout), torch.Generator().manual_seed(0)
    start = Params(torch.randn(layout.size, generator=rng), layout).masked(mask)
    kept: dict[str, Any] = {}
    arrived, due = torch.zeros(layout.size), torch.zeros(layout.size)
    for _ in range(20):
        moved = Params(start.flat + torch.randn(layout.size, generator=rng), layout).masked(mask)
        draws = np.random.default_rng(0)
        update, _, kept = link.upload(Task(start, mask), ClientUpdate(moved, mask), kept, rng=draws)
        arrived, due = arrived + update.params.flat - start.flat, due + moved.flat - start.flat
        assert not bool(update.params.flat[~mask.flat].any())
    assert torch.allclose(arrived + kept[RESIDUAL], due, atol=1e-4)
    assert not torch.allclose(arrived, due, atol=1e-4)


def test_fedpaq_keeps_nothing_and_draws_other_numbers_for_every_client_and_round():
    server = federation(FedPAQ(bits=2))
    small.run(server)
    assert server.checkpoint.memories == {}
    again = federation(FedPAQ(bits=2))
    small.run(again)
    assert again.model == server.model
    fixed = federation(Fixed(bits=2))
    small.run(fixed)
    assert fixed.model != server.model


@dataclass(frozen=True, kw_only=True)
class Fixed(FedPAQ):
    """FedPAQ that always draws the same numbers."""

    def encode_drawing(self, difference: Params, mask: Mask, rng: np.random.Generator) -> bytes:
        """Ignore the generator."""
        return super().encode_drawing(difference, mask, np.random.default_rng(0))


def test_without_feedback_nothing_is_kept():
    server = federation(TopK(share=0.1, feedback=False))
    small.run(server)
    assert server.checkpoint.memories == {}


def test_everything_sent_is_almost_the_plain_run():
    every, plain = federation(TopK(share=1.0)), federation(UplinkCodec())
    small.run(every), small.run(plain)
    assert torch.allclose(every.model.flat, plain.model.flat, atol=1e-6)


def test_feedback_learns_more_than_the_same_bytes_without():
    def loss(**options: Any) -> float:
        server = federation(
            TopK(share=0.03, **options),
            Method(lr=0.1, local_epochs=2),
            schedule=Schedule(25, 6),
            data=small.dataset(400),
        )
        return float(small.run(server)[-1].metrics["val/loss"])

    assert loss(feedback=True) < loss(feedback=False)


@pytest.mark.parametrize(
    ("norm", "codec"),
    [("average", TENTH), ("local", TENTH), ("local", STC(share=0.1)), ("group", FedPAQ(feedback=True))],
)
def test_a_resumed_run_pays_what_clients_owed(norm: Norm, codec: DeltaCodec, tmp_path):
    options: dict[str, Any] = {"norm": norm, "architecture": small.CNN, "codec": codec}
    whole = federation(**options)
    reports = small.run(whole)
    stopped = federation(**options)
    for _ in (stopped.setup(), stopped.step(), stopped.step()):
        pass
    path = tmp_path / stored.name_of(3)
    stored.write(path, stopped.checkpoint, {})
    resumed = federation(checkpoint=stored.read(path).checkpoint, **options)
    assert list(map(without_clocks, small.run(resumed))) == list(map(without_clocks, reports[3:]))
    assert resumed.model == whole.model
    owed = residuals(whole)
    assert owed.keys() and all(torch.equal(owed[k], v) for k, v in residuals(resumed).items())
    size = whole.place.model.norms.sent_layout.size
    assert {len(v) for v in owed.values()} == {size}


@pytest.mark.parametrize(
    ("chunk", "codec"),
    [
        pytest.param(1, TENTH, marks=pytest.mark.slow),
        (3, TENTH),
        pytest.param(1, STC(share=0.1), marks=pytest.mark.slow),
        pytest.param(1, FedPAQ(feedback=True), marks=pytest.mark.slow),
        pytest.param(1, Int8(), marks=pytest.mark.slow),
    ],
)
def test_the_bits_do_not_depend_on_where_clients_train(chunk: int, codec: DeltaCodec, ray_local):
    from fedray.federation.pool import ActorOptions, Group, RayPool

    schedule = Schedule(rounds=3, cohort=5, chunk=chunk)

    def on_ray(place: Any) -> RayPool:
        return RayPool(place, [Group(2, ActorOptions(cpu=0.5))])

    here, there = federation(codec, schedule=schedule), federation(codec, schedule=schedule, pool=on_ray)
    assert list(map(without_clocks, small.run(here))) == list(map(without_clocks, small.run(there)))
    assert here.model == there.model
    owed = residuals(here)
    assert owed.keys() == residuals(there).keys()
    assert all(torch.equal(owed[k], v) for k, v in residuals(there).items())
    there.pool.close()


@pytest.mark.parametrize("rules", [Rules(deadline_s=0.1), Rules(dropout=1 - 1e-12)], ids=["late", "dropped"])
def test_an_update_that_does_not_count_changes_no_debt(rules: Rules):
    server = federation(schedule=Schedule(rounds=4, cohort=6))
    server.setup()
    server.step()
    owed = residuals(server)
    server.place = replace(server.place, rules=rules)
    server.pool = type(server.pool)(server.place)  # type: ignore[call-arg]
    server.step()
    assert all(torch.equal(owed[k], v) for k, v in residuals(server).items())


@dataclass(frozen=True, kw_only=True)
class Asking(Method):
    """Asks clients to send the params of their task back, and forgets every round."""

    def prune(self, state: ServerState, cohort: Any, ctx: ServerContext) -> ServerState:
        """Ask everybody."""
        answer = ctx.ask(send_back, {k: Task(state.params, state.mask) for k in range(6)}, keep_updates=True)
        for update in answer.updates.values():
            assert update.params == state.params.masked(state.mask), "what is asked arrives exactly"
        return state

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """Train; the debt is out of sight."""
        assert not client.memory
        client.memory["seen"] = client.round
        return super().client_update(task, client)

    def forgets(self, state: ServerState) -> bool:
        """Forget."""
        return True


def send_back(task: Task, client: Client) -> ClientUpdate:
    return ClientUpdate(task.params, task.mask)


def test_what_is_asked_beside_the_round_arrives_whole_and_changes_no_debt():
    server, plain = federation(method=Asking(lr=0.1)), federation()
    for each in (server, plain):
        each.setup()
        each.step()
    assert residuals(server).keys() == residuals(plain).keys()
    assert all(torch.equal(v, residuals(plain)[k]) for k, v in residuals(server).items())
    assert all(set(memory) == {RESIDUAL} for memory in server.checkpoint.memories.values())


def test_pruned_entries_owe_nothing():
    link = wire(TENTH)
    layout = link.model.layout
    kept = {RESIDUAL: torch.ones(layout.size)}
    mask = half(layout)
    task = Task(Params(torch.zeros(layout.size), layout), mask)
    update, _, kept = link.upload(task, ClientUpdate(task.params, mask), kept)
    assert torch.equal(kept[RESIDUAL] != 0, mask.flat & (update.params.flat == 0))
    assert update.params.flat.count_nonzero() == -(-mask.count // 10)


def test_a_silent_client_keeps_its_debt():
    link = wire(TENTH)
    layout = link.model.layout
    kept = {RESIDUAL: torch.ones(layout.size)}
    task = Task(Params(torch.zeros(layout.size), layout), Mask.full(layout))
    _, sent, after = link.upload(task, ClientUpdate(task.params, Mask.none(layout)), kept)
    assert sent == 32 and torch.equal(after[RESIDUAL], kept[RESIDUAL])


def test_the_bytes_of_a_round_are_the_lengths_of_the_payloads():
    (_, report, *_) = small.run(federation())
    full = 32 + 4 * WEIGHTS
    assert all(record.cost.bytes_down == full for record in report.clients)
    # lengths, a dense mask, a header, 17 values, and 17 positions at a byte each
    assert {record.cost.bytes_up for record in report.clients} == {8 + 5 + 32 + 17 * 4 + 17}


PRUNING = ["staged", "fedlp", "frlp", "fedmef", "prunefl", "autoflip"]
OTHERS = {"stc": STC(share=0.1), "fedpaq": FedPAQ(), "int8": Int8()}


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(pytest.param(name, TENTH, id=f"{name} topk") for name in PRUNING),
        *(
            pytest.param(
                name, codec, id=f"{name} {kind}", marks=[pytest.mark.slow] if name != "fedlp" else []
            )
            for name in PRUNING
            for kind, codec in OTHERS.items()
        ),
    ],
)
def test_methods_that_prune_run_with_it(name: str, codec: DeltaCodec):
    options: dict[str, Any] = {"server_rows": 20, "clients": 8, "data": small.dataset(400)}
    server = federation(codec, fedray.METHODS[name](), **options)
    reports = small.run(server)
    owed = residuals(server) if codec.feedback else {}
    assert len(reports) == 5 and all(torch.isfinite(v).all() for v in owed.values())
    for report in reports[1:]:
        assert {record.fate for record in report.clients} == {"folded"}


# ── in a config ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_with_topk_sends_less_and_is_resumed_with_the_same_bits(tmp_path):
    config = tiny.config({"clients.uplink.name": "topk", "clients.uplink.share": 0.1, "checkpoint_every": 1})
    fedray.run(config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedray.run(config, out=tmp_path / "ended", on_round=tiny.ending(2, KeyboardInterrupt))
    fedray.resume(tmp_path / "ended")
    assert tiny.figures(tmp_path / "ended") == tiny.figures(tmp_path / "whole")
    plain = fedray.run(tiny.config(), out=tmp_path / "plain").result
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["total/bytes/up"] < 0.2 * plain["total/bytes/up"]
    assert result["total/bytes/down"] == plain["total/bytes/down"]


def test_the_digest_names_the_codec_unless_it_is_the_one_of_before():
    assert RunConfig().digest == RunConfig(clients={"uplink": {"name": "plain"}}).digest == "49d7c4b9e8c1"
    several = [{"name": "topk"}, {"name": "topk", "share": 0.1}, {"name": "topk", "feedback": False}]
    assert (
        len({RunConfig(clients={"uplink": uplink}).digest for uplink in several} | {RunConfig().digest}) == 4
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"clients.uplink.name": "topk", "clients.uplink.share": 0}, "clients.uplink.share .*greater than 0"),
        ({"clients.uplink.name": "topk", "clients.uplink.share": 1.5}, "clients.uplink.share .*less than or"),
        ({"clients.uplink.name": "topc"}, "unknown uplink 'topc'; did you mean 'topk'?"),
        ({"clients.uplink.share": 0.1}, "plain has no such option; topk, stc can have it"),
        (
            {"clients.uplink.name": "fedpaq", "clients.uplink.bits": 1},
            "clients.uplink.bits .*greater than or",
        ),
        (
            {"clients.uplink.name": "stc", "method.name": "frlp", "method.aggregation": "nonzero"}
            | {"data.server_fraction": 0.1},
            r"clients.uplink.name .*stc, but frlp .* w ≠ 0, .*; set method.aggregation=mask, or",
        ),
        (
            {"clients.uplink.name": "stc", "model": "resnet18", "data.name": "digits"},
            r"clients.uplink.name .*running statistics of resnet18's BatchNorm .*; set norm=group, local or",
        ),
        (
            {"clients.uplink.name": "topk", "method.uplink_values": "int8"},
            r"method.uplink_values .*int8, but clients.uplink.name=topk .*; set method.uplink_values=fp32",
        ),
        ({"clients.uplink.name": "topk", "method.name": "pqsu"}, "method.uplink_values .*int8, but clients"),
    ],
)
def test_misuse(given: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        RunConfig().override(given)


def test_a_codec_of_a_user_s_class():
    @dataclass(frozen=True, kw_only=True)
    class Half(DeltaCodec):
        def encode(self, difference: Params, mask: Mask) -> bytes:
            return (difference.flat[mask.flat] / 2).numpy().tobytes()

        def decode(self, payload: bytes, mask: Mask) -> Params:
            flat = torch.zeros(mask.layout.size)
            flat[mask.flat] = torch.frombuffer(bytearray(payload), dtype=torch.float32)
            return Params(flat, mask.layout)

    server = federation(Half())
    server.setup()
    report = server.step()
    assert {record.cost.bytes_up for record in report.clients} == {8 + 5 + 4 * WEIGHTS}
