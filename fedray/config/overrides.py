"""Dotted overrides: how a file and `key=value` arguments become one tree of plain values.

`RunConfig.from_tree` validates the tree. A section given as a mapping is flattened first, so that a section,
a dotted key and a point of a sweep mean the same.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fedray.config import yaml_text
from fedray.config.messages import Where, shortened
from fedray.config.tables import OPTIONS
from fedray.config.trees import CHOICES, Tree, flatten
from fedray.errors import ConfigError, unknown
from fedray.federation.method import Method

SHARED = {"method": frozenset(field.name for field in fields(Method))}
"""Section → options that keep their values when another entry is chosen."""

SECTIONS = frozenset({"data", "clients", "clients.resources", "train", "tracking", *CHOICES})
"""Mappings with known keys: an override by a whole mapping changes the keys in it and no others."""

MOST_VALUES = 100_000
"""Values of a config, at most: a few lines of nested YAML aliases could fill the memory."""


def base_of(tree: Tree, path: str | Path) -> Tree:
    """Return the part of a file that describes one run.

    Raises:
        ConfigError: if the file is not a mapping.
    """
    if "base" in tree or "space" in tree or "tune" in tree:
        strangers = sorted(str(key) for key in set(tree) - {"base", "space", "tune"})
        if strangers:
            known = ("base", "space", "tune")
            raise ConfigError(f"{path}: {unknown('section', strangers[0], known)}")
        base = tree.get("base") or {}
        if not isinstance(base, dict):
            raise ConfigError(f"base ({path}): got {shortened(base)}; must be a mapping of keys to values")
        return base
    return tree


def parse_overrides(arguments: Sequence[str]) -> Tree:
    """Read `key=value` arguments; values are YAML.

    Raises:
        ConfigError: for an argument without `=`.
    """
    changes: Tree = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not of the form key=value, e.g. method.lr=0.1")
        changes[key] = yaml_text.parse(value, where=f"override {key}")
    return changes


def origin(path: str | Path, overrides: Mapping[str, Any]) -> Where:
    """Return the origin of each dotted key: `override`, or the file."""

    def where(key: str) -> str:
        related = (f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for o in overrides)
        return "override" if any(related) else str(path)

    return where


def override_tree(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """Return a copy of a nested mapping with dotted keys changed.

    Changing `method.name` keeps the options that every method has and drops the rest of the method section,
    so that one file serves many methods; changing `data.partition.kind` drops the other keys of the
    partition. A whole section may be given at once: `{"method": {"name": "snip", "density": 0.2}}` is the
    same as `{"method.name": "snip", "method.density": 0.2}`.

    Raises:
        ConfigError: if a dotted key goes through something that is not a section, or a value is not plain.
    """
    result, flat = plain_copy(tree), flatten(plain_copy(changes), SECTIONS.__contains__)
    flat = {key: value for key, value in flat.items() if not (key in SECTIONS and value == {})}
    for section, key in CHOICES.items():
        name = f"{section}.{key}"
        if name in flat:
            _change_choice(result, section, key, flat[name])
    for dotted, value in flat.items():
        *parents, last = dotted.split(".")
        _descend(result, parents, dotted)[last] = value
    return result


def plain_copy(tree: Mapping[str, Any]) -> Tree:
    """Return a copy of a nested mapping with the values that JSON has (see `plain`).

    Raises:
        ConfigError: if JSON has no such value.
    """
    try:
        text = json.dumps(plain(tree, "", [MOST_VALUES]), ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text
        copy: Tree = json.loads(text)
    except RecursionError:
        raise ConfigError("a config holds no value that contains itself, and no endless nesting") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a config holds text, numbers, lists and mappings only: {error}") from None
    return copy


def plain(value: Any, key: str, left: list[int]) -> Any:
    """Return a value of Python as a file holds it: a path as text, an array as a list, an enum as its value.

    Args:
        value: text, a number (NumPy's too), a path, an enum, None, a section, a method, a partition, or a
            list, tuple, range, array or mapping of these.
        key: dotted key of the value, for the message.
        left: number of further values that are allowed; the function lowers it.

    Raises:
        ConfigError: if a config cannot hold the value, or if there are too many values.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"a config holds at most {MOST_VALUES:,} values, aliases written out")
    value = _as_mapping(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, key, left)
    if isinstance(value, list | tuple | range):
        return [plain(item, f"{key}.{number}", left) for number, item in enumerate(value)]
    if hasattr(value, "tolist"):  # of NumPy and torch, also scalars
        return plain(value.tolist(), key, left)
    found = _plain_scalar(value)
    if found is NotImplemented:
        kind = type(value).__name__
        raise ConfigError(
            f"{key or 'config'}: got {shortened(value)}; a config holds text, numbers, lists and mappings "
            f"only, not {kind}"
        )
    return found


def _as_mapping(value: Any) -> Any:
    """Return a section, or an entry of a table of choices, as a mapping; any other value unchanged."""
    if hasattr(value, "given_tree"):
        return value.given_tree()
    for section, table in OPTIONS.items():
        for name, kind in table.items():
            if type(value) is kind:
                return {CHOICES[section]: name} | options_given(value)
    return value


def options_given(options: Any, given: frozenset[str] = frozenset()) -> Tree:
    """Return the fields of a dataclass that are in `given`, or that differ from their defaults."""
    default = type(options)()
    return {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name in given or getattr(options, field.name) != getattr(default, field.name)
    }


def _plain_mapping(value: Mapping[Any, Any], key: str, left: list[int]) -> Tree:
    copy: Tree = {}
    for name, inner in value.items():
        text = name if isinstance(name, str) else json.dumps(_plain_scalar(name))
        if text in copy:
            raise ConfigError(f"{key or 'config'}: duplicate key {text!r}, as text and as a number")
        copy[text] = plain(inner, f"{key}.{text}".lstrip("."), left)
    return copy


def _plain_scalar(value: Any) -> Any:
    """Return text, a number, a truth value or None; NotImplemented for anything else."""
    if isinstance(value, Enum):
        return _plain_scalar(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else NotImplemented


def _change_choice(tree: Tree, section: str, key: str, value: Any) -> None:
    current = _descend(tree, section.split("."), section)
    if current.get(key) != value:
        kept = SHARED.get(section, frozenset())
        for option in [o for o in current if o not in kept]:
            del current[option]


def _descend(tree: Tree, parents: Sequence[str], dotted: str) -> Tree:
    for parent in parents:
        child = tree.setdefault(parent, {})
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is {child!r}, not a section with keys")
        tree = child
    return tree
