"""What becomes of an update: when it counts, what it costs, what is remembered, and who hears of an error."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedray.costs.codec import Codec, ValueKind
from fedray.data.datasets import Examples
from fedray.errors import ClientError, MethodError
from fedray.federation.aggregate import merge_all, merge_within
from fedray.federation.client import Client, ClientFunction
from fedray.federation.exchange import Answer, Chunk, Job, Trained
from fedray.federation.method import Method
from fedray.federation.wire import Memory, Order, reject_unknown
from fedray.federation.worker import EVALUATION_SHARD, Rules, Worker, Workplace
from fedray.pruning import masks
from fedray.types import ClientUpdate, Fate, Layout, Mask, Params, Task
from tests import small

BYTES_DOWN = 100
WEIGHTS = 163
LONG_AGO = Rules(deadline_s=0.01)
VALUES: tuple[ValueKind, ...] = get_args(ValueKind)


def honest(task: Task, client: Client) -> ClientUpdate:
    return ClientUpdate(client.sgd(task.params, task.mask), task.mask)


def echo(task: Task, client: Client) -> ClientUpdate:
    """Send back what was received: no time is spent on training."""
    return ClientUpdate(task.params, task.mask)


def replying(change: Callable[[ClientUpdate], Any]) -> ClientFunction:
    """Train, then change the update."""
    return lambda task, client: change(honest(task, client))


def with_value(value: float, *entries: int) -> ClientFunction:
    """Train, then write `value` into some entries of the weights."""

    def change(update: ClientUpdate) -> ClientUpdate:
        update.params.flat[list(entries)] = value
        return update

    return replying(change)


def task_of(place: Workplace, mask: Mask | None = None, **extras: Any) -> Task:
    mask = mask or Mask.full(place.model.layout)
    return Task(place.model.init(0).masked(mask), mask, extras)


def half(layout: Layout, seed: int = 0) -> Mask:
    return masks.random(layout, 0.5, np.random.default_rng(seed))


def train(
    place: Workplace,
    function: ClientFunction,
    *,
    task: Task | None = None,
    id: int = 0,
    memory: Memory | None = None,
    round: int = 1,
    training: bool = True,
) -> Trained:
    """Let one client do its part."""
    job = Job(round, function, (task or task_of(place),), training)
    return Worker(place).train(job, Order(id, 0, BYTES_DOWN), {} if memory is None else memory)


def exchange(
    place: Workplace,
    function: ClientFunction,
    cohort: Sequence[Sequence[int]],
    *,
    task: Task | None = None,
    memories: Mapping[int, Memory] | None = None,
    round: int = 1,
    keep_updates: bool = False,
) -> Answer:
    """Let a cohort, cut into chunks, do its part."""
    job = Job(round, function, (task or task_of(place),), keep_updates=keep_updates)
    chunks = [
        Chunk(index, 0, tuple(Order(k, 0, BYTES_DOWN) for k in part), memories or {}, num_examples=len(part))
        for index, part in enumerate(cohort)
    ]
    return Worker(place).run(job, chunks)


def fates(answer: Answer) -> dict[int, Fate]:
    return {record.client: record.fate for record in answer.records}


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_holds_a_vector_per_level_of_the_tree_and_not_per_chunk(monkeypatch):
    held: list[int] = []

    def merging(partials):
        held.append(len(partials))
        return merge_within(partials)

    monkeypatch.setattr("fedray.federation.worker.merge_within", merging)
    place = small.workplace(Method(), partition=small.dealt(*[4] * 32))
    chunks = [Chunk(k, 0, (Order(k, 0, BYTES_DOWN),), {}, 4) for k in range(32)]
    Worker(place).run(Job(1, echo, (task_of(place),)), chunks)
    assert len(held) == 32 and max(held) <= 6


def test_a_record_by_hand():
    place = small.workplace(Method(batch_size=4), partition=small.dealt(10, 5))
    trained = train(place, honest)
    record = trained.record
    flops = 10 * 3 * 2 * (8 * 16 + 3 * 8)
    bytes_up = 32 + 4 * WEIGHTS
    assert (record.client, record.device, record.num_examples) == (0, "device", 10)
    assert (record.fate, record.density) == ("folded", 1.0)
    assert (record.cost.bytes_down, record.cost.bytes_up) == (BYTES_DOWN, bytes_up)
    assert record.cost.flops == record.cost.executed_flops == flops == 9120
    # 1 s latency, 100 B/s down, 1000 FLOP/s, 50 B/s up
    assert record.cost.seconds == pytest.approx(1 + 1 + 9.12 + bytes_up / 50)
    client = small.client(Method(batch_size=4), partition=small.dealt(10, 5))
    params = client.sgd(place.model.init(0), Mask.full(place.model.layout))
    assert trained.update is not None
    assert (trained.update.params, record.loss) == (params, client.meter.loss)


def test_the_density_is_that_of_the_update():
    place = small.workplace(Method())
    held = half(place.model.layout)
    assert train(place, honest, task=task_of(place, held)).record.density == 0.5
    sparser = masks.random(place.model.layout, 0.25, np.random.default_rng(1))
    assert train(place, replying(lambda update: replace(update, mask=sparser))).record.density == 0.25


# ── late and dropped ─────────────────────────────────────────────────────────────────────────────────────


def test_an_update_is_late_after_the_deadline_and_not_at_it():
    seconds = train(small.workplace(Method()), honest).record.cost.seconds
    at = train(small.workplace(Method(), rules=Rules(deadline_s=seconds)), honest)
    after = train(small.workplace(Method(), rules=Rules(deadline_s=math.nextafter(seconds, 0))), honest)
    assert at.record.fate == "folded"
    assert after.record.fate == "late"
    assert after.update is None
    assert after.record.cost == at.record.cost, "it did its work and sent it"


@pytest.mark.parametrize(
    ("device", "rule", "share"), [(0.0, 0.0, 0.0), (0.3, 0.0, 0.3), (0.0, 0.5, 0.5), (0.3, 0.5, 0.65)]
)
def test_clients_drop_out_as_often_as_device_and_rules_say(device: float, rule: float, share: float):
    devices = [replace(small.DEVICE, dropout=device)]
    place = small.workplace(
        Method(), rules=Rules(dropout=rule), devices=devices, partition=small.dealt(*[1] * 100)
    )
    count = sum(
        fate == "dropped"
        for round in range(10)
        for fate in fates(exchange(place, echo, [range(100)], round=round)).values()
    )
    assert count / 1000 == pytest.approx(share, abs=4 * (share * (1 - share) / 1000) ** 0.5)


def test_a_fate_depends_on_seed_round_and_client_alone():
    def dropped(cohort: Sequence[Sequence[int]], round: int = 1, **options: Any) -> set[int]:
        place = small.workplace(
            Method(), rules=Rules(dropout=0.5, **options), partition=small.dealt(*[1] * 40)
        )
        found = fates(exchange(place, echo, cohort, round=round))
        return {client for client, fate in found.items() if fate == "dropped"}

    everybody = dropped([range(40)])
    assert 5 < len(everybody) < 35
    assert dropped([range(20), range(20, 40)]) == everybody
    assert dropped([[30, 7, 12]]) == everybody & {30, 7, 12}
    assert dropped([range(40)], deadline_s=0.1) == everybody, "who drops out is not late beside"
    assert dropped([range(40)], round=2) != everybody


def test_who_drops_out_received_and_worked_and_sent_nothing():
    stays = train(small.workplace(Method()), honest).record
    dropped = train(small.workplace(Method(), rules=Rules(dropout=1 - 1e-12)), honest)
    assert dropped.record.fate == "dropped"
    assert dropped.update is None
    assert dropped.record.cost == replace(stays.cost, bytes_up=0)


def test_nobody_is_late_or_drops_out_of_what_is_asked_beside_the_round():
    place = small.workplace(Method(), rules=Rules(deadline_s=0.01, dropout=1 - 1e-12))
    assert train(place, honest, training=False).record.fate == "folded"


# ── non-finite and malformed ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["params", "sums", "each"])
@pytest.mark.parametrize("values", VALUES)
def test_what_is_not_finite_is_left_out(value: float, where: str, values: ValueKind):
    def spoil(update: ClientUpdate) -> ClientUpdate:
        if where == "params":
            update.params.flat[7] = value
            return update
        spoiled: dict[str, Any] = {where: {"a": torch.ones(3), "b": torch.tensor([0.0, value])}}
        return replace(update, **spoiled)

    trained = train(small.workplace(Method(uplink_values=values)), replying(spoil))
    assert trained.record.fate == "non-finite"
    assert trained.update is None


@pytest.mark.parametrize("values", VALUES)
def test_what_lies_behind_the_mask_need_not_be_finite(values: ValueKind):
    place = small.workplace(Method(uplink_values=values))
    held = half(place.model.layout)
    hidden = (~held.flat).nonzero().flatten().tolist()
    task = task_of(place, held)
    found = exchange(place, with_value(math.nan, *hidden), [[0, 1]], task=task, keep_updates=True)
    assert set(fates(found).values()) == {"folded"}
    (partial,) = found.partials.values()
    assert partial.mean() == next(iter(exchange(place, honest, [[0, 1]], task=task).partials.values())).mean()
    assert all(update.params.is_finite() for update in partial.updates.values())


def test_the_mean_is_that_of_the_others():
    place = small.workplace(Method())

    def one_diverges(task: Task, client: Client) -> ClientUpdate:
        return (with_value(math.nan, 3) if client.id == 2 else honest)(task, client)

    found = exchange(place, one_diverges, [[0, 1, 2, 3], [4, 5]])
    others = exchange(place, honest, [[0, 1, 3], [4, 5]])
    assert fates(found) == {k: "non-finite" if k == 2 else "folded" for k in range(6)}
    assert merge_all(found.partials, 2).mean() == merge_all(others.partials, 2).mean()


def longer(update: ClientUpdate) -> ClientUpdate:
    layout = Layout(("w",), ((WEIGHTS + 1,),), (True,), (True,))
    return ClientUpdate(Params(torch.zeros(WEIGHTS + 1), layout), Mask.full(layout))


def having(**parts: Any) -> Callable[[ClientUpdate], Any]:
    return lambda update: replace(update, **parts)


def with_vector(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[ClientUpdate], Any]:
    """Put another vector into params or mask, past the check of their constructors."""

    def spoil(update: ClientUpdate) -> ClientUpdate:
        copied = getattr(update, part).clone()
        copied.flat = change(copied.flat)
        return replace(update, **{part: copied})

    return spoil


MALFORMED: dict[str, tuple[Callable[[ClientUpdate], Any], str]] = {
    "nothing": (lambda update: None, "client_update returned NoneType"),
    "params": (lambda update: update.params, "client_update returned Params"),
    "too long": (longer, r"its params has the shape \(164,\), the model \(163,\)"),
    "no params": (having(params=None), "its params is NoneType, not Params"),
    "a tensor": (lambda update: having(params=update.params.flat)(update), "its params is Tensor"),
    "a mask for params": (lambda update: having(params=update.mask)(update), "its params is Mask"),
    "params for a mask": (lambda update: having(mask=update.params)(update), "its mask is Params"),
    "doubles": (with_vector("params", torch.Tensor.double), r"its params is torch.float64 on cpu"),
    "a row": (with_vector("params", lambda flat: flat[None]), r"its params has the shape \(1, 163\)"),
    "numbers": (with_vector("mask", torch.Tensor.float), r"its mask is torch.float32 on cpu"),
    "no sums": (having(sums=None), "its sums is NoneType, not a mapping"),
    "listed metrics": (having(metrics=[("a", 1)]), "its metrics is list"),
}


@pytest.mark.parametrize(("change", "told"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_update_of_this_model_is_left_out(change: Callable[[ClientUpdate], Any], told: str):
    place = small.workplace(Method())

    def one_is_wrong(task: Task, client: Client) -> Any:
        return (replying(change) if client.id == 1 else honest)(task, client)

    found = exchange(place, one_is_wrong, [[0, 1, 2]])
    assert fates(found) == {0: "folded", 1: "malformed", 2: "folded"}
    assert re.match(told, found.faults[0].cause)
    record = found.records[1]
    assert record.cost.bytes_up == 0
    assert record.cost.flops > 0
    assert math.isnan(record.density)
    (partial,) = found.partials.values()
    (expected,) = exchange(place, honest, [[0, 2]]).partials.values()
    assert partial.mean() == expected.mean()


def test_what_never_arrives_in_time_is_not_looked_at():
    for rules, fate in ((Rules(deadline_s=0.1), "late"), (Rules(dropout=1 - 1e-12), "dropped")):
        place = small.workplace(Method(), rules=rules)
        assert train(place, replying(lambda update: None)).record.fate == fate
        assert train(place, with_value(math.nan, 0)).record.fate == fate


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────


def beside() -> dict[str, Any]:
    """Return what an update may carry beside its weights."""
    return {
        "sums": {"gradient": torch.ones(5), "count": torch.tensor(3)},
        "each": {"head": torch.zeros(2, 2)},
        "metrics": {"gain": 0.25},
    }


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("held", ["full", "the task's", "another", "none"])
@pytest.mark.parametrize("fate", ["folded", "late", "non-finite"])
def test_the_bytes_sent_are_the_length_of_the_payload(values: ValueKind, held: str, fate: Fate):
    place = small.workplace(Method(uplink_values=values), rules=LONG_AGO if fate == "late" else Rules())
    layout = place.model.layout
    task = task_of(place, half(layout))
    mask = {
        "full": Mask.full(layout),
        "the task's": task.mask,
        "another": half(layout, seed=1),
        "none": Mask.none(layout),
    }[held]
    sent: list[ClientUpdate] = []

    def reply(update: ClientUpdate) -> ClientUpdate:
        sent.append(replace(update, mask=mask, **beside()))
        if fate == "non-finite":
            sent[0].sums["gradient"][0] = math.nan
        return sent[0]

    record = train(place, replying(reply), task=task).record
    extras = {f"{kind}.{name}": value for kind, named in beside().items() for name, value in named.items()}
    payload = Codec(values).encode(sent[0].params, mask, known=task.mask.digest, extras=extras)
    assert record.fate == fate
    assert record.cost.bytes_up == len(payload)


def test_a_mask_that_the_server_holds_is_only_named():
    place = small.workplace(Method())
    task = task_of(place, half(place.model.layout))
    known = train(place, honest, task=task).record.cost.bytes_up
    another = half(place.model.layout, seed=1)
    unknown = train(place, replying(lambda update: replace(update, mask=another)), task=task).record.cost
    assert known == 32 + 4 * task.mask.count + 8
    assert unknown.bytes_up == 32 + 4 * another.count + -(-WEIGHTS // 8)


@pytest.mark.parametrize("values", ["fp16", "int8"])
def test_what_is_folded_is_what_arrived(values: ValueKind):
    place = small.workplace(Method(uplink_values=values))
    layout = place.model.layout
    task = task_of(place, half(layout))
    for mask in (task.mask, half(layout, seed=1), Mask.full(layout)):
        trained = train(place, replying(lambda update, mask=mask: replace(update, mask=mask)), task=task)  # type: ignore[misc]
        exact = small.client(Method()).sgd(task.params, task.mask)
        payload = Codec(values).encode(exact, mask, known=task.mask.digest)
        expected = Codec(values).decode(payload, layout, known={task.mask.digest: task.mask})
        assert trained.update is not None
        assert trained.update.params == expected.params != exact
        assert trained.update.mask == mask
        assert trained.record.cost.bytes_up == len(payload)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────


def write_params(task: Task) -> None:
    task.params.flat.add_(1)


def write_view(task: Task) -> None:
    task.params["fc1.bias"].zero_()


def write_mask(task: Task) -> None:
    task.mask["fc1.weight"][0] = False


def write_extra(task: Task) -> None:
    extra = task.extras["gradient"]
    assert isinstance(extra, torch.Tensor)
    extra.add_(1)


@pytest.mark.parametrize("write", [write_params, write_view, write_mask, write_extra])
def test_a_task_is_not_to_be_written_into(write: Callable[[Task], None]):
    def write_and_train(task: Task, client: Client) -> ClientUpdate:
        if client.id == 1:
            write(task)
        return honest(task, client)

    place = small.workplace(Method())
    with pytest.raises(ClientError, match="work on a copy") as caught:
        exchange(place, write_and_train, [[0, 1, 2]], task=task_of(place, gradient=torch.zeros(2)), round=5)
    assert (caught.value.client, caught.value.round) == (1, 5)


def test_a_copy_of_a_task_may_be_written_into():
    def on_a_copy(task: Task, client: Client) -> ClientUpdate:
        params = task.params.clone()
        params.flat.add_(1)
        return ClientUpdate(params, task.mask)

    place = small.workplace(Method())
    trained = train(place, on_a_copy)
    assert trained.update is not None
    assert torch.equal(trained.update.params.flat, place.model.init(0).flat + 1)


def raise_error(task: Task, client: Client) -> ClientUpdate:
    raise ZeroDivisionError("no examples of class 7")


def use_what_is_not_declared(task: Task, client: Client) -> ClientUpdate:
    return ClientUpdate(client.sgd(task.params, task.mask, epochs=1, steps=1), task.mask)


def test_an_error_of_a_client_arrives_with_client_round_and_where_it_happened():
    with pytest.raises(ClientError) as caught:
        train(small.workplace(Method()), raise_error, id=4, round=9)
    assert (caught.value.client, caught.value.round) == (4, 9)
    assert str(caught.value).startswith("client 4 failed in round 9: ")
    assert "ZeroDivisionError: no examples of class 7" in str(caught.value)
    assert "test_worker.py" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_ours_arrives_as_its_message():
    with pytest.raises(ClientError) as caught:
        train(small.workplace(Method()), use_what_is_not_declared, id=4, round=9)
    assert str(caught.value) == "client 4 failed in round 9: client.sgd takes epochs or steps, not both"


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    ("beside", "told"),
    [
        (
            {"sums": {"votes": torch.ones(2, dtype=torch.float64)}},
            "'sums.votes' is a tensor of torch.float64",
        ),
        ({"sums": {"votes": 1.0}}, "float"),
        ({"metrics": {"gain": np.float32(1)}}, "'metrics.gain' is float32"),
        ({"each": {"head": None}}, "'each.head' is NoneType"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_an_error_of_that_client(values: ValueKind, beside: dict[str, Any], told: str):
    place = small.workplace(Method(uplink_values=values))
    with pytest.raises(ClientError, match=told) as caught:
        train(place, replying(lambda update: replace(update, **beside)), id=3, round=2)
    assert (caught.value.client, caught.value.round) == (3, 2)


def test_tasks_for_nobody_are_refused():
    task = task_of(small.workplace(Method()))
    reject_unknown({0: task, 5: task}, 6)
    with pytest.raises(MethodError, match=r"asked clients \[-1, 6\], but there are 0 … 5"):
        reject_unknown({-1: task, 2: task, 6: task}, 6)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────


def count_calls(task: Task, client: Client) -> ClientUpdate:
    """Remember how often this client was called, in a number and, in place, in a tensor and a list."""
    client.memory["calls"] = client.memory.get("calls", 0) + 1
    client.memory.setdefault("tensor", torch.zeros(1)).add_(1)
    client.memory.setdefault("list", []).append(client.id)
    return honest(task, client)


def test_a_client_remembers_and_the_others_do_not():
    place = small.workplace(Method())
    first = exchange(place, count_calls, [[0, 1], [2]])
    assert {k: m["calls"] for k, m in first.memories.items()} == {0: 1, 1: 1, 2: 1}
    again = exchange(place, count_calls, [[1, 3]], memories=first.memories)
    assert {k: (m["calls"], m["tensor"].item(), m["list"]) for k, m in again.memories.items()} == {
        1: (2, 2.0, [1, 1]),
        3: (1, 1.0, [3]),
    }


SPOILED: list[tuple[Fate, Rules, Any]] = [
    ("folded", Rules(), lambda update: update),
    ("late", LONG_AGO, lambda update: update),
    ("dropped", Rules(dropout=1 - 1e-12), lambda update: update),
    ("non-finite", Rules(), lambda update: replace(update, sums={"a": torch.tensor([math.nan])})),
    ("malformed", Rules(), lambda update: None),
]


@pytest.mark.parametrize(("fate", "rules", "change"), SPOILED, ids=[fate for fate, _, _ in SPOILED])
def test_only_those_who_count_have_their_memory_kept(fate: Fate, rules: Rules, change: Any):
    place = small.workplace(Method(), rules=rules)
    memory = {"calls": 1, "tensor": torch.ones(1), "list": [0]}
    found = exchange(
        place, lambda task, client: change(count_calls(task, client)), [[0]], memories={0: memory}
    )
    assert fates(found) == {0: fate}
    assert (0 in found.memories) == (fate == "folded")
    assert memory == {"calls": 1, "tensor": torch.ones(1), "list": [0]}, "what was given is not written into"


# ── folding ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_merges_what_it_can_and_keeps_every_record():
    place = small.workplace(Method())
    answer = exchange(place, honest, [[0, 1], [2], [3, 4], [5]])
    assert list(answer.partials) == [(2, 0)]
    assert Counter(record.client for record in answer.records) == Counter(range(6))


def test_two_answers_join_into_that_of_one_worker():
    place = small.workplace(Method())
    job = Job(1, count_calls, (task_of(place),))
    chunks = [Chunk(i, 0, (Order(2 * i, 0, 9), Order(2 * i + 1, 0, 9)), {}, 1) for i in range(3)]
    whole, left, right = (Worker(place).run(job, part) for part in (chunks, chunks[:1], chunks[1:]))
    left.join(right)
    assert merge_all(left.partials, 3).mean() == merge_all(whole.partials, 3).mean()
    assert sorted(left.records, key=lambda r: r.client) == whole.records
    assert left.memories == whole.memories


def test_every_model_is_kept_if_the_job_says_so():
    place = small.workplace(Method())
    (plain,) = exchange(place, honest, [[0, 1]]).partials.values()
    (kept,) = exchange(place, honest, [[0, 1]], keep_updates=True).partials.values()
    assert (list(plain.updates), list(kept.updates)) == ([], [0, 1])
    n = place.population.partition.sizes
    first, second = (int(n[k]) * kept.updates[k].params.flat for k in (0, 1))
    mean = (first + second) / int(n[0] + n[1])
    assert n[0] != n[1]
    np.testing.assert_allclose(plain.mean().flat.numpy(), mean.numpy(), rtol=1e-5, atol=1e-7)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────


def test_shards_of_an_evaluation_cover_every_example_once():
    place = small.workplace(Method())
    train_set = place.dataset.train
    rows = np.arange(2 * EVALUATION_SHARD + 7) % len(train_set)
    examples = Examples(train_set.x[rows], train_set.y[rows])
    task = task_of(place, half(place.model.layout))
    shards = Worker(place).evaluate(task, examples)
    assert [len(shard.right) for shard in shards] == [EVALUATION_SHARD, EVALUATION_SHARD, 7]
    (once,) = Worker(place).evaluate(task, train_set)
    assert np.array_equal(np.concatenate([shard.right for shard in shards]), once.right[rows])
    np.testing.assert_allclose(np.concatenate([s.losses for s in shards]), once.losses[rows], rtol=1e-5)
    assert Worker(place).evaluate(task, Examples(train_set.x[:0], train_set.y[:0])) == []
