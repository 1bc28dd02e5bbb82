"""The same config and seed end with the same weights as in the version before.

`sums.json` is the table. A change that is meant to alter results says so in CHANGELOG.md, and rewrites the
table: `python -m tests.test_sums`.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedray.methods import METHODS
from tests import sums

TABLE = Path(__file__).with_name("sums.json")
pytestmark = pytest.mark.timeout(900)  # the first test computes all sums: a minute alone

KNOWN: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def computed() -> dict[str, Any]:
    """Return the fingerprint and the sums of this processor."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.sums"]
    folder = TABLE.parents[1]
    env = os.environ | sums.ENVIRONMENT | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_method_has_a_sum():
    assert set(METHODS) <= {options.get("name", name) for name, options in sums.METHODS.items()}
    assert [name for name, _ in sums.configs()] == list(KNOWN["sums"])


@pytest.mark.parametrize("name", KNOWN["sums"])
def test_the_weights_are_those_of_the_version_before(name: str):
    found = computed()
    if found["fingerprint"] != KNOWN["fingerprint"]:
        pytest.skip("this processor rounds matrix products otherwise than the one that made the table")
    assert found["sums"][name] == KNOWN["sums"][name]


if __name__ == "__main__":
    TABLE.write_text(json.dumps(computed(), indent=2) + "\n", encoding="utf-8")
