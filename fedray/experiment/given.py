"""What Python gives for a config, with its overrides: a path, a mapping, or a config."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.config import yaml_text
from fedray.config.messages import shortened
from fedray.config.overrides import base_of, origin, override_tree, parse_overrides
from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree
from fedray.errors import ConfigError

logger = logging.getLogger(__name__)

MAPPING = "mapping"
"""Where the keys of a mapping are, in messages."""


def run_config(
    given: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """Return the config of one run, checked as on the command line.

    Raises:
        ConfigError: with every problem found; or if `given` is something else.
    """
    changes = changes_of(overrides)
    if isinstance(given, RunConfig):
        return given.override(changes) if changes else given
    tree, where = tree_of(given, "run takes a config", "RunConfig")
    if tree.get("space"):
        logger.warning("%s is a sweep: run makes its base only; fedray.sweep tries its points", where)
    base = override_tree({}, base_of(tree, where))
    return RunConfig.from_tree(override_tree(base, changes), origin(where, changes))


def changes_of(overrides: Sequence[str] | Mapping[str, Any]) -> Tree:
    """Return overrides as dotted key → value.

    Raises:
        ConfigError: if they are neither a mapping nor `key=value` texts.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        example = '{"method.lr": 0.1} or ["method.lr=0.1"]'
        raise ConfigError(f"overrides: got {shortened(overrides)}; write them as {example}")
    return parse_overrides([str(text) for text in overrides])


def tree_of(given: object, wants: str, kind: str) -> tuple[Tree, str]:
    """Return the nested mapping that a path or a mapping holds, and its name for messages.

    Raises:
        ConfigError: if the file cannot be read, or `given` is something else.
    """
    if isinstance(given, Mapping):
        return dict(given), MAPPING
    if isinstance(given, str | Path):
        return yaml_text.load(given), str(given)
    raise ConfigError(
        f"{wants}, not {shortened(given)}: the path of a YAML file, a mapping of its keys, or a {kind}"
    )
