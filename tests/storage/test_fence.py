"""A process that is suspended, and whose directory another one takes, writes nothing more there."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedray.durable import digests
from fedray.storage import heartbeat
from fedray.storage.directory import Lock

ROOT = Path(__file__).parents[2]

BEGIN = """
import errno, fcntl, sys
from pathlib import Path
from fedray.durable import append_lines, on_disk, replace, replace_folder
from fedray.errors import RunError
from fedray.storage import heartbeat
from fedray.storage.directory import Lock

def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks")

fcntl.lockf = refuse
heartbeat._machine = lambda: "another machine"
heartbeat.BEAT_S = {beat_s}
place = Path({place!r})

def all_refused(writes):
    with Lock(place, {what!r}):
        for write in writes:
            write()
        print("written", flush=True)
        sys.stdin.readline()
        for number, write in enumerate(writes):
            try:
                write()
            except RunError as error:
                assert "has taken it over" in str(error), error
            else:
                print(f"write {{number}} was not refused", flush=True)
    print("ended", flush=True)
"""

SWEEP = """
from fedray.config import sealed
from fedray.storage.run_files import RunFiles
from fedray.sweeps.schedulers import Journal
from fedray.sweeps.stopping import Budget

budget = Budget(place, 100.0)
trial = place / "trials" / "00"
trial.mkdir(parents=True)
all_refused([
    lambda: sealed.write(place / "sweep.yaml", {"name": "x"}),
    lambda: Journal(place / "judged.jsonl").add("00", round=1, value=0.5),
    lambda: Journal(place / "judged.jsonl").keep(["00"]),
    lambda: append_lines(place / "points.jsonl", [{"searcher": "x"}]),
    budget.note,
    lambda: RunFiles(place).write_json("mlflow.json", {"run_id": "a"}),
    lambda: RunFiles(trial).write_json("stopped.json", {"round": 1}),
    lambda: replace(place / "best.yaml", b"x"),
])
"""

TRAINING = """
from fedray.policies.network import Network
from fedray.policies.trained import save
from rllib_pruner.config import TrainConfig
from rllib_pruner.files import TrainFiles
import torch

class Learner:
    def save_to_path(self, path):
        Path(path).mkdir(parents=True)
        (Path(path) / "state").write_text("x")

(place / "checkpoints").mkdir()
files = TrainFiles.create(place, TrainConfig.from_tree({}), taken=True)
layer = (torch.ones(2, 2), torch.ones(2))
network = Network({"encoder": [layer], "head": [layer]})
all_refused([
    lambda: files.append({"iteration": 1, "env_steps": 1.0, "score": 0.0}),
    lambda: files.save(Learner(), 1),
    lambda: files.write_run_id("a"),
    lambda: save(network, files.policy, {"process": "x"}),
    files.rewind,
])
"""


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("beat_s", [0.05, 3600.0], ids=["the thread notices", "the write notices"])
@pytest.mark.parametrize(
    ("what", "writes"), [("sweep", SWEEP), ("training", TRAINING)], ids=["sweep", "training"]
)
def test_who_wakes_up_after_a_takeover_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, writes: str, beat_s: float
) -> None:
    place = tmp_path / what
    place.mkdir()
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.5)
    begin = BEGIN.format(place=str(place), what=what, beat_s=min(beat_s, 0.05))
    begin += f"Beats = heartbeat.Beats\nBeats._beat = Beats._beat if {beat_s} < 1 else lambda self: None\n"
    first = subprocess.Popen(
        [sys.executable, "-c", begin + writes],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "written\n"
        os.kill(first.pid, signal.SIGSTOP)
        with Lock(place, what, patience_s=20):
            before = digests(place)
            os.kill(first.pid, signal.SIGCONT)
            said, _ = first.communicate("go on\n", timeout=60)
            assert said == "ended\n" and first.returncode == 0
            assert digests(place) == before
    finally:
        first.kill()
        first.communicate()
