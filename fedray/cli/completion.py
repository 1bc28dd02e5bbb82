"""What a shell completes beside commands and files: keys of overrides, and the names that they choose.

`make docs` writes the words into the list of methods, since the config itself takes seconds to import.
"""

import json
from pathlib import Path
from typing import Any

LISTING = Path(__file__).parents[1] / "methods" / "listing.json"
"""The list of methods, keys and names, as `make docs` writes it."""

KEYS = {
    "methods": "method.name",
    "samplers": "clients.sampler.name",
    "codecs": "clients.uplink.name",
    "partitions": "data.partition.kind",
}
"""Command that shows a table → the key that names its entries."""


def read_listing() -> dict[str, Any]:
    """Return the list."""
    listed: dict[str, Any] = json.loads(LISTING.read_text(encoding="utf-8"))
    return listed


def completed_key(incomplete: str) -> list[str]:
    """Return the keys, or the values of a key, that begin with a word."""
    listed = read_listing()
    key, sign, value = incomplete.partition("=")
    if sign:
        return [f"{key}={name}" for name in listed["choices"].get(key, []) if name.startswith(value)]
    return [f"{name}=" for name in listed["keys"] if name.startswith(key)]


def completed_name(ctx: Any, incomplete: str) -> list[str]:
    """Return the entries of a command's table that begin with a word."""
    names = read_listing()["choices"].get(KEYS.get(ctx.command.name or "", ""), [])
    return [name for name in names if name.startswith(incomplete)]
