"""Neither MLflow nor Ray reports how it is used, unless the user says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS = ("MLFLOW_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST")


def said(code: str, **env: str) -> list[str]:
    """Return the words that code prints in a process that nothing but `env` told about telemetry."""
    bare = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare | env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "module", ["fedray", "fedray.cli", pytest.param("rllib_pruner.files", marks=pytest.mark.slow)]
)
def test_whatever_is_imported_first_it_is_off(module: str) -> None:
    code = f"import os, {module}; print(*(os.environ[name] for name in {OURS[:2]!r}))"
    assert said(code) == ["true", "0"]


def test_what_the_user_has_set_stays() -> None:
    code = f"import os, fedray; print(*(os.environ[name] for name in {OURS[:2]!r}))"
    assert said(code, MLFLOW_DISABLE_TELEMETRY="false", RAY_USAGE_STATS_ENABLED="1") == ["false", "1"]


TRACKED = """
from fedray.tracking.store import prepare_store
assert prepare_store("sqlite:///{}/mlflow.db", "x").problem is None
from mlflow.telemetry import get_telemetry_client
print(get_telemetry_client())
"""


@pytest.mark.slow
def test_a_tracked_run_has_no_telemetry_client(tmp_path: Path) -> None:
    assert said(TRACKED.format(tmp_path)) == ["None"]
    assert said(TRACKED.format(tmp_path), MLFLOW_DISABLE_TELEMETRY="false") != ["None"]
