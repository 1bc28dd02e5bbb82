"""YAML 1.2 (core schema): `010` is ten, `1e-3` is a number, and `1:30`, `off` and `2001-01-01` are text.

A duplicate key is an error, and errors name the line. Text that `dump` writes has the same values here and
for a reader of YAML 1.1.
"""

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from fedray.config.shipped import hint, located
from fedray.config.uri import without_password
from fedray.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"  # `<<: *anchor`
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BREAKS = re.compile("[\n\r\x85\u2028\u2029\ufeff]")
_STUCK = re.compile(r"(.+?) ?(:|<=|>=|=) ?(.+)", re.DOTALL)
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""The byte order mark that a file begins with → its encoding."""


class _Repeated(yaml.MarkedYAMLError):
    """A duplicate key in one mapping."""


class _NoSpace(yaml.MarkedYAMLError):
    """`{key:value}`, which is one key without a value."""


class _Loader(yaml.SafeLoader):
    """PyYAML's reader of YAML 1.1 with the values of YAML 1.2, and without silent duplicates."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.tag != _MERGE]
        values = {id(k): value for k, value in node.value}
        seen: set[Any] = set()
        for key_node in keys:
            key = self.construct_object(key_node, deep=True)
            if node.flow_style and key_node.style is None:
                _check_space(key_node, values[id(key_node)])
            if key in seen:
                raise _Repeated(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        return float(text.replace(".", "") if text[-1:] in "fFnN" else text)  # .inf, .nan


for _name, _pattern, _first in (
    ("null", re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_float)


def _check_space(key: yaml.ScalarNode, value: yaml.Node) -> None:
    """Refuse a key such as `key:value` or `key=value` in braces, which would have no value."""
    found = _STUCK.fullmatch(key.value)
    if found and isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
        limit = "" if found[2] in ":=" else found[2]
        written = f"{{{found[1]}: {limit}{without_password(found[3])}}}"
        problem = f"write a space after the colon: {written}"
        raise _NoSpace(problem=problem, problem_mark=key.start_mark)


_Quick: Any = None
if hasattr(yaml, "CSafeLoader"):

    class _QuickLoader(yaml.CSafeLoader):
        """The same values, many times as fast; duplicate keys are not seen."""

        yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
        yaml_constructors = _Loader.yaml_constructors

    _Quick = _QuickLoader


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes text that YAML 1.1 reads as something else, or YAML 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        # PyYAML's other styles change some of the line breaks that Unicode has
        style = '"' if _BREAKS.search(data) else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_implicit_resolver(f"{_TAG}bool", re.compile("^[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def load(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, in UTF-8, or as its byte order mark says.

    `tune_configs/NAME.yaml` is the shipped config where there is no such file (`shipped.located`).

    Raises:
        ConfigError: if it cannot be read, is not YAML, or holds something else.
    """
    try:
        data = located(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}{hint(path)}") from None
    tree = parse(_text(data, path), where=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of keys to values")
    return tree


def load_quickly(path: str | Path) -> dict[str, Any] | None:
    """Read a file that `dump` wrote, with libyaml; None where `load` must be asked, which names the fault."""
    if _Quick is None:
        return None
    try:
        tree = yaml.load(Path(path).read_bytes(), Loader=_Quick)
    except (OSError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None


def _text(data: bytes, path: str | Path) -> str:
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        shown = encoding.removesuffix("-sig").upper()
        line = data[: error.start].count(b"\n") + 1
        what = f"the bytes from line {line} on" if shown == "UTF-8" else "its bytes"
        raise ConfigError(
            f"{path}: is not a text file in {shown}: {what} are not; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path}: is not a text file in UTF-8 (UTF-16 has a mark); save it as UTF-8")
    return text


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
        kind = "" if isinstance(error, _Repeated | _NoSpace) else "not YAML: "
        raise ConfigError(f"{where}{line}: {kind}{problem}") from None
    except Exception as error:  # `!!int x` is a ValueError, `!!bool x` a KeyError, `[[[…` a RecursionError
        raise ConfigError(f"{where}: a value cannot be read: {error}") from None


def dump(tree: Any) -> str:
    """Write plain values as YAML, keys in their order."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
