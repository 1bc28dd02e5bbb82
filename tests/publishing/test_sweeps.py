"""Sweeps in S3: trials on nodes that do not see the driver's disk; a sweep resumed from another node."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.places import Place
from fedray.errors import ConfigError
from fedray.publishing.fetching import fetch
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.publisher import Publisher
from fedray.sweeps.nodes import DRIVER, Disk
from fedray.sweeps.sweep import load_sweep, sweep
from tests.publishing.nodes import RATES, Apart, fedray, home, plan, weights_of
from tests.publishing.s3 import S3


@pytest.mark.slow
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_sweep_whose_driver_was_killed_is_resumed_on_another_node(
    s3: S3, tmp_path: Path, weights, finished: int
):
    storage = s3.new()
    here, there = home(tmp_path, "a"), home(tmp_path, "b")
    (tmp_path / "x.yaml").write_text(yaml_text.dump(plan(storage)))
    with fedray("sweep", tmp_path / "x.yaml", **here) as driver:
        trials = tmp_path / "a" / "runs" / "x-001" / "trials"
        deadline = time.monotonic() + 400
        wanted = "*/result.json" if finished else "*/published.json"
        while len(list(trials.glob(wanted))) < max(1, finished) and driver.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    shutil.move(tmp_path / "a", tmp_path / "lost")  # with the node
    address = Place.parse(storage).below("x-001")
    with fedray("resume", address, **there) as again:
        said, _ = again.communicate()
    assert again.returncode == 0, said
    assert f"Published: {address}" in said
    assert weights_of(tmp_path / "b" / "runs" / "x-001") == weights
    (tmp_path / "copy").mkdir()
    fetch(s3.objects(str(address)), tmp_path / "copy")
    assert {"sweep.yaml", "best.yaml", "best.json"} <= {file.name for file in (tmp_path / "copy").iterdir()}
    names = s3.objects(str(address.below("trials"))).folders()
    assert len(names) == 3
    for name in names:
        assert "result.json" in read_manifest(s3.objects(str(address.below("trials", name)))).files


@pytest.mark.slow
@pytest.mark.parametrize(
    "tune",
    [
        {},
        {"scheduler": "asha", "grace_rounds": 1},
        {"search": "optuna", "num_samples": 3},
        {"scheduler": "hyperband"},
    ],
    ids=["all points", "asha", "optuna", "hyperband"],
)
def test_trials_run_on_nodes_that_do_not_see_the_drivers_disk(
    s3: S3, tmp_path: Path, apart: Apart, weights, tune: dict[str, Any]
):
    here = apart.driver
    storage = s3.new()
    tree = plan(storage, **{"concurrent": 2, **tune})
    if "search" in tune:
        tree["space"] = {"method.lr": {"uniform": [0.05, 0.2]}}
    (tmp_path / "x.yaml").write_text(yaml_text.dump(tree))
    with fedray(
        "sweep", tmp_path / "x.yaml", cwd=here["cwd"], env=here["env"] | {"RAY_ADDRESS": apart.address}
    ) as driver:
        said, _ = driver.communicate()
    assert driver.returncode == 0, said
    elsewhere = list((tmp_path / "cache-other").glob("fedray/nodes/*/x-001/trials/*/rounds.jsonl"))
    assert elsewhere, "no trial ran on the other node"
    path = tmp_path / "a" / "runs" / "x-001"
    results = list(path.glob("trials/*/result.json"))
    assert len(results) == 3
    if not tune:
        assert weights_of(path) == weights
    place = Place.parse(storage).below("x-001", "trials")
    for result in results:
        files = read_manifest(s3.objects(str(place.below(result.parent.name)))).files
        assert "result.json" in files
    assert (path / "best.yaml").is_file()


@pytest.mark.slow
def test_a_time_budget_ends_trials_on_other_nodes(s3: S3, tmp_path: Path, apart: Apart):
    here = apart.driver
    tree = plan(s3.new(), concurrent=2, time_budget_s=5.0)
    tree["base"]["rounds"] = 100_000
    tree["base"]["checkpoint_every"] = 100
    (tmp_path / "x.yaml").write_text(yaml_text.dump(tree))
    with fedray(
        "sweep", tmp_path / "x.yaml", cwd=here["cwd"], env=here["env"] | {"RAY_ADDRESS": apart.address}
    ) as driver:
        said, _ = driver.communicate(timeout=120)
    assert "time budget of 5 s is spent" in said
    begun = list((tmp_path / "a" / "runs" / "x-001" / "trials").glob("*/rounds.jsonl"))
    assert len(begun) == 2


# ── without Ray
# ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_knows_whether_it_sees_the_drivers_directory(s3: S3, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "sweep-001"
    path.mkdir()
    disk = Disk.of_driver(path, Place.parse(s3.new("sweep-001")))
    assert disk.here == path
    (path / DRIVER).write_text("of another sweep, at the same path of another node")
    assert disk.here.is_relative_to(tmp_path / "cache") and disk.here.name == "sweep-001"
    assert Disk(path).here == path  # a shared folder


def test_a_node_fetches_the_sweep_and_the_driver_what_a_trial_published(s3: S3, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "sweep-001"
    (path / "trials").mkdir(parents=True)
    (path / "sweep.yaml").write_text("points")
    place = Place.parse(s3.new("sweep-001"))
    disk = Disk.of_driver(path, place)
    with Publisher(path, place):
        pass
    mine = (path / DRIVER).read_text()
    (path / DRIVER).unlink()  # as another node sees it
    disk.bring("a")
    assert (disk.here / "sweep.yaml").read_text() == "points"
    (disk.here / "trials" / "a" / "rounds.jsonl").write_text("1\n")
    trial = disk.place_of("a")
    assert trial is not None
    with Publisher(disk.here / "trials" / "a", trial):
        pass
    (path / DRIVER).write_text(mine)
    disk.mirror(["a", "b"])
    assert (path / "trials" / "a" / "rounds.jsonl").read_text() == "1\n"
    assert not (path / "trials" / "b").exists()
    (path / "trials" / "a" / "stopped.json").write_text("{}")  # the driver's note outlives the next look
    with Publisher(tmp_path / "cache" / disk_folder(tmp_path) / "trials" / "a", trial) as publishing:
        (publishing.folder / "rounds.jsonl").write_text("1\n2\n")
    disk.mirror(["a"])
    assert (path / "trials" / "a" / "rounds.jsonl").read_text() == "1\n2\n"
    assert (path / "trials" / "a" / "stopped.json").exists()


def disk_folder(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache").glob("fedray/nodes/*/sweep-001")
    return found.relative_to(tmp_path / "cache")


def test_pbt_needs_a_folder_that_all_nodes_see(s3: S3, tmp_path: Path):
    tree = plan(
        s3.new(), scheduler={"name": "pbt", "perturb_every": 2, "mutations": {"method.lr": {"choice": RATES}}}
    )
    with pytest.raises(ConfigError, match=r"pbt copies checkpoints .* set storage to a shared folder"):
        sweep(tree, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_points_do_not_differ_in_storage(tmp_path: Path):
    tree = plan("/anywhere")
    tree["space"] = {"storage": {"grid": ["/a", "/b"]}}
    with pytest.raises(
        ConfigError, match="a sweep and its trials are kept in one place: set storage in base"
    ):
        sweep(tree, out=tmp_path / "sweep")


def test_resume_can_publish_a_sweep_elsewhere(tmp_path: Path):
    from fedray.config import sealed
    from fedray.sweeps.space import Sweep
    from fedray.sweeps.sweep import _written

    tree = plan("s3://bucket/old")
    sealed.write(tmp_path / "sweep.yaml", _written(Sweep.read(tree, "mapping", "x", {})))
    assert load_sweep(tmp_path).configs[0].storage == "s3://bucket/old"
    assert load_sweep(tmp_path, overrides=["storage=null"]).configs[0].storage is None
    changed = load_sweep(tmp_path, overrides=["storage=s3://bucket/new", "tune.concurrent=2"])
    assert {config.storage for config in changed.configs} == {"s3://bucket/new"}


def test_a_trial_moves_from_node_to_node(s3: S3, tmp_path: Path, monkeypatch, weights):
    """In this process: a node is a cache, and what a trial reports goes to a list instead of to Tune."""
    from ray import tune

    from fedray.sweeps.space import Sweep
    from fedray.sweeps.suggesting import Trees
    from fedray.sweeps.trial import Job, trial
    from fedray.tracking.store import prepare_store
    from fedray.tracking.tracked import Tracking

    path, place = tmp_path / "sweep-001", Place.parse(s3.new("sweep-001"))
    (path / "trials").mkdir(parents=True)
    tree = plan(str(place).replace("/sweep-001", ""), scheduler="asha", grace_rounds=1)
    tree["base"] |= {"checkpoint_every": 1}
    points = Sweep.read(tree, "mapping", "x", {})
    disk = Disk.of_driver(path, place)
    with Publisher(path, place):
        pass
    trees = Trees(path, points.tree["base"], {one.name: one.config.to_tree() for one in points.points})
    job = Job(
        trees=trees,
        sources=(),
        entries={},
        names=trees.each(lambda name, _: name),
        disk=disk,
        cpus=1,
        tracking=Tracking(store=prepare_store("none", "x")),
        tune=points.tune,
        needed_by=1,
    )
    (path / DRIVER).unlink()
    reported: list[int] = []

    def report(metrics: dict[str, Any]) -> None:
        reported.append(metrics["round"])
        if len(reported) in (2, 6):
            raise KeyboardInterrupt  # the node is lost

    monkeypatch.setattr(tune, "report", report)
    name = points.points[0].name
    for other in ("a", "b", "c"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / other))
        try:
            trial(job, name)
        except KeyboardInterrupt:
            assert other != "c"
    assert reported == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4]  # the judge passes over what it has judged
    assert not any((path / "trials").iterdir())
    disk.mirror([name])
    (done,) = weights_of(path)
    assert done in weights
