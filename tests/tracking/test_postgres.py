"""Several trials at once, to a server with PostgreSQL behind it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fedray.tracking.store import client_of
from tests.tracking.servers import free_port, started

BIN = Path("/usr/lib/postgresql/15/bin")
TRIALS, ROUNDS = 4, 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # 155 s on two busy cores
    pytest.mark.skipif(not (BIN / "initdb").is_file(), reason="PostgreSQL 15 is not installed"),
    pytest.mark.skipif(find_spec("psycopg2") is None, reason="psycopg2-binary is not installed"),
    pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv, as root"),
]


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Yield the address of a database; its server listens on a socket in the folder."""
    # initdb refuses root
    other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    if other:
        shutil.chown(folder, "postgres", "postgres")
    data, port = folder / "data", free_port()
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [*other, str(BIN / "initdb"), "-D", str(data), "-U", "fedray", "-A", "trust", "--no-sync"]
    subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]
    options = ["-D", str(data), "-k", str(folder), "-p", str(port), "-c", "listen_addresses=", "-F"]
    server = subprocess.Popen([*other, str(BIN / "postgres"), *options], **quiet)  # type: ignore[call-overload]
    try:
        ready = [str(BIN / "pg_isready"), "-h", str(folder), "-p", str(port), "-t", "1"]
        while subprocess.run(ready, check=False, **quiet).returncode:  # type: ignore[call-overload]
            assert server.poll() is None
        yield f"postgresql+psycopg2://fedray@/postgres?host={folder}&port={port}"
    finally:
        server.terminate()
        server.wait(30)


TRIAL = """
import sys
from fedray.tracking.mlflow_run import MLflowTracker
from fedray.tracking.store import prepare_store
from fedray.types import RoundReport

made = prepare_store(sys.argv[1], "together")
tracker = MLflowTracker(made, run_name=sys.argv[2], params={"rounds": 30}, tags={}, answer_s=60)
for round in range(int(sys.argv[3])):
    tracker.log_round(RoundReport(round, {f"m/{i}": float(round + i) for i in range(20)}))
tracker.finish("FINISHED")
assert tracker.is_complete, tracker.warnings
"""


def test_trials_at_once_have_all_their_points(tmp_path: Path) -> None:
    # pytest's own folders are closed to other users
    with TemporaryDirectory(prefix="fedray-pg-") as place, postgres(Path(place)) as database:
        port = free_port()
        command = [
            "env",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
            sys.executable,
            "-m",
            "mlflow",
            "server",
        ]
        command += ["--backend-store-uri", database, "--artifacts-destination", (tmp_path / "files").as_uri()]
        command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
        with started(command, port, tmp_path) as uri:
            trials = [
                subprocess.Popen([sys.executable, "-c", TRIAL, uri, f"t{i}", str(ROUNDS)])
                for i in range(TRIALS)
            ]
            assert [trial.wait(600) for trial in trials] == [0] * TRIALS
            client = client_of(uri)
            runs = client.search_runs([client.get_experiment_by_name("together").experiment_id])
            assert sorted(run.info.run_name for run in runs) == [f"t{i}" for i in range(TRIALS)]
            for run in runs:
                assert run.info.status == "FINISHED" and len(run.data.metrics) == 20
                points = client.get_metric_history(run.info.run_id, "m/7")
                assert sorted((p.step, p.value) for p in points) == [(r, r + 7.0) for r in range(ROUNDS)]
