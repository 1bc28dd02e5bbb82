"""Every file of a run and of a training, damaged in many ways: what reads it is right, or names it."""

import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import fedray
from fedray.durable import append_lines, as_mapping
from fedray.errors import FedrayError, RunError
from fedray.experiment.run import resume, run
from fedray.policies.network import Network
from fedray.policies.trained import PolicyInterface, TrainedPolicy
from fedray.policies.trained import save as save_policy
from fedray.report.reading import TRACKED, load_run
from fedray.sweeps.sync import sync
from rllib_pruner.config import TrainConfig
from rllib_pruner.files import TrainFiles
from tests.experiment import tiny
from tests.storage.damage import COUNT, LOOKS, TRIED, Damaging, as_any_user, copied, damages, names, steady

CONFIG = {
    "method": {"name": "staged", "density": 0.3, "stages": 2},
    "rounds": 4,
    "checkpoint_every": 2,
    "clients.dropout": 0.2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a killed one, and another to compare them with."""
    home = tmp_path_factory.mktemp("damage")
    run(tiny.config(CONFIG), out=home / "finished")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(CONFIG), out=home / "killed", on_round=tiny.ending(3, KeyboardInterrupt))
    run(tiny.config(CONFIG | {"method.density": 0.5}), out=home / "other")
    return home


# ── runs
# ──────────────────────────────────────────────────────────────────────────────────────────


def same_run(place: Path, file: str, reference: Mapping[str, Any]) -> str | None:
    """Resume a run; return what is wrong with it then."""
    history = resume(place)
    if history.weights_sha256 != reference["model"]:
        return "other weights"
    fedray.load_model(place)
    found = load_run(place)
    assert found.clients is not None or not (place / "clients.parquet").exists()
    figures, warnings = tiny.figures(place), place / "warnings.txt"
    told = warnings.read_text("utf-8", "replace") if warnings.is_file() else ""
    for key in ("rounds", "result", "model", "clients"):
        if figures[key] != reference[key] and not (key == "clients" and "lost" in told):
            return f"other {key}"
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["finished", "killed"])
def test_a_damaged_file_of_a_run_is_mended_or_named(home: Path, tmp_path: Path, what: str) -> None:
    reference = tiny.figures(home / "finished")
    damaging = Damaging(
        home / what, home / "other", tmp_path, lambda place, file: same_run(place, file, reference)
    )
    damaging.all()
    damaging.check(30 * COUNT)


@pytest.mark.parametrize("content", [b"{", b"[1]", None])
def test_a_damaged_description_of_the_data_is_made_again(
    home: Path, tmp_path: Path, content: bytes | None
) -> None:
    place = copied(home / "killed", tmp_path / "run")
    before = (place / "data.json").read_bytes()
    (place / "data.json").unlink() if content is None else (place / "data.json").write_bytes(content)
    resume(place)
    assert (place / "data.json").read_bytes() == before


def test_a_damaged_record_of_mlflow_is_refused_before_anything_changes(home: Path, tmp_path: Path) -> None:
    place = copied(home / "killed", tmp_path / "run")
    (place / "mlflow.json").write_text("{")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"mlflow\.json"):
        resume(place)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


# ── sync
# ──────────────────────────────────────────────────────────────────────────────────────────


def points_of(database: Path) -> set[tuple[str, int, float]]:
    """Return the metrics that a store has of all its runs."""
    with closing(sqlite3.connect(database)) as store:
        return set(store.execute("SELECT key, step, value FROM metrics WHERE key NOT LIKE '%wall_s'"))


def synced(place: Path) -> set[tuple[str, int, float]]:
    """Bring the store beside a run up to it; return the metrics that it has then."""
    database = place.parent / "mlflow.db"
    sync(place, f"sqlite:///{database}")
    return points_of(database)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["finished", "killed"])
def test_sync_of_a_damaged_run_sends_the_same_or_names_the_file(
    home: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The store lacks all points of the run, and some were on their way."""
    whole = tmp_path / "whole"
    copied(home / what, whole / "run")
    expected = synced(whole / "run")
    with closing(sqlite3.connect(whole / "mlflow.db")) as store:
        store.execute("DELETE FROM metrics")
        store.execute("DELETE FROM latest_metrics")
        store.commit()
    known = TRACKED.read(whole / "run")
    assert known is not None
    (whole / "run" / "mlflow.json").write_bytes(
        as_mapping({k: known[k] for k in ("run_id", "experiment_id")})
    )
    value = next(value for key, step, value in expected if (key, step) == ("val/accuracy", 1))
    point = {"step": 1, "time_ms": 1_700_000_000_000, "metrics": {"val/accuracy": value}}
    append_lines(whole / "run" / "mlflow-sent.jsonl", [{"mark": "m"}, point])
    kept = (".json", ".jsonl", ".yaml")
    files = [path for path in sorted((whole / "run").iterdir()) if path.suffix in kept]
    wrong, number = [], 0
    for path in files:
        for how, spoil in damages(path, number, max(1, COUNT // 3)):
            number += 1
            caplog.clear()
            place = copied(whole, tmp_path / str(number)) / "run"
            spoil(place / path.name)
            TRIED[f"sync of a {what} run"] += 1
            try:
                with as_any_user():
                    is_right = synced(place) == expected or names(caplog.text, path.name)
                problem = None if is_right else "other points"
            except FedrayError as error:
                problem = None if names(str(error), path.name) else f"names no file: {error}"
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is not None and not (path.name == "result.json" and not (place / path.name).exists()):
                wrong.append(f"{path.name}, {how}: {problem}"[:500])
            shutil.rmtree(tmp_path / str(number), ignore_errors=True)  # a thread of MLflow may still write
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong)


# ── folders that may only be read
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", [".", "checkpoints", "clients.parquet"])
def test_a_folder_that_may_only_be_read_is_shown_and_not_resumed(
    home: Path, tmp_path: Path, folder: str
) -> None:
    place = copied(home / "killed", tmp_path / "killed")
    expected = steady(LOOKS["runs"](place, home / "other"))
    (place / folder).chmod(0o555)
    TRIED["folders"] += 1
    with as_any_user():
        assert steady(LOOKS["runs"](place, home / "other")) == expected
        LOOKS["report"](place, home / "other")
        with pytest.raises(RunError, match="cannot be written: Permission denied") as error:
            resume(place)
    assert str(place / folder) in str(error.value)
    (place / folder).chmod(0o755)
    assert resume(place).weights_sha256 == tiny.model_sha256(home / "finished" / "model.safetensors")


# ── trainings
# ──────────────────────────────────────────────────────────────────────────────────────────


class Learner:
    """An algorithm of RLlib, as far as a checkpoint goes."""

    def save_to_path(self, path: str) -> None:
        """Write something."""
        (Path(path) / "module").mkdir(parents=True)
        (Path(path) / "module" / "state.pkl").write_bytes(bytes(range(256)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_file_of_a_training_is_mended_or_named(tmp_path: Path) -> None:
    config = TrainConfig.from_tree({})
    files = TrainFiles.create(tmp_path / "whole", config)
    rows = [{"iteration": n, "env_steps": 10.0 * n, "score": 0.1 * n} for n in (1, 2)]
    for row in rows:
        files.save(Learner(), int(row["iteration"]))
        files.append(row)
    files.write_run_id("abc")
    interface = PolicyInterface("made up", 1, 2, ("a", "b"))
    layers = {"encoder": [(torch.ones(4, 2), torch.ones(4))], "head": [(torch.ones(2, 4), torch.ones(2))]}
    save_policy(Network(layers), files.policy, vars(interface) | {"algorithm": "ppo"})
    wrong, tried = [], 0
    for number, path in enumerate(sorted(path for path in files.path.rglob("*") if path.is_file())):
        file = str(path.relative_to(files.path))
        for how, spoil in damages(path, number, COUNT):
            tried += 1
            place = copied(files.path, tmp_path / "copy")
            spoil(place / file)
            TRIED["training"] += 1
            try:
                with as_any_user():
                    problem = same_training(place, config, rows, interface)
            except FedrayError as error:
                unnamed = not names(str(error), file) and "no checkpoint is as it was written" not in str(
                    error
                )
                problem = f"names no file: {error}" if unnamed else None
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            wrong += [] if problem is None else [f"{file}, {how}: {problem}"]
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 20 * COUNT


def same_training(
    place: Path, config: TrainConfig, rows: list[dict[str, Any]], interface: PolicyInterface
) -> str | None:
    """Go back to the last sound checkpoint of a training; return what is wrong with it then."""
    files = TrainFiles.open(place)
    if files.config() != config:
        return "another config"
    if files.run_id() not in ("abc", None):
        return "another run of MLflow"
    policy = TrainedPolicy.load(files.policy, interface)
    if policy.network(torch.ones(1, 2)).tolist() != [[13.0, 13.0]]:
        return "another policy"
    left, checkpoint = files.rewind()
    if left != rows[: len(left)] or (checkpoint is None) != (not left):
        return f"other evaluations: {left}"
    return None
