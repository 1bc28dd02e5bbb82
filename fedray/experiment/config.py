"""One config path.

Defaults ← YAML `base:` ← dotted overrides. A command-line argument and a Tune sample are the same thing.

A config is validated in two goes, both before any process is started and before anything is written: field by
  field (keys, types, ranges),
then as a whole (does the model take the data, is there server data for a method that needs it). All problems
are reported at once, each with what was given, what is allowed, the nearest match and where to change it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from fedray.data import PARTITIONS
from fedray.data.partition import PartitionKind
from fedray.errors import ConfigError, nearest, unknown
from fedray.experiment import checks, yaml
from fedray.experiment.plugins import import_modules
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Tree = dict[str, Any]
"""A nested mapping of plain values, as YAML and JSON hold it."""

UnitInterval = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class MethodChoice:
    """A method by its name in the table, and its options."""

    name: str
    options: Method


@dataclass(frozen=True)
class PartitionChoice:
    """A kind of partition by its name in the table, and its options."""

    kind: str
    options: PartitionKind


def choose(
    section: str, key: str, value: Any, table: Mapping[str, type[Any]], default: str
) -> tuple[str, Any]:
    """Read a section whose `key` names a dataclass in a table and whose other keys are its fields."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping; to choose one, write {section}.{key}={value}")
    given = dict(value)
    name = given.pop(key, default)
    if name not in table:
        raise ValueError(unknown(section.rpartition(".")[2], str(name), table))
    # JSON in strict mode: no "3" for 3, no true for 1, but a list for a tuple and a string for a path
    return name, TypeAdapter(table[name]).validate_json(json.dumps(given), strict=True)


def _method(value: Any) -> MethodChoice:
    return (
        value
        if isinstance(value, MethodChoice)
        else MethodChoice(*choose("method", "name", value, METHODS, "fedavg"))
    )


def _partition(value: Any) -> PartitionChoice:
    if isinstance(value, PartitionChoice):
        return value
    return PartitionChoice(*choose("data.partition", "kind", value, PARTITIONS, "iid"))


class Section(BaseModel):
    """A part of the config: frozen, and strict about what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class DataConfig(Section):
    """`data:` which examples, and who has them.

    Args:
        name: a data set of the table.
        root: folder that holds it; None downloads it into a cache where it is not embedded.
        partition: how the training examples are dealt to clients.
        validation_fraction: share of the training examples kept for validation, stratified by class.
        server_fraction: share that the server itself has; taken from the clients, never from the test set.
    """

    name: str = "digits"
    root: Path | None = None
    partition: Annotated[
        PartitionChoice,
        PlainValidator(_partition),
        PlainSerializer(lambda c: {"kind": c.kind} | asdict(c.options)),
    ] = Field(default_factory=lambda: _partition({"kind": "iid"}))
    validation_fraction: UnitInterval = 0.1
    server_fraction: UnitInterval = 0.0


class ResourcesConfig(Section):
    """`clients.resources:` what an actor that hosts clients asks of Ray (not what the simulated device is).

    Args:
        cpu: CPUs, may be a fraction; None shares the machine's among the actors.
        gpu: GPUs, may be a fraction; clients then train on the GPU.
        custom: custom resources by name.
        labels: Ray's label selector.
        by_device: name of a device → resources of the actors that host its clients.
    """

    cpu: NonNegativeFloat | None = None
    gpu: NonNegativeFloat = 0.0
    custom: dict[str, PositiveFloat] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    by_device: dict[str, "ResourcesConfig"] = Field(default_factory=dict)


class ClientsConfig(Section):
    """`clients:` who there is, how many are asked, and where they are computed.

    Args:
        population: registered clients.
        cohort: clients whose training is asked for in a round.
        devices: device (or hardware@link) → weight in the mix.
        jitter: spread of speed and bandwidth within a device, as the sigma of a log-normal.
        actors: Ray actors that host the clients; `auto` takes one per CPU, `per_client` one per client, 0
            none: in process.
        resources: what each actor asks of Ray.
        chunk: clients folded together; None makes at most 16 chunks. Changes the last bits of a result.
        deadline_s: simulated seconds after which an update is late.
        over_selection: share of the cohort drawn in excess; the fastest are kept.
        dropout: probability that an asked client never answers, beside its device's own.
    """

    population: PositiveInt = 100
    cohort: PositiveInt = 10
    devices: dict[str, PositiveFloat] = Field(
        default_factory=lambda: {"phone": 0.6, "raspberry_pi_4": 0.2, "laptop": 0.2}, min_length=1
    )
    jitter: NonNegativeFloat = 0.2
    actors: NonNegativeInt | Literal["auto", "per_client"] = "auto"
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    chunk: PositiveInt | None = None
    deadline_s: PositiveFloat | None = None
    over_selection: NonNegativeFloat = 0.0
    dropout: UnitInterval = 0.0


class TrackingConfig(Section):
    """`tracking:` where MLflow keeps what it is told.

    Args:
        uri: a store of MLflow (`sqlite:///…`, `http://…`), or `none`.
        experiment: name of the MLflow experiment.
    """

    uri: str = "sqlite:///runs/mlflow.db"
    experiment: str = "fedray"


class RunConfig(Section):
    """All of one run.

    Args:
        rounds: how many.
        seed: the root of all randomness.
        eval_every: rounds between evaluations on validation data.
        checkpoint_every: rounds between checkpoints.
        model: a model of the table.
        imports: Python files that add methods, models or data sets to the tables.
    """

    rounds: PositiveInt = 30
    seed: NonNegativeInt = 0
    eval_every: PositiveInt = 1
    checkpoint_every: PositiveInt = 10
    model: str = "mlp"
    imports: tuple[Path, ...] = ()
    data: DataConfig = Field(default_factory=DataConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    method: Annotated[
        MethodChoice,
        PlainValidator(_method),
        PlainSerializer(lambda c: {"name": c.name} | asdict(c.options)),
    ] = Field(default_factory=lambda: _method({"name": "fedavg"}))
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a YAML file (its `base:` section, or all of it) and apply `key=value` overrides.

        Raises:
            ConfigError: with every problem found.
        """
        return cls.from_tree(
            override_tree(base_of(yaml.load(path), path), parse_overrides(overrides)), str(path)
        )

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], where: str = "config") -> "RunConfig":
        """Validate a nested mapping; `where` is named in messages.

        Raises:
            ConfigError: with every problem found.
        """
        paths = tree.get("imports") or ()
        import_modules([paths] if isinstance(paths, str) else paths)
        try:
            config = cls.model_validate_json(json.dumps(tree, default=str), strict=True)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None
        problems = checks.problems(config)
        if problems:
            raise ConfigError("\n".join(f"{problem} ({where})" for problem in problems))
        return config

    def override(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> "RunConfig":
        """Return a config with dotted keys changed: `override(seed=1)`, `override({"method.lr": 0.1})`."""
        return RunConfig.from_tree(override_tree(self.to_tree(), dict(changes or {}) | more), "override")

    def to_tree(self) -> Tree:
        """Return the whole config, defaults included, as plain values."""
        tree: Tree = json.loads(json.dumps(self.model_dump(), default=str))
        return tree

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that name what determines the result.

        Not where it is computed, tracked or read from.
        """
        tree = self.to_tree()
        del tree["tracking"], tree["imports"], tree["checkpoint_every"], tree["data"]["root"]
        del tree["clients"]["actors"]
        if not any(
            tree["clients"]["resources"]["by_device"]
        ):  # these decide which clients are folded together
            del tree["clients"]["resources"]
        return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def base_of(tree: Tree, path: str | Path) -> Tree:
    """Return the part of a file that describes one run.

    Raises:
        ConfigError: if the file is not a mapping.
    """
    if "base" in tree or "space" in tree or "tune" in tree:
        strangers = sorted(set(tree) - {"base", "space", "tune"})
        if strangers:
            known = ("base", "space", "tune")
            raise ConfigError(f"{path}: {unknown('section', strangers[0], known)}")
        base = tree.get("base") or {}
        if not isinstance(base, dict):
            raise ConfigError(f"{path}: base: must be a mapping, got {base!r}")
        return base
    return tree


def parse_overrides(arguments: Sequence[str]) -> Tree:
    """Read `key=value` arguments; values are YAML.

    Raises:
        ConfigError: for an argument without `=`.
    """
    changes: Tree = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not of the form key=value, e.g. method.lr=0.1")
        changes[key.strip()] = yaml.parse(value, where=key)
    return changes


CHOICES = {"method": "name", "data.partition": "kind"}
"""Sections whose one key decides which other keys there are."""

SHARED = {"method": frozenset(field.name for field in fields(Method))}
"""Options that survive when the choice changes."""


def override_tree(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """Return a copy of a nested mapping with dotted keys changed.

    Changing `method.name` keeps the options that every method has and drops the rest of the method section,
    so that one file serves many methods; changing `data.partition.kind` drops the other keys of the
    partition. The whole section may be given at once, as in `{"method": {"name": "snip", "density": 0.2}}`:
    the same happens.

    Raises:
        ConfigError: if a dotted key goes through something that is not a section.
    """
    result: Tree = json.loads(json.dumps(tree, default=str))
    flat: Tree = {}
    for dotted, value in changes.items():
        whole = dotted in CHOICES and isinstance(value, Mapping)
        flat |= {f"{dotted}.{key}": v for key, v in value.items()} if whole else {dotted: value}
    for section, key in CHOICES.items():
        name = f"{section}.{key}"
        if name in flat:
            _change_choice(result, section, key, flat[name])
    for dotted, value in flat.items():
        *parents, last = dotted.split(".")
        _descend(result, parents, dotted)[last] = value
    return result


def _change_choice(tree: Tree, section: str, key: str, value: Any) -> None:
    current = _descend(tree, section.split("."), section)
    if current.get(key) != value:
        kept = SHARED.get(section, frozenset())
        for option in [o for o in current if o not in kept]:
            del current[option]


def _descend(tree: Tree, parents: Sequence[str], dotted: str) -> Tree:
    for parent in parents:
        child = tree.setdefault(parent, {})
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is {child!r}, not a section with keys of its own")
        tree = child
    return tree


# ── messages
# ─────────────────────────────────────────────────────────────────────────────────────────────────


def explain(error: ValidationError, root: type[BaseModel], where: str, prefix: tuple[str, ...] = ()) -> str:
    """Turn pydantic's errors into a line each.

    Key (file): what was given, what is allowed, the nearest match.
    """
    return "\n".join(_lines(error, prefix, root, where))


def _lines(error: ValidationError, above: tuple[str, ...], root: Any, where: str) -> list[str]:
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        loc = above + tuple(str(part) for part in problem["loc"])
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            choices = {"method": METHODS, "partition": PARTITIONS}
            section = problem.get("input") or {}
            kind = section.get(CHOICES[".".join(loc)]) if isinstance(section, dict) else None
            lines += _lines(inner, loc, choices[loc[-1]].get(kind or "", Method), where)
            continue
        key = ".".join(loc)
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            allowed = _field_names(root, loc[len(above) : -1])
            lines.append(
                f"{key} ({where}): unknown{nearest(loc[-1], allowed)} Keys here: {', '.join(sorted(allowed))}"
            )
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            given = "" if inner is not None else f"got {_short(problem.get('input'))}; "
            lines.append(f"{key} ({where}): {given}{message}")
    return list(dict.fromkeys(lines))


def _field_names(root: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        root = root.model_fields[part].annotation if part in getattr(root, "model_fields", {}) else root
    if hasattr(root, "model_fields"):
        return list(root.model_fields)
    return [field.name for field in fields(root)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
