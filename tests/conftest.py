"""What all tests share: one torch thread, no usage statistics, and where the real data sets are."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
torch.set_num_threads(1)  # small tensors: a second thread only waits


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Collect garbage after each file: what complains when it is deleted fails the file that left it behind.

    Warnings are errors here. Collected later, a process or socket that was not closed would fail whichever
    test happens to run then.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real data sets, from FEDRAY_DATA."""
    root = os.environ.get("FEDRAY_DATA")
    if not root:
        pytest.skip("FEDRAY_DATA is not set: no real data sets here")
    return Path(root)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Start one local Ray for all tests that want one, as a run starts it."""
    import ray

    from fedray.experiment.cluster import start_ray

    start_ray()
    yield
    ray.shutdown()
