"""Messages about a config that does not validate: key (file): the given value, the allowed ones, a hint."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedray.config import hints
from fedray.config.trees import dotted_keys
from fedray.config.uri import without_password
from fedray.errors import nearest

Where = str | Callable[[str], str]
"""Origin of a key in a message: the name of a file, or a function of the dotted key."""

COMPLETE = "complete"
"""Type of a problem whose message is complete: given value, allowed values, nearest match."""

WORDS = {
    "Input should be ": "must be ",
    "Dictionary should have at least 1 item after validation, not 0": "must have at least one entry",
    "an object": "a mapping of keys to values",
    "a valid dictionary": "a mapping of keys to values",
    "a valid array": "a list",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "Value error, ": "",
}
"""Pydantic's words → ours."""

SHOWN = 50
"""Problems that a message names; a file of another tool, or a damaged one, can have thousands."""


def explain(error: ValidationError, root: type[BaseModel], where: Where, prefix: tuple[str, ...] = ()) -> str:
    """Turn pydantic's errors into a line each, the first SHOWN of them.

    Args:
        error: pydantic's error about `root`.
        root: the validated model, for its keys.
        where: origin of the keys.
        prefix: sections above `root`.
    """
    return joined(_lines(error, root, where, prefix))


def joined(problems: Iterable[str]) -> str:
    """Return the first SHOWN problems, a line each, and say if there are more."""
    rest = iter(problems)
    lines = list(dict.fromkeys(islice(rest, SHOWN)))
    more = ["and more problems; are these the keys of fedray?"] if next(rest, None) is not None else []
    return "\n".join(lines + more)


def _lines(
    error: ValidationError, root: type[BaseModel], where: Where, prefix: tuple[str, ...]
) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        path = tuple(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            text = _unknown_key(path, root, problem["input"])
        elif problem["type"] == COMPLETE:
            text = problem["msg"]
        else:
            key = ".".join(prefix + path)
            text = f"got {shortened(problem['input'])}; {_allowed(problem, key)}"
        yield line(".".join(prefix + path), text, where)


def line(key: str, text: str, where: Where) -> str:
    """Return the message for one key."""
    return f"{without_password(key)} ({where if isinstance(where, str) else where(key)}): {text}"


def shortened(value: Any) -> str:
    """Return the repr of a value, at most 60 characters of it, and without the logins in it."""
    try:
        text = repr(_without_logins(value))
    except RecursionError:
        text = f"a {type(value).__name__} with endless nesting"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _without_logins(value: Any) -> Any:
    """Return a value of a config without the logins of the addresses in it."""
    if isinstance(value, str):
        shown = without_password(value)
        return value if shown == value else f"…@{shown}"
    if isinstance(value, list | tuple):
        return type(value)(map(_without_logins, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {_without_logins(key): _without_logins(inner) for key, inner in value.items()}
    return value


def _unknown_key(path: Sequence[str], root: type[BaseModel], value: Any) -> str:
    """Return the message for an unknown key, with the nearest one of ours or of other tools."""
    section = _section(root, path[:-1])
    above = ".".join(path[:-1])
    known = [*keys_of(root), *(f"{above}.{key}".lstrip(".") for key in section.model_fields)]
    hint = hints.for_key(".".join(path), value, dict.fromkeys(known), above)
    return f"unknown{hint} Keys here: {', '.join(sorted(section.model_fields))}"


def keys_of(root: type[BaseModel]) -> list[str]:
    """Return all dotted keys of a config; those of a run include the options of every entry of its tables."""
    own = dotted_keys(root().model_dump(mode="json"))
    return [*own, *hints.option_keys()] if "method" in root.model_fields else own


def _section(root: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    section: Any = root
    for part in path:
        if hasattr(section, "model_fields"):
            section = section.model_fields[part].annotation
        else:  # a mapping of names to sections
            section = get_args(section)[1]
    found: type[BaseModel] = section
    return found


def _allowed(problem: Any, key: str) -> str:
    text = str(problem["msg"])
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        text += nearest(problem["input"], re.findall("'(.+?)'", problem["ctx"]["expected"])).rstrip(".")
    return text + hints.for_value(key, problem["input"], problem["type"])
