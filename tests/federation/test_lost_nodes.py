"""A node is killed in mid-round, and a node lacks memory: each in a Ray and a process of its own."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest

from fedray.errors import RunError
from fedray.federation.pool import ActorOptions, Group, RayPool
from fedray.federation.server import Server
from tests import small
from tests.federation.test_losses import SCHEDULE, Faulty, finish, served, wait_until

pytestmark = pytest.mark.slow

LIMIT_S = 300.0
"""Seconds that a driver may run."""


MARK = "FEDRAY_TEST_OF_LOSSES"
"""Variable by which the processes of a test are known."""


def elsewhere(call: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Return what a function of this file prints as JSON, run in a process of its own; nothing is left."""
    mark = {MARK: str(os.getpid())}
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    }
    code = f"from tests.federation.test_lost_nodes import *; {call}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**kept, **env, **mark},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    finally:
        left = marked(mark)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
    assert done.returncode == 0, done.stderr
    assert [process.pid for process in left] == []
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(answer)  # noqa: T201
    return answer


def marked(mark: Mapping[str, str]) -> list[psutil.Process]:
    """Return the processes that have the mark, but for those that end by themselves within ten seconds."""
    found: list[psutil.Process] = []
    for _ in range(20):
        found = [process for process in psutil.process_iter() if has(process, mark)]
        if not found:
            break
        time.sleep(0.5)
    return found


def has(process: psutil.Process, mark: Mapping[str, str]) -> bool:
    try:
        return bool(mark.items() <= process.environ().items())
    except psutil.Error:
        return False


def two_actors(place: Any) -> RayPool:
    return RayPool(place, [Group(2, ActorOptions(cpu=1.0))])


def its_pool(server: Server) -> RayPool:
    assert isinstance(server.pool, RayPool)
    return server.pool


# ── a node


def lose_a_node(folder: str) -> None:
    """Lose one of two nodes in mid-round, without room for its actor elsewhere, and get one back later."""
    import ray
    from ray.cluster_utils import Cluster

    schedule, log = replace(SCHEDULE, rounds=5), Path(folder) / "log"
    expected = finish(served(Faulty(), schedule=schedule))
    at = small.run(served(Faulty()))[2].clients[-2].client
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def kill() -> None:
        wait_until(log.exists)
        cluster.remove_node(second, allow_graceful=False)

    killer = Thread(target=kill)
    try:
        method = Faulty(fault=partial(time.sleep, 5), at=at, log=str(log))
        server = served(method, two_actors, schedule)
        pool, seconds = its_pool(server), list[float]()
        server.setup()
        nodes = {ray.get(actor.__ray_call__.remote(_node)) for actor in pool.actors}
        killer.start()
        while server.state.round <= schedule.rounds:
            if server.state.round == 4:
                killer.join()
                cluster.add_node(num_cpus=1)
                wait_until(lambda: both_are_ready(pool))
            began = time.monotonic()
            server.step()
            seconds.append(time.monotonic() - began)
        same = server.model.sha256 == expected
        pool.close()
        print(json.dumps({"same": same, "nodes": len(nodes), "seconds": seconds, "deaths": pool.deaths}))  # noqa: T201
    finally:
        ray.shutdown()
        cluster.shutdown()


def both_are_ready(pool: RayPool) -> bool:
    pool.crew.assemble()
    return len(pool.crew.ready(0)) == 2


def _node(_: Any) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def test_a_run_continues_at_once_on_the_node_that_is_left(tmp_path):
    told = elsewhere(f"lose_a_node({str(tmp_path)!r})", {})
    assert told["nodes"] == 2
    assert told["same"]
    assert told["deaths"] >= 1
    assert max(told["seconds"]) < 60, told


# ── memory


@dataclass(frozen=True, kw_only=True)
class Hungry(Faulty):
    """Each client holds `megabytes` for some seconds, in round 2."""

    megabytes: int = 0

    def client_update(self, task, client):
        if task.extras["round"] == 2 and self.megabytes:
            held = [np.ones(2**17) for _ in range(self.megabytes)]
            time.sleep(4)
            del held
        return super().client_update(task, client)


def monitor(megabytes: int) -> dict[str, str]:
    """Return variables by which Ray kills workers beyond these megabytes more than are used now."""
    memory = psutil.virtual_memory()
    most = memory.total - memory.available + megabytes * 2**20
    return {
        "RAY_memory_usage_threshold": f"{most / memory.total:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }


def lack_memory(megabytes: int) -> None:
    """Train clients that need these megabytes on two actors."""
    import ray

    from fedray.experiment.cluster import start_ray

    few = replace(SCHEDULE, cohort=4)
    expected = finish(served(Hungry(), schedule=few))
    start_ray()
    server = served(
        Hungry(megabytes=megabytes), lambda place: RayPool(place, [Group(2, ActorOptions(cpu=0.5))]), few
    )
    told: dict[str, Any] = {"error": ""}
    try:
        small.run(server)
        told["same"] = server.model.sha256 == expected
    except RunError as error:
        told["error"] = str(error)
    told |= {
        "deaths": its_pool(server).deaths,
        "shortages": [s.shortages for s in its_pool(server).crew.seats],
    }
    server.pool.close()
    ray.shutdown()
    print(json.dumps(told))  # noqa: T201


def test_actors_that_lack_memory_train_again_on_fewer():
    """Two clients at once do not fit, one does."""
    told = elsewhere("lack_memory(2500)", monitor(5300))
    assert (told["error"], told["same"]) == ("", True)
    assert told["deaths"] >= 1
    assert sum(told["shortages"]) >= 1


def test_a_client_that_never_fits_ends_the_run_with_what_to_change():
    told = elsewhere("lack_memory(4000)", monitor(3000))
    for word in ("memory monitor", "method.batch_size", "clients.chunk", "clients.actors=1"):
        assert word in told["error"], told
