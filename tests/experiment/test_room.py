"""Room for client actors: what nodes have, what a selector takes, what an autoscaler says; no Ray starts."""

import json
from typing import Any

import pytest

from fedray.errors import ConfigError, RunError
from fedray.experiment import room
from fedray.experiment.room import Autoscaler, Node, autoscaler, check_room, lacking
from fedray.federation.pool import ActorOptions, Group

FAST, SLOW = {"tier": "fast", "ray.io/node-id": "ab"}, {"tier": "slow", "site": "a"}
NODES = [Node({"CPU": 2.0}, FAST), Node({"CPU": 3.0, "edge": 1.0}, SLOW), Node({"GPU": 1.0})]


@pytest.mark.parametrize(
    ("selector", "takes"),
    [
        ({}, [True, True, True]),
        ({"tier": "fast"}, [True, False, False]),
        ({"tier": "!fast"}, [False, True, True]),  # as Ray has it: a node without the label is taken
        ({"tier": "in(fast,slow)"}, [True, True, False]),
        ({"tier": "in(fast, slow)"}, [True, True, False]),
        ({"tier": "!in(fast,slow)"}, [False, False, True]),
        ({"tier": "slow", "site": "a"}, [False, True, False]),
        ({"tier": "slow", "site": "!a"}, [False, False, False]),
        ({"zone": "x"}, [False, False, False]),
    ],
)
def test_a_label_selector(selector: dict[str, str], takes: list[bool]) -> None:
    assert [node.has(selector) for node in NODES] == takes


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([Group(5, ActorOptions(1.0))], None),
        ([Group(10, ActorOptions(0.5))], None),
        ([Group(30, ActorOptions(0.1, labels={"tier": "slow"}))], None),
        (
            [Group(6, ActorOptions(1.0))],
            "6 × CPU for its client actors, but the cluster has 5 × CPU, 1 × GPU",
        ),
        (
            [Group(2, ActorOptions(0.0, gpu=1.0)), Group(2, ActorOptions(1.0))],
            "2 × GPU for its client actors, but the cluster has 5 × CPU, 1 × GPU, 1 × edge",
        ),
        (
            [Group(1, ActorOptions(4.0))],
            "client actors with 4 × CPU, 0 × GPU each, but no node of the cluster has that much: 2 × CPU",
        ),
        (  # five CPUs, but of two only in pairs
            [Group(2, ActorOptions(2.0))],
            None,
        ),
        (
            [Group(1, ActorOptions(1.0, gpu=1.0))],
            "client actors with 1 × CPU, 1 × GPU each, but no node of the cluster has that much",
        ),
        (
            [Group(2, ActorOptions(1.5, labels={"tier": "fast"}))],
            "2 client actors with 1.5 × CPU, 0 × GPU each on nodes with the labels tier=fast, but the nodes "
            "have room for 1 of them: 2 × CPU, 0 × GPU",
        ),
        (
            [Group(1, ActorOptions(1.0, labels={"tier": "gpu"}))],
            "client actors on nodes with the labels tier=gpu, but the nodes of the cluster have tier=fast; "
            "site=a, tier=slow; no labels",
        ),
        (
            [Group(1, ActorOptions(0.5)), Group(1, ActorOptions(2.5, labels={"tier": "!slow"}))],
            "client actors with 2.5 × CPU, 0 × GPU each on nodes with the labels tier=!slow, but no node",
        ),
    ],
)
def test_what_actors_need_and_nodes_lack(groups: list[Group], says: str | None) -> None:
    found = lacking(groups, NODES)
    assert found is None if says is None else found is not None and found.startswith(says), found


def test_labels_that_no_node_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "cluster_nodes", lambda: NODES)
    monkeypatch.setattr(room, "autoscaler", lambda: None)
    with pytest.raises(
        ConfigError, match=r"^clients\.resources: trial 3 needs client actors on nodes with.*lower"
    ):
        check_room([Group(1, ActorOptions(labels={"tier": "gpu"}))], "trial 3")


# ── what an autoscaler says ──────────────────────────────────────────────────────────────────────────────


def report(**changes: Any) -> bytes:
    empty = {"active_nodes": {"head": 1}, "pending_nodes": [], "pending_launches": {}, "failed_nodes": []}
    return json.dumps({"autoscaler_report": empty | changes}).encode()


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (None, None),
        (b"{}", None),
        (report(active_nodes={"node_0a1b": 1, "node_2c": 1}), None),  # it only watches
        (report(), Autoscaler(0)),
        (
            report(pending_launches={"cpu": 2}, pending_nodes=[["10.0.0.2", "cpu", "setting-up"]]),
            Autoscaler(3),
        ),
    ],
)
def test_an_autoscaler_of_version_1(
    monkeypatch: pytest.MonkeyPatch, kept: bytes | None, expected: Autoscaler | None
) -> None:
    monkeypatch.setattr(room, "_second_version", lambda: None)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_initialized", lambda: True)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: kept)
    assert autoscaler() == expected


class Group2s:
    """A placement group that is placed after some waits of 2 s."""

    class id:
        hex = staticmethod(lambda: "00ff")

    def __init__(self, waits: int) -> None:
        self.left = waits

    def wait(self, seconds: float) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A cluster with an autoscaler; what it says, the clock, and what was asked for and given back."""
    import ray

    seen: dict[str, Any] = {"says": Autoscaler(), "group": Group2s(3), "clock": 0.0, "removed": []}

    def ticking() -> float:
        seen["clock"] += 50.0
        return float(seen["clock"])

    def placement_group(bundles: list[dict[str, float]], **options: Any) -> Group2s:
        seen["bundles"], seen["selectors"] = bundles, options["bundle_label_selector"]
        group: Group2s = seen["group"]
        return group

    monkeypatch.setattr(room, "cluster_nodes", lambda: NODES)
    monkeypatch.setattr(room, "autoscaler", lambda: seen["says"])
    monkeypatch.setattr("fedray.experiment.room.time.monotonic", ticking)
    monkeypatch.setattr(ray.util, "placement_group", placement_group)
    monkeypatch.setattr(ray.util, "remove_placement_group", seen["removed"].append)
    return seen


GPUS = [Group(2, ActorOptions(1.0, gpu=1.0, labels={"tier": "gpu"}))]


def test_what_an_autoscaler_may_start_is_waited_for(growing: Any, caplog: pytest.LogCaptureFixture) -> None:
    growing["says"] = Autoscaler(starting=2)
    check_room(GPUS, "the run")
    assert (
        growing["bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * 2 and growing["selectors"] == [{"tier": "gpu"}] * 2
    )
    assert growing["removed"] == [growing["group"]], "the actors take the room"
    first, *later = [record.getMessage() for record in caplog.records]
    assert first.startswith("the run needs 2 × GPU") and first.endswith(
        "waiting for the cluster's autoscaler"
    )
    assert later and all("for room; 2 nodes are starting" in line for line in later)


def test_an_autoscaler_that_starts_nothing_is_not_waited_for(growing: Any) -> None:
    growing["group"] = Group2s(1000)
    with pytest.raises(
        ConfigError, match=r"needs 2 × GPU.*cluster has 5 × CPU.*started no node for it within 120 s"
    ):
        check_room(GPUS, "the run")
    assert growing["removed"] == [growing["group"]]


def test_what_its_autoscaler_cannot_start_is_refused(growing: Any) -> None:
    growing["group"], growing["says"] = Group2s(1000), Autoscaler(infeasible=("00ff:PACK|PENDING",))
    with pytest.raises(ConfigError, match="its autoscaler can start no node for it"):
        check_room(GPUS, "the run")
    assert growing["removed"] == [growing["group"]]


def test_a_cluster_without_cpus_waits_for_one_if_it_may_grow(
    growing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    growing["says"] = Autoscaler(starting=1)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} if growing["removed"] else {})
    assert room.cluster_cpus() == 4 and growing["bundles"] == [{"CPU": 1.0}]
    growing["removed"].clear()
    monkeypatch.setattr(room, "autoscaler", lambda: None)
    with pytest.raises(RunError, match="has no CPUs"):
        room.cluster_cpus()


def test_trials_at_once_follow_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = [2.0]
    monkeypatch.setattr(room, "ASK_EVERY_S", -1.0)
    monkeypatch.setattr(room, "cluster_cpus", lambda **_: cpus[0])
    monkeypatch.setattr(room, "autoscaler", lambda: None)
    seen = []
    for cpus[0] in (2.0, 5.0, 0.0, 100.0):
        seen.append(room.trials_at_once(1.0, 10))
    assert seen == [2, 5, 1, 10]
    assert room.trials_at_once(0.1, 2000) == 1000  # 100 / 0.1 is less
    monkeypatch.setattr(room, "autoscaler", Autoscaler)
    assert room.trials_at_once(1.0, 10) == 10
