"""YAML files that a run or a sweep reads back. Their first line has the SHA-256 of their values.

A reader refuses a truncated file and one whose values have changed. Comments and order do not count. To any
other program it is plain YAML.
"""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedray.config import yaml_text
from fedray.config.trees import Tree
from fedray.durable import replace
from fedray.errors import RunError

_SEAL = re.compile(r"^# SHA-256 of the values: ([0-9a-f]{64})$", re.MULTILINE)


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file with its seal, as a whole.

    Raises:
        OSError: if it cannot be written.
    """
    text = yaml_text.dump(dict(tree))
    digest = _digest(yaml_text.parse(text, str(path)))
    note = "# Config of this run. To change a value and resume: fedray resume DIR KEY=VALUE\n"
    replace(path, f"{note}# SHA-256 of the values: {digest}\n{text}".encode())


def fault(path: Path) -> str | None:
    """Return the fault of a file, or None if its values are as written.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
    """
    tree = yaml_text.load(path)
    seal = _SEAL.search(path.read_text(encoding="utf-8"))
    if seal is None:
        return "it has no line with the SHA-256 of its values: an earlier version wrote it, or it was cut"
    if seal[1] != _digest(tree):
        return "its values are not those that were written: it was edited, or cut"
    return None


def load(path: Path) -> Tree:
    """Read a file and check its seal.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
        RunError: if its values have changed.
    """
    problem = fault(path)
    if problem is not None:
        raise RunError(f"{path}: {problem}")
    return yaml_text.load(path)


def _digest(tree: Any) -> str:
    return sha256(json.dumps(tree, default=str, sort_keys=True).encode()).hexdigest()
