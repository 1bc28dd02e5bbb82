"""What tests of configs share: a file to be read."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write_yaml(in_tmp: Path) -> Callable[[str], str]:
    """Return a function that writes `x.yaml` in the working directory and returns its name."""

    def write(text: str) -> str:
        (in_tmp / "x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write
