"""`fedray stop`: a run, a sweep and a trial end in good order from another process, and can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.errors import ConfigError
from fedray.experiment.run import resume, run
from fedray.overview import stopping
from fedray.overview.summary import summary
from fedray.storage.directory import STOP, Lock, ask_to_stop, holder_of
from tests.experiment import tiny

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(in_tmp: Path) -> Iterator[Start]:
    """A function that starts a command in a temporary folder; what still runs at the end is killed."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fedray.cli", *words]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def fedray(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedray.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], patience_s: float = 60) -> None:
    until = time.monotonic() + patience_s
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("how", [(), ("--now",)], ids=["after its round", "now"])
def test_a_run_ends_in_good_order_and_can_be_resumed(
    start: Start, in_tmp: Path, how: tuple[str, ...]
) -> None:
    (in_tmp / "x.yaml").write_text(yaml_text.dump(tiny.TREE))
    process = start("run", "x.yaml", "rounds=100000", "eval_every=50", "--out", "r")
    wait_for(lambda: (summary(in_tmp / "r").round or 0) > 3, process)
    assert summary(in_tmp / "r").status == "running"
    done = fedray("stop", "r", *how)
    assert done.returncode == 0, done.stderr
    ended = summary(in_tmp / "r")
    said = f"r is interrupted after round {ended.round} of 100000. To resume: fedray resume r"
    assert said in done.stdout.replace("\n", " ")
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how else 128 + signal.SIGTERM), err
    assert "Traceback" not in out + err
    assert "`fedray resume r` continues from the last checkpoint" in err
    assert not (in_tmp / "r" / STOP).exists()
    rounds = ended.round or 0
    config = tiny.config(rounds=rounds + 2, eval_every=50)
    resumed = resume(in_tmp / "r", [f"rounds={rounds + 2}"]).weights_sha256
    assert resumed == run(config, out=in_tmp / "whole").weights_sha256


def test_stop_does_not_wait_longer_than_it_may(start: Start, in_tmp: Path) -> None:
    """A process that has the lock and looks at nothing."""
    run(tiny.config(rounds=1), out=in_tmp / "r")
    code = "import time; from pathlib import Path; from fedray.storage.directory import Lock\n"
    code += "with Lock(Path('r')): Path('held').touch(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (in_tmp / "held").exists():
            time.sleep(0.02)
        holder = holder_of(in_tmp / "r")
        assert holder is not None and holder.pid == process.pid and holder.is_here
        done = fedray("stop", "r", "--wait", "0.5")
        assert done.returncode == 1
        assert "r has not ended yet after 0.5 s: it ends after its round in progress" in done.stderr
        assert fedray("stop", "r", "--wait", "0").returncode == 0
    finally:
        process.kill()
        process.wait()
    assert holder_of(in_tmp / "r") is None


def test_what_does_not_run_cannot_be_stopped(in_tmp: Path) -> None:
    run(tiny.config(rounds=1), out=in_tmp / "r")
    before = tiny.listing(in_tmp)
    with pytest.raises(ConfigError, match=r"^r does not run: it is finished \(after round 1 of 1\)"):
        stopping.stop(in_tmp / "r")
    with pytest.raises(ConfigError, match="is not the directory of a run or a sweep"):
        stopping.stop(in_tmp)
    assert tiny.listing(in_tmp) == before


def test_a_request_for_an_earlier_process_ends_no_later_one(in_tmp: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), out="r", on_round=tiny.ending(1, KeyboardInterrupt))
    ask_to_stop(in_tmp / "r")
    assert resume("r").result["status"] == "finished"
    assert not (in_tmp / "r" / STOP).exists()


def test_a_request_in_the_last_round_changes_nothing(in_tmp: Path) -> None:
    def ask(report: Any) -> None:
        if report.round == tiny.ROUNDS:
            ask_to_stop(in_tmp / "r")

    assert run(tiny.config(), out="r", on_round=ask).result["status"] == "finished"
    assert not (in_tmp / "r" / STOP).exists()


def test_a_look_takes_no_lock_and_ends_none(in_tmp: Path) -> None:
    assert holder_of(in_tmp) is None
    with Lock(in_tmp):
        mine = holder_of(in_tmp)
        assert mine is not None and mine.pid == os.getpid()
        code = "from pathlib import Path; from fedray.storage.directory import holder_of\n"
        code += "print(holder_of(Path('.')).pid)"
        for _ in range(2):  # the first look of either process has not ended it
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            assert int(done.stdout) == os.getpid()
    assert holder_of(in_tmp) is None


@pytest.mark.slow
def test_a_trial_and_then_the_whole_sweep(start: Start, in_tmp: Path) -> None:
    """The sweep continues without the trial, which is marked stopped."""
    tree = {"base": tiny.TREE | {"rounds": 100000, "eval_every": 50}, "space": {"seed": {"grid": [0, 1]}}}
    (in_tmp / "s.yaml").write_text(yaml_text.dump(tree))
    process = start("sweep", "s.yaml", "--out", "s")
    trials = in_tmp / "s" / "trials"

    def running() -> list[Path]:
        found = [path for path in trials.glob("*") if summary(path).status == "running"]
        return [path for path in found if (summary(path).round or 0) > 3]

    wait_for(lambda: len(running()) == 2, process, 120)
    first, second = sorted(running())
    refused = fedray("stop", str(first), "--now")
    assert refused.returncode == 2 and "is a trial of a running sweep" in refused.stderr
    done = fedray("stop", str(first))
    assert done.returncode == 0, done.stderr
    assert f"{first.name} is stopped after round" in done.stdout.replace("\n", " ")
    assert "its sweep continues" in done.stdout.replace("\n", " ")
    at = summary(second).round
    wait_for(lambda: (summary(second).round or 0) > (at or 0) + 3, process)
    assert summary(first).status == "stopped"
    whole = fedray("stop", "s")
    assert whole.returncode == 0, whole.stderr
    assert "s has ended. To resume: fedray resume s" in whole.stdout
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in out + err
    assert summary(second).status == "interrupted"
    assert json.loads((first / "result.json").read_text())["status"] == "stopped"
    assert not list((in_tmp / "s").rglob(STOP))
