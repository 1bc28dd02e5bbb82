"""JSON files and JSON lines of a known shape: what another program wrote is refused by its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from fedray.durable import read_lines, read_mapping
from fedray.errors import RunError

Kinds = Mapping[str, type | tuple[type, ...]]
"""Key → type of its value. A float may be written without a point; a bool is no number."""


@dataclass(frozen=True)
class Shape:
    """Of a mapping.

    Args:
        needs: the keys that it must have.
        may: further keys that it may have.
        each: the type of all its values.
        inside: key → shape of a mapping in it.
        items: key of a list or a mapping in it → the shape of each entry.
    """

    needs: Kinds = field(default_factory=dict)
    may: Kinds = field(default_factory=dict)
    each: type | None = None
    inside: "Mapping[str, Shape]" = field(default_factory=dict)
    items: "Mapping[str, Shape]" = field(default_factory=dict)

    def fault(self, found: Any) -> str | None:
        """Return what is wrong with a value; None: nothing."""
        if not isinstance(found, dict):
            return f"{found!r:.40} is no mapping"
        missing = [key for key in self.needs if key not in found]
        if missing:
            return f"it has no {missing[0]}"
        kinds = {**self.needs, **self.may}
        if self.each is not None:
            kinds |= dict.fromkeys(found, self.each)
        wrong = [key for key, kind in kinds.items() if key in found and not is_a(found[key], kind)]
        if wrong:
            return f"its {wrong[0]} is {found[wrong[0]]!r:.40}"
        faults = (self._inner_fault(key, value) for key, value in found.items())
        return next((fault for fault in faults if fault is not None), None)

    def _inner_fault(self, key: str, value: Any) -> str | None:
        shapes = [(self.inside[key], value)] if key in self.inside else []
        if key in self.items:
            if not isinstance(value, dict | list):
                return f"its {key} is {value!r:.40}"
            entries = value.values() if isinstance(value, dict) else value
            shapes += [(self.items[key], entry) for entry in entries]
        faults = (shape.fault(one) for shape, one in shapes)
        return next((f"in its {key}, {fault}" for fault in faults if fault is not None), None)


@dataclass(frozen=True)
class Record:
    """A JSON file with a mapping.

    Args:
        name: of the file.
        shape: of the mapping.
        otherwise: what a user can do who has no copy of it; begins with `or`.
    """

    name: str
    shape: Shape
    otherwise: str = ""

    def read(self, folder: Path) -> dict[str, Any] | None:
        """Return what the file in a folder holds; None if there is none.

        Raises:
            RunError: if it is damaged, or not of this shape; with the file and what to do.
        """
        try:
            found = read_mapping(folder / self.name)
        except RunError as error:
            raise RunError(f"{error}; {_advice(self.otherwise)}") from error
        fault = None if found is None else self.shape.fault(found)
        if fault is not None:
            raise RunError(f"{folder / self.name}: is damaged: {fault}; {_advice(self.otherwise)}")
        return found


@dataclass(frozen=True)
class Records:
    """A file of JSON lines.

    Args:
        name: of the file.
        shapes: key → shape of the lines that have it; of several, the first counts.
        otherwise: as of `Record`.
    """

    name: str
    shapes: Mapping[str, Shape]
    otherwise: str = ""

    def read(self, folder: Path) -> list[dict[str, Any]]:
        """Return the lines of the file in a folder; a torn last one is left out.

        Raises:
            RunError: if a line is damaged, or of no such shape; with file, line and what to do.
        """
        path = folder / self.name
        try:
            lines = read_lines(path)
        except RunError as error:
            raise RunError(f"{error}; {_advice(self.otherwise)}") from error
        for number, line in enumerate(lines, start=1):
            fault = self.fault(line)
            if fault is not None:
                raise RunError(f"{path}, line {number}: is damaged: {fault}; {_advice(self.otherwise)}")
        return lines

    def fault(self, line: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a line; None: nothing."""
        key = next((key for key in self.shapes if key in line), None)
        return f"it has no {' or '.join(self.shapes)}" if key is None else self.shapes[key].fault(line)


def _advice(otherwise: str) -> str:
    return f"restore it from a copy{', ' + otherwise if otherwise else ''}"


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Tell whether a value of JSON has a type; NaN and infinity, which JSON lacks, have none."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) is float and not isfinite(value):
        return False
    return type(value) in kinds or (float in kinds and type(value) is int)
