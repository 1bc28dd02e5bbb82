"""The commands take the addresses of published runs."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.config.places import Place
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.publishing.fetching import fetch
from fedray.report.reading import load_run
from tests.experiment import tiny
from tests.publishing.s3 import S3


@pytest.fixture
def on_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "another").mkdir()
    monkeypatch.chdir(tmp_path / "another")
    return tmp_path / "another"


@pytest.fixture(scope="module")
def storage(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two published runs."""
    storage = s3.new()
    for number in (0, 1):
        config = tiny.config({"storage": storage, "method.lr": 0.1 + number / 10})
        run(config, out=tmp_path_factory.mktemp("home") / f"run-{number}")
    return Place.parse(storage)


def fedray(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_runs_lists_what_is_below_an_address(storage: Place, on_another_node: Path):
    rows = json.loads(fedray("runs", storage, "--json"))
    assert [(row["name"], row["status"]) for row in rows] == [("run-0", "finished"), ("run-1", "finished")]
    (row,) = json.loads(fedray("runs", storage.below("run-1"), "--json"))
    assert row["status"] == "finished"
    assert not any(on_another_node.iterdir())


def test_compare_and_report_take_addresses(storage: Place, on_another_node: Path):
    compared = fedray("compare", storage.below("run-0"), storage.below("run-1"))
    assert "method.lr" in compared
    for letter, number in (("A", 0), ("B", 1)):  # under the addresses that were given
        assert f"{letter} = {storage.below(f'run-{number}')}   finished" in compared
    assert "cache" not in compared
    fedray("report", storage, "--no-pictures")
    assert (on_another_node / "runs-report" / "table.csv").is_file()


def test_watch_shows_a_run_of_another_node(s3: S3, on_another_node: Path, monkeypatch):
    place = Place.parse(s3.new())
    seen = []

    def look(report: object) -> None:
        with pytest.raises(ConfigError, match=rf"s3://.*/mine\?.*process {os.getpid()} .* `fedray stop DIR`"):
            fedray("stop", place.below("mine"))
        seen.append(json.loads(fedray("watch", place.below("mine"), "--once", "--json"))["running"])
        seen.append(json.loads(fedray("runs", place, "--json"))[0]["status"])

    run(tiny.config(storage=str(place), rounds=1), out="mine", on_round=look)
    assert seen == [True, "running"] * 2
    assert json.loads(fedray("runs", place, "--json"))[0]["status"] == "finished"
    with pytest.raises(ConfigError, match=r"s3://.*/mine\?.* does not run: it is finished"):
        fedray("stop", place.below("mine"))
    assert (
        fedray("watch", place.below("mine"), "--once").splitlines()[-1].startswith(f"{place.below('mine')}: ")
    )
    with pytest.raises(ConfigError, match=r"s3://.*/mine\?.*: MLflow tracks none of these runs"):
        fedray("ui", place.below("mine"))


def test_resume_takes_an_address_and_says_where_the_run_is(s3: S3, on_another_node: Path, tmp_path: Path):
    place = Place.parse(s3.new())
    run(tiny.config(storage=str(place), rounds=1), out=tmp_path / "mine")
    said = fedray("resume", place.below("mine"), "rounds=2")
    assert f"Published: {place.below('mine')}" in said
    assert load_run(on_another_node / "runs" / "mine").rounds["round"].max() == 2
    assert "is finished: nothing was run" in fedray("resume", place.below("mine"))


def test_sync_brings_a_published_run_to_mlflow_once(s3: S3, on_another_node: Path, tmp_path: Path):
    place = Place.parse(s3.new())
    run(tiny.config(storage=str(place), rounds=1), out=tmp_path / "mine")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert "FINISHED" in fedray("sync", place.below("mine"), "--uri", uri)
    (tmp_path / "copy").mkdir()
    fetch(s3.objects(str(place.below("mine"))), tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "mlflow.json").read_text())["is_complete"]


def test_an_address_where_nothing_is_is_refused(s3: S3, on_another_node: Path):
    for command in ("runs", "report", "compare", "watch", "sync", "resume", "stop", "ui"):
        with pytest.raises(ConfigError, match="no run or sweep is published there"):
            fedray(command, s3.new())
        with pytest.raises(ConfigError, match="unknown scheme 's4'; did you mean 's3'"):
            fedray(command, "s4://bucket/run")
    assert not any(on_another_node.iterdir())
