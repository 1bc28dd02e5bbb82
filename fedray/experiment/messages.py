"""What is said of a config that does not validate: key (file): what was given, what is allowed."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedray.errors import nearest

Where = str | Callable[[str], str]
"""What a message says of where a key was given: a file, or a function of the dotted key."""

WORDS = {
    "Input should be ": "must be ",
    "Dictionary should have at least 1 item after validation, not 0": "must have at least one entry",
    "an object": "a mapping of keys to values",
    "a valid dictionary": "a mapping of keys to values",
    "a valid array": "a list",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "Value error, ": "",
}
"""Pydantic's words → ours."""


def explain(error: ValidationError, root: type[BaseModel], where: Where, prefix: tuple[str, ...] = ()) -> str:
    """Turn pydantic's errors into a line each.

    Args:
        error: of validating a `root`; problems of type `told` say all that is to be said.
        root: the model, for the keys that it has.
        where: the keys were given.
        prefix: keys above those of `root`.
    """
    lines = []
    for problem in error.errors(include_url=False):
        path = tuple(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            text = _unknown_key(path, root)
        elif problem["type"] == "told":
            text = problem["msg"]
        else:
            text = f"got {shortened(problem['input'])}; {_allowed(problem)}"
        lines.append(line(".".join(prefix + path), text, where))
    return "\n".join(dict.fromkeys(lines))


def line(key: str, text: str, where: Where) -> str:
    """Return the message for one key."""
    return f"{key} ({where if isinstance(where, str) else where(key)}): {text}"


def shortened(value: Any) -> str:
    """Return the repr of a value, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _unknown_key(path: Sequence[str], root: type[BaseModel]) -> str:
    """Name the nearest key of the section, or else the key of that very name in another section."""
    known = sorted(_section(root, path[:-1]).model_fields)
    hint = nearest(path[-1], known)
    elsewhere = [key for key in _keys(root().model_dump(mode="json")) if key.endswith(f".{path[-1]}")]
    if hint == "." and len(elsewhere) == 1:
        hint = f"; did you mean {elsewhere[0]!r}?"
    return f"unknown{hint} Keys here: {', '.join(known)}"


def _section(root: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    section: Any = root
    for part in path:
        if hasattr(section, "model_fields"):
            section = section.model_fields[part].annotation
        else:  # a mapping of names to sections
            section = get_args(section)[1]
    found: type[BaseModel] = section
    return found


def _keys(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield above + key
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{key}.")


def _allowed(problem: Any) -> str:
    text = str(problem["msg"])
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        text += nearest(problem["input"], re.findall("'(.+?)'", problem["ctx"]["expected"])).rstrip(".")
    return text
