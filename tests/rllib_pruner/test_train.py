"""Training: what it leaves, that it goes on where it was, and that the same seed gives the same policy."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from fedray.config import sealed
from fedray.errors import ConfigError, RunError
from fedray.overview import stopping
from fedray.overview.watching import look
from fedray.policies.rate_search import INTERFACE
from fedray.policies.trained import TrainedPolicy, policy_problem
from fedray.storage.directory import Lock
from rllib_pruner import training
from rllib_pruner.config import Plan, TrainConfig
from rllib_pruner.files import Row, TrainFiles, as_row
from rllib_pruner.processes import RateSearchProcess
from rllib_pruner.syncing import sync
from rllib_pruner.train import train as command
from rllib_pruner.training import is_over, resume, train
from rllib_pruner.trials import train_all

SMALL: dict[str, Any] = {
    "process": {"name": "rate_search", "states": 20, "problems": 5},
    "algorithm": {"name": "dqn", "hidden": [8], "batch": 32, "warm_up": 64, "epsilon_steps": 400},
    "budget": {"env_steps": 400, "evaluate_every": 200, "in_a_row": 9},
    "tracking": {"uri": "none"},
}


def small(**changes: Any) -> TrainConfig:
    return TrainConfig.from_tree(SMALL | changes)


def module_of(path: Path) -> bytes:
    return (path / "policy" / "network.safetensors").read_bytes()


# ── without RLlib


def test_a_line_search_is_a_perfect_policy_and_walking_down_is_the_worst():
    process = RateSearchProcess(problems=30)
    best = process.judge(lambda observations: np.zeros(len(observations), np.int64))
    worst = process.judge(lambda observations: np.ones(len(observations), np.int64))
    assert best["score"] == 1 and process.good_enough(best)
    assert {name: value for name, value in best.items() if name.startswith("gap/")} == {
        "gap/monotone": 0,
        "gap/noisy": 0,
        "gap/overshooting": 0,
    }
    assert worst["score"] < 0.2 and worst["gap/monotone"] > 0.1 and not process.good_enough(worst)


def test_training_ends_when_the_policy_was_good_often_enough_or_the_budget_is_spent():
    config = small(budget={"env_steps": 1000, "in_a_row": 2, "stop_score": 0.9})
    bad, good = ({"iteration": 1, "env_steps": 10, "score": score} for score in (0.5, 0.95))
    assert not is_over(config, [])
    assert (
        not is_over(config, [good])
        and not is_over(config, [good, bad])
        and is_over(config, [bad, good, good])
    )
    assert is_over(config, [bad | {"env_steps": 1000}])
    perfect = {"iteration": 1, "env_steps": 10, "score": 1.0}
    assert is_over(small(budget={"in_a_row": 1}), [perfect])  # the process itself says so
    assert not is_over(small(budget={"in_a_row": 1}), [good])


def test_files_are_rewound_and_a_torn_line_is_passed_over(tmp_path):
    files = TrainFiles.create(tmp_path / "t", small())
    assert files.progress() == [] and files.config() == small()
    for iteration in (1, 2, 3):
        files.append({"iteration": iteration, "env_steps": 10 * iteration, "score": 0.1})
    with open(tmp_path / "t" / "progress.jsonl", "a") as file:
        file.write('{"iteration": 4, "env_')
    assert [row["iteration"] for row in files.progress()] == [1, 2, 3]
    progress = tmp_path / "t" / "progress.jsonl"
    torn = progress.read_bytes()
    progress.write_text('{"iteration": 1, "env_steps": 10}\n')  # whole, of an earlier version, without score
    with pytest.raises(RunError, match=r"progress\.jsonl, line 1: not an evaluation"):
        files.progress()
    progress.write_bytes(torn)
    with pytest.raises(
        RunError, match=r"t cannot be resumed: no checkpoint is as it was written \(there is none"
    ):
        files.rewind()
    files.save(Writes(), 2)
    rows, place = files.rewind()
    assert rows == files.progress() and len(rows) == 2
    assert place == files.checkpoints()[0]
    with pytest.raises(ConfigError, match="is not empty: a run needs an empty directory"):
        TrainFiles.create(tmp_path / "t", small())
    with pytest.raises(ConfigError, match=r"not the directory of a training: it has no config\.yaml"):
        TrainFiles.open(tmp_path)
    (tmp_path / "trials").mkdir()
    with pytest.raises(ConfigError, match=r"resume its trials one by one, in .*/trials"):
        TrainFiles.open(tmp_path)


def test_a_row_has_what_there_is():
    assert as_row(1, 20, {}, {"score": 1.0}) == {"iteration": 1, "env_steps": 20, "score": 1.0}
    episodes = {"episode_return_mean": np.float64(2.5), "episode_len_mean": 7}
    row = as_row(2, 40, episodes, {"score": 0.5})
    assert row == {"iteration": 2, "env_steps": 40, "return": 2.5, "length": 7.0, "score": 0.5}
    json.dumps(row)


class Writes:
    """Something that RLlib would save."""

    def save_to_path(self, path: str) -> None:
        (Path(path) / "module").mkdir(parents=True)
        (Path(path) / "module" / "state.pkl").write_bytes(b"some weights")


def files_of(path: Path, iterations: int = 3) -> TrainFiles:
    """Return a training that was interrupted."""
    files = TrainFiles.create(path, small())
    for iteration in range(1, iterations + 1):
        files.save(Writes(), iteration)
        files.append({"iteration": iteration, "env_steps": 10 * iteration, "score": 0.1})
    return files


def test_a_training_whose_config_was_edited_or_cut_is_refused(tmp_path):
    files = files_of(tmp_path / "t")
    place, whole = tmp_path / "t" / "config.yaml", (tmp_path / "t" / "config.yaml").read_text()
    place.write_text(whole.replace("seed: 0", "seed: 4"))
    with pytest.raises(RunError, match=r"edited, or cut.*seed: 0 in the checkpoint, 4 in config\.yaml\. Put"):
        resume(tmp_path / "t")
    for count in range(1, len(whole.splitlines())):
        place.write_text("".join(whole.splitlines(keepends=True)[:count]))
        with pytest.raises((RunError, ConfigError)):
            files.config()
    place.write_text(whole)
    assert files.config() == small()


def _spoil(place: Path, how: str) -> None:
    match how:
        case "flipped":
            (place / "module" / "state.pkl").write_bytes(b"some weightr")
        case "missing file":
            (place / "module" / "state.pkl").unlink()
        case "no digests":
            (place / "digests.json").unlink()
        case _:
            shutil.rmtree(place)
            place.mkdir()


@pytest.mark.parametrize("how", ["flipped", "missing file", "no digests", "empty"])
def test_a_damaged_checkpoint_of_a_training_gives_way_to_the_one_before(tmp_path, how):
    files = files_of(tmp_path / "t")
    newest, older = files.checkpoints()
    _spoil(newest, how)
    rows, usable = files.rewind()
    assert ([row["iteration"] for row in rows], usable) == ([1, 2], older)
    assert (tmp_path / "t" / "checkpoints" / f"unusable-{newest.name}").is_dir()
    _spoil(older, how)
    with pytest.raises(RunError, match=r"no checkpoint is as it was written \(iteration-000002\)"):
        files.rewind()
    assert len(files.progress()) == 2


def test_an_evaluation_that_a_crash_kept_from_being_written_is_made_again(tmp_path):
    files = files_of(tmp_path / "t", 2)
    files.save(Writes(), 3)
    rows, usable = files.rewind()
    assert ([row["iteration"] for row in rows], usable and usable.name) == ([1, 2], "iteration-000002")


class Interrupted:
    """An algorithm whose second training is interrupted: by a signal, or by what is called."""

    local_replay_buffer = None

    def __init__(self, interrupt: Callable[[], object] | None = None) -> None:
        self.iterations = 0
        self.interrupt = interrupt or (lambda: os.kill(os.getpid(), signal.SIGTERM))

    def train(self) -> dict[str, Any]:
        self.iterations += 1
        if self.iterations == 2:
            self.interrupt()
        return {
            "training_iteration": self.iterations,
            "num_env_steps_sampled_lifetime": 200 * self.iterations,
            "env_runners": {},
        }

    def get_module(self) -> SimpleNamespace:
        """Return a module as RLlib's DQN has it; its policy always does the first action."""
        last = nn.Linear(8, 2)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([1.0, 0.0]))
        encoder, head = nn.Sequential(nn.Linear(1, 8), nn.ReLU()), nn.Sequential(last)
        parts = {
            name: SimpleNamespace(net=SimpleNamespace(mlp=m))
            for name, m in (("encoder", encoder), ("af", head))
        }
        return SimpleNamespace(**parts, uses_dueling=False)

    def stop(self) -> None: ...


@pytest.fixture
def without_rllib(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(training, "start_ray", lambda: None)
    monkeypatch.setattr(TrainFiles, "save", lambda *_: None)
    yield monkeypatch


def test_a_signal_keeps_the_evaluations_and_ends_the_tracking(
    tmp_path, without_rllib, caplog: pytest.LogCaptureFixture
) -> None:
    without_rllib.setattr(training, "_build", lambda config: Interrupted())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(SystemExit) as ended:
        train(small(tracking={"uri": uri}), tmp_path / "t")
    assert ended.value.code == 128 + signal.SIGTERM
    assert [row["iteration"] for row in TrainFiles.open(tmp_path / "t").progress()] == [1]
    kept = TrainedPolicy.load(tmp_path / "t" / "policy", INTERFACE)
    assert list(kept.acts(np.zeros((2, 1), np.float32))) == [0, 0]
    (run,) = MlflowClient(uri).search_runs(["1"])
    assert run.info.status == "KILLED"
    assert "interrupted; `fedray agent train --resume" in caplog.messages[-1]


def test_fedray_stop_ends_a_training_after_its_evaluation(tmp_path, without_rllib) -> None:
    asked: list[stopping.Asked] = []
    made = Interrupted(lambda: asked.append(stopping.stop(tmp_path / "t")))
    without_rllib.setattr(training, "_build", lambda config: made)
    with pytest.raises(SystemExit) as ended:
        budget = {"env_steps": 2000, "evaluate_every": 200, "in_a_row": 9}
        train(small(budget=budget), tmp_path / "t")
    assert ended.value.code == 128 + signal.SIGTERM and asked[0].what == "training"
    assert [row["iteration"] for row in TrainFiles.open(tmp_path / "t").progress()] == [1, 2]
    with pytest.raises(ConfigError, match="t does not run: there is nothing to stop"):
        stopping.stop(tmp_path / "t")


def test_what_stop_and_watch_say_of_trainings(tmp_path) -> None:
    files_of(tmp_path / "many" / "trials" / "a")
    with Lock(tmp_path / "many"), Lock(tmp_path / "many" / "trials" / "a"):
        assert stopping.stop(tmp_path / "many").what == "training"
        with pytest.raises(ConfigError, match=r"which end together: fedray stop .*many$"):
            stopping.stop(tmp_path / "many" / "trials" / "a")
    for path in (tmp_path / "many", tmp_path / "many" / "trials" / "a"):
        with pytest.raises(ConfigError, match="is of the training of an agent, and `watch` shows runs and"):
            look(path)


def points_of(uri: str, run: Any) -> list[tuple[int, float]]:
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "score")
    return [(point.step, point.value) for point in history]


@pytest.mark.parametrize("rows", [2, 3])
def test_sync_brings_mlflow_up_to_a_training(tmp_path, rows) -> None:
    """Of three evaluations, two of which exhaust the budget of 20 steps or not."""
    files_of(tmp_path / "t", rows)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    over = rows == 3
    config = small(budget={"env_steps": 30, "evaluate_every": 10, "in_a_row": 9})
    with files_of(tmp_path / "u", rows).writing("config.yaml") as place:
        sealed.write(place, config.to_tree())
    for added in (True, False):
        for name in ("t", "u"):
            (done,) = sync(tmp_path / name, uri)
            assert done.status == ("FINISHED" if over and name == "u" else "KILLED")
            assert (done.points > 0) == added
    found = {run.info.run_name: run for run in MlflowClient(uri).search_runs(["1"])}
    assert set(found) == {"t", "u"} and found["t"].info.status == "KILLED"
    assert points_of(uri, found["u"]) == [(10 * n, 0.1) for n in range(1, rows + 1)]
    assert found["u"].data.tags["process"] == "rate_search"


def test_sync_brings_mlflow_up_to_several_trainings_and_the_run_above_them(tmp_path) -> None:
    from typer.testing import CliRunner

    from fedray.cli import app

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "many" / "trials").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no training has begun here"):
        sync(tmp_path / "many", uri)
    for name in ("a", "b"):
        files_of(tmp_path / "many" / "trials" / name)
    for _ in range(2):
        shown = CliRunner().invoke(app, ["sync", str(tmp_path / "many"), "--uri", uri])
        assert shown.exit_code == 0, shown.output
        assert shown.output.count("KILLED") == 3
    found = {run.info.run_name: run for run in MlflowClient(uri).search_runs(["1"])}
    assert set(found) == {"many", "a", "b"}
    above = found["many"].info.run_id
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("a", "b")} == {above}
    with Lock(tmp_path / "many" / "trials" / "b"), pytest.raises(RunError, match="still running"):
        sync(tmp_path / "many", uri)


def test_a_training_that_is_running_is_not_resumed(tmp_path):
    files_of(tmp_path / "t")
    with Lock(tmp_path / "t"), pytest.raises(RunError, match="t: this training is still running"):
        resume(tmp_path / "t")


def test_a_policy_is_never_lost_between_two(tmp_path):
    files = files_of(tmp_path / "t")
    (tmp_path / "t" / ".policy.old").mkdir()  # a crash left it so, in the midst of the replacement
    assert TrainFiles.open(tmp_path / "t").policy.is_dir()
    assert files.policy.is_dir()


def test_only_the_newest_two_checkpoints_are_kept(tmp_path):
    files = TrainFiles.create(tmp_path / "t", small())
    for iteration in range(1, 5):
        files.save(Writes(), iteration)
    assert [path.name for path in files.checkpoints()] == ["iteration-000004", "iteration-000003"]
    assert len(list((tmp_path / "t" / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a YAML file, or --resume"),
        ({"file": Path("x.yaml"), "resume": Path("y")}, "give either a YAML file, or --resume"),
        ({"resume": Path("y"), "overrides": ["seed=1"]}, "it takes neither --out nor key=value"),
        ({"resume": Path("nowhere")}, "nowhere is not the directory of a training"),
        ({"file": Path("nowhere.yaml")}, r"nowhere\.yaml: cannot be read"),
    ],
)
def test_a_command_that_cannot_be_run_starts_nothing(options, message, in_tmp):
    with pytest.raises(ConfigError, match=message):
        command(**{"file": None, "overrides": None, "out_dir": None, "resume": None, "ship": False} | options)
    assert list(in_tmp.iterdir()) == []


# ── with RLlib


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[tuple[Path, list[Row]]]:
    """A training of two evaluations, tracked."""
    path = tmp_path_factory.mktemp("trained")
    config = small(tracking={"uri": f"sqlite:///{path}/mlflow.db", "experiment": "agents"})
    told: list[Row] = []
    rows = train(config, path / "t", on_evaluation=told.append)
    assert told == rows
    yield path, rows


@pytest.mark.slow
def test_what_a_training_leaves(trained):
    path, rows = trained
    files = TrainFiles.open(path / "t")
    assert files.progress() == rows and [row["iteration"] for row in rows] == [1, 2]
    assert rows[0]["env_steps"] >= 200 and rows[1]["env_steps"] >= 400
    assert {"return", "length", "score", "agreement/monotone", "gap/monotone"} <= rows[1].keys()
    assert [place.name for place in files.checkpoints()] == ["iteration-000002", "iteration-000001"]
    assert (path / "t" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not [place for place in (path / "t").rglob(".*") if place.name.endswith(".writing")]


@pytest.mark.slow
def test_the_policy_it_leaves_decides_as_it_was_judged(trained):
    path, rows = trained
    assert policy_problem(path / "t" / "policy", INTERFACE) is None
    policy = TrainedPolicy.load(path / "t" / "policy", INTERFACE)
    best = max(row["score"] for row in rows)
    assert policy.about["measures"]["score"] == best
    assert RateSearchProcess(states=20, problems=5).judge(policy.acts) == policy.about["measures"]
    assert policy.about["config_digest"] == TrainFiles.open(path / "t").config().digest
    assert "tracking" not in policy.about["config"]


@pytest.mark.slow
def test_mlflow_has_the_evaluations_and_the_policy(trained):
    path, rows = trained
    client = MlflowClient(tracking_uri=f"sqlite:///{path}/mlflow.db")
    experiment = client.get_experiment_by_name("agents")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["algorithm.name"] == "dqn"
    history = client.get_metric_history(run.info.run_id, "score")
    assert [(point.step, point.value) for point in history] == [
        (row["env_steps"], row["score"]) for row in rows
    ]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"policy", "curve.png"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_policy(trained, tmp_path):
    path, rows = trained
    again = train(small(), tmp_path / "again")
    assert again == rows
    assert module_of(tmp_path / "again") == module_of(path / "t")
    train(small(seed=1), tmp_path / "other")
    assert module_of(tmp_path / "other") != module_of(path / "t")


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_its_counters(trained, tmp_path):
    _, uninterrupted = trained

    def interrupt(row: Row) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path / "t", on_evaluation=interrupt)
    files = TrainFiles.open(tmp_path / "t")
    assert files.progress() == uninterrupted[:1] and policy_problem(files.policy, INTERFACE) is None
    # killed between a checkpoint and the end of the evaluation after it
    files.append({"iteration": 2, "env_steps": 999, "score": 9.0})
    rows = resume(tmp_path / "t")
    assert rows[0] == uninterrupted[0] and [row["iteration"] for row in rows] == [1, 2]
    assert 400 <= rows[1]["env_steps"] < 999
    assert files.progress() == rows
    assert resume(tmp_path / "t") == rows  # over: nothing is done


@pytest.mark.slow
def test_ppo_trains_and_its_policy_is_used_alike(ray_local, tmp_path):
    algorithm = {"name": "ppo", "hidden": [8], "batch": 200, "minibatch": 50, "epochs": 2}
    train(small(algorithm=algorithm, budget={"env_steps": 200, "evaluate_every": 200}), tmp_path / "t")
    policy = TrainedPolicy.load(tmp_path / "t" / "policy", INTERFACE)
    assert policy.about["algorithm"] == "ppo"
    assert RateSearchProcess(states=20, problems=5).judge(policy.acts) == policy.about["measures"]


@pytest.mark.slow
def test_trials_of_tune_each_leave_a_training_and_the_best_policy_is_kept(ray_local, tmp_path):
    budget = {"env_steps": 200, "evaluate_every": 200}
    plan = Plan("seeds", {f"seed={seed}": small(seed=seed, budget=budget) for seed in (0, 1)}, concurrent=2)
    told: list[str] = []
    lock = RLock()  # what shows progress cannot be pickled, and need not

    def show(name: str, row: Row) -> None:
        with lock:
            told.append(name)

    best = train_all(plan, tmp_path / "t", show)
    assert sorted(told) == ["seed=0", "seed=1"]
    scores = {
        name: TrainFiles.open(tmp_path / "t" / "trials" / name).progress()[-1]["score"] for name in told
    }
    assert scores[best] == max(scores.values())
    assert module_of(tmp_path / "t") == module_of(tmp_path / "t" / "trials" / best)
    shutil.rmtree(tmp_path / "t")
