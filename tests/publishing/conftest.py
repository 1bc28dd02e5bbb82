"""The S3 server and the nodes of these tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedray.experiment.run import run
from tests.experiment import tiny
from tests.publishing.nodes import RATES, Apart, two_nodes
from tests.publishing.s3 import LOGIN, S3, serving


@pytest.fixture(autouse=True, scope="session")
def _login() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOGIN.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3(_login: None) -> Iterator[S3]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The weights of the points of `plan`, each run by itself."""
    folder = tmp_path_factory.mktemp("alone")
    config = tiny.config(rounds=4)
    return {run(config.override({"method.lr": r}), out=folder / str(r)).weights_sha256 for r in RATES}


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    """Two nodes of one CPU, of which the second does not see the first one's working directory."""
    with two_nodes(tmp_path) as nodes:
        yield nodes
