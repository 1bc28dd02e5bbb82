"""How many actors host the clients, and what each asks of Ray; nothing here starts Ray."""

from typing import Any

import pytest

from fedray.experiment.placement import groups_for, pool_for
from fedray.federation.pool import ActorOptions, Group, LocalPool
from tests.experiment import tiny


def groups(cpus: float, **clients: Any) -> list[Group]:
    return groups_for(tiny.config({f"clients.{key}": value for key, value in clients.items()}), cpus)


def test_in_process_there_is_no_actor() -> None:
    assert pool_for(tiny.config()) is LocalPool


@pytest.mark.parametrize(
    ("actors", "cpu", "expected"),
    [
        ("auto", None, Group(4, ActorOptions(cpu=1.0))),
        ("auto", 0.5, Group(8, ActorOptions(cpu=0.5))),
        ("auto", 0.1, Group(40, ActorOptions(cpu=0.1))),  # 4 // 0.1 is 39
        ("auto", 0.05, Group(80, ActorOptions(cpu=0.05))),
        ("auto", 0.4, Group(10, ActorOptions(cpu=0.4))),
        ("auto", 3.0, Group(1, ActorOptions(cpu=3.0))),
        ("auto", 9.0, Group(1, ActorOptions(cpu=9.0))),  # Ray says that this is too much
        (2, None, Group(2, ActorOptions(cpu=1.0))),  # an actor has no use for more than one
        (12, None, Group(12, ActorOptions(cpu=0.3333))),  # rounded down: twelve of them fit
        ("per_client", None, Group(6, ActorOptions(cpu=0.6666))),
    ],
)
def test_actors_on_four_cpus(actors: Any, cpu: float | None, expected: Group) -> None:
    assert groups(4, actors=actors, resources={"cpu": cpu}) == [expected]


def test_on_half_a_cpu_there_is_still_an_actor() -> None:
    assert groups(0.5, actors="auto") == [Group(1, ActorOptions(cpu=0.5))]


def test_a_device_with_its_own_resources_has_its_own_actors() -> None:
    found = groups(
        8,
        actors="auto",
        devices={"phone": 3.0, "jetson_nano": 1.0},
        resources={"by_device": {"jetson_nano": {"gpu": 0.25, "custom": {"slot": 1}, "labels": {"a": "b"}}}},
    )
    # a quarter of eight actors hosts the quarter of clients that has this device
    assert found == [
        Group(6, ActorOptions(cpu=1.0)),
        Group(2, ActorOptions(cpu=1.0, gpu=0.25, custom={"slot": 1}, labels={"a": "b"})),
    ]


def test_every_group_has_an_actor() -> None:
    devices = {"phone": 0.98, "jetson_nano": 0.02}
    resources = {"by_device": {"jetson_nano": {"cpu": 2.0}}}
    found = groups(1, actors=1, devices=devices, resources=resources)
    assert found == [Group(1, ActorOptions(cpu=0.5)), Group(1, ActorOptions(cpu=2.0))]
