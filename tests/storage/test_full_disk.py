"""A disk that is really full: what is said, what is left, and that it continues once there is room."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fedray
from fedray.config import sealed
from fedray.errors import RunError
from fedray.experiment.run import resume, run
from fedray.sweeps.space import Sweep
from fedray.sweeps.sync import sync
from fedray.types import RoundReport
from tests.experiment import tiny

MIB = 2**20

SWEEP = {
    "base": tiny.TREE | {"rounds": 1},
    "space": {"method.lr": {"grid": [0.1, 0.2]}},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three mebibytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    command = ["mount", "-t", "tmpfs", "none", str(place), "-o", f"size={3 * MIB}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this machine mounts no disk: {done.stderr.strip()}")
    try:
        yield place
    finally:
        # -l: a store may still be open
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk up to some bytes."""
    space = os.statvfs(disk)
    number = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(number, 0, max(1, space.f_bavail * space.f_frsize - leave))
    os.close(number)


def filling(disk: Path, round: int, leave: int = 0, wait_s: float = 0.0) -> Callable[[RoundReport], None]:
    """Return an `on_round` that fills a disk after a round."""

    def on_round(report: RoundReport) -> None:
        if report.round == round:
            time.sleep(wait_s)
            fill(disk, leave)

    return on_round


@pytest.mark.parametrize("leave", [0, 8192, 40_000])
def test_a_run_on_a_full_disk_names_the_file_and_the_last_checkpoint(
    disk: Path, tmp_path: Path, leave: int
) -> None:
    out, config = disk / "run", tiny.config(rounds=5, checkpoint_every=2)
    with pytest.raises(
        RunError,
        match=rf"{out}/\S+: cannot be written: No space left on device; free space, then "
        rf"`fedray resume {out}` continues after round 2, the last checkpoint$",
    ):
        run(config, out=out, on_round=filling(disk, 3, leave))
    with pytest.raises(RunError, match=r"No space left on device; free space, then `fedray resume "):
        resume(out)  # still no room
    (disk / "filler").unlink()
    history = resume(out)
    assert history.weights_sha256 == run(config, out=tmp_path / "whole").weights_sha256
    assert tiny.figures(out) == tiny.figures(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start(disk: Path) -> None:
    fill(disk)
    with pytest.raises(RunError, match=r"run/config\.yaml: cannot be written: No space left on device"):
        run(tiny.config(), out=disk / "run")


@pytest.mark.slow
def test_a_store_on_a_full_disk_costs_the_run_nothing_and_is_brought_up_later(
    disk: Path, tmp_path: Path
) -> None:
    import sqlite3
    from collections import Counter
    from contextlib import closing

    config = tiny.config({"tracking.uri": f"sqlite:///{disk}/mlflow.db", "rounds": 6})
    history = run(config, out=tmp_path / "run", on_round=filling(disk, 2, wait_s=3))
    assert history.result["status"] == "finished"
    assert history.weights_sha256 == run(tiny.config(rounds=6), out=tmp_path / "plain").weights_sha256
    assert "full" in (tmp_path / "run" / "warnings.txt").read_text()
    (disk / "filler").unlink()
    sync(tmp_path / "run")
    with closing(sqlite3.connect(disk / "mlflow.db")) as store:
        points = store.execute("SELECT key, step FROM metrics WHERE key = 'val/accuracy'").fetchall()
        status = store.execute("SELECT status FROM runs").fetchall()
    assert max(Counter(points).values()) == 1 and {step for _, step in points} == set(range(7))
    assert status == [("FINISHED",)]
    assert fedray.load_model(tmp_path / "run") is not None


# ── sweeps and trainings
# ──────────────────────────────────────────────────────────────────────────────────────────


def full(path: Path, advice: str) -> str:
    """Return the pattern of the message on a file of a full disk."""
    return rf"^{path}: cannot be written: No space left on device; free space, then `{advice}"


def test_the_files_of_a_sweep_on_a_full_disk_are_named_and_it_is_resumable(disk: Path) -> None:
    """The driver's own files; a trial is a run."""
    from fedray.durable import append_lines, read_lines
    from fedray.sweeps.outcome import record_best
    from fedray.sweeps.perturbing import PERTURBED, recorded
    from fedray.sweeps.schedulers import Journal
    from fedray.sweeps.stopping import Budget
    from fedray.sweeps.sweep import _result, _written, resume_sweep

    plan = Sweep.read(SWEEP, "x.yaml", "x", {})
    place = disk / "sweep"
    for point in plan.points:
        run(point.config, out=place / "trials" / point.name)
    sealed.write(place / "sweep.yaml", _written(plan))
    best = _result(plan, place, {}).best
    assert best is not None
    journal, budget = Journal(place / "judged.jsonl"), Budget(place, 100.0)
    journal.add("00", round=1, value=0.5)
    append_lines(place / PERTURBED, [{"round": 0, "exploits": []}])
    files = {
        "judged.jsonl": lambda: journal.add("x" * 10_000, round=2, value=0.5),
        "best.yaml": lambda: record_best(place, best, "val/accuracy"),
        "spent.json": budget.note,
    }
    fill(disk)
    for name, write in files.items():
        with pytest.raises(RunError, match=full(place / name, f"fedray resume {place}`")):
            write()
    with pytest.raises(RunError, match=full(place / PERTURBED, f"fedray resume {place}`")):
        for round in range(1, 200):  # a line may fit into the last block of the file
            recorded(place, plan.points[0].config, round, [])
    (disk / "filler").unlink()
    assert [line["trial"] for line in read_lines(place / "judged.jsonl")] == ["00"]
    made = resume_sweep(place)
    assert made.best == best and (place / "best.yaml").exists()


def test_a_trial_without_room_for_its_traceback_tells_its_error(disk: Path) -> None:
    from fedray.sweeps.tune import attempt

    def body(name: str) -> None:
        fill(disk)
        raise RunError("no room for trial " + name)

    with pytest.raises(RunError, match="no room for trial a"):
        attempt(body, "a", disk / "trial")


def test_a_training_on_a_full_disk_names_the_file_and_continues_from_the_last_evaluation(disk: Path) -> None:
    from rllib_pruner.config import TrainConfig
    from rllib_pruner.files import TrainFiles

    class Learner:
        def save_to_path(self, path: str) -> None:
            Path(path).mkdir()
            (Path(path) / "state").write_bytes(bytes(50_000))

    files = TrainFiles.create(disk / "training", TrainConfig.from_tree({}))
    row = {"iteration": 1, "env_steps": 10.0, "score": 0.5}
    files.save(Learner(), 1)
    files.append(row)
    fill(disk, 20_000)
    advice = f"fedray agent train --resume {files.path}`"
    with pytest.raises(RunError, match=full(files.path / "checkpoints/iteration-000002", advice)):
        files.save(Learner(), 2)
    (disk / "filler").unlink()
    fill(disk)
    with pytest.raises(RunError, match=full(files.path / "progress.jsonl", advice)):
        for _ in range(200):  # a line may fit into the last block of the file
            files.append(row | {"iteration": 2})
    (disk / "filler").unlink()
    rows, checkpoint = TrainFiles.open(files.path).rewind()
    assert rows == [row] and checkpoint == files.path / "checkpoints" / "iteration-000001"
