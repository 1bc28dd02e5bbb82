"""Files that may hold a secret are readable by their owner alone, whatever the umask is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedray
from fedray.durable import append, append_lines, replace
from fedray.sweeps.tune import attempt
from tests.experiment import tiny


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}


def test_configs_warnings_and_what_mlflow_lacks_are_private(in_tmp: Path) -> None:
    nowhere = {"tracking.uri": "http://127.0.0.1:1"}
    fedray.run(tiny.config(nowhere), out="r")
    found = modes(in_tmp / "r")
    private = {"config.yaml", "warnings.txt", "mlflow-sent.jsonl"} & set(found)
    assert {"config.yaml", "warnings.txt"} <= private
    assert {found[name] for name in private} == {0o600}
    assert found["result.json"] == 0o666  # figures may be shared


def test_mlflows_database_and_artifacts_are_private(in_tmp: Path) -> None:
    config = tiny.config({"tracking.uri": f"sqlite:///{in_tmp}/m.db", "tracking.also": ["tensorboard"]})
    fedray.run(config, out="r")
    assert modes(in_tmp) == {"m.db": 0o600}
    for folder in (in_tmp / "mlartifacts", in_tmp / "r" / "tensorboard"):
        assert any(folder.rglob("*")) and folder.stat().st_mode & 0o777 == 0o700


def test_tracebacks_are_private(tmp_path: Path) -> None:
    def body(name: str) -> None:
        raise ValueError("with values of variables")

    with pytest.raises(fedray.RunError):
        attempt(body, "t", tmp_path)
    append(tmp_path / "client_errors.txt", "Traceback")
    assert set(modes(tmp_path).values()) == {0o600}


def test_a_replaced_file_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch(0o644)
    replace(tmp_path / "sweep.yaml", b"a: 1\n")
    append_lines(tmp_path / "points.jsonl", [{"a": 1}])
    assert set(modes(tmp_path).values()) == {0o600}
