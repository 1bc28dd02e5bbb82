"""A disk that is really full: what is said, what is left, and that it continues once there is room."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fedray
from fedray.errors import RunError
from fedray.experiment.run import resume, run
from fedray.sweeps.sync import sync
from fedray.types import RoundReport
from tests.experiment import tiny

MIB = 2**20


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
