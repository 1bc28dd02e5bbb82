"""Sweeps on a real Ray with a real MLflow.

Trials side by side, parents and children, stopping, failing, going on.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedray.config import yaml_text
from fedray.config.run_config import RunConfig
from fedray.durable import read_mapping
from fedray.errors import ConfigError
from fedray.storage.run_files import RunFiles
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import resume_sweep, sweep
from fedray.tracking.store import prepare_store

BASE: dict[str, Any] = {
    "rounds": 4,
    "checkpoint_every": 1,
    "model": "mlp",
    "data": {"name": "digits", "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "clients": {"population": 12, "cohort": 5, "devices": {"laptop": 1.0}, "actors": 1},
    "method": {"name": "fedavg", "lr": 0.1},
}


def plan(folder: Path, space, tune=None, uri=None, **base) -> Sweep:
    tree = {"base": BASE | base, "space": space, "tune": tune or {}}
    tree["base"]["tracking"] = {"uri": uri or "none", "experiment": "tests"}
    path = folder / "some_sweep.yaml"
    path.write_text(yaml_text.dump(tree))
    return Sweep.load(path, trust=True)


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(path.glob("trials/*/result.json"))}


def test_two_trials_at_once_on_two_cores_finish_and_stand_in_mlflow(ray_local, in_tmp):
    from mlflow import MlflowClient

    uri = f"sqlite:///{in_tmp}/mlflow.db"
    space = {"method": {"grid": [{"name": "fedavg"}, {"name": "staged", "density": 0.3}]}}
    seen: list[tuple[str, int]] = []
    made = sweep(
        plan(in_tmp, space, {"concurrent": 2}, uri),
        out=in_tmp / "sweep",
        on_round=lambda trial, metrics: seen.append((trial, metrics["round"])),
    )
    assert [trial.status for trial in made.trials] == ["finished", "finished"]
    assert {trial for trial, _ in seen} == {"00-fedavg", "01-staged,density=0.3"}
    assert results(made.path)["01-staged,density=0.3"]["density/global"] == pytest.approx(0.3, abs=1e-3)

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.info.status for child in [*children, parent]} == {"FINISHED"}
    best = max(results(made.path).items(), key=lambda item: item[1]["val/accuracy"])
    assert parent.data.tags["best"] == best[0]
    assert parent.data.metrics["test/accuracy"] == best[1]["test/accuracy"]
    assert parent.data.metrics["total/bytes/up"] == best[1]["total/bytes/up"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        *("sweep.yaml", "best.yaml", "report")
    }
    sums = {child.info.run_name: child.data.tags["weights_sha256"] for child in children}
    shas = {name: result["weights_sha256"] for name, result in results(made.path).items()}
    assert sums == {"fedavg": shas["00-fedavg"], "staged density=0.3": shas["01-staged,density=0.3"]}
    staged = next(child for child in children if child.data.tags["method"] == "staged")
    assert staged.data.params["method.density"] == "0.3"
    assert staged.data.params["data.partition.alpha"] == "1.0"
    history = client.get_metric_history(staged.info.run_id, "val/accuracy")
    assert [metric.step for metric in history] == [0, 1, 2, 3, 4]
    files = {file.path for file in client.list_artifacts(staged.info.run_id)}
    assert {"config.yaml", "rounds.jsonl", "result.json", "model.safetensors", "data.json"} <= files


def test_a_trial_takes_over_the_process_of_an_earlier_one_and_none_of_its_state(ray_local, in_tmp):
    import fedray

    methods = [
        {"name": "staged", "density": 0.3},
        {"name": "fedavg", "momentum": 0.9},
        {"name": "fedavg_warm"},
    ]
    planned = plan(in_tmp, {"method": {"grid": methods}}, {"concurrent": 1})
    reported: set[tuple[str, int]] = set()
    made = sweep(
        planned,
        out=in_tmp / "sweep",
        on_round=lambda trial, metrics: reported.add((trial, metrics["pid"])),
    )
    assert [trial.status for trial in made.trials] == ["finished"] * 3
    assert {trial for trial, _ in reported} == {trial.point.name for trial in made.trials}
    assert len({process for _, process in reported}) == 1
    sums = {name: result["weights_sha256"] for name, result in results(made.path).items()}
    for point in planned.points:
        alone = fedray.run(point.config.override({"clients.actors": 0}), out=in_tmp / f"alone-{point.name}")
        assert sums[point.name] == alone.weights_sha256


@pytest.mark.slow
def test_asha_ends_the_worse_trials_early_and_says_so(ray_local, in_tmp):
    space = {"method.lr": {"grid": [0.1, 1e-7, 1e-6, 1e-5]}}
    tune = {"scheduler": "asha", "grace_rounds": 2, "reduction": 4, "concurrent": 1}
    made = sweep(plan(in_tmp, space, tune, rounds=8), out=in_tmp / "sweep")
    statuses = {trial.point.name: trial.status for trial in made.trials}
    assert statuses["00-lr=0.1"] == "finished"
    assert "stopped" in statuses.values()
    for name, result in results(made.path).items():
        assert result["status"] == statuses[name]
        assert ("test/accuracy" in result) == (result["status"] == "finished")
    again = resume_sweep(made.path)  # what was stopped on purpose stays stopped
    assert [trial.status for trial in again.trials] == list(statuses.values())


FLAKY = '''
"""A method that breaks in round 3 as long as a file is missing."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from fedray.federation.method import Method
from fedray.methods import METHODS

@dataclass(frozen=True, kw_only=True)
class Flaky(Method):
    needs: str = ""

    def aggregate(self, state, cohort):
        if state.round == 3 and not Path(self.needs).exists():
            raise OSError("the disk is on fire")
        return super().aggregate(state, cohort)

METHODS["flaky"] = Flaky
'''


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_a_sweep_goes_on_with_what_is_missing(ray_local, in_tmp):
    import fedray

    (in_tmp / "flaky.py").write_text(FLAKY)
    space = {"method": {"grid": [{"name": "fedavg"}, {"name": "flaky", "needs": str(in_tmp / "hose")}]}}
    planned = plan(in_tmp, space, {"max_failures": 0}, imports=[str(in_tmp / "flaky.py")])
    made = sweep(planned, out=in_tmp / "sweep")
    assert [trial.status for trial in made.trials] == ["finished", "failed"]
    assert "the disk is on fire" in (made.failed[0].error or "")
    finished = made.trials[0].path / "result.json"
    before = finished.stat().st_mtime_ns

    (in_tmp / "hose").touch()
    again = resume_sweep(made.path)
    assert [trial.status for trial in again.trials] == ["finished", "finished"]
    assert finished.stat().st_mtime_ns == before
    whole = fedray.run(planned.points[1].config, out=in_tmp / "whole")
    assert (
        json.loads((again.trials[1].path / "result.json").read_text())["weights_sha256"]
        == whole.weights_sha256
    )


MINE = '''
"""A model, a data set, a partition, a device and a method, none of which can be pickled by value."""
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import nn

import fedray
from fedray.costs.devices import DEVICES
from fedray.costs.differences import CODECS, DeltaCodec
from fedray.data import DATASETS, PARTITIONS
from fedray.data.partition import Dealt
from fedray.federation.method import Method
from fedray.federation.sampling import SAMPLERS, Sampler
from fedray.methods import METHODS
from fedray.models import MODELS
from fedray.models.spec import Architecture
from fedray.types import Params

LOCK = Lock()  # what stands in a module of its own is there once in each process
HERE = Path(__file__).parent

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 12), nn.ReLU())
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        with LOCK:
            return self.head(self.layers(x))

def build(shape, classes):
    return Net(shape, classes)

def load(root):
    return replace(DATASETS["digits"].load(root), name="my_digits")

@dataclass(frozen=True)
class Halves:
    def split(self, labels, writers, rows, population, seed):
        with LOCK:
            return Dealt(rows, np.arange(len(rows)) * population // len(rows), population)

@dataclass(frozen=True)
class Seen:
    rounds: tuple[int, ...] = ()

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    hose: str = ""

    def setup(self, state, ctx):
        return replace(state, memory=Seen())

    def client_update(self, task, client):
        with LOCK:
            client.memory["times"] = client.memory.get("times", 0) + 1
        return super().client_update(task, client)

    def aggregate(self, state, cohort):
        if state.round == 3 and self.hose and not (HERE / self.hose).exists():
            raise OSError("the disk is on fire")
        state = replace(state, memory=Seen((*state.memory.rounds, state.round)))
        return super().aggregate(state, cohort)

@dataclass(frozen=True, kw_only=True)
class Alternating(Sampler):
    def draw(self, memory, ctx):
        with LOCK:
            return [k for k in range(len(ctx.clients)) if k % 2 == len((memory or Seen()).rounds) % 2]

    def learn(self, memory, records, round):
        return Seen((*(memory or Seen()).rounds, round))

@dataclass(frozen=True, kw_only=True)
class Half(DeltaCodec):
    def encode(self, difference, mask):
        with LOCK:
            return (difference.flat[mask.flat] / 2).numpy().tobytes()

    def decode(self, payload, mask):
        flat = torch.zeros(mask.layout.size)
        flat[mask.flat] = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        return Params(flat, mask.layout)

CODECS["half"] = Half
SAMPLERS["alternating"] = Alternating
MODELS["mine"] = Architecture(build, lambda shape: None, "mine", "12")
DATASETS["my_digits"] = replace(DATASETS["digits"], load=load)
PARTITIONS["halves"] = Halves
fedray.DEVICES["esp32"] = replace(DEVICES["phone"], name="esp32", flops_per_s=1e8)
fedray.LINKS["pigeon"] = replace(fedray.LINKS["lte"], latency_s=9.0)
METHODS["mine"] = Mine
'''

OWN: dict[str, Any] = {
    "imports": ["mine.py"],
    "model": "mine",
    "data": {"name": "my_digits", "partition": {"kind": "halves"}},
    "method": {"name": "mine", "lr": 0.1, "hose": "hose"},
    "clients": BASE["clients"]
    | {
        "devices": {"esp32": 1.0, "esp32@pigeon": 1.0},
        "sampler": {"name": "alternating"},
        "uplink": {"name": "half"},
    },
}


@pytest.mark.slow
def test_what_a_file_adds_to_the_tables_works_in_a_sweep_and_after_resume(ray_local, in_tmp):
    """Also on two actors; and an error of its code is kept, in a line and whole."""
    import fedray

    (in_tmp / "mine.py").write_text(MINE)
    line = MINE[: MINE.index("raise OSError")].count("\n") + 1
    space = {"clients.actors": {"grid": [2, 0]}}
    made = sweep(plan(in_tmp, space, {"max_failures": 0, "concurrent": 1}, **OWN), out=in_tmp / "sweep")
    assert [trial.status for trial in made.trials] == ["failed", "failed"]
    for trial in made.trials:
        message = trial.error or ""
        assert message.startswith("OSError: the disk is on fire (") and "\n" not in message
        assert f"({in_tmp}/mine.py, line {line}, in aggregate)" in message
        assert "in aggregate" in (trial.path / "error.txt").read_text()
    (in_tmp / "hose").touch()
    again = resume_sweep(made.path)
    assert [trial.status for trial in again.trials] == ["finished", "finished"]
    config = again.trials[0].point.config.override({"clients.actors": 0})
    alone = fedray.run(config, out=in_tmp / "alone")
    sums = {result["weights_sha256"] for result in results(made.path).values()}
    assert sums == {alone.weights_sha256}
    clients = pd.read_parquet(again.trials[0].path / "clients.parquet")
    assert set(clients["client"] % 2 == (clients["round"] - 1) % 2) == {True}
    assert not list(made.path.glob("trials/*/error.txt"))


def test_tokens_and_attention_from_a_file_work_in_a_sweep(ray_local, in_tmp):
    import fedray

    example = Path(__file__).parents[2] / "examples" / "tokens.py"
    own = {"imports": [str(example)], "model": "attention", "data": {"name": "reviews"}}
    method = {"name": "staged", "density": 0.5, "lr": 0.1}
    planned = plan(in_tmp, {"seed": {"grid": [0]}}, method=method, **own)
    made = sweep(planned, out=in_tmp / "sweep")
    assert [trial.status for trial in made.trials] == ["finished"]
    alone = fedray.run(planned.points[0].config.override({"clients.actors": 0}), out=in_tmp / "alone")
    (first,) = results(made.path).values()
    assert first["weights_sha256"] == alone.weights_sha256
    assert first["density/global"] == pytest.approx(0.5, abs=0.01)


SCRIPT = '''
"""Everything of a user's own in the script itself, which no other process can import."""
from dataclasses import dataclass, replace
from torch import nn
from fedray.costs.devices import DEVICES
from fedray.costs.hardware import HARDWARE
from fedray.costs.links import LINKS
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import sweep
from fedray.federation.method import Method
from fedray.federation.sampling import SAMPLERS, Sampler
from fedray.methods import METHODS
from fedray.models import MODELS
from fedray.models.spec import Architecture

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    def client_update(self, task, client):
        return super().client_update(task, client)

    def prune(self, state, cohort, ctx):
        ctx.validate(state.params, state.mask)
        return state

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

@dataclass(frozen=True, kw_only=True)
class Everyone(Sampler):
    def draw(self, memory, ctx):
        return ctx.available(ctx.cohort)

METHODS["mine"] = Mine
SAMPLERS["mine"] = Everyone
MODELS["mine"] = Architecture(build, lambda shape: None, "mine", "")
DEVICES["mine"] = replace(DEVICES["laptop"], name="mine")
DEVICES["server"] = replace(DEVICES["server"], flops_per_s=1.0)  # its FLOPs are then its seconds
HARDWARE["board"] = HARDWARE["phone"]
LINKS["pigeon"] = replace(LINKS["lte"], latency_s=1e6)

if __name__ == "__main__":
    made = sweep(Sweep.load("some_sweep.yaml"), out="sweep")
    print([(trial.status, trial.error) for trial in made.trials])
    from fedray.report import find_runs, load_run
    (path,) = find_runs(["sweep"])
    last = load_run(path).result
    print(last["total/time/simulated_s"] > 1e6, last["total/time/server_s"] == last["total/flops/server"] > 0)
'''


@pytest.mark.slow
def test_what_a_script_adds_to_the_tables_works_in_its_sweep(in_tmp):
    base = BASE | {"model": "mine", "method": {"name": "mine"}, "tracking": {"uri": "none"}}
    own = {"devices": {"mine": 1, "board@pigeon": 1}, "actors": 2, "sampler": {"name": "mine"}}
    base["clients"] = BASE["clients"] | own
    (in_tmp / "some_sweep.yaml").write_text(yaml_text.dump({"base": base, "space": {"seed": {"grid": [0]}}}))
    (in_tmp / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=280)
    assert done.stdout == "[('finished', None)]\nTrue True\n", done.stderr


@pytest.mark.slow
def test_a_resumed_sweep_compares_with_what_was_there_before(ray_local, in_tmp):
    """A trial that starts only after `resume` is stopped at the rung that the others passed before."""
    import shutil

    space = {"method.lr": {"grid": [0.1, 0.09, 1e-7]}}
    tune = {"scheduler": "asha", "grace_rounds": 2, "reduction": 4, "concurrent": 1, "metric": "val/loss"}
    planned = plan(in_tmp, space, tune, rounds=8)
    made = sweep(planned, out=in_tmp / "sweep")
    assert [trial.status for trial in made.trials][::2] == ["finished", "stopped"]
    assert made.best is not None
    assert made.best.trials == (made.trials[0],)
    assert RunConfig.load(made.path / "best.yaml") == made.trials[0].point.config
    shutil.rmtree(made.trials[2].path)
    again = resume_sweep(made.path)
    assert [trial.status for trial in again.trials] == [trial.status for trial in made.trials]
    assert read_mapping(again.trials[2].path / "stopped.json") == {"round": 2}


def test_a_metric_that_no_round_reports_is_one_clear_message(ray_local, in_tmp):
    (in_tmp / "mine.py").write_text(MINE)
    tune = {"scheduler": "asha", "metric": "train/distanz", "mode": "min", "max_failures": 0}
    made = sweep(plan(in_tmp, {"seed": {"grid": [0]}}, tune, **OWN), out=in_tmp / "sweep")
    (trial,) = made.trials
    assert trial.status == "failed"
    assert (trial.error or "").startswith(
        "tune.metric 'train/distanz': no round up to 1, where asha compares, reported it"
    )
    assert "they report train/loss; start a sweep with another tune.metric" in (trial.error or "")


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param("train/loss", marks=pytest.mark.slow),
        pytest.param("density/client_mean", marks=pytest.mark.slow),
        pytest.param("method/asked", marks=pytest.mark.slow),
    ],
)
def test_a_metric_that_some_rounds_lack_is_compared_where_it_is(ray_local, in_tmp, metric):
    """None of these is known of the set-up; with no validation data, no round has an accuracy."""
    base: dict[str, Any] = {
        "data": {"name": "digits", "validation_fraction": 0.1 if metric == "method/asked" else 0}
    }
    if metric == "method/asked":
        base["method"] = {"name": "staged", "policy": "bandit", "stages": 2}
    tune = {"scheduler": "asha", "metric": metric, "grace_rounds": 4, "max_failures": 0}
    tune = tune | ({"mode": "max"} if metric == "method/asked" else {})
    made = sweep(plan(in_tmp, {"seed": {"grid": [0]}}, tune, **base), out=in_tmp / "sweep")
    assert [(trial.status, trial.error) for trial in made.trials] == [("finished", None)]


@pytest.mark.parametrize(
    "resources, lacking",
    [
        ({"gpu": 1.0}, "needs 2 × GPU for its client actors, but the cluster has "),
        ({"custom": {"edge": 1.0}}, "needs 2 × edge for its client actors, but the cluster has "),
        ({"cpu": 999.0}, "needs 1998 × CPU for its client actors, but the cluster has "),
    ],
)
def test_what_the_cluster_has_no_room_for_is_refused_at_once(ray_local, in_tmp, resources, lacking):
    import time

    import fedray

    clients = {"clients": BASE["clients"] | {"actors": 2, "resources": resources}}
    planned = plan(in_tmp, {"seed": {"grid": [0, 1]}}, **clients)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"clients.resources: trial 00-seed=0 {lacking}") as caught:
        sweep(planned, out=in_tmp / "sweep")
    assert "× CPU" in str(caught.value) and "× GPU" in str(caught.value)
    with pytest.raises(ConfigError, match=f"clients.resources: the run {lacking}"):
        fedray.run(planned.points[0].config, out=in_tmp / "run")
    assert time.monotonic() - began < 60
    assert sorted(path.name for path in in_tmp.iterdir()) == ["some_sweep.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "scheduler"),
    [(signal.SIGKILL, "fifo"), (signal.SIGTERM, "fifo"), (signal.SIGINT, "fifo"), (signal.SIGTERM, "asha")],
)
def test_a_killed_sweep_can_be_gone_on_from(in_tmp, how, scheduler):
    grace = {} if scheduler == "fifo" else {"grace_rounds": 400}  # it stops nobody
    tune = {"concurrent": 2, "scheduler": scheduler, "metric": "val/accuracy", **grace}
    uri = f"sqlite:///{in_tmp}/mlflow.db"
    planned = plan(in_tmp, {"seed": {"grid": [0, 1]}}, tune, uri, rounds=400, checkpoint_every=1000)
    assert len(planned.points) == 2
    command = [sys.executable, "-m", "fedray.cli", "sweep", "some_sweep.yaml", "--out", "sweep"]
    said = open(in_tmp / "said", "w+")  # noqa: SIM115
    process = subprocess.Popen(command, cwd=in_tmp, start_new_session=True, stderr=said)
    try:
        logs = [in_tmp / "sweep" / "trials" / point.name / "rounds.jsonl" for point in planned.points]
        wait_until(lambda: all(log.exists() and log.read_text().count("\n") > 5 for log in logs), process)
        if how != signal.SIGKILL:
            process.send_signal(how)
            assert process.wait(timeout=180) == 128 + how  # two cores may have other work
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said.close()
    assert not list(in_tmp.glob("sweep/trials/*/result.json"))
    if how != signal.SIGKILL:
        last = (in_tmp / "said").read_text().splitlines()[-1]
        assert last.endswith("interrupted; `fedray resume sweep` continues with the trials that are missing")
        for point in planned.points:  # no complete round is lost
            files = RunFiles.open(in_tmp / "sweep" / "trials" / point.name)
            found = files.load()
            assert found is not None and found.done == files.rounds()[-1]["round"] > 5
    assert statuses_of(uri) == {"RUNNING" if how == signal.SIGKILL else "KILLED"}
    done = subprocess.run(
        [sys.executable, "-m", "fedray.cli", "resume", "sweep"],
        cwd=in_tmp,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {result["status"] for result in results(in_tmp / "sweep").values()} == {"finished"}
    assert statuses_of(uri) == {"FINISHED"}


def statuses_of(uri: str) -> set[str]:
    """Return the statuses of a sweep's run and those of its trials."""
    store = prepare_store(uri, "tests")
    from mlflow import MlflowClient

    runs = MlflowClient(uri).search_runs([store.experiment_id])
    assert len(runs) == 3
    return {run.info.status for run in runs}


def wait_until(condition, process, seconds=120):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended by itself"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)
