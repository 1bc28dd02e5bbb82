"""One config path: defaults ← YAML `base:` ← dotted overrides.

A command-line argument and a Tune sample are the same thing.

A config is validated in two goes, both before any process is started and before anything is written: field by
field (keys, types, ranges), then as a whole (does the model take the data, is there server data for a method
that needs it). All problems of a go are reported at once, each with what was given, what is allowed, the
nearest match and where to change it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedray.config import checks, hints, yaml_text
from fedray.config.messages import Where, explain, keys_of, line
from fedray.config.overrides import (
    CHOICES,
    Tree,
    base_of,
    options_given,
    origin,
    override_tree,
    parse_overrides,
    plain_copy,
)
from fedray.config.plugins import files_of, import_modules, unrecorded
from fedray.config.uri import absolute_uri
from fedray.data import DATASETS, PARTITIONS
from fedray.data.partition import PartitionKind
from fedray.errors import ConfigError, nearest, unknown
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.models import MODELS, InputShape, ModelSpec, Norm, build_model
from fedray.types import LocalPath, NonNegativeFloat, PositiveFloat, PositiveInt, Seed

UnitInterval = Annotated[float, Field(ge=0, lt=1)]


TABLES: Mapping[str, Mapping[str, Any]] = {
    "method.name": METHODS,
    "data.partition.kind": PARTITIONS,
    "data.name": DATASETS,
    "model": MODELS,
}
"""Key of a config → the table that its value is a name of."""


@dataclass(frozen=True)
class MethodChoice:
    """A method by its name in the table, its options, and which of them were given."""

    name: str
    options: Method
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def given_tree(self) -> Tree:
        """Return the name, and the options that were given or are not at their defaults."""
        return {"name": self.name} | options_given(self.options, self.given)


@dataclass(frozen=True)
class PartitionChoice:
    """A kind of partition by its name in the table, its options, and which of them were given."""

    kind: str
    options: PartitionKind
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def given_tree(self) -> Tree:
        """Return the kind, and the options that were given or are not at their defaults."""
        return {"kind": self.kind} | options_given(self.options, self.given)


def choose(
    section: str, key: str, value: Any, table: Mapping[str, type[Any]], default: str
) -> tuple[str, Any, frozenset[str]]:
    """Read a section whose `key` names a dataclass in a table and whose other keys are its fields.

    Returns:
        The name, the dataclass, and the fields that were given.

    Raises:
        ValidationError, ValueError: with every problem found.
    """
    if not isinstance(value, Mapping):
        hint = f"; to choose one, write {section}.{key}={value}" if isinstance(value, str) else ""
        raise ValueError(f"must be a mapping of keys to values{hint}")
    given = dict(value)
    name = given.pop(key, default)
    if not isinstance(name, str) or name not in table:
        message = unknown(section.rpartition(".")[2], str(name), table)
        raise ValidationError.from_exception_data(section, [_told(message, key, name)])
    known = [field.name for field in fields(table[name])]
    problems = [
        _told(_no_option(option, value, name, known, section, key, table), option, value)
        for option, value in sorted(given.items())
        if option not in known
    ]
    given = {option: value for option, value in given.items() if option in known}
    try:
        # JSON in strict mode: no "3" for 3, no true for 1, but a list for a tuple and a string for a path
        options = TypeAdapter(table[name]).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        problems += [_again(problem) for problem in error.errors(include_url=False)]
    if problems:
        raise ValidationError.from_exception_data(section, problems)
    return name, options, frozenset(given)


def _told(message: str, key: str, value: Any) -> InitErrorDetails:
    """Return a problem whose message says all."""
    return {"type": PydanticCustomError("told", "{text}", {"text": message}), "loc": (key,), "input": value}


def _again(problem: Any) -> InitErrorDetails:
    """Return a problem that pydantic found, to be raised with others."""
    told = {**problem.get("ctx", {}), "text": problem["msg"]}
    custom = PydanticCustomError(problem["type"], "{text}", told)
    return {"type": custom, "loc": problem["loc"], "input": problem["input"]}


def _no_option(
    option: str,
    value: Any,
    name: str,
    known: list[str],
    section: str,
    key: str,
    table: Mapping[str, type[Any]],
) -> str:
    owners = [other for other, kind in table.items() if option in {field.name for field in fields(kind)}]
    if owners:
        hint = f"; {', '.join(owners)} can have it."
    else:
        others = keys_of(RunConfig) if section in CHOICES else []
        keys = [*(f"{section}.{k}" for k in known), *(k for k in others if not k.startswith(f"{section}."))]
        hint = hints.for_key(f"{section}.{option}", value, keys, section)
    return f"{name} has no such option{hint} Keys here: {', '.join(sorted([key, *known]))}"


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


def _store_uri(value: str) -> str:
    try:
        return absolute_uri(value)
    except ConfigError as error:
        text = str(error).removeprefix("tracking.uri: ")
        raise PydanticCustomError("told", "{text}", {"text": text}) from None


StoreUri = Annotated[str, AfterValidator(_store_uri)]
"""A store of MLflow, or `none`: a path in it is made absolute where it is validated."""


def _actors(value: Any) -> Any:
    if value in ("auto", "per_client") or (type(value) is int and value >= 0):
        return value
    hint = nearest(value, ("auto", "per_client")).rstrip(".") if isinstance(value, str) else ""
    raise ValueError(f"must be auto, per_client, or a whole number of actors (0: in process){hint}")


class Section(BaseModel):
    """A part of the config: frozen, strict about values, and about keys that it does not know.

    Python's values are taken as a file would hold them (`overrides.plain`): a NumPy number for a number, a
    tuple for a list, a path for text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, **values: Any) -> None:
        # JSON in strict mode: no "3" for 3, no true for 1, but a list for a tuple and a string for a path
        text = json.dumps(plain_copy(values))
        self.__pydantic_validator__.validate_json(text, strict=True, self_instance=self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, validated anew where it is updated."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**(self.given_tree() | dict(update)))

    def to_tree(self) -> Tree:
        """Return all keys, defaults included, as plain values."""
        return plain_copy(self.model_dump())

    def given_tree(self) -> Tree:
        """Return the keys that were given, not those left at their defaults, as plain values."""
        return plain_copy(self.model_dump(exclude_unset=True))


def chosen(key: str) -> PlainSerializer:
    """Return what writes a choice as a mapping: with all its options, or with those given."""

    def write(choice: Any, info: SerializationInfo) -> Tree:
        if info.exclude_unset:
            tree: Tree = choice.given_tree()
            return tree
        return {key: getattr(choice, key)} | asdict(choice.options)

    return PlainSerializer(write)


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
    root: LocalPath | None = None
    partition: Annotated[
        PartitionChoice,
        PlainValidator(_partition),
        chosen("kind"),
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
        jitter: spread of speed and bandwidth within a device, as the sigma of a log-normal; up to 10.
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
    jitter: Annotated[NonNegativeFloat, Field(le=10)] = 0.2
    actors: Annotated[int | Literal["auto", "per_client"], PlainValidator(_actors)] = "auto"
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    chunk: PositiveInt | None = None
    deadline_s: PositiveFloat | None = None
    over_selection: Annotated[NonNegativeFloat, Field(le=1000)] = 0.0
    dropout: UnitInterval = 0.0


class TrackingConfig(Section):
    """`tracking:` where MLflow keeps what it is told.

    Args:
        uri: a store of MLflow (`sqlite:///…`, `http://…`), or `none`.
        experiment: name of the MLflow experiment.
    """

    uri: StoreUri = Field(default_factory=lambda: absolute_uri("sqlite:///runs/mlflow.db"))
    experiment: str = "fedray"

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        self.__pydantic_fields_set__.add("uri")  # its default is of the directory where it was made


class Config(Section):
    """A whole config. However it is made, all of it is checked, and what is wrong is a ConfigError.

    It has a `tracking` section.
    """

    def __init__(self, /, **values: Any) -> None:
        self._fill(values, type(self).__name__)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], where: Where = "config") -> Self:
        """Validate a nested mapping; `where` is named in messages.

        Raises:
            ConfigError: with every problem found.
        """
        config = cls.__new__(cls)
        config._fill(tree, where)
        return config

    def _fill(self, tree: Mapping[str, Any], where: Where) -> None:
        tree = plain_copy(tree)
        self._prepare(tree)
        try:
            super().__init__(**tree)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), where)) from None
        self.__pydantic_fields_set__.add("tracking")  # see TrackingConfig
        self._complete()
        problems = [line(key, text, where) for key, text in self._problems()]
        if problems:
            raise ConfigError("\n".join(problems))

    def _prepare(self, tree: Tree) -> None:
        """Do what must be done before the keys of a plain tree can be validated."""

    def _complete(self) -> None:
        """Add what a valid config has to remember, though nobody gave it."""

    def _problems(self) -> Iterable[checks.Problem]:
        """Return everything that keeps the config from being run, though each key is valid."""
        return ()


class RunConfig(Config):
    """All of one run.

    Args:
        rounds: how many.
        seed: the root of all randomness.
        eval_every: rounds between evaluations on validation data.
        checkpoint_every: rounds between checkpoints.
        model: a model of the table.
        norm: what becomes of its batch normalisation: averaged like weights, kept by each client (FedBN),
            asked for before evaluation (static, HeteroFL), or replaced by GroupNorm.
        prune_first: whether the weights of its first convolution or linear layer may be pruned.
        prune_last: whether those of its last one, the classifier, may be.
        imports: Python files that add methods, models or data sets to the tables.
    """

    rounds: PositiveInt = 30
    seed: Seed = 0
    eval_every: PositiveInt = 1
    checkpoint_every: PositiveInt = 10
    model: str = "mlp"
    norm: Norm = "average"
    prune_first: bool = True
    prune_last: bool = False
    imports: tuple[LocalPath, ...] = ()
    data: DataConfig = Field(default_factory=DataConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    method: Annotated[
        MethodChoice,
        PlainValidator(_method),
        chosen("name"),
    ] = Field(default_factory=lambda: _method({"name": "fedavg"}))
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    def __init__(self, /, **values: Any) -> None:  # said here, else mypy wants sections, and refuses mappings
        super().__init__(**values)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a YAML file (its `base:` section, or all of it) and apply `key=value` overrides.

        Raises:
            ConfigError: with every problem found.
        """
        changes = parse_overrides(overrides)
        return cls.from_tree(
            override_tree(base_of(yaml_text.load(path), path), changes), origin(path, changes)
        )

    def _prepare(self, tree: Tree) -> None:
        imports = tree.get("imports")
        if isinstance(imports, list) and all(isinstance(path, str) for path in imports):
            import_modules(imports)

    def _complete(self) -> None:
        entries = [TABLES[key][name] for key, name in self.chosen().items() if name in TABLES[key]]
        known = {path.resolve() for path in self.imports}
        missing = [path for path in files_of(entries) if path not in known]
        if missing:
            self.__dict__["imports"] = (*self.imports, *missing)  # else `resume` would not know them
            self.__pydantic_fields_set__.add("imports")

    def chosen(self) -> dict[str, str]:
        """Return the names that the config chooses from tables: key → name."""
        return {
            "method.name": self.method.name,
            "data.partition.kind": self.data.partition.kind,
            "data.name": self.data.name,
            "model": self.model,
        }

    def unrecorded(self) -> dict[str, tuple[str, str]]:
        """Return key → name and module of what is chosen, but whose module `imports` cannot name."""
        names = self.chosen()
        modules = unrecorded({key: TABLES[key][name] for key, name in names.items()})
        return {key: (names[key], module) for key, module in modules.items()}

    def _problems(self) -> Iterable[checks.Problem]:
        return checks.problems(self)

    def override(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> "RunConfig":
        """Return a config with dotted keys changed: `override(seed=1)`, `override({"method.lr": 0.1})`.

        As on the command line, a default stays a default: with another method, it is that method's.

        Raises:
            ConfigError: with every problem found.
        """
        return RunConfig.from_tree(override_tree(self.given_tree(), dict(changes or {}) | more), "override")

    def build_model(self, input_shape: InputShape, num_classes: int) -> ModelSpec:
        """Return the model for a data set, as this config wants it.

        Raises:
            ConfigError: if there is no such model, or if it does not take such inputs.
        """
        return build_model(
            self.model,
            input_shape,
            num_classes,
            prune_first=self.prune_first,
            prune_last=self.prune_last,
            norm=self.norm,
        )

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that name what determines the result.

        Not where it is computed, tracked or read from.
        """
        tree = decisive(self.to_tree())
        for key in ("norm", "prune_first", "prune_last"):
            if (
                tree[key] == type(self).model_fields[key].default
            ):  # what all runs had before they could choose
                del tree[key]
        if tree["method"]["min_layer"] == type(self.method.options).min_layer:  # since then no layer empties
            del tree["method"]["min_layer"]
        return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def decisive(tree: Tree) -> Tree:
    """Return the part of a whole config that determines the result; `resume` changes only its rounds."""
    tree = plain_copy(tree)
    del tree["tracking"], tree["imports"], tree["checkpoint_every"], tree["data"]["root"]
    clients = tree["clients"]
    del clients["actors"]
    if not clients["resources"]["by_device"]:  # which decides what clients are folded together
        del clients["resources"]
    return tree
