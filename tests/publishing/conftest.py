"""The S3 server of these tests."""

import logging
from collections.abc import Iterator

import pytest

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
