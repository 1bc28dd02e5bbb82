"""How many actors host the clients, and what each asks of Ray; nothing here starts Ray."""

from typing import Any

import pytest

from fedray.errors import ConfigError
from fedray.experiment import placement
from fedray.experiment.placement import (
    actors_for,
    expected_s,
    groups_for,
    in_trial,
    placed,
    pool_for,
    stack_of,
)
from fedray.experiment.room import Node, check_room
from fedray.experiment.run import Federation
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ActorOptions(cpu=1.0), None),
        (ActorOptions(cpu=2.0), None),
        (
            ActorOptions(cpu=0.5, gpu=1.0),
            "a run needs 2 × GPU for its client actors, but the cluster has 4 × CPU, 0 × GPU, 1 × edge;",
        ),
        (ActorOptions(cpu=0.5, custom={"edge": 1.0}), "a run needs 2 × edge for its client actors, but the"),
        (
            ActorOptions(cpu=0.5, custom={"egde": 0.1}),
            "a run needs 0.2 × egde for its client actors, but the",
        ),
        (
            ActorOptions(cpu=1.0, custom={"edge": 0.5}),
            None,
        ),
        (
            ActorOptions(cpu=3.0),
            "a run needs 6 × CPU for its client actors",
        ),
    ],
)
def test_what_no_cluster_node_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: ActorOptions, message: str | None
) -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources | {"memory": 1e9, "node:10.0.0.1": 1.0}}

    nodes = [node(CPU=2.0), node(CPU=2.0, edge=1.0), node(alive=False, GPU=8.0, CPU=64.0)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    if message is None:
        check_room([Group(2, options)], "a run")
        return
    with pytest.raises(ConfigError) as caught:
        check_room([Group(2, options)], "a run")
    assert str(caught.value).startswith(f"clients.resources: {message}")


def test_an_actor_larger_than_any_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster as a whole has that much."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    with pytest.raises(
        ConfigError, match="client actors with 3 × CPU, 0 × GPU each, but no node of the cluster"
    ):
        check_room([Group(1, ActorOptions(cpu=3.0))], "a run")


@pytest.mark.parametrize(
    ("clients", "cpus", "expected"),
    [
        ({}, 1.0, True),
        ({}, 0.5, True),
        ({}, 1.99, True),
        ({}, 2.0, False),
        ({"actors": 1}, 1.0, False),
        ({"actors": "per_client"}, 1.0, False),
        ({"resources.cpu": 0.5}, 1.0, False),
        ({"resources.gpu": 0.1}, 1.0, False),
        ({"resources.custom": {"edge": 1.0}}, 1.0, False),
    ],
)
def test_a_trial_with_one_cpu_trains_in_its_own_process(
    clients: dict[str, Any], cpus: float, expected: bool
) -> None:
    config = tiny.config(
        {"clients.actors": "auto"} | {f"clients.{key}": value for key, value in clients.items()}
    )
    assert in_trial(config, cpus) is expected
    assert (pool_for(config, cpus) is LocalPool) is expected
    if expected:
        assert actors_for(config, cpus) == [ActorOptions(cpu=min(1.0, cpus))]


@pytest.mark.parametrize(
    ("changes", "address", "starts"),
    [
        ({}, "", False),
        ({"rounds": 10**6}, "", True),
        ({"rounds": 10**6, "clients.actors": 0}, "", False),
        ({"clients.actors": 1}, "", True),
        ({"clients.resources.cpu": 1.0}, "", True),  # asked for
        ({}, "127.0.0.1:1", True),  # a cluster is there, and asked for
    ],
)
def test_a_run_too_short_for_the_start_of_ray_trains_in_its_own_process(
    changes: dict[str, Any], address: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config({"clients.actors": "auto"} | changes)
    place = Federation.of(config).place
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(placement, "cluster_cpus", lambda **_: 2.0)
    monkeypatch.setattr(placement, "check_room", lambda *_: None)
    calls: list[str] = []

    def start_ray(meanwhile: Any) -> None:
        calls.append("start")
        meanwhile()

    monkeypatch.setattr(placement, "start_ray", start_ray)
    pool = placed(config, place, lambda: calls.append("meanwhile"))
    assert calls == (["start", "meanwhile"] if starts else [])
    assert (pool is LocalPool) is not starts


@pytest.mark.parametrize(("clients", "idle"), [({}, 24), ({"chunk": 25}, 0), ({"chunk": 50}, 20)])
def test_actors_without_a_chunk_are_named(
    clients: dict[str, int], idle: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {f"clients.{key}": value for key, value in clients.items()}
    config = tiny.config(
        {"clients.actors": 40, "clients.population": 1_000, "clients.cohort": 1_000, **asked}
    )
    monkeypatch.setattr(placement, "start_ray", lambda _: None)
    monkeypatch.setattr(placement, "cluster_cpus", lambda **_: 64.0)
    monkeypatch.setattr("fedray.experiment.room.cluster_nodes", lambda: [Node({"CPU": 64.0})])
    placed(config, Federation.of(tiny.config({})).place, lambda: None)
    assert bool(idle) is (f"{idle} of 40 client actors have nothing to do" in caplog.text)
    assert bool(idle) is ("Set clients.chunk=25 or less" in caplog.text)


def test_the_estimate_is_logged_and_grows_with_the_work(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.config({"clients.actors": "auto", "clients.cohort": 3, "rounds": 3})
    place = Federation.of(config).place
    once = expected_s(config, place)
    assert expected_s(config.override({"rounds": 30}), place) == pytest.approx(10 * once)
    assert expected_s(config.override({"clients.cohort": 6}), place) == pytest.approx(2 * once)
    # three rounds of three clients; each makes steps of two milliseconds, and costs another one
    n = int(place.population.partition.sizes.mean())
    steps = place.method.local_steps(n)
    assert 9 * (2e-3 * steps + 1e-3) < once < 9 * (2e-3 * steps + 2e-3)
    with caplog.at_level("INFO", logger="fedray"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr("ray.is_initialized", lambda: False)
        placed(config, place, lambda: None)
    assert "clients.actors=auto takes this process" in caplog.text


@pytest.mark.parametrize(
    ("clients", "weights", "expected"),
    [
        ({}, 1_000, 1),
        ({"stack": 5}, 1_000, 5),
        ({"stack": 5}, 10**9, 5),
        ({"actors": 2, "resources": {"gpu": 0.5}}, 1_000, 32),
        ({"actors": 2, "resources": {"gpu": 0.5}}, 4_000_000, 16),
        ({"actors": 2, "resources": {"gpu": 0.5}}, 11_000_000, 1),
        ({"actors": 2, "resources": {"gpu": 0.5}, "stack": 1}, 1_000, 1),
        ({"actors": "per_client", "resources": {"gpu": 0.1}}, 1_000, 1),
        (
            {"actors": 2, "resources": {"by_device": {"phone": {"gpu": 0.5}}}, "devices": {"phone": 1.0}},
            1_000,
            1,
        ),
    ],
)
def test_small_models_are_stacked_on_gpus(clients: dict[str, Any], weights: int, expected: int) -> None:
    config = tiny.config({f"clients.{key}": value for key, value in clients.items()})
    assert stack_of(config, weights) == expected


def test_a_stack_is_not_trained_in_bf16() -> None:
    gpu = {"clients.actors": 2, "clients.resources.gpu": 0.5}
    assert stack_of(tiny.config(gpu | {"train.precision": "bf16"}), 1_000) == 1
    with pytest.raises(ConfigError, match=r"clients\.stack.*4, but with train\.precision=bf16"):
        tiny.config(gpu | {"train.precision": "bf16", "clients.stack": 4})


def test_a_run_knows_its_stack() -> None:
    config = tiny.config({"clients.stack": 3})
    assert Federation.of(config).place.stack == 3
