"""Clients hosted by Ray actors: the same bits as in process, whoever computed what and whoever died."""

import os
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import nn

from fedray.errors import ClientError, RunError
from fedray.federation.actor import PackedJob
from fedray.federation.crew import Crew
from fedray.federation.exchange import Job
from fedray.federation.method import Method
from fedray.federation.pool import ActorOptions, Group, LocalPool, RayPool
from fedray.federation.server import Schedule, Server
from fedray.federation.works import Works
from fedray.methods import METHODS
from fedray.models.spec import Architecture
from fedray.types import ClientUpdate, DeviceProfile, Mask, Params, Task
from tests import small

CLIENTS = 20
SCHEDULE = Schedule(rounds=3, cohort=11)


@dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """FedAvg with momentum in the client's memory, so that a lost memory changes the weights; keeps a log.

    A client in `dies` kills its process once, in round 2.
    """

    citation: ClassVar[str] = "made up"

    log: str = ""
    dies: int = -1

    def client_update(self, task, client):
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{task.extras['round']} {client.id} {os.getpid()}\n")
            marker = Path(self.log).with_name("died")
            if client.id == self.dies and task.extras["round"] == 2 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        moved = client.sgd(task.params, task.mask).flat - task.params.flat
        client.memory["velocity"] = velocity = 0.5 * client.memory.get("velocity", 0.0) + moved
        params = Params(task.params.flat + velocity, task.params.layout)
        return ClientUpdate(params, task.mask, sums={"seen": torch.ones(1)}, metrics={"size": len(client.y)})

    def configure(self, state, client):
        return Task(state.params, state.mask, extras={"round": state.round})


def finish(server: Server) -> str:
    small.run(server)
    assert server.checkpoint.memories or not isinstance(server.method, Remembering)
    server.pool.close()
    return server.model.sha256


def on_ray(*groups: Group, per_client: bool = False):
    return lambda place: RayPool(place, groups, per_client=per_client)


@pytest.fixture(scope="module")
def expected(ray_local) -> str:
    return finish(small.server(Remembering(), clients=CLIENTS, schedule=SCHEDULE, pool=LocalPool))


slow = pytest.mark.slow  # a client actor takes seconds to start


@pytest.mark.parametrize("actors", [pytest.param(1, marks=slow), pytest.param(2, marks=slow), 3])
def test_any_number_of_actors_gives_the_bits_of_one_process(actors, expected):
    pool = on_ray(Group(actors, ActorOptions(cpu=0.5)))
    assert finish(small.server(Remembering(), clients=CLIENTS, schedule=SCHEDULE, pool=pool)) == expected


def test_actors_that_merge_for_the_driver_give_the_same_bits(expected, monkeypatch):
    """Three actors merge in teams of two, and the first partial sums are lost with their node."""
    from ray.exceptions import ObjectLostError

    real, methods = Crew.do, list[str]()

    def do(crew, works):
        method = works[0].method
        methods.extend([method] * (method != "evaluate"))
        if methods == ["fold", "merge"]:
            raise ObjectLostError("00" * 28, "", "")
        return real(crew, works)

    monkeypatch.setattr("fedray.federation.pool.FAN_IN", 2)
    monkeypatch.setattr(Crew, "do", do)
    pool = on_ray(Group(3, ActorOptions(cpu=0.3)))
    assert finish(small.server(Remembering(), clients=CLIENTS, schedule=SCHEDULE, pool=pool)) == expected
    assert methods[:4] == ["fold", "merge"] * 2
    assert methods.count("merge") == SCHEDULE.rounds + 1


def test_partial_sums_that_are_always_lost_end_the_run(monkeypatch):
    pool = RayPool.__new__(RayPool)
    pool._ray, pool.max_deaths = pytest.importorskip("ray"), 2

    def lost(works):
        raise pool._ray.exceptions.ObjectLostError("00" * 28, "", "")

    pool.crew = cast(Crew, SimpleNamespace(do=lost))
    monkeypatch.setattr(pool, "_dealt", lambda works: [])
    with pytest.raises(RunError, match="partial sums were lost 3 times in one exchange"):
        pool._fold_in_actors(cast(Works, SimpleNamespace(given_up=[])))


def test_an_actor_for_each_client_gives_the_same_bits(ray_local):
    few = replace(SCHEDULE, cohort=3)
    pool = on_ray(Group(4, ActorOptions(cpu=0.25)), per_client=True)
    alone = small.server(Remembering(), clients=4, schedule=few, pool=LocalPool)
    assert finish(small.server(Remembering(), clients=4, schedule=few, pool=pool)) == finish(alone)


def test_an_actor_killed_in_mid_round_changes_nothing(expected, tmp_path):
    undisturbed = small.run(small.server(Remembering(), clients=CLIENTS, schedule=SCHEDULE))
    cohort_of_2 = [record.client for record in undisturbed[2].clients]
    method = Remembering(log=str(tmp_path / "log"), dies=cohort_of_2[-2])
    server = small.server(
        method, clients=CLIENTS, schedule=SCHEDULE, pool=on_ray(Group(2, ActorOptions(cpu=0.5)))
    )
    pool = server.pool
    assert isinstance(pool, RayPool)
    assert finish(server) == expected
    assert (tmp_path / "died").exists()
    assert pool.deaths == 1
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    killed = next(pid for round, client, pid in lines if (round, int(client)) == ("2", method.dies))
    twice = {int(c) for r, c, pid in lines if r == "2" and pid == killed}
    trained = [int(client) for round, client, _ in lines if round == "2"]
    assert sorted(trained) == sorted([*cohort_of_2, *twice])  # the others' chunks were not trained again
    assert 0 < len(twice) < len(cohort_of_2)


@dataclass(frozen=True, kw_only=True)
class Drawing(Remembering):
    """It draws from the global generators of all three libraries, beside the dropout of its model."""

    def client_update(self, task, client):
        update = super().client_update(task, client)
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return replace(update, params=Params(update.params.flat * (1 + noise / 100), update.params.layout))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_what_draws_from_the_global_generators_has_the_bits_of_one_process(ray_local, tmp_path, dies):
    def build(input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, num_classes))

    dropout = Architecture(build, lambda shape: None, "made up", "fc 8, dropout, fc classes")
    of: dict[str, Any] = {"clients": CLIENTS, "schedule": SCHEDULE, "architecture": dropout}
    alone = small.server(Drawing(), **of)
    expected = finish(alone)
    dying = small.run(small.server(Drawing(), **of))[2].clients[3].client if dies else -1
    method = Drawing(log=str(tmp_path / "log"), dies=dying)
    server = small.server(method, pool=on_ray(Group(2, ActorOptions(cpu=0.5))), **of)
    assert finish(server) == expected
    assert (tmp_path / "died").exists() == dies


@slow
def test_an_actor_that_always_dies_ends_the_run(ray_local, tmp_path):
    class Deadly(Method):
        def client_update(self, task, client):
            os.kill(os.getpid(), signal.SIGKILL)

    def pool(place):
        return RayPool(place, [Group(1, ActorOptions(cpu=0.5))], max_deaths=1)

    server = small.server(Deadly(), clients=3, schedule=SCHEDULE, pool=pool)
    server.setup()
    with pytest.raises(RunError, match="2 client actors were lost in one exchange; the last one died: "):
        server.step()
    server.pool.close()


def test_an_error_arrives_with_client_and_round(ray_local):
    class Broken(Method):
        def client_update(self, task, client):
            raise ZeroDivisionError("on the device")

    server = small.server(Broken(), clients=4, pool=on_ray(Group(1, ActorOptions(cpu=0.5))))
    server.setup()
    with pytest.raises(
        ClientError, match=r"client \d failed in round 1: (.|\n)*ZeroDivisionError: on the device"
    ):
        server.step()
    server.pool.close()


def test_the_broadcast_is_unchanged_after_a_round(ray_local):
    import ray

    place = small.workplace(Method())
    pool = RayPool(place, [Group(2, ActorOptions(cpu=0.5))])
    params = place.model.init(0)
    task = Task(params, Mask.full(params.layout))
    before = params.flat.clone()
    server = small.server(Method(), pool=lambda place: pool)
    packed = PackedJob.pack(Job(1, Method().client_update, (task,)))
    reference = ray.put(packed)
    for _ in range(2):  # the arrays of the store are shared: training must not write into them
        orders = server.wire.send(dict.fromkeys(range(4), task), server.checkpoint.holds)[1]
        chunks = server._chunks(orders)
        ray.get([actor.run.remote(reference, chunks) for actor in pool.actors])
    np.testing.assert_array_equal(ray.get(reference).tasks[0][0], before.numpy())
    assert torch.equal(params.flat, before)
    pool.close()


def test_an_actor_reads_the_weights_of_a_job_where_they_are():
    layout = small.workplace(Method()).model.layout
    task = Task(Params(torch.ones(layout.size), layout), Mask.full(layout))
    packed = PackedJob.pack(Job(1, Method().client_update, (task,)))
    packed.tasks[0][0].flags.writeable = False  # as arrays of the object store are; and no warning
    (arrived,) = packed.unpack(layout).tasks
    assert np.shares_memory(arrived.params.flat.numpy(), packed.tasks[0][0])


@pytest.mark.parametrize("actors", [pytest.param(1, marks=slow), pytest.param(2, marks=slow), 3])
def test_evaluation_has_the_same_bits_on_any_number_of_actors(ray_local, actors):
    data = small.dataset(1_700)
    place = small.workplace(Method(), data=data)
    task = Task(place.model.init(3), Mask.full(place.model.layout))
    local = LocalPool(place).evaluate(task, data.train)
    pool = RayPool(place, [Group(actors, ActorOptions(cpu=0.5))])
    outcome = pool.evaluate(task, data.train)
    assert outcome.loss == local.loss
    np.testing.assert_array_equal(outcome.right, local.right)
    pool.close()


def test_device_classes_are_trained_by_actors_of_their_own(ray_local, tmp_path):
    fast = DeviceProfile("fast", 1e9, 1e6, 1e6, 0.0, 2.0**30)
    slow = replace(fast, name="slow", flops_per_s=1e3)
    federation: dict[str, Any] = {
        "clients": 8,
        "devices": [fast, slow],  # even and odd clients
        "schedule": Schedule(rounds=2, cohort=8, groups=("slow",)),
    }
    method = Remembering(log=str(tmp_path / "log"))
    groups = [Group(1, ActorOptions(cpu=0.5)), Group(1, ActorOptions(cpu=0.5))]
    assert finish(small.server(method, pool=on_ray(*groups), **federation)) == finish(
        small.server(Remembering(), **federation)
    )
    hosts: list[set[str]] = [set(), set()]
    for _, client, pid in (line.split() for line in (tmp_path / "log").read_text().splitlines()):
        hosts[int(client) % 2].add(pid)
    assert [len(pids) for pids in hosts] == [1, 1]
    assert hosts[0] != hosts[1]


def test_actors_that_do_not_fit_are_reported_and_not_waited_for(ray_local):
    started = time.monotonic()

    def pool(place):
        return RayPool(place, [Group(1, ActorOptions(cpu=99.0))], ready_timeout_s=2)

    server = small.server(Remembering(), clients=CLIENTS, schedule=SCHEDULE, pool=pool)
    with pytest.raises(RunError, match=r"not placed within 2 s.*99.*the cluster has.*clients.actors"):
        small.run(server)
    server.pool.close()
    assert time.monotonic() - started < 30


# prunefl asks clients questions and keeps memories, pqsu shapes its uploads; the others are slow tests
@pytest.mark.parametrize(
    "name", [name if name in ("prunefl", "pqsu") else pytest.param(name, marks=slow) for name in METHODS]
)
def test_every_method_has_the_same_bits_on_ray(name, ray_local):
    method = METHODS[name]()
    pool = on_ray(Group(2, ActorOptions(cpu=0.5)))
    both = [
        small.server(method, clients=8, server_rows=20, schedule=Schedule(rounds=5, cohort=5), pool=where)
        for where in (LocalPool, pool)
    ]
    assert finish(both[0]) == finish(both[1])


def test_a_method_pickled_by_value_keeps_its_fields(ray_local):
    import dataclasses
    import pickle

    from ray import cloudpickle

    @dataclass(frozen=True, kw_only=True)
    class Local(Method):
        """A class that no other process could import."""

        needed: int
        given: tuple[int, ...] = (1,)

    again = pickle.loads(cloudpickle.dumps(Local))
    for field in dataclasses.fields(again):
        original = next(f for f in dataclasses.fields(Local) if f.name == field.name)
        assert (field.default is dataclasses.MISSING) == (original.default is dataclasses.MISSING)
        assert field.default_factory is dataclasses.MISSING
