"""AutoFLIP: what exploring finds and costs, the mask from it, whom the mask follows, and what is optional."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedray.config.run_config import RunConfig
from fedray.costs.codec import HEADER_BYTES
from fedray.errors import ConfigError, MethodError, RunError
from fedray.federation.aggregate import CohortUpdate, Fold, Partial
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.autoflip import AutoFLIP
from fedray.models.spec import Architecture, ModelSpec
from fedray.pruning.channels import removed_channels, shrink
from fedray.types import Mask, Params, ServerState, Task
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
MLP, CNN = (ModelSpec.of("small", kind, small.SHAPE, small.CLASSES) for kind in (small.MLP, small.CNN))


def begin(method: AutoFLIP, rounds: int = 3, cohort: int = 4, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort), **place)


def set_up(method: AutoFLIP, **options: Any) -> Server:
    server = begin(method, **options)
    server.setup()
    return server


def explored(method: AutoFLIP, id: int, start: Params, epochs: int = 1, **place: Any) -> Params:
    """Return what a client makes of a model when it explores."""
    client, params = small.client(method, id=id, round=0, **place), start
    for _ in range(epochs):
        params = client.sgd(params, Mask.full(start.layout), epochs=1)
    return params


def movement(model: ModelSpec, **tensors: Tensor) -> Tensor:
    """Return a movement of prunable weights, given by tensor; what is not named did not move."""
    params = Params(torch.zeros(model.layout.size), model.layout)
    for name, value in tensors.items():
        params[f"{name}.weight"][:] = value
    return params.flat[model.layout.prunable_flat]


def rounds_of(server: Server) -> Iterator[tuple[ServerState, ServerState, list[int]]]:
    """Set up, then yield for each round the state before, the state after, and whose updates counted."""
    server.setup()
    for _ in range(server.schedule.rounds):
        before, report = server.state, server.step()
        yield before, server.state, [record.client for record in report.clients]


@dataclass(frozen=True, kw_only=True)
class Watched(AutoFLIP):
    """AutoFLIP that remembers the mean of each round."""

    means: list[Tensor] = field(default_factory=list, compare=False)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        self.means.append(cohort.mean(otherwise=state.params).flat)
        return super().aggregate(state, cohort)


# ── what exploring finds


def scaled(values: np.ndarray, scaling: str) -> np.ndarray:
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    by_range = np.array((values - low) / (high - low))
    return by_range if scaling == "minmax" else np.array((values - median) / (q3 - q1))


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": "robust"},
        {"threshold": 0.5, "explore_epochs": 3},
        {"quantile": "layer", "mask_from": "all"},
    ],
    ids=str,
)
def test_the_first_mask_is_the_published_formula(architecture: Architecture, options: dict[str, Any]) -> None:
    method = AutoFLIP(structured=False, **options)
    server = begin(method, architecture=architecture)
    start, layout = server.state.params, server.place.model.layout
    epochs = method.explore_epochs or 1
    models = [explored(method, k, start, epochs, architecture=architecture).flat for k in range(6)]
    deviation = Params((torch.stack(models) - start.flat).square().mean(0), layout)
    guidance = {n: scaled(deviation[n].double().numpy(), method.scaling) for n in layout.prunable_names}
    together = np.quantile(np.concatenate([g.ravel() for g in guidance.values()]), method.threshold)
    server.setup()
    for name, values in guidance.items():
        cut = np.quantile(values, method.threshold) if method.quantile == "layer" else together
        np.testing.assert_array_equal(server.state.mask[name].numpy(), values > cut)
    assert server.state.mask.density == pytest.approx(1 - method.threshold, abs=2 / WEIGHTS)
    assert server.state.params == start  # exploring leaves the model alone


@pytest.mark.parametrize(
    ("rounds", "options", "epochs"),
    [
        (3, {}, 1),
        (100, {}, 5),
        (4000, {}, 150),
        (100, {"explore_epochs": 2}, 2),
        (100, {"explore_epochs": 9, "patience": 3, "lr": 1e-30}, 4),  # one that is best, three that are not
    ],
    ids=str,
)
def test_how_long_an_explorer_trains(rounds: int, options: dict[str, Any], epochs: int) -> None:
    method = AutoFLIP(**{"patience": 150, **options})
    server = begin(method, rounds, partition=small.dealt(*[1] * 6))  # an example each, always the same batch
    per_epoch = 6 * server.place.flops.train(Mask.full(server.place.model.layout))
    assert server.setup().metrics["flops/clients"] == epochs * per_epoch


def test_patience_is_about_the_best_loss_of_all() -> None:
    losses = iter([3.0, 1.0, 2.0, 1.5, 1.2, 0.5])  # 1.5 is better than 2, not than 1
    start, meter = Params(torch.zeros(SIZE), MLP.layout), SimpleNamespace()

    def sgd(params: Params, mask: Mask, epochs: int) -> Params:
        meter.last_loss = next(losses)
        return Params(params.flat + epochs, params.layout)

    client: Any = SimpleNamespace(sgd=sgd, meter=meter)
    task = Task(start, Mask.full(start.layout), extras={"epochs": 6})
    assert AutoFLIP(patience=3).explore(task, client).flat.unique().tolist() == [5.0]


@pytest.mark.parametrize(("share", "asked"), [(0.1, 1), (0.5, 3), (1.0, 6)])
def test_the_share_of_clients_that_explore(share: float, asked: int) -> None:
    assert begin(AutoFLIP(explorers=share)).setup().metrics["bytes/down"] // (4 * SIZE) == asked


@pytest.mark.parametrize("scouts", ["independent", "aliased"])
def test_nobody_to_learn_from(scouts: Any) -> None:
    with pytest.raises(MethodError, match=r"all 6 explorers diverged; lower method\.lr"):
        set_up(AutoFLIP(scouts=scouts, lr=1e30, explore_epochs=3), rules=Rules(max_failed=1))
    told = r"round 0: \d of 6 clients sent no update that counts, .* lets none fail: non-finite: clients \["
    with pytest.raises(RunError, match=told):
        set_up(AutoFLIP(scouts=scouts, lr=1e30, explore_epochs=3))


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_what_did_not_move_stays(agreement: float) -> None:
    """Where min-max would divide 0 by 0, and prune everything."""
    server = set_up(AutoFLIP(lr=1e-30, agreement=agreement))
    assert server.state.mask.is_full and server.step().metrics["density/global"] == 1


# ── what it costs


def test_exploring_is_charged_in_round_0() -> None:
    server = begin(AutoFLIP(explore_epochs=2))
    setup = server.setup().metrics
    sizes, flops = server.place.population.partition.sizes, server.place.flops
    full = Mask.full(server.place.model.layout)
    assert setup["flops/clients"] == 2 * sizes.sum() * flops.train(full)
    assert setup["time/simulated_s"] > 2 * sizes.max() * flops.train(full) / small.DEVICE.flops_per_s
    # down: the dense model and the number of epochs; up: no model, and a number for each prunable weight
    assert 0 < setup["bytes/down"] / 6 - HEADER_BYTES - 4 * SIZE < 100
    assert 0 < setup["bytes/up"] / 6 - HEADER_BYTES - 4 * WEIGHTS < 100


def test_a_vote_is_a_byte_and_needs_no_server_memory() -> None:
    alone, voted = (begin(AutoFLIP(mask_from="all", agreement=a)) for a in (0.0, 0.5))
    difference = voted.setup().metrics["bytes/up"] - alone.setup().metrics["bytes/up"]
    assert WEIGHTS <= difference / 6 < WEIGHTS + 80
    assert alone.state.memory.scouts == voted.state.memory.scouts == {}
    kept = set_up(AutoFLIP()).state.memory.scouts
    assert {client: len(moved) for client, moved in kept.items()} == dict.fromkeys(range(6), WEIGHTS)


# ── the mask, by hand


def test_the_unstructured_part_by_hand() -> None:
    model, method = MLP, AutoFLIP(threshold=0.25)
    moved = movement(model, fc1=torch.arange(WEIGHTS).view(8, 16))
    mask = method.mask_from_scouts([moved], model)
    # the quarter of the weights that moved least are the first two of eight rows: two neurons, all in all
    assert removed_channels(mask, model.channel_groups[0]).tolist() == [True] * 2 + [False] * 6
    assert not mask["fc1.bias"][:2].any() and not mask["fc2.weight"][:, :2].any()
    assert mask["fc1.weight"][2:].all() and mask["fc2.bias"].all()
    whole = AutoFLIP(threshold=0.25, structured=False).mask_from_scouts([moved], model)
    assert whole["fc1.bias"].all() and whole["fc2.weight"].all()
    assert torch.equal(whole["fc1.weight"], mask["fc1.weight"])


def test_a_removed_filter_takes_along_what_it_leaves_empty() -> None:
    model = CNN
    conv1, conv2 = torch.ones(4, 1, 3, 3), torch.full((6, 4, 3, 3), 2.0)
    conv1[0, 0, 0], conv1[3] = 3.0, 0.0  # filter 3 did not move at all
    conv2[5, :3], conv2[5, 3], conv2[0, 0, 0, 0] = 0.0, 3.0, 4.0  # filter 5 looks at that one only
    mask = AutoFLIP(threshold=0.1).mask_from_scouts([movement(model, conv1=conv1, conv2=conv2)], model)
    first, second = model.channel_groups
    assert removed_channels(mask, first).tolist() == [False] * 3 + [True]
    assert removed_channels(mask, second).tolist() == [False] * 5 + [True]
    assert mask["bn1.weight"].tolist() == [True] * 3 + [False]
    assert not mask["fc.weight"][:, 20:].any() and mask["fc.weight"][:, :20].all()


def test_a_layer_that_loses_all_its_weights_keeps_its_channels() -> None:
    """They still pass something on; without any of them the network would be cut in two."""
    model = CNN
    conv1, conv2 = torch.linspace(0, 1, 36).view(4, 1, 3, 3), torch.linspace(0, 1, 216)
    conv2[:50] = 100.0  # far outside the quartiles; nothing in conv1 is
    moved = movement(model, conv1=conv1, conv2=conv2.view(6, 4, 3, 3))
    method = AutoFLIP(scaling="robust", threshold=0.82, min_layer=0)
    mask = method.mask_from_scouts([moved], model)
    first, second = model.channel_groups
    assert not mask["conv1.weight"].any()
    assert mask["bn1.weight"].all() and not removed_channels(mask, first).any()
    assert removed_channels(mask, second).tolist() == [False] * 2 + [True] * 4
    # by default its best weight stays, and the channel of it
    mask = replace(method, min_layer=1).mask_from_scouts([moved], model)
    assert mask["conv1.weight"].flatten().tolist() == [False] * 35 + [True]
    assert removed_channels(mask, first).tolist() == [True] * 3 + [False]


def test_a_layer_whose_last_columns_go_with_channels_takes_another_weight() -> None:
    model = CNN
    conv1, conv2 = torch.ones(4, 1, 3, 3), torch.zeros(6, 4, 3, 3)
    conv1[3], conv2[:, 3], conv2[2, 1, 0, 0] = 0.0, 1.0, 0.1
    # filter 3 did not move at all, and all that moved far in conv2 looks at it
    moved = movement(model, conv1=conv1, conv2=conv2)
    method = AutoFLIP(threshold=170.5 / 251)
    mask = method.mask_from_scouts([moved], model)
    assert removed_channels(mask, model.channel_groups[0]).tolist() == [False] * 3 + [True]
    assert mask["conv2.weight"].nonzero().tolist() == [[2, 1, 0, 0]]
    assert not replace(method, min_layer=0).mask_from_scouts([moved], model)["conv2.weight"].any()


def test_the_removed_channels_make_the_model_smaller() -> None:
    """With most of its neurons gone, a device trains what is left, and is faster for it."""
    smaller, whole = (set_up(AutoFLIP(threshold=0.9, lr=0.5, structured=s)) for s in (True, False))
    groups = smaller.place.model.channel_groups
    assert shrink(smaller.state.mask, groups) is not None
    assert shrink(whole.state.mask, groups) is None
    assert smaller.step().metrics["flops/executed"] < whole.step().metrics["flops/executed"]


def test_agreement_by_hand() -> None:
    """Four weights of a layer count; the others moved far, for both explorers."""
    model = MLP
    first, second = torch.full((2, 8, 16), 1000.0)
    first[0, :4] = torch.tensor([0.0, 1.0, 900.0, 900.0])
    second[0, :4] = torch.tensor([900.0, 0.0, 1.0, 950.0])
    scouts = [movement(model, fc1=m) for m in (first, second)]
    share = 1.9 / (WEIGHTS - 1)  # each explorer alone prunes two weights: 0 and 1, and 1 and 2

    def lost(agreement: float) -> list[int]:
        method = AutoFLIP(threshold=share, agreement=agreement, structured=False)
        return (~method.mask_from_scouts(scouts, model).flat).nonzero().flatten().tolist()

    # mean movement is 450, 0.5, 450.5 and 925; both would remove 1, one each 0 and 2
    assert lost(0.0) == [0, 1]
    assert lost(1.0) == [0, 1, 2]  # 0 and 2 tie
    assert lost(0.5) == [0, 1]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 40), min_size=252, max_size=252),
    st.floats(0, 0.95),
    st.sampled_from(["minmax", "robust"]),
    st.sampled_from(["global", "layer"]),
    st.integers(-10, 10),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_movement_gives_a_mask_that_a_model_can_have(
    values: list[int], threshold: float, scaling: Any, quantile: Any, power: int, agreement: float
) -> None:
    model = CNN
    method = AutoFLIP(
        threshold=threshold, scaling=scaling, quantile=quantile, agreement=agreement, structured=False
    )
    moved = torch.tensor(values, dtype=torch.float32)
    scouts = [moved, moved.roll(7)]
    mask = method.mask_from_scouts(scouts, model)
    assert bool(mask.flat[~model.layout.prunable_flat].all())
    assert mask.density > 0
    if quantile == "layer":
        assert all(mask[name].any() for name in model.layout.prunable_names)
    assert method.mask_from_scouts([scout * 2.0**power for scout in scouts], model) == mask


# ── whom the mask follows


def test_the_mask_follows_the_clients_of_each_round() -> None:
    method = AutoFLIP(threshold=0.5)
    server = begin(method, rounds=4, cohort=3)
    masks = []
    for before, after, clients in rounds_of(server):
        present = [before.memory.scouts[client] for client in clients]
        assert after.mask == method.mask_from_scouts(present, server.place.model)
        masks.append(after.mask.digest)
    assert len(set(masks)) > 1


@pytest.mark.parametrize("options", [{"mask_from": "all"}, {"explorers": 0.5}, {"scouts": "aliased"}])
def test_or_it_stays(options: dict[str, Any]) -> None:
    server = set_up(AutoFLIP(**options))
    mask = server.state.mask
    assert server.state.memory.scouts == {}
    for _ in range(3):
        server.step()
        assert server.state.mask == mask


@pytest.mark.parametrize("agreement", [0.0, 0.05])
def test_sums_give_the_first_mask_that_movements_client_by_client_give(agreement: float) -> None:
    """Up to one weight at the quantile: sums are added in another order."""
    each, summed = (
        set_up(AutoFLIP(agreement=agreement, mask_from=where, structured=False)).state.mask
        for where in ("participants", "all")
    )
    assert int((each.flat ^ summed.flat).count_nonzero()) <= 1


def test_clients_that_have_not_explored_say_nothing() -> None:
    method = AutoFLIP(threshold=0.5)
    server = set_up(method, rounds=2)
    scouts = dict(server.state.memory.scouts)
    for client in (0, 1, 2, 3, 4):
        del server.state.memory.scouts[client]
    while server.state.round <= 6:
        mask = server.state.mask
        present = [r.client for r in server.step().clients]
        alone = method.mask_from_scouts([scouts[5]], server.place.model)
        assert server.state.mask == (alone if 5 in present else mask)


def test_a_weight_that_comes_back_resumes_from_its_last_value() -> None:
    back = 0
    for before, after, _ in rounds_of(begin(AutoFLIP(threshold=0.5), rounds=4, cohort=2)):
        pruned = ~before.mask.flat
        assert torch.equal(after.params.flat[pruned], before.params.flat[pruned])
        back += int((pruned & after.mask.flat & (after.params.flat != 0)).count_nonzero())
    assert back > 0


# ── the published code: one model in turn, and the server's momentum


@pytest.mark.parametrize("warm_start", [False, True])
def test_aliased_scouts_train_one_model_and_only_the_last_one_counts(warm_start: bool) -> None:
    method = AutoFLIP(scouts="aliased", warm_start=warm_start, explore_epochs=2)
    server = begin(method)
    models = [server.state.params]
    for client in range(6):
        models.append(explored(method, client, models[-1], epochs=2))
    server.setup()
    assert server.state.params == (models[-1] if warm_start else models[0])
    moved = (models[-1].flat - models[-2].flat).square()[models[0].layout.prunable_flat]
    assert server.state.mask == method.mask_from_scouts([moved], server.place.model)


def test_aliased_scouts_wait_for_each_other() -> None:
    together, in_turn = (
        begin(AutoFLIP(scouts=scouts)).setup().metrics for scouts in ("independent", "aliased")
    )
    assert in_turn["flops/clients"] == together["flops/clients"]
    assert in_turn["bytes/down"] == together["bytes/down"]
    assert in_turn["bytes/up"] == 6 * (HEADER_BYTES + 4 * SIZE)  # a model, not a movement
    assert in_turn["time/simulated_s"] > 3 * together["time/simulated_s"]


def test_an_explorer_that_diverges_is_left_out_of_the_turns() -> None:
    method = AutoFLIP(scouts="aliased", warm_start=True, lr=1e15)
    partition = small.dealt(50, 20, 50)  # only the second one makes a single step, which is finite
    server = begin(method, partition=partition, rules=Rules(max_failed=0.67, max_change=None))
    alone = explored(method, 1, server.state.params, partition=partition)
    server.setup()
    assert server.state.params == alone


def test_only_a_model_that_was_trained_can_be_started_from() -> None:
    problem = AutoFLIP(warm_start=True).check(small.setting())
    assert problem is not None and problem.startswith("method.warm_start")
    assert AutoFLIP(warm_start=True, scouts="aliased").check(small.setting()) is None
    tree = {"method": {"name": "autoflip", "warm_start": True}, "tracking": {"uri": "none"}}
    with pytest.raises(ConfigError, match=r"method\.warm_start=true needs method\.scouts=aliased"):
        RunConfig.from_tree(tree)


@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
def test_the_servers_momentum_by_hand(architecture: Architecture) -> None:
    method, velocity = Watched(server_momentum=0.75, threshold=0.5), torch.zeros(())
    for before, after, _ in rounds_of(begin(method, rounds=4, cohort=2, architecture=architecture)):
        start, mean, trained = before.params.flat, method.means[-1], before.params.layout.trainable_flat
        velocity = 0.75 * velocity + 0.25 * (mean - start)
        velocity = torch.where(before.mask.flat & trained, velocity, 0.0)  # none for running statistics
        expected = torch.where(trained, start + velocity, mean)
        np.testing.assert_allclose(after.params.flat.numpy(), expected.numpy(), atol=1e-6)
        assert velocity.any() and after.memory.scouts == before.memory.scouts


def test_momentum_does_not_move_a_model_that_nobody_trains() -> None:
    server = set_up(AutoFLIP(server_momentum=0.9))
    server.step()
    nobody = CohortUpdate(Partial(server.place.model.layout, Fold(), {}))
    assert server.state.memory.velocity.any()
    assert server.method.aggregate(server.state, nobody).params == server.state.params
