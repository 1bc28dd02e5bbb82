"""`fedray watch`: a running run and a sweep from another terminal; it ends with them, and by Ctrl-C alone."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.config import yaml_text
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.overview.watching import duration, look, newest_running
from fedray.storage.directory import Lock
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
        for _ in range(2):
            watchers.append(subprocess.Popen([*fedray, "watch", "--every", "0.2"], **quiet))  # type: ignore[call-overload]
        first = [watcher.stdout.readline() for watcher in watchers if watcher.stdout is not None]
        assert all(line.startswith("runs/fedavg-digits-mlp-s0-001: ") for line in first)
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
    finally:
        for one in (process, *watchers):
            one.kill()
            one.communicate()
