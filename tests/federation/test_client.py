"""The metered inner loop: what torch's own SGD computes, zeros that stay zeros, FLOPs counted by hand."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.sgd import sgd  # what torch.optim.SGD calls; the class itself imports a compiler for seconds

from fedray.errors import MethodError
from fedray.federation.client import Client, Outcome, Step
from fedray.federation.method import Method
from fedray.federation.worker import Worker, client_generator
from fedray.models.spec import Architecture, ModelSpec
from fedray.pruning import masks
from fedray.types import ClientInfo, Exploits, Extra, Layout, Mask, Params, Task
from tests import small

SGDS = [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}]


def assert_close(found: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0) -> None:
    """As torch.testing.assert_close, which imports torch.distributed for seconds."""
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=rtol, atol=atol)


def start(client: Client, density: float = 1.0, seed: int = 3) -> tuple[Params, Mask]:
    """Return random weights of the client's model, non-zero everywhere, and a mask."""
    layout = client._engine.layout
    flat = torch.from_numpy(np.random.default_rng(seed).standard_normal(layout.size, dtype=np.float32)) / 2
    return Params(flat, layout), masks.random(layout, density, np.random.default_rng(seed))


def batches(client: Client, size: int, epochs: int, round: int = 1) -> list[Tensor]:
    """Return the rows of each batch that the client sees, from its generator alone."""
    rng = client_generator(0, round, client.id)()
    passes = [torch.from_numpy(rng.permutation(client.num_examples)) for _ in range(epochs)]
    return [rows for order in passes for rows in order.split(size)]


def torch_sgd(
    client: Client, model: ModelSpec, params: Params, mask: Mask, method: Method, loss: Any = None
) -> Tensor:
    """Train as anybody would with torch, on the client's batches: mask gradients, step, mask weights."""
    flat = params.masked(mask).flat
    module = model.bind(flat).train()
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    held = mask.layout.views(mask.flat.float())
    keep = [held[name] for name, p in module.named_parameters() if p.requires_grad]
    velocity: list[Tensor | None] = [None for _ in leaves]
    for rows in batches(client, method.batch_size, method.local_epochs):
        # the same images in the same order in memory: another order rounds convolutions differently
        value = cross_entropy(module(client._engine.batch(client.x[rows])), client.y[rows])
        if loss is not None:
            value = value + loss(dict(module.named_parameters()))
        gradients = torch.autograd.grad(value, leaves)
        with torch.no_grad():
            sgd(
                leaves,
                [gradient * kept for gradient, kept in zip(gradients, keep, strict=True)],
                velocity,
                weight_decay=method.weight_decay,
                momentum=method.momentum,
                lr=method.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                foreach=False,
            )
            for leaf, kept in zip(leaves, keep, strict=True):
                leaf.mul_(kept)
    return flat


def plain_loss(step: Step) -> Tensor:
    """The loss that is used without another; to name it is to go the general way, through autograd."""
    return cross_entropy(step.logits, step.y)


# ── sgd is SGD ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", SGDS, ids=str)
@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("architecture", [small.MLP, small.CNN], ids=["mlp", "cnn"])
def test_sgd_is_torch_sgd(options: dict[str, float], density: float, architecture: Architecture):
    method = Method(lr=0.1, batch_size=6, local_epochs=3, **options)  # type: ignore[arg-type]
    client = small.client(method, architecture=architecture)
    assert client.num_examples % 6, "the last batch of an epoch is a short one"
    params, mask = start(client, density)
    params.flat[~params.layout.trainable_flat] = 1.0  # running variances are positive
    model = small.workplace(method, architecture=architecture).model
    expected = torch_sgd(client, model, params, mask, method)
    assert_close(client.sgd(params, mask, loss=plain_loss).flat, expected, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_the_short_way_through_linear_layers_is_sgd_too(weight_decay: float, density: float):
    method = Method(lr=0.1, batch_size=6, local_epochs=3, weight_decay=weight_decay)
    short, long = small.client(method), small.client(method)
    params, mask = start(short, density)
    trained = short.sgd(params, mask)
    assert_close(trained.flat, long.sgd(params, mask, loss=plain_loss).flat, atol=1e-6)
    assert trained.flat[~mask.flat].count_nonzero() == 0
    assert short.meter.loss == pytest.approx(long.meter.loss, rel=1e-6)
    assert (short.meter.flops, short.meter.executed_flops) == (long.meter.flops, long.meter.executed_flops)


def tied(shape: tuple[int, ...], classes: int) -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), layer, nn.ReLU(), layer)


def test_a_layer_that_is_used_twice_is_trained_once_a_step():
    client = small.client(
        Method(lr=0.5), architecture=Architecture(tied, small.MLP.accepts, "made up", "a layer used twice")
    )
    params, mask = start(client)
    trained = client.sgd(params, mask, steps=3, seed=1)
    assert_close(trained.flat, client.sgd(params, mask, steps=3, seed=1, loss=plain_loss).flat, atol=1e-6)


class Siblings(nn.Module):
    """Two biases that are added: autograd hands both one and the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(-torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1)) + (self.a + self.b)
        return logits


SIBLINGS = Architecture(lambda shape, classes: Siblings(), lambda shape: None, "made up", "two biases")


@pytest.mark.parametrize("options", SGDS, ids=str)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_weights_that_share_a_gradient_are_trained_apart(options: dict[str, float], density: float):
    method = Method(batch_size=6, local_epochs=2, **options)  # type: ignore[arg-type]
    client = small.client(method, architecture=SIBLINGS, prune_last=True)
    params, mask = start(client, density)
    model = small.workplace(method, architecture=SIBLINGS, prune_last=True).model
    expected = torch_sgd(client, model, params, mask, method)
    assert_close(client.sgd(params, mask).flat, expected, atol=1e-7)


def test_a_loss_whose_gradient_is_the_same_everywhere_can_be_trained():
    client = small.client(Method(lr=0.5, momentum=0.5, batch_size=6))
    params, mask = start(client)
    total = client.sgd(params, mask, steps=2, loss=lambda step: sum_of(step.weights))
    # momentum 1, then 1.5: −0.5 · 2.5
    assert_close(total.flat, params.flat - 1.25, atol=1e-6)


def sum_of(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weight.sum() for weight in weights.values()]).sum()


def test_frozen_weights_stay_as_they_are():
    def build(shape: tuple[int, ...], classes: int) -> nn.Module:
        module = small.MLP.build(shape, classes)
        module.get_parameter("fc1.bias").requires_grad_(False)
        return module

    frozen = Architecture(build, small.MLP.accepts, "made up", "a frozen bias")
    method = Method(momentum=0.9, weight_decay=0.1, batch_size=6)
    client = small.client(method, architecture=frozen)
    params, mask = start(client, 0.5)
    gradients: list[Tensor] = []
    trained = client.sgd(params, mask, on_grad=gradients.append)
    assert torch.equal(trained["fc1.bias"], params["fc1.bias"])
    assert all(not gradient[params.layout.spans["fc1.bias"]].any() for gradient in gradients)
    expected = torch_sgd(client, small.workplace(method, architecture=frozen).model, params, mask, method)
    assert_close(trained.flat, expected, atol=1e-7)


@pytest.mark.parametrize("options", SGDS, ids=str)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_masked_entries_stay_exactly_zero(options: dict[str, float], with_gradient: bool):
    client = small.client(Method(lr=0.2, batch_size=6, local_epochs=3, **options))  # type: ignore[arg-type]
    params, mask = start(client, 0.3)
    trained = client.sgd(params, mask, on_grad=(lambda gradient: None) if with_gradient else None)
    assert trained.flat[~mask.flat].count_nonzero() == 0
    assert (trained.flat != params.flat)[mask.flat].float().mean() > 0.7, "most others are trained"
    dense = client.sgd(params.masked(mask), Mask.full(mask.layout))
    assert dense.flat[~mask.flat].count_nonzero() > 50, "without a mask they do not stay zero"


def test_training_leaves_what_it_is_given_as_it_is_and_owns_what_it_returns():
    client = small.client(Method(momentum=0.9, batch_size=6))
    params, mask = start(client, 0.5)
    before = params.clone(), mask.clone()
    first = client.sgd(params, mask)
    kept = first.clone()
    client.sgd(params, mask)
    client.grad(params, mask)
    client.evaluate(params, mask)
    assert (params, mask) == before
    assert first == kept, "a result lives in memory of its own"


def test_momentum_starts_from_zero_in_each_call():
    client = small.client(Method(momentum=0.9, batch_size=6))
    params, mask = start(client)
    assert client.sgd(params, mask, seed=1) == client.sgd(params, mask, seed=1)


# ── which batches ────────────────────────────────────────────────────────────────────────────────────────


def seen(client: Client, **options: Any) -> list[list[list[float]]]:
    """Train and return each batch's images as lists."""
    params, mask = start(client)
    found: list[list[list[float]]] = []

    def record(step: Step) -> Tensor:
        assert step.index == len(found)
        found.append(step.x.flatten(1).tolist())
        return cross_entropy(step.logits, step.y)

    client.sgd(params, mask, loss=record, **options)
    return found


def ten(**options: Any) -> Client:
    """A client of ten examples, four to a batch."""
    return small.client(Method(batch_size=4, **options), partition=small.dealt(10, 5))


def test_epochs_pass_over_all_examples_and_steps_count_batches():
    assert [len(b) for b in seen(ten(), epochs=2)] == [4, 4, 2, 4, 4, 2]
    assert [len(b) for b in seen(ten(), steps=5)] == [4, 4, 2, 4, 4]
    assert [len(b) for b in seen(ten(), steps=2)] == [4, 4]
    assert [len(b) for b in seen(ten(local_epochs=3))] == [4, 4, 2] * 3
    assert seen(ten(), steps=0) == seen(ten(), epochs=0) == []


def test_each_epoch_sees_every_example_once_in_an_order_of_its_own():
    client = ten()
    found = seen(client, epochs=2)
    first, second = [image for b in found[:3] for image in b], [image for b in found[3:] for image in b]
    assert sorted(first) == sorted(second) == sorted(client.x.flatten(1).tolist())
    assert first != second


def test_steps_and_epochs_see_the_same_batches():
    assert seen(ten(), steps=6) == seen(ten(), epochs=2)


def test_equal_seeds_see_equal_batches():
    client = ten()
    assert seen(client, seed=7) == seen(client, seed=7) != seen(client, seed=8)
    assert seen(client) != seen(client), "without a seed the round's generator goes on"


def test_a_seed_does_not_touch_the_generator_of_the_round():
    with_seed, without = ten(), ten()
    seen(with_seed, seed=7)
    assert seen(with_seed) == seen(without)


def test_batches_depend_on_seed_round_and_client_alone():
    def batches_of(round: int = 1, id: int = 0, seed: int = 0) -> object:
        return seen(
            small.client(Method(batch_size=4), id=id, round=round, seed=seed, partition=small.dealt(10, 10))
        )

    assert batches_of() == batches_of()
    assert batches_of() != batches_of(round=2)
    order = [client_generator(*key)().permutation(10).tolist() for key in [(0, 1, 0), (0, 1, 1), (1, 1, 0)]]
    assert order[0] != order[1] != order[2] != order[0]


def test_a_seed_of_the_method_is_no_round():
    make = client_generator(0, 5, 3)
    assert make(5).permutation(20).tolist() != make().permutation(20).tolist()
    assert make(5).permutation(20).tolist() == client_generator(0, 6, 3)(5).permutation(20).tolist()


def test_another_learning_rate_can_be_given():
    method = small.client(Method(lr=0.3, batch_size=6))
    given = small.client(Method(lr=0.1, batch_size=6))
    params, mask = start(given)
    assert given.sgd(params, mask, lr=0.3) == method.sgd(params, mask)
    assert given.sgd(params, mask, lr=0.0) == params


def test_nothing_is_trained_without_a_step():
    client = ten()
    params, mask = start(client, 0.5)
    assert client.sgd(params, mask, epochs=0) == params.masked(mask)
    assert math.isnan(client.meter.loss)
    assert client.meter.flops == 0


def test_epochs_and_steps_at_once_are_refused():
    client = ten()
    with pytest.raises(MethodError, match="epochs or steps, not both"):
        client.sgd(*start(client), epochs=1, steps=1)


def test_a_client_without_examples_cannot_train():
    place = small.workplace(Method())
    info = ClientInfo(4, 0, small.DEVICE)
    client = Worker(place).client(info, np.arange(0), 1, {})
    with pytest.raises(MethodError, match="client 4 has no examples"):
        client.sgd(place.model.init(0), Mask.full(place.model.layout))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────


def autograd(client: Client, params: Params, mask: Mask, x: Tensor, y: Tensor) -> Tensor:
    """Return the dense gradient of the MLP's mean loss at `params ⊙ mask`, by plain autograd."""
    flat = params.masked(mask).flat.requires_grad_()
    w = client._engine.layout.views(flat)
    hidden = torch.relu(x.flatten(1) @ w["fc1.weight"].T + w["fc1.bias"])
    loss = cross_entropy(hidden @ w["fc2.weight"].T + w["fc2.bias"], y)
    (gradient,) = torch.autograd.grad(loss, flat)
    return gradient


def test_on_grad_gets_the_dense_gradient_before_the_step():
    client = small.client(Method(lr=0.1, batch_size=6, momentum=0.9, weight_decay=0.5))
    params, mask = start(client, 0.4)
    found: list[Tensor] = []
    client.sgd(params, mask, steps=1, on_grad=found.append)
    (rows, *_) = batches(client, 6, 1)
    (gradient,) = found
    assert gradient[~mask.flat].count_nonzero() > 50, "also where the mask is False"
    expected = autograd(client, params, mask, client.x[rows], client.y[rows])
    assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_grad_is_the_gradient_over_all_examples(batch_size: int):
    client = small.client(Method(batch_size=batch_size))
    params, mask = start(client, 0.4)
    gradient = client.grad(params, mask)
    expected = autograd(client, params, mask, client.x, client.y)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient[~mask.flat].count_nonzero() > 50


def test_grad_of_a_loss_of_ones_own():
    client = small.client(Method(batch_size=7))
    params, mask = start(client, 0.4)
    gradient = client.grad(params, mask, loss=lambda step: 2 * cross_entropy(step.logits, step.y))
    assert_close(gradient, 2 * client.grad(params, mask), rtol=1e-5, atol=1e-7)


# ── the meter ────────────────────────────────────────────────────────────────────────────────────────────

DENSE = 2 * (8 * 16 + 3 * 8)  # a multiply-add for each weight of fc1 and fc2


def half_of_fc1(layout: Layout, structured: bool) -> Mask:
    """Hold half of fc1.weight (8, 16): four rows whole, or every second weight of each."""
    mask = Mask.full(layout)
    if structured:
        mask["fc1.weight"][:4] = False
    else:
        mask["fc1.weight"][::2, ::2] = False
        mask["fc1.weight"][1::2, 1::2] = False
    return mask


def test_sgd_is_charged_three_forward_passes_for_each_example():
    client = ten()
    params, mask = start(client)
    client.sgd(params, mask, epochs=2)
    assert DENSE == 304
    assert client.meter.flops == client.meter.executed_flops == 3 * DENSE * 20
    client.sgd(params, mask, steps=2)
    assert client.meter.flops == 3 * DENSE * (20 + 8)


@pytest.mark.parametrize("exploits", ["nothing", "structured", "unstructured"])
@pytest.mark.parametrize("structured", [False, True])
def test_zeros_are_free_in_theory_and_on_devices_that_skip_them(exploits: Exploits, structured: bool):
    device = replace(small.DEVICE, exploits=exploits)
    client = small.client(Method(batch_size=4), partition=small.dealt(10), devices=[device])
    params, _ = start(client)
    mask = half_of_fc1(params.layout, structured)
    sparse = 2 * (64 + 24)
    skipped = exploits == "unstructured" or (exploits == "structured" and structured)
    executed = sparse if skipped else DENSE
    client.sgd(params, mask)
    assert client.meter.flops == 3 * sparse * 10
    assert client.meter.executed_flops == 3 * executed * 10
    client.sgd(params, mask, on_grad=lambda gradient: None)
    assert client.meter.flops == (3 * sparse + sparse + 2 * DENSE) * 10, (
        "a dense gradient is two dense passes"
    )
    assert client.meter.executed_flops == (3 * executed + executed + 2 * DENSE) * 10


def test_grad_is_charged_as_dense_and_evaluate_as_a_forward_pass():
    client = ten()
    params, _ = start(client)
    mask = half_of_fc1(params.layout, structured=True)
    client.grad(params, mask)
    assert client.meter.flops == (176 + 2 * 304) * 10
    client.evaluate(params, mask)
    assert client.meter.flops == (176 + 2 * 304) * 10 + 176 * 10
    assert client.meter.executed_flops == client.meter.flops


def test_the_loss_is_the_mean_over_the_examples_seen():
    client = small.client(Method(batch_size=4), architecture=small.LINEAR, partition=small.dealt(10))
    params, mask = Params(torch.zeros(48), client._engine.layout), Mask.full(client._engine.layout)
    client.sgd(params, mask, lr=0.0)
    assert client.meter.loss == pytest.approx(math.log(3))
    # batches of 4, 4 and 2 examples, with losses 0, 1 and 2
    client.sgd(params, mask, loss=lambda step: 0 * step.logits.sum() + step.index)
    assert client.meter.loss == pytest.approx((0 * 4 + 1 * 4 + 2 * 2) / 10)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("broken", ["fc1.bias", "fc2.weight", "fc2.bias"])
def test_a_model_that_diverged_classifies_nothing_rightly(broken: str):
    client = small.client(Method())
    params = client.model.init(0)
    params.flat[params.layout.spans[broken]] = torch.nan
    assert 0 in client.y, "argmax takes NaN for the largest, and would answer 0"
    assert client.evaluate(params, Mask.full(params.layout)).accuracy == 0.0


def test_evaluate_classifies_every_example():
    data = small.pixels([1, 2, 3, 4], [0, 1, 1, 2], classes=3)
    client = small.client(
        Method(), architecture=small.LINEAR, prune_last=True, data=data, partition=small.dealt(4)
    )
    layout = client._engine.layout
    params = Params(torch.tensor([1.0, 2.0, 9.0]), layout)
    mask = Mask(torch.tensor([True, True, False]), layout)
    outcome = client.evaluate(params, mask)  # logits x, 2x and 0: always class 1
    assert outcome.right.tolist() == [False, True, True, False]
    assert outcome.accuracy == 0.5
    logits = [(x, 2.0 * x, 0.0) for x in (1, 2, 3, 4)]
    losses = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, (0, 1, 1, 2), strict=True)]
    assert outcome.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert outcome.loss == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_of_no_examples_there_is_no_accuracy():
    nothing = Outcome(np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.float32))
    assert math.isnan(nothing.accuracy)
    assert math.isnan(nothing.loss)


# ── variations ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_a_proximal_term_is_a_loss(density: float):
    method = Method(lr=0.1, batch_size=6, local_epochs=3)
    client, plain = small.client(method), small.client(method)
    params, mask = start(client, density)
    origin = params.masked(mask)

    def distance(weights: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * torch.stack([(w - origin[name]).square().sum() for name, w in weights.items()]).sum()

    def proximal(step: Step) -> Tensor:
        return cross_entropy(step.logits, step.y) + distance(step.weights)

    trained = client.sgd(params, mask, loss=proximal)
    expected = torch_sgd(client, small.workplace(method).model, params, mask, method, loss=distance)
    assert_close(trained.flat, expected, atol=1e-7)
    free = plain.sgd(params, mask)
    assert (trained.flat - origin.flat).norm() < 0.9 * (free.flat - origin.flat).norm()


def test_a_view_changes_what_the_forward_pass_sees_and_the_chain_rule_does_the_rest():
    client = small.client(Method(lr=0.1, batch_size=1000))
    params, mask = start(client)
    trained = client.sgd(params, mask, steps=1, view=lambda weights: {n: 2 * w for n, w in weights.items()})
    gradient = 2 * client.grad(Params(2 * params.flat, params.layout), mask)
    assert_close(trained.flat, params.flat - 0.1 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_on_step_takes_the_place_of_the_masking(momentum: float):
    client = small.client(Method(lr=0.1, batch_size=6, momentum=momentum))
    params, mask = start(client, 0.4)
    steps: list[int] = []

    def clip(flat: Tensor) -> None:
        steps.append(len(flat))
        flat.clamp_(-0.25, 0.25)

    trained = client.sgd(params, mask, steps=3, on_step=clip)
    assert steps == [params.layout.size] * 3
    assert trained.flat.abs().max() == 0.25
    assert trained.flat[~mask.flat].count_nonzero() > 50, "nothing else keeps them at zero"


# ── running statistics ───────────────────────────────────────────────────────────────────────────────────


def test_running_statistics_travel_in_the_vector():
    method = Method(batch_size=1000)
    client = small.client(method, architecture=small.CNN)
    params, mask = (
        small.workplace(method, architecture=small.CNN).model.init(0),
        Mask.full(client._engine.layout),
    )
    trained = client.sgd(params, mask, lr=0.0, steps=1)
    seen = nn.functional.conv2d(client.x, params["conv1.weight"], padding=1)
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
    assert_close(trained["bn1.running_mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    assert_close(trained["bn1.running_var"], 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-6)
    statistics = ~params.layout.trainable_flat
    assert torch.equal(trained.flat[~statistics], params.flat[~statistics])
    assert client.grad(params, mask)[statistics].count_nonzero() == 0
    assert client.evaluate(trained, mask).loss != client.evaluate(params, mask).loss


def test_nothing_of_one_client_is_left_for_the_next():
    method = Method(momentum=0.9, batch_size=6)
    place = small.workplace(method, architecture=small.CNN)
    params, mask = place.model.init(0), masks.random(place.model.layout, 0.5, np.random.default_rng(0))

    def trained(worker: Worker, id: int) -> Params:
        rows = place.population.partition.rows(id)
        return worker.client(place.population[id], rows, 1, {}).sgd(params, mask)

    busy = Worker(place)
    first, second = trained(busy, 0), trained(busy, 1)
    assert second == trained(Worker(place), 1)
    assert first != second


@pytest.mark.parametrize("channels", [1, 3])
def test_images_for_convolutions_have_channels_last_and_the_same_values(channels: int):
    client = small.client(Method(), architecture=small.CNN)
    x = torch.rand(5, channels, 4, 6)
    batch = client._engine.batch(x)
    assert torch.equal(batch, x)
    assert batch.stride() == (24 * channels, 1, 6 * channels, channels)
    assert batch.data_ptr() != x.data_ptr()  # a model may write into its input


# ── typed access


def test_an_entry_of_the_memory_is_recalled_by_its_type():
    client = small.client(Method(), memory={"loss": 0.5, "head": torch.ones(2), "done": True})
    assert client.recall("loss", float) == 0.5 and client.recall("done", bool) is True
    head = client.recall("head", Tensor)
    assert head is not None and head.tolist() == [1.0, 1.0]
    assert client.recall("absent", float) is None
    with pytest.raises(TypeError, match="the memory 'loss' is a float, not a Tensor"):
        client.recall("loss", Tensor)
    with pytest.raises(TypeError, match="the memory 'head' is a Tensor, not a int"):
        client.recall("head", int)


def test_an_extra_of_a_task_is_read_by_its_type():
    params = Params(torch.zeros(3), Layout(("w",), ((3,),), (True,), (True,)))
    extras: dict[str, Extra] = {
        "epochs": 3,
        "share": 0.5,
        "upload": False,
        "times": torch.ones(1),
        "word": "a",
    }
    task = Task(params, Mask.full(params.layout), extras=extras)
    assert task.extra("epochs", int) == 3 and task.extra("share", float) == 0.5
    assert task.extra("upload", bool) is False and task.extra("word", str) == "a"
    assert task.extra("times", Tensor) is extras["times"]
    with pytest.raises(TypeError, match="the extra 'share' is a float, not a int"):
        task.extra("share", int)
    with pytest.raises(KeyError, match="absent"):
        task.extra("absent", int)
