"""`fedray watch`: a running run and a sweep from another terminal; it ends with them, and by Ctrl-C alone."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.config import yaml_text
from fedray.durable import append_lines
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.overview.summary import Summary, summary
from fedray.overview.watching import actors, duration, look, newest_running
from fedray.storage.directory import Holder, Lock, holder_of
from tests.experiment import tiny


def test_a_sweep_needs_not_know_its_points(tmp_path: Path) -> None:
    """A search draws them as they run."""
    run(tiny.config(), out=tmp_path / "trials" / "00-a")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), out=tmp_path / "trials" / "01-b", on_round=tiny.ending(1, KeyboardInterrupt))
    tree = {"name": "s", "base": tiny.TREE}
    (tmp_path / "sweep.yaml").write_text(yaml_text.dump(tree))
    found = look(tmp_path)
    assert (found.planned, found.waiting, found.done, found.left) == (2, 0, 4, 2)
    (tmp_path / "sweep.yaml").write_text(yaml_text.dump(tree | {"points": [{"seed": k} for k in range(5)]}))
    found = look(tmp_path)
    assert (found.waiting, found.left, found.is_running, found.left_s) == (
        3,
        2 + 3 * tiny.ROUNDS,
        False,
        None,
    )
    shown = CliRunner().invoke(cli.app, ["watch", "--once", str(tmp_path)], catch_exceptions=False).stdout
    assert [line.split()[:3] for line in shown.splitlines()[2:4]] == [
        ["01-b", "interrupted", "1/3"],
        ["00-a", "finished", "3/3"],
    ]
    assert "1 finished, 1 interrupted, 3 waiting" in shown
    tree = json.loads(CliRunner().invoke(cli.app, ["watch", "--once", "--json", str(tmp_path)]).stdout)
    assert tree["waiting"] == 3 and len(tree["trials"]) == 2


@pytest.mark.parametrize("how", ["deleted", "a directory", "a link to nowhere"])
def test_a_trial_whose_config_is_gone_is_damaged_and_not_waiting(tmp_path: Path, how: str) -> None:
    for name in ("00-a", "01-b"):
        run(tiny.config(rounds=1), out=tmp_path / "trials" / name)
    (tmp_path / "trials" / "02-c").mkdir()  # about to begin
    (tmp_path / "sweep.yaml").write_text(
        yaml_text.dump({"name": "s", "base": tiny.TREE, "points": [{"seed": k} for k in range(3)]})
    )
    config = tmp_path / "trials" / "01-b" / "config.yaml"
    config.unlink()
    if how == "a directory":
        config.mkdir()
    elif how != "deleted":
        config.symlink_to("nowhere")
    found = look(tmp_path)
    assert [run.status for run in found.runs] == ["finished", "damaged"] and found.waiting == 1
    assert str(config) in str(found.runs[1].problem)


@pytest.mark.parametrize(
    ("tune", "lines", "waiting"),
    [
        ({"search": "optuna", "num_samples": 4}, [], 3),
        ({"search": {"name": "optuna"}, "num_samples": 4, "repeat": [0, 1]}, [], 7),
        ({"search": "optuna", "num_samples": 4}, [{"suggested": 0, "trials": ["0"]}, {"ended": "why"}], 0),
        ({}, [], 0),
        ("damaged", [], 0),
    ],
)
def test_the_points_that_a_search_has_not_suggested_wait(
    tmp_path: Path, tune: Any, lines: list[dict[str, Any]], waiting: int
) -> None:
    run(tiny.config(), out=tmp_path / "trials" / "0")
    tree = {"name": "s", "base": tiny.TREE, "points": [], "tune": tune}
    (tmp_path / "sweep.yaml").write_text(yaml_text.dump(tree))
    append_lines(tmp_path / "points.jsonl", [{"searcher": "optuna"}, *lines])
    assert look(tmp_path).waiting == waiting


def test_the_actors_that_live_are_told_from_those_that_are_asked_for(tmp_path: Path) -> None:
    seen: list[Summary] = []
    config = tiny.config(rounds=1)
    run(config, out=tmp_path / "a", on_round=lambda report: seen.append(summary(tmp_path / "a")))
    assert [actors(one) for one in seen] == ["0", "0"] and seen[-1].holder is not None
    assert seen[-1].holder.actors == 0 and actors(summary(tmp_path / "a")) == "0"
    for asked, live, shown in (("auto", 2, "2 (auto)"), (4, 3, "3 of 4"), (4, 4, "4"), (4, None, "4")):
        holder = Holder(1, "here", "now", live)
        found = replace(seen[-1], config={"clients": {"actors": asked}}, holder=holder)
        assert actors(found) == shown
        assert actors(replace(found, status="interrupted", holder=None)) == str(asked)


@pytest.mark.slow
def test_a_run_tells_its_actors(ray_local: None, tmp_path: Path) -> None:
    seen: list[str] = []
    config = tiny.config({"clients.actors": 2, "clients.resources.cpu": 0.5}, rounds=2)
    run(config, out=tmp_path / "a", on_round=lambda report: seen.append(actors(summary(tmp_path / "a"))))
    assert seen == ["2", "2", "2"] and holder_of(tmp_path / "a") is None


def test_the_newest_running_one_is_found(in_tmp: Path) -> None:
    runs = in_tmp / "runs"
    for name in ("a", "b", "s/trials/00-x"):
        run(tiny.config(rounds=1), out=runs / name)
    (runs / "s" / "sweep.yaml").write_text(yaml_text.dump({"base": tiny.TREE, "points": [{}]}))
    with pytest.raises(ConfigError, match="nothing runs below runs"):
        newest_running(runs)
    with Lock(runs / "b"):
        assert newest_running(runs) == runs / "b"
    with Lock(runs / "s"), Lock(runs / "s" / "trials" / "00-x"):
        assert newest_running(runs) == runs / "s"
    with pytest.raises(ConfigError, match="nothing runs below nowhere"):
        newest_running(in_tmp / "nowhere")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (12000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_it_watches_a_run_in_another_process_until_its_end(in_tmp: Path) -> None:
    (in_tmp / "x.yaml").write_text(yaml_text.dump(tiny.TREE))
    fedray = [sys.executable, "-m", "fedray.cli"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*fedray, "run", "x.yaml", "rounds=100000", "eval_every=50"], **quiet)  # type: ignore[call-overload]
    watchers: list[subprocess.Popen[str]] = []
    try:
        while not list(in_tmp.glob("runs/*/rounds.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        for more in ([], [], ["--json"]):
            command = [*fedray, "watch", "--every", "0.2", *more]
            watchers.append(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
        first = [watcher.stdout.readline() for watcher in watchers if watcher.stdout is not None]
        assert all(line.startswith("runs/fedavg-digits-mlp-s0-001: ") for line in first[:2])
        assert json.loads(first[2])["running"] and json.loads(first[2])["trials"][0]["actors"] == 0
        watchers[0].send_signal(signal.SIGINT)
        said, _ = watchers[0].communicate(timeout=30)
        assert watchers[0].returncode == 0 and "Traceback" not in said
        assert process.poll() is None  # the run runs on
        assert watchers[1].stdout is not None
        while "rounds/s, about" not in (line := watchers[1].stdout.readline()):
            assert line  # not at its end
        process.send_signal(signal.SIGINT)
        said, _ = watchers[1].communicate(timeout=60)
        assert watchers[1].returncode == 0
        assert said.splitlines()[-1] == "runs/fedavg-digits-mlp-s0-001 has ended"
        said, _ = watchers[2].communicate(timeout=60)
        states = [json.loads(line) for line in said.splitlines()]
        assert watchers[2].returncode == 0 and [state["running"] for state in states][-1] is False
    finally:
        for one in (process, *watchers):
            one.kill()
            one.communicate()
