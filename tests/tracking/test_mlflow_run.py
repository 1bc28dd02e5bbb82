"""MLflow, for real, on SQLite in a temporary folder; servers are small stand-ins, but for one real one."""

import json
import pickle
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedray.config.uri import check_uri
from fedray.errors import ConfigError
from fedray.models import build_model
from fedray.tracking import store as stores
from fedray.tracking.mlflow_run import MLflowTracker
from fedray.tracking.parent import finish_parent, parent_run
from fedray.tracking.provenance import run_tags
from fedray.tracking.shipping import name_of
from fedray.tracking.store import Store, prepare_store
from fedray.tracking.ui import ui_command
from fedray.types import RoundReport

CONFIG = {"rounds": 3, "method": {"name": "frlp", "density": 0.1, "prune_rounds": (20, 40)}, "seed": None}


def report(round: int, **metrics: float) -> RoundReport:
    return RoundReport(round, {"val/accuracy": 0.5, "bytes/up": 10.0 * round, **metrics})


def tracker_of(store: Store, **more: Any) -> MLflowTracker:
    return MLflowTracker(store, **{"run_name": "one", "params": CONFIG, "tags": {"method": "frlp"}} | more)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("tracking") / "new" / "my runs #1"
    store = prepare_store(f"sqlite:///{folder}/mlflow.db", "pruning")
    assert store.problem is None
    return store


@pytest.fixture
def client(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri)


# ── the URI ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "uri",
    [
        "none",
        "sqlite:///mlflow.db",
        "sqlite:////data/of mine/mlflow.db",
        "http://127.0.0.1:5000",
        "https://me:secret@mlflow.example.org/prefix",
    ],
)
def test_check_uri_takes_what_can_be_used_and_touches_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_uri(uri) == uri
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///folder/", "three slashes"),
        ("sqlite:///:memory:", "three slashes"),
        ("sqlite:///a%20b.db", "without ?"),
        ("sqlite:///a.db?timeout=1", "without ?"),
        ("http://", "no host"),
        ("http://host:99999", "port"),
        ("http://host:x", "port"),
        ("file:///tmp/mlruns", "plain folders"),
        ("./mlruns", "plain folders"),
        ("", "plain folders"),
        ("non", "did you mean 'none'"),
        ("sqlit:///a.db", "did you mean 'sqlite'"),
        ("postgresql://host/runs", "MLflow server in front"),
        ("databricks://profile", "unknown scheme 'databricks'"),
    ],
)
def test_check_uri_refuses_the_rest_and_says_what_is_allowed(
    uri: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for refuse in (check_uri, lambda uri: prepare_store(uri, "x"), lambda uri: ui_command(uri, 5000)):
        with pytest.raises(ConfigError) as caught:
            refuse(uri)
        message = str(caught.value)
        assert message.startswith(f"tracking.uri: {uri!r}") and says in message and "sqlite:///" in message
    assert not list(tmp_path.iterdir())


def test_no_message_holds_a_password() -> None:
    with pytest.raises(ConfigError) as caught:
        check_uri("http://me:secret@host:99999")
    assert "secret" not in str(caught.value) and "host:99999" in str(caught.value)
    problem = prepare_store(f"http://me:secret@127.0.0.1:{closed_port()}", "x").problem
    assert problem is not None and "secret" not in problem and "127.0.0.1" in problem


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_store_is_made_once_with_its_artifacts_beside_it(store: Store, client: Any) -> None:
    folder = Path(store.uri.removeprefix("sqlite:///")).parent
    assert {path.name for path in folder.iterdir()} == {
        "mlflow.db",
        "mlartifacts",
    }  # nothing is left of its making
    assert prepare_store(store.uri, "pruning") == store
    assert pickle.loads(pickle.dumps(store)) == store
    experiment = client.get_experiment(store.experiment_id)
    assert experiment.name == "pruning"
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()


def test_a_relative_path_counts_from_the_working_directory_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "50% of b?d #1"
    odd.mkdir()
    monkeypatch.chdir(odd)
    store = prepare_store("sqlite:///db/mlflow.db", "x")
    assert store.problem is None and (odd / "db" / "mlflow.db").stat().st_size > 0
    tracker = tracker_of(store)
    tracker.finish("FINISHED", [])
    assert tracker.run_id is not None and not tracker.warnings


def test_a_store_that_cannot_be_made_is_a_problem_and_not_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = prepare_store(f"sqlite:///{tmp_path}/file/mlflow.db", "x")
    assert store.experiment_id is None and store.problem is not None
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        store.problem
    ]
    tracker = tracker_of(store)
    assert tracker.warnings == [store.problem] and tracker.run_id is None


def test_a_deleted_experiment_is_told(store: Store, client: Any) -> None:
    client.delete_experiment(prepare_store(store.uri, "gone").experiment_id)
    problem = prepare_store(store.uri, "gone").problem
    assert problem is not None and "tracking.experiment" in problem


def test_none_costs_nothing() -> None:
    store = prepare_store("none", "x")
    assert store == Store("none")
    tracker = tracker_of(store)
    tracker.log_round(report(1))
    tracker.finish("FINISHED", [], model=lambda: pytest.fail("the model was built"))
    assert tracker.run_id is None and tracker.warnings == []
    assert parent_run(store, "sweep", {}, {}) is None
    finish_parent(store, None, "FINISHED")


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────


def test_params_are_dotted_and_each_round_is_one_batch(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    log_batch = type(client).log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **more: Any) -> None:
        batches.append(len(metrics))
        log_batch(self, run_id, metrics=metrics, **more)

    tracker = tracker_of(
        store, tags=run_tags(method="frlp", dataset="mnist", model="cnn", digest="0123456789ab")
    )
    monkeypatch.setattr(type(client), "log_batch", counted)
    for round in range(4):
        tracker.log_round(report(round, **{"val/loss": float("nan"), "train/loss": float("inf")}))
    tracker.finish("FINISHED")
    assert sum(batches) == 8 and len(batches) <= 4 and tracker.warnings == []

    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "one")
    assert run.data.params == {
        "rounds": "3",
        "method.name": "frlp",
        "method.density": "0.1",
        "method.prune_rounds": "[20, 40]",
        "seed": "null",
    }
    assert set(run.data.metrics) == {"val/accuracy", "bytes/up"}
    history = client.get_metric_history(tracker.run_id, "bytes/up")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0)]
    assert run.data.tags["method"] == "frlp" and run.data.tags["dataset"] == "mnist"
    assert run.data.tags["config_digest"] == "0123456789ab"
    assert run.data.tags["fedray_version"]


def test_no_param_and_no_tag_is_too_long_or_too_many(store: Store, client: Any) -> None:
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 7000, "a" * 300: 1, "deep": {"what?": {}}}
    tracker = tracker_of(store, params=params, tags={"long": "x" * 9000})
    tracker.finish("FINISHED")
    assert tracker.warnings == []
    run = client.get_run(tracker.run_id)
    assert len(run.data.params) == 253 and run.data.params["p249"] == "249"
    assert len(run.data.params["long"]) == 6000 and len(run.data.tags["long"]) == 5000
    (odd,) = (key for key in run.data.params if key.startswith("deep."))
    assert run.data.params[odd] == "{}"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("ab./ -_:?é\n", max_size=260), max_size=5, unique=True))
def test_every_key_becomes_a_name_of_its_own(keys: list[str]) -> None:
    from mlflow.utils.validation import _validate_param

    names = [name_of(key) for key in keys]
    for name in names:
        _validate_param(name, "1")
    assert len(set(names)) == len(keys)
    assert name_of("method.density") == "method.density"
    assert name_of("val/accuracy") == "val/accuracy"


def test_trials_are_found_by_their_sweep(store: Store, client: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("a,b")
    parent = parent_run(store, "sweep", {"kind": "sweep"}, {"space": {"seed": [0, 1]}})
    trials = [tracker_of(store, run_name=f"trial {i}", parent_run_id=parent) for i in range(2)]
    trials[0].finish("FINISHED")
    trials[1].finish("FAILED")
    assert client.get_run(parent).info.status == "RUNNING"
    finish_parent(store, parent, "KILLED", [table])

    children = client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {(r.info.run_name, r.info.status) for r in children} == {
        ("trial 0", "FINISHED"),
        ("trial 1", "FAILED"),
    }
    run = client.get_run(parent)
    assert (run.info.run_name, run.info.status) == ("sweep", "KILLED")
    assert run.data.params == {"space.seed": "[0, 1]"}
    assert [f.path for f in client.list_artifacts(parent)] == ["table.csv"]


def test_artifacts_and_the_model_come_back_with_the_same_bits(
    store: Store, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "state").write_bytes(b"123")
    (tmp_path / "config.yaml").write_text("rounds: 3")
    spec = build_model("lenet5", (1, 28, 28), 10)
    module = spec.bind(spec.init(seed=1).flat)
    before = mlflow.get_tracking_uri()

    tracker = tracker_of(store)
    tracker.finish(
        "FINISHED",
        [tmp_path / "config.yaml", tmp_path / "checkpoints", tmp_path / "nowhere"],
        model=lambda: module,
    )
    assert tracker.warnings == []
    assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"config.yaml", "checkpoints"}
    got = client.download_artifacts(tracker.run_id, "checkpoints/5/state", str(tmp_path))
    assert Path(got).read_bytes() == b"123"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    loaded = mlflow.pytorch.load_model(f"runs:/{tracker.run_id}/model")
    assert isinstance(loaded, nn.Module) and not loaded.training
    want, have = module.state_dict(), loaded.state_dict()
    assert want.keys() == have.keys() and all(torch.equal(want[k], have[k]) for k in want)


def test_a_model_that_cannot_be_saved_is_a_warning(store: Store, client: Any) -> None:
    module, lock = nn.Linear(1, 1), threading.Lock()
    module.register_forward_hook(lambda *_: lock.locked())  # cannot be pickled
    tracker = tracker_of(store)
    tracker.finish("FINISHED", model=lambda: module)
    (warning,) = tracker.warnings
    assert "no model" in warning
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert client.list_artifacts(tracker.run_id) == []


def test_a_resumed_run_has_each_round_once(store: Store, client: Any) -> None:
    first = tracker_of(store)
    for round in range(1, 6):
        first.log_round(report(round))
    first.finish("FAILED")

    # the checkpoint was older than the last round that was logged
    again = tracker_of(store, resume=first.run_id, params={"rounds": 99}, parent_run_id="other")
    assert again.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    for round in range(4, 8):
        again.log_round(report(round))
    again.log_round(RoundReport(7, {"test/accuracy": 0.7}))
    again.finish("FINISHED")

    assert again.warnings == []
    steps = [m.step for m in client.get_metric_history(first.run_id, "val/accuracy")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6, 7]
    run = client.get_run(first.run_id)
    assert run.data.metrics["test/accuracy"] == 0.7
    assert run.data.params["rounds"] == "3" and "mlflow.parentRunId" not in run.data.tags


def test_a_run_that_is_not_there_is_made_anew_and_a_deleted_one_restored(store: Store, client: Any) -> None:
    tracker = tracker_of(store, resume="f" * 32)
    tracker.log_round(report(1))
    tracker.finish("FINISHED")
    assert tracker.run_id not in (None, "f" * 32) and tracker.is_complete and tracker.points == 2
    assert client.get_run(tracker.run_id).data.params["method.density"] == "0.1"
    client.delete_run(tracker.run_id)
    again = tracker_of(store, resume=tracker.run_id)
    again.finish("KILLED")
    info = client.get_run(tracker.run_id).info
    assert (info.lifecycle_stage, info.status, again.warnings) == ("active", "KILLED", [])


def test_a_run_that_must_be_there_is_not_made(store: Store) -> None:
    tracker = tracker_of(store, resume="f" * 32, params=None)
    assert tracker.run_id is None and len(tracker.warnings) == 1


def test_what_a_resumed_run_lacks_is_added_wherever_it_is(store: Store, client: Any) -> None:
    first = tracker_of(store, params={"rounds": 3}, tags={})
    for round in (1, 2, 5):  # 3 and 4 were lost
        first.log_round(report(round))
    first.finish("FAILED")
    again = tracker_of(store, resume=first.run_id)
    for round in range(1, 7):
        again.log_round(report(round))
    again.tag({"trials_failed": "1"})
    again.finish("FINISHED")
    assert again.points == 2 * 3
    steps = [m.step for m in client.get_metric_history(first.run_id, "bytes/up")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    run = client.get_run(first.run_id)
    assert (run.data.params["method.density"], run.data.tags["method"]) == ("0.1", "frlp")
    assert run.data.tags["trials_failed"] == "1"


TRIAL = """
import sys
from fedray.tracking.mlflow_run import MLflowTracker
from fedray.tracking.store import prepare_store
from fedray.types import RoundReport

assert "mlflow" not in sys.modules
store = prepare_store(sys.argv[1], "race")
assert store.problem is None, store.problem
tracker = MLflowTracker(store, run_name=sys.argv[2], params={}, tags={})
for round in range(30):
    tracker.log_round(RoundReport(round, {f"m/{i}": float(round) for i in range(20)}))
tracker.finish("FINISHED")
assert not tracker.warnings, tracker.warnings
"""


@pytest.mark.slow
def test_two_processes_make_one_store_and_log_into_it_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    trials = [subprocess.Popen([sys.executable, "-c", TRIAL, uri, name]) for name in "ab"]
    assert [trial.wait(250) for trial in trials] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    store = prepare_store(uri, "race")
    client = stores.client_of(store.uri)
    runs = client.search_runs([store.experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {("a", "FINISHED"), ("b", "FINISHED")}
    for run in runs:
        assert len(client.get_metric_history(run.info.run_id, "m/7")) == 30


# ── servers that fail ────────────────────────────────────────────────────────────────────────────────────


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server(ThreadingHTTPServer):
    """Just enough of MLflow's REST interface to open a run; `failing` makes it answer 500 from then on."""

    daemon_threads, failing = True, False

    def __enter__(self) -> "Server":
        self.batches: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
        if path == "runs/log-batch" and not self.server.failing:
            self.server.batches.append(json.loads(body))
        answers: dict[str, object] = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "7", "lifecycle_stage": "active"}},
            "runs/create": {"run": {"info": {"run_id": "abc", "run_uuid": "abc"}, "data": {}}},
        }
        text = json.dumps(answers.get(path, {})).encode()
        self.send_response(500 if self.server.failing and path != "/health" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: object) -> None: ...


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_a_server_that_is_not_there_is_given_up_fast(caplog: pytest.LogCaptureFixture) -> None:
    import mlflow  # noqa: F401 (its import is not what is timed)

    started = time.monotonic()
    store = prepare_store(f"http://127.0.0.1:{closed_port()}", "x")
    tracker = tracker_of(store)
    tracker.log_round(report(1))
    tracker.finish("FINISHED")
    assert time.monotonic() - started < 6
    assert store.problem is not None and tracker.warnings == [store.problem]
    assert [record.name for record in caplog.records] == [stores.__name__]


def test_a_server_that_goes_away_ends_the_tracking_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        store = prepare_store(server.uri, "x")
        assert store == Store(server.uri, "7", experiment="x")
        tracker = tracker_of(store)
        assert tracker.run_id == "abc"
        tracker.log_round(report(1))
        wait_for(lambda: len(server.batches) == 2)  # params, round 1
    caplog.clear()
    started = time.monotonic()
    for round in range(2, 50):
        tracker.log_round(report(round))
    tracker.finish("FINISHED", [Path(__file__)], model=lambda: nn.Linear(1, 1))
    assert time.monotonic() - started < 6
    (warning,) = tracker.warnings
    assert "sent when it answers again" in warning and store.uri in warning
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_a_server_that_only_fails_never_makes_the_run_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        tracker = tracker_of(prepare_store(server.uri, "x"))
        server.failing = True
        monkeypatch.setattr(stores, "ANSWER_S", 0.5)
        started = time.monotonic()
        tracker.log_round(report(1))
        tracker.log_round(report(2))
        assert time.monotonic() - started < 0.2
        tracker.finish("FINISHED")
        assert time.monotonic() - started < 2
        (warning,) = tracker.warnings
        assert "500" in warning


def test_a_locked_database_never_makes_the_run_wait(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_of(store)
    monkeypatch.setattr(stores, "ANSWER_S", 0.5)
    with closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        tracker.log_round(report(1))
        assert time.monotonic() - started < 0.2
        tracker.finish("FINISHED")
        assert time.monotonic() - started < 2
    assert len(tracker.warnings) == 1 and client.get_run(tracker.run_id).info.status == "RUNNING"


def test_a_database_that_is_not_on_this_machine_is_not_made_there(tmp_path: Path) -> None:
    tracker = tracker_of(Store(f"sqlite:///{tmp_path}/of/the/driver.db", "1"))
    (warning,) = tracker.warnings
    assert "not on this machine" in warning
    assert not list(tmp_path.iterdir())


# ── the UI ───────────────────────────────────────────────────────────────────────────────────────────────


def test_there_is_no_ui_for_what_is_not_there(tmp_path: Path) -> None:
    for uri, says in (
        ("none", "nothing is tracked"),
        ("http://host", "shows its runs itself"),
        (f"sqlite:///{tmp_path}/a.db", "run something first"),
    ):
        with pytest.raises(ConfigError, match=says):
            ui_command(uri, 5000)


@pytest.mark.slow
def test_the_ui_starts_and_shows_runs_and_takes_them_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    port = closed_port()
    (tmp_path / "note.txt").write_text("hello")
    tracker = tracker_of(store)
    tracker.finish("FINISHED", [tmp_path / "note.txt"])

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bytes(answer.read())

    server = subprocess.Popen(ui_command(store.uri, port), cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                assert get("/health") == b"OK"
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        experiments = json.loads(get("/api/2.0/mlflow/experiments/search?max_results=100"))["experiments"]
        assert "pruning" in {e["name"] for e in experiments}
        assert get(f"/get-artifact?path=note.txt&run_uuid={tracker.run_id}") == b"hello"
        assert b"<html" in get("/")

        remote = prepare_store(f"http://127.0.0.1:{port}", "remote")
        assert remote.problem is None and prepare_store(remote.uri, "remote") == remote
        module = nn.Linear(2, 3)
        first = tracker_of(remote, parent_run_id=parent_run(remote, "sweep", {}, {}))
        for round in range(3):
            first.log_round(report(round))
        first.finish("FAILED")
        again = tracker_of(remote, resume=first.run_id)
        for round in range(2, 4):
            again.log_round(report(round))
        again.finish("FINISHED", [tmp_path / "note.txt"], model=lambda: module)
        assert first.warnings == again.warnings == []

        monkeypatch.setenv("MLFLOW_TRACKING_URI", remote.uri)
        client = mlflow.MlflowClient()
        run = client.get_run(first.run_id)
        assert run.info.status == "FINISHED" and run.data.params["method.density"] == "0.1"
        assert [m.step for m in client.get_metric_history(first.run_id, "bytes/up")] == [0, 1, 2, 3]
        assert {f.path for f in client.list_artifacts(first.run_id)} == {"note.txt"}
        (model,) = client.search_logged_models([run.info.experiment_id])
        assert model.name == "model" and model.source_run_id == first.run_id
        loaded = mlflow.pytorch.load_model(f"runs:/{first.run_id}/model")
        assert torch.equal(loaded.weight, module.weight)
    finally:
        server.terminate()
        server.wait(20)
    with pytest.raises(OSError):
        get("/health")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
