"""Descriptions of keys and options, read from the Google docstrings of their classes."""

import inspect
import re

_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):\s*$")
_ARGUMENT = re.compile(r"^    (\w+): (.*)$")


def arguments(cls: type) -> dict[str, str]:
    """Return name → description of what `Args:` lists in a class and in the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__doc__" in vars(base) and base.__doc__:
            found |= _listed(inspect.cleandoc(base.__doc__))
    return found


def summary(cls: type) -> str:
    """Return the first paragraph of a class's own docstring in one line, empty if it has none."""
    text = inspect.cleandoc(cls.__doc__ or "") if "__doc__" in vars(cls) else ""
    first = text.partition("\n\n")[0]
    return " ".join(first.split()) if not _SECTION.match(first.partition("\n")[0]) else ""


def _listed(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    is_inside, name = False, ""
    for line in text.splitlines():
        if _SECTION.match(line):
            is_inside = line.startswith("Args:")
        elif is_inside and (match := _ARGUMENT.match(line)):
            name = match[1]
            found[name] = match[2]
        elif is_inside and name and line.startswith("     "):
            found[name] += f" {line.strip()}"
    return found
