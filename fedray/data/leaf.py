"""LEAF's files of data with a natural partition: FEMNIST by writer, Shakespeare by speaking role.

Caldas et al., LEAF: a benchmark for federated settings, arXiv:1812.01097, 2018. Its scripts write
`train/*.json` and `test/*.json`, each with `users` and `user_data`: user → `x` and `y`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedray.data.files import Indices, Labelled, unreadable
from fedray.errors import DataError

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF's Shakespeare; a token is a place in it."""

CODES = {letter: code for code, letter in enumerate(LETTERS)}

Content = tuple[Labelled, Labelled, Indices]
"""Training examples, test examples, and the user of each training example."""


def read_femnist(root: Path) -> Content:
    """Read FEMNIST from ROOT/femnist: images uint8 (n, 1, 28, 28), white on black as in MNIST."""
    return _read(root / "femnist", _images)


def read_shakespeare(root: Path) -> Content:
    """Read Shakespeare from ROOT/shakespeare: 80 characters each (uint8 tokens), and the character after."""
    return _read(root / "shakespeare", _characters)


def _images(x: Any, y: Any) -> Labelled:
    """Turn LEAF's numbers (0 black ink, 1 paper) into pixels (255 ink)."""
    pixels = np.asarray(x, dtype=np.float64).reshape(-1, 1, 28, 28)
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError("an image has numbers outside 0..1")
    return np.rint(255 * (1 - pixels)).astype(np.uint8), np.asarray(y, dtype=np.int64)


def _characters(x: Any, y: Any) -> Labelled:
    tokens = [[CODES[letter] for letter in text] for text in x]
    return np.asarray(tokens, dtype=np.uint8), np.asarray([CODES[letter] for letter in y], dtype=np.int64)


def _read(folder: Path, convert: Callable[[Any, Any], Labelled]) -> Content:
    train, users = _part(folder / "train", convert)
    test, _ = _part(folder / "test", convert)
    return train, test, users


def _part(folder: Path, convert: Callable[[Any, Any], Labelled]) -> tuple[Labelled, Indices]:
    """Return the examples of a part, user after user in the order of the files, and each one's user."""
    found = dict(_users(folder, convert))
    x, y = (np.concatenate(column) for column in zip(*found.values(), strict=True))
    return (x, y), np.repeat(np.arange(len(found)), [len(labels) for _, labels in found.values()])


def _users(folder: Path, convert: Callable[[Any, Any], Labelled]) -> Iterator[tuple[str, Labelled]]:
    """Yield the examples of each user that has any."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder}: has no JSON file; data.root needs the train/ and test/ that LEAF writes")
    seen: set[str] = set()
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            for user in content["users"]:
                if user in seen:
                    raise ValueError(f"user {user!r} stands twice")
                seen.add(user)
                data = content["user_data"][user]
                x, y = convert(data["x"], data["y"])
                if len(x) != len(y):
                    raise ValueError(f"user {user!r} has {len(x)} examples and {len(y)} labels")
                if len(y):
                    yield user, (x, y)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise unreadable(path, error) from error
