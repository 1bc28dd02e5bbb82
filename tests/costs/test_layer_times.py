"""The time of a round as a sum over weights: PruneFL's published totals, and the clock of devices."""

import re
from dataclasses import replace

import pytest
import torch

from fedray.costs.codec import Codec
from fedray.costs.devices import profile
from fedray.costs.layer_times import (
    COMMUNICATION_S,
    MEASURED,
    LayerTimes,
    mean_steps,
    mismatch,
    of_devices,
    published,
    weights,
)
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.federation.worker import Workplace
from fedray.models import ModelSpec, build_model
from fedray.pruning.masks import top_k
from fedray.types import ClientInfo, Exploits, Layout, Mask
from tests import small

VGG11 = build_model("vgg11", (3, 32, 32), 10, prune_last=True)
CONV2 = build_model("conv2", (1, 28, 28), 62, prune_last=True)


# ── as published


@pytest.mark.parametrize(
    ("model", "name", "count", "constant_s", "total_s"),
    [
        (VGG11, "vgg11_cifar10", 9_747_136, 86.8495, 209.6140),
        (CONV2, "conv2_femnist", 6_601_504, 6.2464, 51.0811),
    ],
    ids=["vgg11", "conv2"],
)
def test_a_dense_round_takes_what_the_published_model_says(
    model: ModelSpec, name: str, count: int, constant_s: float, total_s: float
) -> None:
    assert model.layout.prunable_count == count
    assert mismatch(MEASURED[name].per_weight_s, model.layout) is None
    times = published(name, steps=5)
    assert round(times.constant_s, 4) == constant_s
    assert round(times.seconds(Mask.full(model.layout)), 4) == total_s


def test_pruning_saves_the_times_of_what_is_pruned() -> None:
    times, mask = published("conv2_femnist", steps=5), Mask.full(CONV2.layout)
    mask["conv2.weight"].flatten()[:1000] = False
    saved_s = times.seconds(Mask.full(CONV2.layout)) - times.seconds(mask)
    assert saved_s == pytest.approx(1000 * (5 * 7.09885e-6 + 5.561621e-6), rel=1e-6)


def test_computing_grows_with_the_steps_and_communication_does_not() -> None:
    one, three = published("conv2_femnist", 1), published("conv2_femnist", 3)
    assert three.constant_s == pytest.approx(3 * one.constant_s)
    for name in weights(CONV2.layout):
        computing = one.per_weight_s[name] - COMMUNICATION_S
        assert three.per_weight_s[name] == pytest.approx(COMMUNICATION_S + 3 * computing)
    assert three.per_weight_s["conv1.weight"] == COMMUNICATION_S  # nothing was measured for the first layer


def test_communication_is_that_of_prunefls_link() -> None:
    assert pytest.approx(1.43843e6, rel=1e-6) == 8 / COMMUNICATION_S  # bytes per second
    device = profile("raspberry_pi_prunefl")
    wire_s = 4 / device.downlink_bytes_per_s + 4 / device.uplink_bytes_per_s
    assert wire_s == pytest.approx(COMMUNICATION_S, rel=1e-4)


def test_conv2_has_the_published_layers_and_starts_over_the_fan_out() -> None:
    shapes = [CONV2.layout.shape_of[name] for name in weights(CONV2.layout)]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (2048, 3136), (62, 2048)]
    assert float(CONV2.init(0)["fc1.weight"].abs().max()) == pytest.approx((6 / 2048) ** 0.5, rel=1e-3)


# ── of the devices of a run


def place_of(*exploits: Exploits, method: Method | None = None) -> Workplace:
    devices = [replace(small.DEVICE, name=f"device {e}", exploits=e, dropout=0.0) for e in exploits]
    devices = [replace(d, flops_per_s=1000.0 * (k + 1)) for k, d in enumerate(devices)]
    return small.workplace(method or Method(), partition=small.dealt(37, 50, 23), devices=devices)


def times_of(place: Workplace, dense_gradient: bool = False) -> LayerTimes:
    method, clients = place.method, place.population
    return of_devices(
        clients,
        place.flops,
        lambda n: 2 * n,
        method.local_steps,
        method.downlink,
        method.uplink,
        dense_gradient=dense_gradient,
    )


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
def test_dense_it_is_the_clock_of_a_dense_round(values: str) -> None:
    method = Method(local_epochs=2, uplink_values=values, downlink_values=values)  # type: ignore[arg-type]
    place = place_of("structured", "unstructured", "nothing", method=method)
    server = small.server(
        method,
        schedule=Schedule(rounds=1, cohort=3),
        partition=place.population.partition,
        devices=place.population.fleet.profiles,
    )
    _, report = small.run(server)
    clock_s = sum(record.cost.seconds for record in report.clients) / 3
    assert times_of(place).seconds(Mask.full(place.model.layout)) == pytest.approx(clock_s, rel=1e-12)


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_where_any_zero_is_skipped_it_is_the_clock_of_a_pruned_round_too(dense_gradient: bool) -> None:
    place = place_of("unstructured")
    layout, flops = place.model.layout, place.flops
    mask = top_k(torch.rand(layout.size, generator=torch.manual_seed(1)), 0.3, layout)
    times, full = times_of(place, dense_gradient), Mask.full(layout)
    wire_s = (full.count - mask.count) * (4 / 100 + 4 / 50)
    saved_flops = flops.train(full) - flops.train(mask, dense_gradient=dense_gradient)
    compute_s = saved_flops * 2 * (37 + 50 + 23) / 3 / 1000
    assert times.seconds(full) - times.seconds(mask) == pytest.approx(wire_s + compute_s)


@pytest.mark.parametrize("exploits", ["structured", "nothing"])
def test_where_single_zeros_are_not_skipped_pruning_saves_bytes_only(exploits: Exploits) -> None:
    times = times_of(place_of(exploits))
    assert times.per_weight_s == pytest.approx(dict.fromkeys(times.per_weight_s, 4 / 100 + 4 / 50))
    assert times.constant_s > times_of(place_of("unstructured")).constant_s


def test_devices_count_alike() -> None:
    parts = [times_of(place_of(e)) for e in ("structured", "unstructured")]
    place = small.workplace(
        Method(),
        partition=small.dealt(50, 50),
        devices=[replace(small.DEVICE, exploits=e) for e in ("structured", "unstructured")],
    )
    mixed = times_of(place)
    assert parts[0].per_weight_s["fc1.weight"] < mixed.per_weight_s["fc1.weight"]
    assert mixed.per_weight_s["fc1.weight"] == pytest.approx(0.12 + 6 * 100 / 1000 / 2)


def test_a_large_population_is_surveyed_in_equal_distances() -> None:
    asked: list[int] = []

    def steps(num_examples: int) -> int:
        asked.append(num_examples)
        return num_examples

    clients = [ClientInfo(k, k, small.DEVICE) for k in range(1050)]
    assert mean_steps(clients, steps) == sum(range(0, 1050, 10)) / 105
    assert asked == list(range(0, 1050, 10))


# ── on the wire, and for the wrong model


def test_it_arrives_as_it_was_sent() -> None:
    times, layout = published("conv2_femnist", 5), CONV2.layout
    vector = times.vector(layout)
    assert vector.dtype == torch.float32
    assert vector.shape == (1 + len(layout.names),)
    again, mask = LayerTimes.of_vector(vector, layout), top_k(torch.rand(layout.size), 0.1, layout)
    assert again.seconds(mask) == pytest.approx(times.seconds(mask), rel=1e-6)


LAYOUT = Layout(
    ("one.weight", "one.bias", "two.weight", "last.weight"),
    ((2, 2), (2,), (2, 2), (3, 2)),
    (True, False, True, False),
    (True,) * 4,
)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"one.weight", "two.weight"}, None),
        ({"one.weight", "two.weight", "last.weight"}, None),
        ({"two.weight", "last.weight"}, "no time for one.weight; give every layer .*constant_s"),
        (set(), "no time for one.weight, two.weight;"),
        ({"one.weight", "two.weight", "on.weight"}, "unknown layer 'on.weight'; did you mean 'one.weight'"),
        ({"one.weight", "two.weight", "one.bias"}, "unknown layer 'one.bias'.* Known: last.weight, one"),
    ],
)
def test_layers_must_match(names: set[str], reason: str | None) -> None:
    fault = mismatch(names, LAYOUT)
    assert (fault is None) == (reason is None)
    assert re.search(reason or "", fault or "")


def test_a_measured_model_must_name_all_its_layers() -> None:
    some = ("one.weight", "two.weight")
    assert mismatch(some, LAYOUT) is None
    assert (mismatch(some, LAYOUT, complete=True) or "").startswith("no time for last.weight; give")
    assert mismatch((*some, "last.weight"), LAYOUT, complete=True) is None


def test_what_an_entry_weighs_is_the_codecs_business() -> None:
    place = place_of("structured")
    exact, coarse = Codec(), Codec("fp16")
    times = of_devices(place.population, place.flops, lambda n: n, lambda n: 1, coarse, exact)
    assert times.per_weight_s["fc1.weight"] == pytest.approx(2 / 100 + 4 / 50)
