"""Client actors that hang, die early, lose their node or lack memory: the same weights, or a clear end."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fedray.errors import ClientError, RunError
from fedray.federation.crew import Crew
from fedray.federation.method import Method
from fedray.federation.patience import Clock, Patience, Size
from fedray.federation.pool import ActorOptions, Group, LocalPool, RayPool
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.types import ClientUpdate, Params, Task
from tests import small

CLIENTS = 20
SCHEDULE = Schedule(rounds=3, cohort=11)
HALF = ActorOptions(cpu=0.5)
SOON = Patience(factor=10.0, floor_s=2.0, first_s=20.0)


@dataclass(frozen=True, kw_only=True)
class Faulty(Method):
    """FedAvg with momentum in the client's memory; the client `at` commits a fault, from round 2 on.

    Args:
        fault: what it does. at: the client. log: counts the faults, a line each; at most `times` of them.
    """

    citation: ClassVar[str] = "made up"

    fault: Callable[[], None] | None = None
    at: int = -1
    log: str = ""
    times: int = 1

    def client_update(self, task, client):
        if client.id == self.at and task.extras["round"] >= 2 and self.fault is not None:
            faults = len(Path(self.log).read_text().splitlines()) if Path(self.log).exists() else 0
            if faults < self.times:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(f"{os.getpid()}\n")
                self.fault()
        moved = client.sgd(task.params, task.mask).flat - task.params.flat
        client.memory["velocity"] = velocity = 0.5 * client.memory.get("velocity", 0.0) + moved
        params = Params(task.params.flat + velocity, task.params.layout)
        return ClientUpdate(params, task.mask, sums={"seen": torch.ones(1)}, metrics={"size": len(client.y)})

    def configure(self, state, client):
        return Task(state.params, state.mask, extras={"round": state.round})


def stop() -> None:
    """Be stopped, as by a SIGSTOP from outside."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def served(
    method: Method,
    pool: Callable[[Any], Any] = LocalPool,
    schedule: Schedule = SCHEDULE,
    max_failed: float = 0.1,
) -> Server:
    rules = Rules(max_failed=max_failed)
    return small.server(method, clients=CLIENTS, schedule=schedule, pool=pool, rules=rules)


def finish(server: Server) -> str:
    try:
        small.run(server)
        return server.model.sha256
    finally:
        server.pool.close()


def crewed(actors: int, **options: Any) -> Callable[[Any], RayPool]:
    return lambda place: RayPool(place, [Group(actors, HALF)], **options)


def deaths_in(server: Server) -> int:
    assert isinstance(server.pool, RayPool)
    return server.pool.deaths


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return False


def wait_until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def expected(ray_local) -> str:
    return finish(served(Faulty()))


@pytest.fixture(scope="module")
def faulty() -> int:
    """The client that commits the fault: one of round 2."""
    return small.run(served(Faulty()))[2].clients[-2].client


# ── hangs


@pytest.mark.slow
@pytest.mark.parametrize("fault", [stop, sleep_for_ever])
@pytest.mark.parametrize("actors", [1, 2])
def test_an_actor_that_hangs_is_replaced_and_the_weights_are_the_same(
    expected, faulty, tmp_path, fault, actors
):
    method = Faulty(fault=fault, at=faulty, log=str(tmp_path / "log"))
    server = served(method, crewed(actors, patience=replace(SOON)))
    before = time.monotonic()
    assert finish(server) == expected
    assert deaths_in(server) == 1
    assert time.monotonic() - before < 90
    (pid,) = map(int, (tmp_path / "log").read_text().split())
    wait_until(lambda: not is_running(pid), 20)


@pytest.mark.slow
def test_an_actor_that_an_evaluation_stops_is_replaced(expected):
    """The fault comes from outside, between two rounds: the next call finds the actor stopped."""
    import ray

    server = served(Faulty(), crewed(2, patience=replace(SOON)))
    server.setup()
    server.step()
    pool = server.pool
    assert isinstance(pool, RayPool)
    pid = ray.get(pool.actors[0].ready.remote())
    os.kill(pid, signal.SIGSTOP)
    while server.state.round <= SCHEDULE.rounds:
        server.step()
    assert (server.model.sha256, pool.deaths) == (expected, 1)
    pool.close()
    wait_until(lambda: not is_running(pid), 20)


def test_limits_follow_the_slowest_call():
    patience = Patience(factor=4, floor_s=30, first_s=600)
    few, many = Size("train", 1, 100), Size("train", 10, 500)
    assert patience.limit_s(few) == 600
    patience.learn(few, 2.0)
    assert patience.limit_s(few) == 30  # the floor
    assert patience.limit_s(many) == 4 * 20  # by client, which is more than by example
    patience.learn(many, 200.0)
    assert patience.limit_s(few) == 4 * 40  # by example
    patience.learn(many, 10.0)
    assert patience.limit_s(many) == 4 * 200  # the slowest stays
    assert patience.limit_s(many, losses=2) == 4 * 4 * 200
    assert patience.limit_s(Size("evaluate", 1, 100)) == 600  # of another kind
    assert Patience(factor=None).limit_s(few) == float("inf")


def test_a_clock_does_not_count_the_time_in_which_its_process_is_stopped(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 5000.0, 5001.0])
    monkeypatch.setattr("fedray.federation.patience.time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = Clock()
    assert [clock.now() for _ in range(4)] == [1.0, 2.0, 7.0, 8.0]


# ── early deaths


@dataclass(frozen=True)
class Early:
    """Called in each actor before it is ready: the first `deaths` of them die."""

    log: str
    deaths: int

    def __call__(self) -> None:
        path = Path(self.log)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        if len(path.read_text().splitlines()) <= self.deaths:
            die()


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 3])
def test_actors_that_die_before_they_are_ready_are_created_again(expected, tmp_path, deaths):
    pool = crewed(1, prepare=Early(str(tmp_path / "log"), deaths))
    server = served(Faulty(), pool)
    assert finish(server) == expected
    assert deaths_in(server) == deaths


@pytest.mark.slow
def test_a_replacement_that_dies_before_it_is_ready_is_replaced(expected, faulty, tmp_path):
    marker = tmp_path / "again"

    def prepare() -> None:
        """Die in the first actor that starts after the fault."""
        if (tmp_path / "log").exists() and not marker.exists():
            marker.touch()
            die()

    method = Faulty(fault=die, at=faulty, log=str(tmp_path / "log"))
    server = served(method, crewed(1, prepare=prepare))
    assert finish(server) == expected
    assert deaths_in(server) == 2


@pytest.mark.slow
def test_actors_that_always_die_early_end_the_run(ray_local, tmp_path):
    server = served(Faulty(), crewed(1, prepare=die, max_deaths=2))
    with pytest.raises(RunError, match="3 client actors were lost in one exchange"):
        finish(server)


def test_an_actor_that_cannot_be_set_up_ends_the_run_at_once(ray_local):
    def prepare() -> None:
        raise OSError("no such module there")

    server = served(Faulty(), crewed(1, prepare=prepare))
    with pytest.raises(RunError, match=r"could not be set up(.|\n)*no such module there"):
        finish(server)
    assert deaths_in(server) == 0


# ── clients that are at fault


@pytest.mark.slow
def test_the_client_whose_actor_always_dies_is_known(ray_local, faulty, tmp_path):
    method = Faulty(fault=die, at=faulty, log=str(tmp_path / "log"), times=99)
    with pytest.raises(ClientError, match=f"client {faulty} failed in round 2: its actor died 3 times"):
        finish(served(method, crewed(2), max_failed=0.0))
    assert len((tmp_path / "log").read_text().split()) == 5  # with its actor's chunks, its chunk, and alone


def fail() -> None:
    raise ValueError("as a client that is left out in process")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "actors"), [(die, 1), (die, 3), (sleep_for_ever, 2)])
def test_a_client_whose_actor_is_always_lost_is_left_out_and_named(ray_local, tmp_path, fault, actors):
    """It has the effect of a client that raises; later it gets one try in a round."""
    everyone, log = Schedule(rounds=3, cohort=CLIENTS), tmp_path / "log"
    raising = Faulty(fault=fail, at=7, log=str(tmp_path / "in process"), times=99)
    expected = finish(served(raising, schedule=everyone))
    method = Faulty(fault=fault, at=7, log=str(log), times=99)
    server = served(method, crewed(actors, patience=replace(SOON)), everyone)
    try:
        reports = small.run(server)
        assert server.model.sha256 == expected
    finally:
        server.pool.close()
    how = "died" if fault is die else "hung"
    found = [[(f.client, f.fate, f.cause) for f in report.faults] for report in reports]
    assert found == [
        [],
        [],
        [(7, "failed", f"its actor {how} 3 times while it trained alone")],
        [(7, "failed", f"its actor {how} once more while it trained alone")],
    ]
    assert [r.fate for r in reports[3].clients if r.client == 7] == ["failed"]
    assert len(log.read_text().split()) == 5 + 1
    assert deaths_in(server) == 5 + 1


# ── nodes


@pytest.mark.slow
def test_actors_that_are_left_do_the_work_of_one_for_which_there_is_no_room(expected, faulty, tmp_path):
    """A replacement that is never placed holds up nothing."""
    created = Crew.fill

    method = Faulty(fault=die, at=faulty, log=str(tmp_path / "log"))
    server = served(method, crewed(2))
    pool = server.pool
    assert isinstance(pool, RayPool)
    nowhere = Group(2, ActorOptions(cpu=99.0))

    def fill(crew: Crew) -> None:
        if (tmp_path / "log").exists():
            pool.groups = (nowhere,)
        created(crew)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "fill", fill)
        before = time.monotonic()
        assert finish(server) == expected
    assert pool.deaths == 1
    assert time.monotonic() - before < 60
