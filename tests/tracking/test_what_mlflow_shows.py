"""A run in MLflow as its users look at it: metrics, data set, model, name; and after its folder was moved."""

import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedray.experiment.history import History
from fedray.experiment.run import run
from fedray.report.reading import store_of
from fedray.sweeps.sync import sync
from fedray.tracking.shown import shown_params, trial_names
from fedray.tracking.store import prepare_store
from fedray.tracking.ui import ui_command
from tests.experiment import tiny


def tracked(folder: Path, name: str, **changes: Any) -> History:
    where = {"tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    return run(tiny.config(where | changes), out=folder / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown") / "runs"
    tracked(folder, "one", method={"name": "staged", "density": 0.3})
    return folder


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def run_of(folder: Path, name: str) -> Any:
    import json

    known = json.loads((folder / name / "mlflow.json").read_text())
    return client_of(folder).get_run(known["run_id"])


def weights_of(module: Any) -> str:
    layers = [tensor.detach().numpy().astype("<f4").tobytes() for tensor in module.parameters()]
    return sha256(b"".join(layers)).hexdigest()


def test_every_metric_of_the_result_has_its_name_and_value(home: Path) -> None:
    import json

    result = json.loads((home / "one" / "result.json").read_text())
    shown = run_of(home, "one")
    expected = {key: value for key, value in result.items() if "/" in key and value is not None}
    assert {"test/accuracy", "clients/accuracy_mean", "total/bytes/up", "total/flops/clients"} <= set(
        expected
    )
    assert {key: shown.data.metrics[key] for key in expected} == expected
    assert shown.data.tags["weights_sha256"] == result["weights_sha256"]


def test_a_run_has_a_name_that_tells_it_and_no_parameter_without_a_value(home: Path) -> None:
    shown = run_of(home, "one")
    assert shown.info.run_name == "staged digits mlp s0"
    assert shown.data.params["method.density"] == "0.3"
    assert not {"null", "{}"} & set(shown.data.params.values())
    assert shown_params({"a": None, "b": {"c": None}, "d": 0, "e": False, "f": []}) == {
        "d": 0,
        "e": False,
        "f": [],
    }


def test_names_of_trials_begin_with_the_method_and_tell_what_differs() -> None:
    methods: list[dict[str, Any]] = [{"name": "staged", "density": 0.1}, {"name": "fedavg"}]
    configs = {str(k): tiny.config(method=m, seed=k) for k, m in enumerate(methods)}
    points = [{"method": m, "seed": k} for k, m in enumerate(methods)]
    assert trial_names(points, configs) == {"0": "staged density=0.1 s0", "1": "fedavg s1"}
    flat = [{"clients.cohort": 2}, {"clients.cohort": 3}]
    configs = {str(k): tiny.config(change) for k, change in enumerate(flat)}
    assert trial_names(flat, configs) == {"0": "fedavg cohort=2", "1": "fedavg cohort=3"}


def test_the_data_set_is_an_input_with_each_part_as_its_context(home: Path) -> None:
    inputs = run_of(home, "one").inputs.dataset_inputs
    parts = {entry.tags[0].value: entry.dataset for entry in inputs}
    assert set(parts) == {"training", "validation", "test"}
    assert {part.name for part in parts.values()} == {"digits"}
    assert len({part.digest for part in parts.values()}) == 3
    assert '"num_rows": 360' in parts["test"].profile and "Kaynak" in parts["test"].source
    assert "[-1, 1, 8, 8]" in parts["training"].schema.replace("\\", "")


def test_another_seed_is_the_same_test_set_and_other_training_data(home: Path) -> None:
    tracked(home, "two", seed=1)
    digests = [
        {entry.tags[0].value: entry.dataset.digest for entry in run_of(home, name).inputs.dataset_inputs}
        for name in ("one", "two")
    ]
    assert digests[0]["test"] == digests[1]["test"]
    assert digests[0]["training"] != digests[1]["training"]


def logged(folder: Path, run: Any) -> list[Any]:
    found = client_of(folder).search_logged_models([run.info.experiment_id])
    return [model for model in found if model.source_run_id == run.info.run_id]


def test_the_model_is_logged_with_the_metrics_and_loads_with_the_same_bits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    shown = run_of(home, "one")
    (model,) = logged(home, shown)
    assert str(model.status) == "READY" and model.tags["method"] == "staged"
    values = {metric.key: metric.value for metric in model.metrics}
    assert values == shown.data.metrics
    assert [out.model_id for out in shown.outputs.model_outputs] == [model.model_id]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    for uri in (f"models:/{model.model_id}", f"runs:/{shown.info.run_id}/model"):
        assert weights_of(mlflow.pytorch.load_model(uri)) == shown.data.tags["weights_sha256"]


def test_sync_logs_no_second_model_and_no_second_point(home: Path) -> None:
    before = run_of(home, "one")
    history = client_of(home).get_metric_history(before.info.run_id, "val/accuracy")
    sync(home / "one")
    assert len(logged(home, before)) == 1
    assert client_of(home).get_metric_history(before.info.run_id, "val/accuracy") == history


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_artifacts_stay_reachable_when_the_folder_is(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    old, new = tmp_path / "old", tmp_path / "another place" / "new"
    tracked(old, "one")
    old_uri = run_of(old, "one").info.artifact_uri
    new.parent.mkdir()
    if how == "moved":
        shutil.move(old, new)
    else:
        shutil.copytree(old, new)
    store = store_of(new / "one")
    assert store == f"sqlite:///{new}/mlflow.db"
    ui_command(store, 5000)
    shown = run_of(new, "one")
    got = client_of(new).download_artifacts(shown.info.run_id, "result.json", str(tmp_path))
    assert Path(got).read_bytes() == (new / "one" / "result.json").read_bytes()
    (model,) = logged(new, shown)
    assert shown.info.artifact_uri.startswith(new.as_uri())
    assert model.artifact_location.startswith(new.as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    loaded = mlflow.pytorch.load_model(f"models:/{model.model_id}")
    assert weights_of(loaded) == shown.data.tags["weights_sha256"]
    # another process, as for a user: MLflow remembers in each where the artifacts of a run are
    subprocess.run([sys.executable, "-m", "fedray.cli", "sync", str(new / "one")], check=True)
    assert old.exists() == (how == "copied")  # nothing was written to the old place
    tracked(new, "two", seed=1)
    assert run_of(new, "two").info.artifact_uri.startswith(new.as_uri())
    if how == "copied":
        assert run_of(old, "one").info.artifact_uri == old_uri
        assert len(client_of(old).search_runs(["1"])) == 1


def test_a_database_without_its_artifacts_keeps_their_place(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    tracked(old, "one")
    new.mkdir()
    shutil.copy(old / "mlflow.db", new / "mlflow.db")
    assert prepare_store(f"sqlite:///{new}/mlflow.db", "fedray").problem is None
    known = run_of(old, "one").info
    assert client_of(new).get_run(known.run_id).info.artifact_uri == known.artifact_uri
