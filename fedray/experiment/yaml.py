"""YAML as people write it: `1e-3` is a number, a key may not stand twice, and errors name the line."""

import re
from pathlib import Path
from typing import Any

import yaml

from fedray.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"  # `<<: *anchor`


class _Repeated(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1, with the numbers of YAML 1.2 and without silent duplicates."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.tag != _MERGE]
        seen: set[Any] = set()
        for key_node in keys:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _Repeated(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `1e-3` as text for want of a dot
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: if it cannot be read, is not YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None
    tree = parse(text, where=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of keys to values")
    return tree


def parse(text: str, where: str) -> Any:
    """Read one YAML value; `where` is named in the message.

    Raises:
        ConfigError: if it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        kind = "" if isinstance(error, _Repeated) else "not YAML: "
        raise ConfigError(f"{where}{line}: {kind}{problem}") from None
    except Exception as error:  # 2001-99-99 is a ValueError, `!!bool x` a KeyError, `[[[…` a RecursionError
        raise ConfigError(f"{where}: a value cannot be read: {error}") from None


def dump(tree: Any) -> str:
    """Write plain values as YAML, keys in their order."""
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return text
