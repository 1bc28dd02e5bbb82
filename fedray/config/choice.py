"""A section of a config whose one key names a dataclass in a table, and whose other keys are its fields.

    method: Annotated[Choice[Method], METHOD] = Field(default_factory=METHOD.default)

Reading, writing, messages and the JSON schema of such a section are here, for every table.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, TypeVar

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from fedray.config import hints
from fedray.config.docstrings import arguments, summary
from fedray.config.messages import COMPLETE, SHOWN
from fedray.config.overrides import options_given
from fedray.config.trees import Tree
from fedray.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """An entry of a table, chosen by its name.

    Args:
        key: the key that chooses, `name` or `kind`.
        name: the entry's name in the table.
        options: the entry's dataclass with the given options.
        given: the options that a file, an argument or Python code gave.
    """

    key: str
    name: str
    options: T
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The name, where the config calls it `kind`."""
        return self.name

    def to_tree(self) -> Tree:
        """Return the name and all options."""
        return {self.key: self.name} | asdict(self.options)  # type: ignore[call-overload, no-any-return]

    def given_tree(self) -> Tree:
        """Return the name, and the options that were given or are not at their defaults."""
        return {self.key: self.name} | options_given(self.options, self.given)


@dataclass(frozen=True, eq=False)
class Chooser(Generic[T]):
    """Reads and writes a section as a `Choice`; stands in the annotation of its field.

    Args:
        section: dotted key of the section.
        key: its key that chooses.
        table: name → dataclass.
        first: the name where none is given.
        keys_elsewhere: returns the dotted keys of the rest of the config, for the nearest match.
        shorthand: whether a text in place of the mapping is the name.
    """

    section: str
    key: str
    table: Mapping[str, type[Any]]
    first: str
    keys_elsewhere: Callable[[], Iterable[str]] = tuple
    shorthand: bool = False

    def default(self) -> Choice[T]:
        """Return the first entry with its defaults."""
        return self.read({})

    def read(self, value: Any) -> Choice[T]:
        """Return the choice that a mapping describes.

        Raises:
            ValidationError, ValueError: with every problem found.
        """
        if isinstance(value, Choice):
            return value
        if self.shorthand and isinstance(value, str):
            value = {self.key: value}
        if not isinstance(value, Mapping):
            hint = f"; to choose one, write {self.section}.{self.key}={value}"
            hint = hint if isinstance(value, str) else ""
            kind = f"one of {', '.join(self.table)}, or a mapping" if self.shorthand else "a mapping"
            raise ValueError(f"must be {kind} of keys to values{hint}")
        given = dict(value)
        name = given.pop(self.key, self.first)
        if not isinstance(name, str) or name not in self.table:
            message = unknown(self.section.rpartition(".")[2], str(name), self.table)
            raise ValidationError.from_exception_data(self.section, [_problem(message, self.key, name)])
        known = [option.name for option in fields(self.table[name])]
        problems = [
            _problem(self._no_option(option, given[option], name, known), option, given[option])
            for option in sorted(set(given).difference(known))[: SHOWN + 1]
        ]
        given = {option: value for option, value in given.items() if option in known}
        try:
            # JSON in strict mode: no "3" for 3, no true for 1, but a list for a tuple and a string for a path
            options = TypeAdapter(self.table[name]).validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            problems += [_again(problem) for problem in error.errors(include_url=False)]
        if problems:
            raise ValidationError.from_exception_data(self.section, problems)
        return Choice(self.key, name, options, frozenset(given))

    def _no_option(self, option: str, value: Any, name: str, known: list[str]) -> str:
        owners = [n for n, kind in self.table.items() if option in {field.name for field in fields(kind)}]
        if owners:
            hint = f"; {', '.join(owners)} can have it."
        else:
            here = f"{self.section}."
            elsewhere = [key for key in self.keys_elsewhere() if not key.startswith(here)]
            keys = [*(f"{here}{key}" for key in known), *elsewhere]
            hint = hints.for_key(f"{here}{option}", value, keys, self.section)
        return f"{name} has no such option{hint} Keys here: {', '.join(sorted([self.key, *known]))}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `read`; write all options, or with `exclude_unset` those that were given."""
        return core_schema.no_info_plain_validator_function(
            self.read,
            serialization=core_schema.plain_serializer_function_ser_schema(_write, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe the section: each name of the table, as it is now, allows its own options."""
        cases = []
        for name, kind in self.table.items():
            ours = handler.resolve_ref_schema(handler(TypeAdapter(kind).core_schema))
            entry = {
                "if": {"properties": {self.key: {"const": name}}, "required": [self.key]},
                "then": self._entry(kind, ours),
            }
            cases.append(entry)
            if name == self.first:
                cases.append({"if": {"not": {"required": [self.key]}}, "then": entry["then"]})
        names = {"enum": list(self.table), "default": self.first}
        section = {"type": "object", "properties": {self.key: names}, "required": [], "allOf": cases}
        return {"anyOf": [{"enum": list(self.table)}, section]} if self.shorthand else section

    def _entry(self, kind: type[Any], ours: Mapping[str, Any]) -> Tree:
        properties = described(ours.get("properties", {}), kind)
        return {
            "description": summary(kind),
            "properties": {self.key: True, **properties},
            "additionalProperties": False,
        }


@dataclass(frozen=True, eq=False)
class Named:
    """Stands in the annotation of a text that names an entry of a table, for the schema."""

    table: Mapping[str, Any]

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Allow the names of the table, as it is now."""
        return {"type": "string", "enum": list(self.table)}


def described(properties: Mapping[str, Tree], kind: type) -> Tree:
    """Return the properties of a schema with the descriptions of the class's docstring."""
    texts = arguments(kind)
    return {
        name: {**schema, "description": texts[name]} if name in texts else schema
        for name, schema in properties.items()
    }


def _write(choice: Choice[Any], info: SerializationInfo) -> Tree:
    return choice.given_tree() if info.exclude_unset else choice.to_tree()


def _problem(message: str, key: str, value: Any) -> InitErrorDetails:
    """Return a problem whose message is complete (see `messages.COMPLETE`)."""
    return {"type": PydanticCustomError(COMPLETE, "{text}", {"text": message}), "loc": (key,), "input": value}


def _again(problem: Any) -> InitErrorDetails:
    """Return a problem that pydantic found, to be raised with others."""
    context = {**problem.get("ctx", {}), "text": problem["msg"]}
    custom = PydanticCustomError(problem["type"], "{text}", context)
    return {"type": custom, "loc": problem["loc"], "input": problem["input"]}
