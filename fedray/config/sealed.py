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

NOTE = "# Config of this run. To change a value and resume: fedray resume DIR KEY=VALUE\n"
"""The first line of every such file."""

ADVICE = "put its values back, or restore it from a copy"
"""What a user can do with a file whose values have changed."""

_SEAL = re.compile(r"^# SHA-256 of the values: ([0-9a-f]{64})$", re.MULTILINE)


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file with its seal, as a whole.

    Raises:
        OSError: if it cannot be written.
    """
    text = yaml_text.dump(dict(tree))
    digest = _digest(yaml_text.parse(text, str(path)))
    replace(path, f"{NOTE}# SHA-256 of the values: {digest}\n{text}".encode())


def fault(path: Path) -> str | None:
    """Return the fault of a file, or None if its values are as written.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
    """
    tree = yaml_text.load(path)
    seal = _SEAL.search(path.read_text(encoding="utf-8", errors="replace"))
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
        raise RunError(f"{path}: {problem}; {ADVICE}")
    return yaml_text.load(path)


def look(path: Path, *, quickly: bool = False) -> Tree:
    """Read a file to show it: an earlier version or another program may have written it, without a seal.

    Args:
        path: the file.
        quickly: with libyaml where it can.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
        RunError: if it has a seal, or the note above it, and its values are not those that were written.
    """
    tree = (yaml_text.load_quickly(path) if quickly else None) or yaml_text.load(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    if seal[1] != _digest(tree) if seal is not None else not tree or text.startswith(NOTE[:20]):
        raise RunError(f"{path}: its values are not those that were written: it was edited, or cut; {ADVICE}")
    return tree


def _digest(tree: Any) -> str:
    try:
        text = json.dumps(tree, default=str, sort_keys=True)
    except TypeError:  # keys that are not text: no such tree is written
        return ""
    return sha256(text.encode()).hexdigest()
