"""What all tests share: one torch thread, no usage statistics, and where the real data sets are."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from tests.raylets import Raylets

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
torch.set_num_threads(1)  # small tensors: a second thread only waits

# `make test` draws the same examples on every machine; `make test-all` draws new ones in each run
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that need a Ray: in parallel, a long file at the end would run alone."""
    with_ray = {item.path for item in items if "ray_local" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Collect garbage after each file: what complains when it is deleted fails the file that left it behind.

    Warnings are errors here. Collected later, a process or socket that was not closed would fail whichever
    test happens to run then.
    """
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def tables_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the tables of methods, models, devices, … after a test that imports a file."""
    from fedray.config import plugins
    from fedray.costs.devices import DEVICES
    from fedray.costs.differences import CODECS
    from fedray.costs.hardware import HARDWARE
    from fedray.costs.links import LINKS
    from fedray.data import DATASETS, PARTITIONS
    from fedray.federation.sampling import SAMPLERS
    from fedray.methods import METHODS
    from fedray.models import MODELS

    monkeypatch.setattr(sys, "path", list(sys.path))
    tables: tuple[dict[Any, Any], ...] = (
        *(METHODS, MODELS, DATASETS, PARTITIONS, SAMPLERS, CODECS),
        *(DEVICES, HARDWARE, LINKS),
    )
    records: tuple[dict[Any, Any], ...] = (
        plugins._imported,
        plugins._beside,
        plugins._adopted,
        plugins._sources,
    )
    before = [(kept, dict(kept)) for kept in (*tables, *records)]
    modules = set(sys.modules)
    yield
    for kept, contents in before:
        kept.clear()
        kept.update(contents)
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "mine", "fedray_import_")):
            del sys.modules[name]


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


@pytest.fixture
def raylets() -> "Iterator[Raylets]":
    """Start the head of a cluster, with one CPU and a dashboard; tests add workers."""
    from tests.raylets import started_raylets

    with started_raylets() as cluster:
        yield cluster


@pytest.fixture
def write_yaml(in_tmp: Path) -> Callable[[str], str]:
    """Return a function that writes `x.yaml` in the working directory and returns its name."""

    def write(text: str) -> str:
        (in_tmp / "x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write
