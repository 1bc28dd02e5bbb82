"""A password in `tracking.uri` is written nowhere: neither to files, nor to a server, nor to a terminal."""

import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config.overrides import override_tree, parse_overrides
from fedray.config.run_config import RunConfig
from fedray.config.uri import PASSWORD, USER, check_uri, take_login
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep
from fedray.sweeps.sync import sync
from fedray.tracking.store import prepare_store
from tests.experiment import tiny
from tests.tracking.servers import Proxy, mlflow_server

SECRET = "s3cr3t-pass/word"
QUOTED = "s3cr3t-pass%2Fword"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (USER, PASSWORD):
        monkeypatch.setenv(name, "")  # restored at the end


def test_a_login_goes_to_the_variables_of_mlflow() -> None:
    assert take_login(f"https://me:{QUOTED}@host:99/prefix") == "https://host:99/prefix"
    assert (os.environ[USER], os.environ[PASSWORD]) == ("me", SECRET)
    config = tiny.config({"tracking.uri": f"http://you:{QUOTED}@host"})
    assert config.tracking.uri == "http://host" and "s3cr3t" not in repr(config)
    assert os.environ[USER] == "you"
    assert RunConfig.from_tree(config.to_tree()).tracking.uri == "http://host"
    for uri in ("none", "sqlite:///a@b.db", "http://host/a"):
        assert take_login(uri) == uri


@pytest.mark.parametrize("uri", ["http://token@host", "http://:secret@host", "http://me:@host"])
def test_half_a_login_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"give both, or set {USER}") as caught:
        check_uri(uri)
    assert "secret" not in str(caught.value) and "token@" not in str(caught.value)


@pytest.mark.parametrize("mark", ["/", "?", "#", "/@", ""])
@pytest.mark.parametrize(
    "scheme", ["http://", "https://", "http:/", "http:", "", "postgresql://", "sqlite://"]
)
def test_an_address_that_is_refused_is_shown_without_its_login(scheme: str, mark: str) -> None:
    uri = f"{scheme}me:s3{mark}cr3t@host:5000"
    if mark == "" and scheme.startswith("http") and scheme.endswith("//"):
        assert check_uri(uri) == uri
        return
    with pytest.raises(ConfigError) as caught:
        check_uri(uri)
    assert "cr3t" not in str(caught.value) and "host:5000" in str(caught.value)


@pytest.mark.parametrize("uri", ["http://me:33/cr3t@host", "http://host:5000/a@b"])
def test_an_at_sign_after_the_host_is_most_likely_a_password(uri: str) -> None:
    with pytest.raises(ConfigError, match="as %2F %3F %23 %40") as caught:
        check_uri(uri)
    assert "cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:s3cr3t@host",
        "me:s3cr3t@host",
        "me:s3cr3t@host:5000/prefix",
        "me%3As3cr3t%2Fmore@host",
        "me:a/s3cr3t@host",
        f"me:s3cr3t{'x' * 80}@host",
        f"http://me:s3cr3t{'x' * 80}@host",
    ],
)
@pytest.mark.parametrize(
    "override",
    [
        "tracking={uri}",
        "tracking.uri=[{uri}]",
        "tracking.uri:{uri}",
        "rounds={uri}",
        "tracking={{uri: 1, url: '{uri}'}}",
        "tracking={{uri:{uri}}}",
        "tracking.also={uri}",
        "tracking.also=[{{wandb: {uri}}}]",
        "tracking.experiment=[{uri}]",
        "model={uri}",
        "{uri}",
        "{uri}=1",
        "clients.sampler={uri}",
        "data.partition={uri}",
        "imports={uri}",
    ],
)
@pytest.mark.parametrize("kind", ["run", "sweep", "base"])
def test_an_address_in_the_wrong_place_is_shown_without_its_login(
    override: str, address: str, kind: str
) -> None:
    given = override.format(uri=address)
    with pytest.raises(ConfigError) as caught:
        changes = parse_overrides([given])
        if kind == "run":
            RunConfig.from_tree(override_tree(tiny.TREE, changes))
        elif kind == "sweep":
            Sweep.read({"base": tiny.TREE, "space": {"seed": {"grid": [0, 1]}}}, "x.yaml", "x", changes)
        else:
            base = override_tree(tiny.TREE, changes)
            Sweep.read({"base": base, "space": {"seed": {"grid": [0, 1]}}}, "x.yaml", "x", {})
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("address", ["me:s3cr3t@host", "me: s3cr3t@host", "me:my s3cr3t@host", "s3cr3t@host"])
def test_an_address_without_a_scheme_is_refused_without_its_login(address: str) -> None:
    for changes in ({"tracking.uri": address}, {"tracking": address}):
        with pytest.raises(ConfigError) as caught:
            tiny.config(changes)
        assert "s3cr3t" not in str(caught.value)


def test_a_message_keeps_what_is_no_login() -> None:
    for text in (
        "tracking.uri: 'sqlite:////data/a@b:c.db': no",
        "http://host:5000/x, mail me@host",
        "C:/a:b",
    ):
        assert str(ConfigError(text)) == text


def holds_secret(folder: Path) -> list[str]:
    words = (b"s3cr3t", b64encode(f"me:{SECRET}".encode()))  # as given, and as HTTP sends it
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(word in path.read_bytes() for word in words)
    ]


def address(proxy: Proxy) -> str:
    return proxy.uri.replace("http://", f"http://me:{QUOTED}@")


PLAN = """
base:
  rounds: 1
  model: mlp
  data: {{name: digits}}
  clients: {{population: 6, cohort: 3, actors: 0}}
  method: {{name: fedavg, batch_size: 50}}
  tracking: {{uri: "{uri}"}}
space: {{seed: {{grid: [0, 1]}}}}
"""


CAPTURED: Any = {"capture_output": True, "text": True, "timeout": 390, "check": False}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 235 s on two busy cores
def test_neither_a_sweep_nor_its_store_nor_the_terminal_shows_it(tmp_path: Path) -> None:
    """The server is there for the sweep, and gone for a second one, whose messages name it."""
    (tmp_path / "server").mkdir()
    (tmp_path / "sweep").mkdir()
    with mlflow_server(tmp_path / "server") as server:
        proxy = Proxy(server)
        for name, state in (("well", "well"), ("gone", "gone")):
            proxy.state = state  # type: ignore[assignment]
            plan = tmp_path / "plan.yaml"
            plan.write_text(PLAN.format(uri=address(proxy)))
            command = [sys.executable, "-m", "fedray.cli", "sweep", str(plan), "--out", name]
            done = subprocess.run(command, cwd=tmp_path / "sweep", **CAPTURED)
            assert done.returncode == 0, done.stderr
            assert "s3cr3t" not in done.stdout + done.stderr
        proxy.mend()
        command = [sys.executable, "-m", "fedray.cli", "sync", "gone"]
        done = subprocess.run(command, cwd=tmp_path / "sweep", **CAPTURED)
        assert done.returncode == 0 and "s3cr3t" not in done.stdout + done.stderr, done.stderr
        assert holds_secret(tmp_path / "sweep") == holds_secret(tmp_path / "server") == []
        assert proxy.logins >= {"me:" + SECRET}
        from mlflow import MlflowClient

        client = MlflowClient(server)
        found = client.search_runs([client.get_experiment_by_name("fedray").experiment_id])
        assert len(found) == 6
        assert {run.info.status for run in found} == {"FINISHED"}
        proxy.shutdown()
        proxy.server_close()


def test_a_login_that_is_missing_is_named(in_tmp: Path) -> None:
    proxy = Proxy("http://127.0.0.1:1")
    proxy.state = "401"
    store = prepare_store(proxy.uri, "x")
    assert store.problem is not None and f"set {USER} and {PASSWORD}" in store.problem
    history: Any = fedray.run(tiny.config({"tracking.uri": proxy.uri, "rounds": 1}), out="r")
    assert history.result["status"] == "finished"
    with pytest.raises(fedray.FedrayError, match=f"set {USER} and {PASSWORD}"):
        sync("r")
    proxy.shutdown()
    proxy.server_close()
