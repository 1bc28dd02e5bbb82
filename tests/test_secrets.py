"""No secret of the environment or of an address is in a file, in MLflow, in Ray's logs or on the terminal."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.config.places import KEY, SECRET, absolute_place
from fedray.config.uri import PASSWORD, USER
from fedray.errors import ClientError, ConfigError, FedrayError, RunError, without_secrets
from fedray.experiment import cluster
from fedray.federation.faults import fault_of
from fedray.methods.fedavg import FedAvg
from fedray.sweeps.space import Sweep
from fedray.sweeps.tune import attempt
from tests.experiment import tiny

MARK = "s3cr3t"
NAMES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
    "MY_DB_PASSWORD",
)
TELLS = """
import os
from dataclasses import dataclass
from fedray.methods.fedavg import FedAvg
from fedray.methods import METHODS

@dataclass(frozen=True, kw_only=True)
class Tells(FedAvg):
    \"\"\"A client that raises with all that it knows.\"\"\"
    def client_update(self, task, client):
        if client.id == 3:
            raise ValueError(f"{dict(os.environ)} at http://me:s3cr3t-x@host/x")
        return super().client_update(task, client)

METHODS["tells"] = Tells
"""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, f"{MARK}-of-{name.lower()}")
    monkeypatch.setenv(USER, "me")


def holding(*folders: Path) -> list[str]:
    """Return the files that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


def test_secrets_are_told_by_the_names_of_variables(secrets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("SHORT_TOKEN", "of")
    told = without_secrets(f"{dict(os.environ)} http://me:{MARK}@host/x and mail me@host")
    assert MARK not in told and "<WANDB_API_KEY>" in told
    assert "http://host/x and mail me@host" in told
    assert "/home/me/token" in told and "'disabled'" in told and " of " not in told.replace("<", "")


@pytest.mark.parametrize("kind", [FedrayError, ConfigError, RunError])
def test_no_message_shows_them(kind: Any, secrets: None) -> None:
    assert MARK not in str(kind(f"the store said: {os.environ['AWS_SECRET_ACCESS_KEY']}"))
    assert MARK not in str(ClientError(1, 2, f"the store said: {os.environ['AWS_SECRET_ACCESS_KEY']}"))


def test_no_traceback_shows_them(secrets: None, tmp_path: Path) -> None:
    def body(name: str) -> None:
        raise ValueError(f"{dict(os.environ)} http://me:{MARK}@host/x")

    with pytest.raises(RunError) as caught:
        attempt(body, "t", tmp_path)
    assert MARK not in str(caught.value) and not holding(tmp_path)
    with pytest.raises(ValueError) as raised:
        body("t")
    fault = fault_of(0, raised.value)
    assert MARK not in fault.cause + fault.traceback


LOGINS = (
    f"s3://b/p?endpoint_override=http://me:{MARK}@host:9",
    f"s3://b/p?endpoint_override=http%3A//me:{MARK}%40host:9",
    f"s3://b/p?secret_key={MARK}",
    f"s3://b/p?access_key=me&secret_key={MARK}",
    f"s3://me:{MARK}%40b/p",
    f"s3://me:{MARK}@b/p?session_token={MARK}",
    f"me:{MARK}@b/p",
    f"s3:me:{MARK}@b/p",
    f"me%3A{MARK}@b/p",
    f"s3:/me:{MARK}@b/p",
    f"https://b.s3.amazonaws.com/p?X-Amz-Signature={MARK}",
    f"abfs://c:{MARK}@account/p?account_key={MARK}",
)


@pytest.mark.parametrize("text", LOGINS)
def test_a_login_in_the_wrong_place_of_storage_is_refused_and_not_shown(text: str, in_tmp: Path) -> None:
    for changes in ({"storage": text}, [f"storage={text}"]):
        with pytest.raises(ConfigError, match="storage") as caught:
            fedray.run(tiny.config(), overrides=changes)
        assert MARK not in str(caught.value)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("text", ["runs", "./me:x@b/p", "a/b:c@d", "/mnt/me:x@b", "a@b", "C:/x"])
def test_the_path_of_a_folder_is_no_login(text: str) -> None:
    assert absolute_place(text) == str(Path(text).absolute())


def test_ray_is_not_told_a_password_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import utils

    kept: list[str] = []
    monkeypatch.setattr(utils, "get_entrypoint_name", lambda: f"fedray run x uri=http://me:{MARK}@host/x")
    monkeypatch.setattr(ray, "init", lambda *_, **__: kept.append(utils.get_entrypoint_name()))
    cluster._init("here")
    assert kept == ["fedray run x uri=http://host/x"]
    assert MARK in utils.get_entrypoint_name()


@pytest.mark.parametrize("search", [{}, {"tune": {"search": "random", "num_samples": 2}}])
def test_a_sweep_hands_no_login_to_its_trials(
    search: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (USER, PASSWORD, KEY, SECRET):
        monkeypatch.setenv(name, "")  # restored at the end
    given = {"tracking.uri": f"http://me:{MARK}@host", "storage": f"s3://me:{MARK}@bucket/runs"}
    space = {"method.lr": {"uniform": [0.1, 0.2]} if search else {"grid": [0.1, 0.2]}}
    for base, changes in ((override_tree(tiny.TREE, given), {}), (tiny.TREE, given)):
        plan = Sweep.read({"base": base, "space": space} | search, "x.yaml", "x", changes)
        assert MARK not in repr(plan) and MARK.encode() not in pickle.dumps(plan.tree)
        assert (os.environ[PASSWORD], os.environ[SECRET]) == (MARK, MARK)


def write(folder: Path, actors: int, uri: str) -> None:
    (folder / "tells.py").write_text(TELLS)
    base = tiny.TREE | {"method": {**tiny.TREE["method"], "name": "tells"}, "tracking": {"uri": uri}}
    base["clients"] = {**tiny.TREE["clients"], "actors": actors, "max_failed": 0.9}
    (folder / "x.yaml").write_text(yaml_text.dump({"base": base, "space": {"seed": {"grid": [0, 1]}}}))


def test_a_run_keeps_none_of_them(secrets: None, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(self: Any, task: Any, client: Any) -> Any:
        if client.id == 3:
            raise ValueError(f"{dict(os.environ)} at http://me:{MARK}-x@host/x")
        return update(self, task, client)

    update = FedAvg.client_update
    monkeypatch.setattr(FedAvg, "client_update", tell)
    fedray.run(tiny.config({"tracking.uri": f"sqlite:///{in_tmp}/m.db", "clients.max_failed": 0.9}), out="r")
    assert "ValueError" in (in_tmp / "r" / "client_errors.txt").read_text()
    assert list((in_tmp / "mlartifacts").rglob("client_errors.txt"))
    assert not holding(in_tmp)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_command_on_actors_keeps_none_of_them(command: str, secrets: None, tmp_path: Path) -> None:
    """Address and password are on the command line; Ray's directory of logs is searched, too."""
    ray = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, for Ray's sockets
    (tmp_path / "made").mkdir()
    write(tmp_path, 1, "none")
    words = ["tracking.uri=http://me:s3cr3t-y@127.0.0.1:1", "tracking.also=[tensorboard]"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fedray",
            command,
            "../x.yaml",
            *words,
            "--out",
            "r",
            "--import",
            "../tells.py",
        ],
        cwd=tmp_path / "made",
        env=os.environ | {"RAY_TMPDIR": str(ray), PASSWORD: ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "made").rglob("client_errors.txt")) and list(ray.rglob("raylet.out"))
        assert MARK not in done.stdout + done.stderr
        assert not holding(tmp_path / "made", ray)
    finally:
        shutil.rmtree(ray)
