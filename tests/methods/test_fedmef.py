"""FedMef: who goes and who comes in, what is squeezed out before, and that all see the same function."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import cos, exp, pi
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedray.costs.codec import HEADER_BYTES
from fedray.costs.extras import extras_size
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.fedmef import Extrusion, FedMef
from fedray.models.sparse_layers import PrunedActivations, standardised
from fedray.models.spec import Architecture
from fedray.pruning.masks import random
from fedray.types import ClientUpdate, Mask, Params, ServerState, Task
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
DATA = small.dataset(250)
PLAIN: dict[str, Any] = {"nsconv": False, "activation_pruning": 0.0}
"""Without what changes the training itself."""
ONE_BATCH: dict[str, Any] = {"batch_size": 1000}
"""All of a client's examples: a single step in an epoch, and one batch for the gradient."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def begin(method: Method, rounds: int = 10, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, 4), data=DATA, **place)


def task_of(client: Client, density: float = 0.5, **extras: Any) -> Task:
    """Return a task with the model's initial weights under a random mask."""
    mask = random(client.model.layout, density, np.random.default_rng(0))
    return Task(client.model.init(0).masked(mask), mask, extras)


def going(method: FedMef, task: Task) -> Tensor:
    """Return a bool vector (size,): the weights that the adjustment would take out as things are."""
    return task.mask.flat & ~method.largest(task.params, task.mask, float(task.extras["adjust"])).flat


@dataclass(frozen=True, kw_only=True)
class Watched(FedMef):
    """FedMef that remembers what each `prune` was given and left."""

    seen: list[tuple[ServerState, ServerState, CohortUpdate]] = field(default_factory=list, compare=False)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        after = super().prune(state, cohort, ctx)
        self.seen.append((state, after, cohort))
        return after


# ── when, and how much


@pytest.mark.parametrize(
    ("rounds", "options", "events"),
    [
        (500, {}, list(range(10, 300, 10))),  # as in the paper: every 10 rounds, until round 300
        (30, {}, [6, 12]),
        (10, {}, [2, 4]),
        (3, {}, [1]),
        (100, {"interval": 25, "until": 1.0}, [25, 50, 75]),
        (100, {"until": 0.0}, []),
        (1, {}, []),
    ],
)
def test_adjustment_rounds(rounds: int, options: dict[str, Any], events: list[int]) -> None:
    server = begin(FedMef(**options), rounds)
    server.setup()
    assert list(server.state.memory.shares) == events


def test_the_share_falls_as_a_cosine() -> None:
    server = begin(FedMef(adjust=0.4), rounds=10)
    server.setup()
    assert server.state.memory.shares == pytest.approx(
        {2: 0.2 * (1 + cos(pi / 3)), 4: 0.2 * (1 + cos(2 * pi / 3))}
    )
    assert server.state.memory.shares == pytest.approx({2: 0.3, 4: 0.1})


def test_an_interval_without_an_adjustment_is_refused() -> None:
    setting = small.setting(rounds=10)
    problem = FedMef(interval=6).check(setting)
    assert problem is not None and problem.startswith("method.interval=6") and "round 6 " in problem
    assert FedMef(interval=5).check(setting) is None
    assert FedMef(interval=6, until=0).check(setting) is None  # a static mask, as asked for
    assert FedMef().check(small.setting(rounds=1)) is None


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
def test_every_layers_density_stays_and_masks_move_at_adjustments_alone(density: float) -> None:
    server = begin(FedMef(density=density, adjust=0.8), architecture=small.CNN)
    server.setup()
    first = server.state.mask
    assert first.density == pytest.approx(density, abs=2 / first.layout.prunable_count)
    for round in range(1, 6):
        before, report = server.state.mask, server.step()
        assert (server.state.mask != before) == (round in (2, 4))
        for name in first:
            assert int(server.state.mask[name].sum()) == int(first[name].sum())
        assert report.metrics["density/global"] == first.density


# ── who goes, who comes in


def test_an_adjustment_by_hand() -> None:
    method = Watched(density=0.3, adjust=0.5)
    server = begin(method, rounds=5, architecture=small.CNN)
    small.run(server)
    assert list(server.state.memory.shares) == [1, 2]
    for before, after, cohort in method.seen[:2]:
        share = before.memory.shares[before.round]
        total = torch.zeros(before.mask.layout.size, dtype=torch.float64)
        for client, sent in cohort.each.items():
            examples = server.population[client].num_examples
            for position, value in zip(sent["positions"].tolist(), sent["gradient"].tolist(), strict=True):
                total[position] += examples * value
        for name, count in (("conv1.weight", 36), ("conv2.weight", 216)):
            held, weights = before.mask[name].flatten(), before.params[name].flatten()
            going = min(int(share * int(held.sum())), count - int(held.sum()))
            where = sorted(held.nonzero().flatten().tolist(), key=lambda i: abs(float(weights[i])))
            free = (~held).nonzero().flatten().tolist()
            scores = total[before.mask.layout.spans[name]].abs()
            coming = sorted(free, key=lambda i: -float(scores[i]))[:going]
            assert going > 0
            expected = set(where[going:]) | set(coming)
            assert set(after.mask[name].flatten().nonzero().flatten().tolist()) == expected
            values = after.params[name].flatten()
            assert not bool(values[coming].any()), "new weights start from zero"
            assert torch.equal(values[where[going:]], weights[where[going:]])


def test_a_full_layer_stays_as_it_is_and_a_nearly_full_one_gives_what_it_has_room_for() -> None:
    method, layout = FedMef(adjust=1.0), small.workplace(FedMef(), architecture=small.CNN).model.layout
    mask = Mask.full(layout)
    mask.flat[layout.spans["conv2.weight"]][:3] = False
    params = Params(torch.arange(1.0, layout.size + 1), layout)
    assert method.exchanged(mask, 0.5) == {"conv1.weight": 0, "conv2.weight": 3}
    kept = method.largest(params, mask, 0.5)
    gone = (mask.flat & ~kept.flat).nonzero().flatten() - layout.spans["conv2.weight"].start
    assert gone.tolist() == [3, 4, 5]


@dataclass(frozen=True, kw_only=True)
class Silent(Watched):
    """FedMef whose clients send no gradient."""

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        nothing = {"gradient": torch.zeros(0), "positions": torch.zeros(0, dtype=torch.int32)}
        return replace(super().client_update(task, client), each=nothing)


def test_what_goes_does_not_come_back_even_where_no_gradient_was_sent() -> None:
    method = Silent(density=0.5, adjust=1.0)
    small.run(begin(method, rounds=3))
    before, after, _ = method.seen[0]
    gone, new = before.mask.flat & ~after.mask.flat, after.mask.flat & ~before.mask.flat
    assert int(gone.sum()) == int(new.sum()) == int(before.memory.shares[1] * 64)
    assert not bool(after.params.flat[gone | new].any())


# ── what a client sends


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("nsconv", [True, False])
def test_a_client_sends_its_largest_gradients_outside_the_mask(
    nsconv: bool, architecture: Architecture
) -> None:
    method = FedMef(nsconv=nsconv, adjust=0.4, **ONE_BATCH)
    client = small.client(method, architecture=architecture)
    task = task_of(client, adjust=0.3)
    update = method.client_update(task, client)
    positions, values = update.each["positions"], update.each["gradient"]
    # with plain torch, at the trained weights as the forward pass uses them, on all examples
    used = client.model.forward_params(update.params, task.mask).masked(task.mask)
    assert (used == update.params.masked(task.mask)) == (not nsconv or architecture is small.MLP)
    module = client.model.bind(used.flat.clone()).train()
    loss = cross_entropy(module(client.x), client.y)
    gradients = torch.autograd.grad(loss, dict(module.named_parameters()))
    expected: dict[int, float] = {}
    for name in task.mask.layout.prunable_names:
        free, start = ~task.mask[name].flatten(), task.mask.layout.spans[name].start
        count = min(int(0.3 * int((~free).sum())), int(free.sum()))
        best = (gradients[name].flatten().abs() * free).topk(count).indices.tolist()
        expected |= {start + i: float(gradients[name].flatten()[i]) for i in best}
    assert positions.tolist() == sorted(expected)
    assert values.tolist() == pytest.approx([expected[i] for i in sorted(expected)], rel=1e-3, abs=1e-6)


def test_an_adjustment_is_paid_for_and_other_rounds_pay_for_weights_alone() -> None:
    server = begin(FedMef(density=0.25), partition=small.dealt(*[40] * 6))
    server.setup()
    held = server.state.mask.count
    reports = {round: server.step().metrics for round in range(1, 6)}
    known = HEADER_BYTES + 4 * held + 8  # the receiver has the mask: values and its digest
    sizes, dense = server.place.population.partition.sizes, server.place.flops
    assert set(sizes.tolist()) == {40}
    for round, metrics in reports.items():
        share = server.state.memory.shares.get(round, 0.0)
        count = int(share * 32)
        sent = {
            "each.gradient": torch.zeros(count),
            "each.positions": torch.zeros(count, dtype=torch.int32),
        }
        assert metrics["bytes/up"] == 4 * (known + (extras_size(sent) if share else 0))
        probe = dense.train(server.state.mask, dense_gradient=True) * 20  # one batch of 20
        trained = dense.train(server.state.mask) * 40
        assert metrics["flops/clients"] == pytest.approx(4 * (trained + (probe if share else 0)))


def test_a_client_that_diverges_is_left_out_and_harms_nobody() -> None:
    server = begin(FedMef(lr=1e30), architecture=small.CNN, rules=Rules(max_failed=1))
    reports = small.run(server)
    assert all(record.fate == "non-finite" for report in reports for record in report.clients)
    assert len(reports[2].clients) == 4  # an adjustment round among them
    assert server.model.is_finite()


# ── extrusion


class TestExtrusion:
    """L + λ‖θ_low‖² and the step's learning rate."""

    def test_one_step_by_hand(self) -> None:
        moved: list[Params] = []
        for extrusion in (0.0, 0.5):
            method = FedMef(extrusion=extrusion, boost=0, lr=0.1, **ONE_BATCH, **PLAIN)
            client = small.client(method)
            task = task_of(client, adjust=0.3)
            moved.append(method.client_update(task, client).params)
        low = going(method, task)
        assert int(low.sum()) == int(0.3 * 64)
        pulled = moved[1].flat - moved[0].flat
        assert torch.allclose(pulled[~low], torch.zeros(()), atol=1e-6)
        assert torch.allclose(pulled[low], -0.1 * 2 * 0.5 * task.params.flat[low], atol=1e-7)

    def test_what_is_squeezed_out_is_what_goes(self) -> None:
        # with a penalty that leaves nothing of them, the server finds the very weights that clients chose
        method = Watched(density=0.5, extrusion=5.0, boost=0, lr=0.05, local_epochs=4, adjust=0.5)
        server = begin(method)
        server.setup()
        server.step()
        task = method.configure(server.state, server.population[0])
        low = going(method, task)
        server.step()
        before, after, _ = method.seen[1]
        assert before.round == 2
        assert torch.equal(before.mask.flat & ~after.mask.flat, low)
        assert before.params.flat[low].norm() < 0.15 * task.params.flat[low].norm()

    def test_only_adjustment_rounds_have_it(self) -> None:
        models = []
        for extrusion in (0.0, 0.5):
            server = begin(FedMef(extrusion=extrusion, density=0.5))
            server.setup()
            models.append([server.step() and server.model.sha256 for _ in range(2)])
        assert models[0][0] == models[1][0] and models[0][1] != models[1][1]

    def rates(self, method: FedMef, norm: float, round: int = 1) -> list[float]:
        """Return the learning rates of a client's steps while ‖θ_low‖₁ stays `norm`."""
        client = small.client(method, round=round, partition=small.dealt(80))
        layout = client.model.layout
        low = torch.zeros(layout.size, dtype=torch.bool)
        low[3:5] = True
        params = Params(torch.zeros(layout.size), layout)
        params.flat[3], params.flat[4] = norm / 4, -3 * norm / 4
        extrusion = Extrusion(method, client, params, Mask(low, layout))
        return [extrusion.lr(step) for step in range(method.local_steps(80))]

    def test_the_learning_rate_by_hand(self) -> None:
        # 80 examples in batches of 20: B = 4, and (2B − 2b)/(2B − b) = 1, 6/7, 4/6, 2/5
        left = [1, 6 / 7, 4 / 6, 2 / 5]
        squeezed = 2 / (1 + exp(-1.5)) - 1
        wide = FedMef(lr=0.1, boost=3.0)
        assert self.rates(wide, 1.5) == pytest.approx([max(0.1, 0.3 * x * squeezed) for x in left])
        assert self.rates(wide, 1.5)[-1] == 0.1  # η: it falls to the round's and no further
        assert self.rates(replace(wide, max_lr=0.15), 1.5) == pytest.approx(
            [min(0.15, max(0.1, 0.3 * x * squeezed)) for x in left]
        )
        assert self.rates(replace(wide, boost=1000.0), 50.0) == [1.0] * 4  # ξ: ten times lr
        assert self.rates(wide, 0.0) == [0.1] * 4  # nothing is left of them
        # in round 3 η = lr/4; ψ = 1 raises it to a share of lr
        decayed = FedMef(lr=0.1, lr_decay=0.5)
        assert self.rates(decayed, 1.5, round=3) == pytest.approx(
            [max(0.025, 0.1 * x * squeezed) for x in left]
        )

    @settings(deadline=None, max_examples=30)
    @given(norm=st.floats(0, 100), boost=st.floats(0, 1))
    def test_without_decay_a_boost_of_one_changes_nothing(self, norm: float, boost: float) -> None:
        assert self.rates(FedMef(lr=0.1, boost=boost), norm) == [0.1] * 4

    def test_the_norm_is_that_of_the_weights_as_they_are_at_the_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = FedMef(lr=0.1, boost=20.0, extrusion=2.0, local_epochs=2, **PLAIN)
        client = small.client(method, partition=small.dealt(80))
        task = task_of(client, adjust=0.3)
        low = going(method, task)
        norms: list[float] = []
        used: list[float] = []
        sgd = Client.sgd

        def listening(self: Client, params: Params, mask: Mask, *, lr: Any, **options: Any) -> Params:
            def ask(step: int) -> float:
                used.append(float(lr(step)))
                norms.append(float(self._engine.flat[low].abs().sum()))
                return used[-1]

            return sgd(self, params, mask, lr=ask, **options)

        monkeypatch.setattr(Client, "sgd", listening)
        method.client_update(task, client)
        assert len(used) == 8 and len(set(norms)) == 8
        expected = [
            max(0.1, 2.0 * (16 - 2 * b) / (16 - b) * (2 / (1 + exp(-n)) - 1)) for b, n in enumerate(norms)
        ]
        assert used == pytest.approx([min(1.0, rate) for rate in expected])


# ── the same function everywhere


def test_what_is_evaluated_is_what_clients_train() -> None:
    method = FedMef(density=0.4)
    server = begin(method, rounds=3, architecture=small.CNN)
    small.run(server)
    client, state = small.client(method, architecture=small.CNN), server.state
    weights = standardised({n: p for n, p in state.params.items() if "running" not in n}, state.mask)
    module = client.model.bind(state.params.flat.clone()).eval()
    logits = PrunedActivations(0.5)(module, weights, client.x)
    assert torch.equal(client.model.bind(server.model.flat.clone()).eval()(client.x), logits)
    assert not torch.equal(client.model.bind(state.params.flat.clone()).eval()(client.x), logits)
    assert not bool(server.model.flat[~state.mask.flat].any())


def test_without_its_parts_it_trains_as_fedavg_does() -> None:
    method = FedMef(until=0.0, density=1.0, **PLAIN)
    fedmef, fedavg = (begin(m, rounds=3) for m in (method, Method()))
    assert [r.metrics["train/loss"] for r in small.run(fedmef)[1:]] == [
        r.metrics["train/loss"] for r in small.run(fedavg)[1:]
    ]
    assert fedmef.model.sha256 == fedavg.model.sha256


@pytest.mark.parametrize("options", [{}, {"nsconv": False}, {"activation_pruning": 0.0}, {"extrusion": 0.0}])
def test_each_part_can_be_left_out_and_changes_the_model(options: dict[str, Any]) -> None:
    server = begin(FedMef(density=0.4, **options), rounds=5, architecture=small.CNN)
    reports = small.run(server)
    assert reports[-1].metrics["val/loss"] < reports[0].metrics["val/loss"]
    whole = begin(FedMef(density=0.4), rounds=5, architecture=small.CNN)
    small.run(whole)
    assert (server.model.sha256 == whole.model.sha256) == (not options)
