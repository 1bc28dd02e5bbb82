"""Runs that are published in S3: killed, and resumed in another folder with the same bits."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import fedray
from fedray.config.places import Place
from fedray.errors import ConfigError, RunError
from fedray.experiment import run as runs
from fedray.experiment.run import resume, run
from fedray.publishing import claims, publisher
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.objects import StoreError
from fedray.publishing.publisher import PUBLISHED, is_published
from tests.experiment import tiny
from tests.publishing.s3 import S3

STAGED = {"name": "staged", "density": 0.3, "stages": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    run(tiny.config(method=STAGED), out=path)
    return tiny.figures(path)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that goes to a node: a folder where nothing is at first."""

    def to(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return to


class Ends(Exception):
    """Ends a run."""


def ends_after(round: int):
    def on_round(report: fedray.RoundReport) -> None:
        if report.round == round:
            raise Ends

    return on_round


def test_a_run_is_published_below_storage_and_can_be_resumed_on_another_node(s3: S3, nodes, undisturbed):
    nodes("a")
    storage = s3.new()
    with pytest.raises(Ends):
        run(tiny.config(method=STAGED, storage=storage), on_round=ends_after(2))
    (name,) = s3.objects(storage).folders()
    assert name == "staged-digits-mlp-s0-001"
    there = nodes("b")
    address = str(Place.parse(storage).below(name))
    history = resume(address)
    assert history.path == there / "runs" / name
    assert tiny.figures(history.path) == undisturbed
    assert is_published(history.path)
    assert read_manifest(s3.objects(address)).files.keys() >= {"config.yaml", "result.json"}
    home = nodes("a")
    again = resume(Path("runs") / name)  # the other node has finished it
    assert tiny.figures(again.path) == undisturbed
    assert again.path == home / "runs" / name
    assert resume(address).path == home / "runs" / name


def test_a_run_that_ended_before_its_first_checkpoint_is_resumed_on_another_node(
    s3: S3, nodes, undisturbed, monkeypatch
):
    nodes("a")
    storage = s3.new()
    with monkeypatch.context() as patch, pytest.raises(Ends):
        patch.setattr(runs, "Server", Mock(side_effect=Ends))
        run(tiny.config(method=STAGED, storage=storage))
    nodes("b")
    (name,) = s3.objects(storage).folders()
    assert tiny.figures(resume(str(Place.parse(storage).below(name))).path) == undisturbed


KILLED = """
    import sys
    from fedray.experiment.run import run
    from fedray.config.overrides import parse_overrides
    from tests.experiment import tiny
    import os, signal

    def on_round(report):
        if report.round == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    method = {"name": "staged", "density": 0.3, "stages": 2}
    run(tiny.config(method=method, storage=sys.argv[1], checkpoint_every=1), on_round=on_round)
"""


@pytest.mark.slow
@pytest.mark.parametrize("round", [0, 1, 2, 3])
def test_a_killed_run_is_resumed_in_another_folder_with_the_same_bits(s3: S3, nodes, undisturbed, round):
    home, storage = nodes("a"), s3.new()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), storage, str(round)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == -signal.SIGKILL
    nodes("b")
    (name,) = s3.objects(storage).folders()
    started = time.monotonic()
    history = resume(str(Place.parse(storage).below(name)))
    assert time.monotonic() - started < 20  # its process is seen to be dead
    figures = tiny.figures(history.path)
    assert figures["model"] == undisturbed["model"] and figures["rounds"] == undisturbed["rounds"]


def test_two_nodes_get_two_names(s3: S3, nodes):
    storage = s3.new()
    config = tiny.config(storage=storage, rounds=1)
    nodes("a")
    assert run(config).path.name == "fedavg-digits-mlp-s0-001"
    there = nodes("b")
    assert run(config).path == there / "runs" / "fedavg-digits-mlp-s0-002"
    with pytest.raises(ConfigError, match="holds a run already: choose another name with --out, or continue"):
        run(config, out="fedavg-digits-mlp-s0-001")
    assert not (there / "fedavg-digits-mlp-s0-001").exists()
    run(config, out="mine")
    assert s3.objects(storage).folders()[-1] == "mine"


def test_a_run_that_is_published_elsewhere_is_not_overwritten(s3: S3, nodes):
    storage, other = s3.new(), s3.new()
    nodes("a")
    path = run(tiny.config(storage=storage, rounds=1), out="x").path
    nodes("b")
    run(tiny.config(storage=other, rounds=1, seed=5), out="x")
    nodes("a")
    before = tiny.figures(path)
    with pytest.raises(RunError, match="holds something that x does not come from"):
        resume(path, [f"storage={other}", "rounds=2"])
    assert tiny.figures(path) == before
    moved = resume(path, [f"storage={s3.new()}", "rounds=2"])
    assert is_published(moved.path)


def test_a_store_that_does_not_answer_is_one_message_before_anything_starts(s3: S3, nodes):
    here = nodes("a")
    s3.stop()
    try:
        with pytest.raises(StoreError, match="the store does not answer"):
            run(tiny.config(storage=s3.new()))
    finally:
        s3.start()
    with pytest.raises(StoreError, match="there is no bucket 'nowhere'"):
        run(tiny.config(storage=f"s3://nowhere/runs{s3.query}"))
    assert not any(here.iterdir())


def test_a_run_outlives_the_store_and_says_how_to_send_the_rest(s3: S3, nodes, undisturbed, monkeypatch):
    monkeypatch.setattr(publisher, "PATIENCE_S", 1.0)
    nodes("a")
    storage = s3.new()

    def goes(report: fedray.RoundReport) -> None:
        if report.round == 1:
            s3.stop()

    with pytest.raises(StoreError, match=r"files \(.* MB\) of mine are not published; nothing is lost"):
        run(tiny.config(method=STAGED, storage=storage), out="mine", on_round=goes)
    assert tiny.figures(Path("mine")) == undisturbed
    s3.start()
    resume("mine")  # as the message says
    nodes("b")
    copy = resume(str(Place.parse(storage).below("mine")))
    assert tiny.figures(copy.path) == undisturbed


def test_without_its_store_a_run_can_be_resumed_unpublished(s3: S3, nodes, undisturbed):
    nodes("a")
    with pytest.raises(Ends):
        run(tiny.config(method=STAGED, storage=s3.new()), out="mine", on_round=ends_after(1))
    s3.stop()
    try:
        with pytest.raises(StoreError, match="does not answer"):
            resume("mine")
        resume("mine", ["storage=null"])
    finally:
        s3.start()
    assert tiny.figures(Path("mine")) == undisturbed


def test_two_processes_do_not_continue_one_run(s3: S3, nodes, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 1.0)
    nodes("a")
    storage = s3.new()

    def second(report: fedray.RoundReport) -> None:
        if report.round == 2:
            with pytest.raises(RunError, match="publishes there; wait for its end"):
                nodes("b")
                resume(str(Place.parse(storage).below("mine")))
            nodes("a")

    run(tiny.config(storage=storage), out="mine", on_round=second)


def test_a_login_is_in_no_file_and_no_object(s3: S3, nodes):
    here = nodes("a")
    storage = s3.new().replace("s3://", "s3://AKIATEST:very-secret@")
    path = run(tiny.config(storage=storage, rounds=1), out="mine").path
    texts = [file.read_bytes() for file in here.rglob("*") if file.is_file()]
    assert len(texts) > 5 and not any(b"very-secret" in text for text in texts)
    store = s3.objects(json.loads((path / PUBLISHED).read_text())["place"])
    assert not any(b"very-secret" in store.get(f"objects/{one.name}") for one in store.listed("objects"))


def test_a_folder_as_storage_holds_the_directories_themselves(nodes, tmp_path: Path, undisturbed):
    here = nodes("a")
    history = run(tiny.config(method=STAGED, storage=f"file://{tmp_path}/shared"))
    assert history.path == tmp_path / "shared" / "staged-digits-mlp-s0-001"
    assert tiny.figures(history.path) == undisturbed
    assert not any(here.iterdir())
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"storage: .*file is a file, not a folder"):
            run(tiny.config(storage=str(storage)))


@pytest.mark.parametrize("out", ["s3://bucket/x", "s3:/bucket/x", "gs://bucket/x"])
def test_out_is_a_directory(nodes, out: str):
    here = nodes("a")
    for given in (out, Path(out)):
        with pytest.raises(
            ConfigError, match=r"--out is a directory of this node.*storage=(s3|gs)://bucket/x"
        ):
            run(tiny.config(), out=given)
    assert not any(here.iterdir())


def test_where_it_is_kept_changes_no_digest():
    assert tiny.config(storage="/somewhere").digest == tiny.config().digest
