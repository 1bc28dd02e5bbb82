"""Nested mappings of plain values: dotted keys, and which keys choose other keys or change no result.

Needs neither torch nor a table, so that reports can read configs without loading either.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
"""A nested mapping of plain values, as YAML and JSON hold it."""

CHOICES = {"method": "name", "data.partition": "kind", "clients.sampler": "name", "clients.uplink": "name"}
"""Section → its key that names an entry of a table; the entry decides which other keys the section has."""

INDECISIVE = (
    "checkpoint_every",
    "tracking",
    "clients.actors",
    "clients.resources",
    "clients.max_failed",
    "clients.patience",
    "data.root",
    "imports",
    "storage",
)
"""Keys that no result depends on: where a run is computed, read, tracked and kept, and when it gives up.
`resume` may change them.

`clients.resources` is one of them unless it has `by_device`, which decides which clients are folded together.
"""


def flatten(tree: Mapping[str, Any], opens: Callable[[str], bool] = lambda key: True) -> Tree:
    """Return dotted key → value, in the order of the tree.

    Args:
        tree: its keys may contain dots already.
        opens: whether the mapping under a dotted key is a section; any other mapping, and an empty one, is
            one value.
    """
    flat: Tree = {}

    def walk(inner: Mapping[str, Any], above: str) -> None:
        for key, value in inner.items():
            dotted = f"{above}{key}"
            if isinstance(value, Mapping) and value and opens(dotted):
                walk(value, f"{dotted}.")
            else:
                flat[dotted] = value

    walk(tree, "")
    return flat


def flat_text(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key → value as text: strings and paths as they are, everything else as JSON."""
    return {
        key: str(value)
        if isinstance(value, str | Path)
        else json.dumps(value, default=str, ensure_ascii=False)
        for key, value in flatten(tree).items()
    }


def dotted_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return every dotted key of a tree, each section before its keys."""
    keys: dict[str, None] = {}
    for dotted in flatten(tree):
        parts = dotted.split(".")
        keys |= dict.fromkeys(".".join(parts[: end + 1]) for end in range(len(parts)))
    return list(keys)


def decisive(tree: Mapping[str, Any]) -> Tree:
    """Return a copy of a config without the keys that no result depends on (`INDECISIVE`)."""
    copy = deepcopy(dict(tree))
    for dotted in INDECISIVE:
        *parents, last = dotted.split(".")
        section: Any = copy
        for parent in parents:
            section = section.get(parent)
            if not isinstance(section, dict):  # a config of another version
                break
        else:
            value = section.get(last)
            if not (isinstance(value, Mapping) and value.get("by_device")):
                section.pop(last, None)
    _name_choices(copy.get("clients"))
    return copy


def _name_choices(clients: Any) -> None:
    """Name the sampler and the codec that a config of an earlier version leaves out.

    `clients.sampler` alone then says what `over_selection`, the older key, says of the sampler.
    """
    if isinstance(clients, dict) and "over_selection" in clients:
        share = clients.pop("over_selection")
        sampler = clients.setdefault("sampler", {"name": "uniform"})
        if share and sampler.get("name") == "uniform":
            clients["sampler"] = {"name": "fastest", "over_selection": share}
        clients.setdefault("uplink", {"name": "plain"})
