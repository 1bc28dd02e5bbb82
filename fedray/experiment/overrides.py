"""Dotted overrides: where a config's keys come from, and how they are changed.

A file and the `key=value` arguments after it become one nested mapping of plain values, which
`RunConfig.from_tree` validates. What is given whole is taken apart first, so that a section, a dotted key and
a point of a sweep mean the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError, unknown
from fedray.experiment import yaml
from fedray.experiment.messages import Where, shortened
from fedray.federation.method import Method

Tree = dict[str, Any]
"""A nested mapping of plain values, as YAML and JSON hold it."""

CHOICES = {"method": "name", "data.partition": "kind"}
"""Sections whose one key decides which other keys there are."""

SHARED = {"method": frozenset(field.name for field in fields(Method))}
"""Options that survive when the choice changes."""

SECTIONS = frozenset({"data", "data.partition", "clients", "clients.resources", "method", "tracking"})
"""Mappings whose keys are known beforehand: given whole, they change the keys they name and no others."""


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
        changes[key] = yaml.parse(value, where=f"override {key}")
    return changes


def origin(path: str | Path, overrides: Mapping[str, Any]) -> Where:
    """Return what says where a dotted key was given: in an override, or in the file."""

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
    result, flat = plain_copy(tree), dict(_flat(plain_copy(changes)))
    for section, key in CHOICES.items():
        name = f"{section}.{key}"
        if name in flat:
            _change_choice(result, section, key, flat[name])
    for dotted, value in flat.items():
        *parents, last = dotted.split(".")
        _descend(result, parents, dotted)[last] = value
    return result


def plain_copy(tree: Mapping[str, Any]) -> Tree:
    """Return a nested mapping as JSON holds it: a copy, with paths and dates as text.

    Raises:
        ConfigError: if something in it cannot be written so.
    """
    try:
        text = json.dumps(tree, default=str, ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text
        copy: Tree = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"a config holds text, numbers, lists and mappings only: {error}") from None
    return copy


def _flat(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each change, with sections taken apart."""
    for key, value in changes.items():
        dotted = above + key
        if dotted in SECTIONS and isinstance(value, dict):
            yield from _flat(value, f"{dotted}.")
        else:
            yield dotted, value


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
            raise ConfigError(f"{dotted}: {parent} is {child!r}, not a section with keys of its own")
        tree = child
    return tree
