"""One config path: defaults ← YAML `base:` ← dotted overrides.

A command-line argument and a Tune sample are the same thing.

Validation has two steps, both before a process starts or a file is written: field by field (keys, types,
ranges), then as a whole (whether the model takes the data, whether a method has the server data that it
needs). A step reports all its problems at once, each with the given value, the allowed ones, the nearest
match and the key to change.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from fedray.config import checks, yaml_text
from fedray.config.choice import Choice, Chooser, Named, described
from fedray.config.docstrings import summary
from fedray.config.messages import COMPLETE, Where, explain, joined, keys_of, line
from fedray.config.overrides import base_of, origin, override_tree, parse_overrides, plain_copy
from fedray.config.places import absolute_place
from fedray.config.plugins import files_of, import_modules, unrecorded
from fedray.config.tables import TABLES
from fedray.config.trees import Tree, decisive
from fedray.config.trust import check as check_trusted
from fedray.config.trust import trusting
from fedray.config.uri import absolute_uri
from fedray.costs.differences import CODECS, UplinkCodec
from fedray.costs.memory import OnShort
from fedray.data import DATASETS, PARTITIONS
from fedray.data.partition import PartitionKind
from fedray.errors import ConfigError, nearest
from fedray.federation.method import Method
from fedray.federation.sampling import MOST_OVER_SELECTION, SAMPLERS, Fastest, Sampler
from fedray.methods import METHODS
from fedray.models import MODELS, InputShape, ModelSpec, Norm, build_model
from fedray.training.precision import Precision
from fedray.types import (
    Fraction,
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)

MOST_PATIENCE = 1e6
"""Factor of `clients.patience`, at most; null is longer."""
MOST_STACKED = 1024
"""Clients that train together; each needs the memory of a model and its batch."""

UnitInterval = Annotated[float, Field(ge=0, lt=1)]


METHOD: Chooser[Method] = Chooser("method", "name", METHODS, "fedavg", lambda: keys_of(RunConfig))
PARTITION: Chooser[PartitionKind] = Chooser(
    "data.partition", "kind", PARTITIONS, "iid", lambda: keys_of(RunConfig)
)
SAMPLER: Chooser[Sampler] = Chooser(
    "clients.sampler", "name", SAMPLERS, "uniform", lambda: keys_of(RunConfig)
)
UPLINK: Chooser[UplinkCodec] = Chooser("clients.uplink", "name", CODECS, "plain", lambda: keys_of(RunConfig))


def _store_uri(value: str) -> str:
    try:
        return absolute_uri(value)
    except ConfigError as error:
        text = str(error).removeprefix("tracking.uri: ")
        raise PydanticCustomError(COMPLETE, "{text}", {"text": text}) from None


StoreUri = Annotated[str, AfterValidator(_store_uri)]
"""An MLflow store, or `none`; validation makes a path in it absolute."""


def _storage(value: str) -> str:
    try:
        return absolute_place(value)
    except ConfigError as error:
        text = str(error).removeprefix("storage: ")
        raise PydanticCustomError(COMPLETE, "{text}", {"text": text}) from None


Storage = Annotated[str, AfterValidator(_storage)]
"""A folder, made absolute, or a place in an object store, without a login."""


Also = Literal["tensorboard", "wandb"]

NEEDS: dict[Also, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Tracker beside MLflow → the package that it needs."""


def _usable(names: tuple[Also, ...]) -> tuple[Also, ...]:
    missing = [name for name in names if find_spec(NEEDS[name]) is None]
    if missing:
        packages = " and ".join(NEEDS[name] for name in missing)
        raise ValueError(f"{packages} is not installed: pip install 'fedray[{','.join(missing)}]'")
    if len(set(names)) < len(names):
        raise ValueError("names a tracker twice")
    return names


Actors = NonNegativeInt | Literal["auto", "per_client"]


def _actors(value: Any) -> Any:
    if value in ("auto", "per_client") or (type(value) is int and value >= 0):
        return value
    hint = nearest(value, ("auto", "per_client")).rstrip(".") if isinstance(value, str) else ""
    raise ValueError(f"must be auto, per_client, or a whole number of actors (0: in process){hint}")


Stack = PositiveInt | Literal["auto"]


def _stack(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_STACKED):
        return value
    hint = nearest(value, ("auto",)).rstrip(".") if isinstance(value, str) else ""
    raise ValueError(
        f"must be auto, or a whole number of clients, 1 to {MOST_STACKED} (1: one after the other){hint}"
    )


class Section(BaseModel):
    """A part of the config: frozen, and strict about types and unknown keys.

    Values from Python are converted to those of a file (`overrides.plain`): a NumPy number to a number, a
    tuple to a list, a path to text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, **values: Any) -> None:
        # JSON in strict mode: no "3" for 3, no true for 1, but a list for a tuple and a string for a path
        text = json.dumps(plain_copy(values))
        self.__pydantic_validator__.validate_json(text, strict=True, self_instance=self)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Add the descriptions of the docstring."""
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] = described(schema.get("properties", {}), cls)
        schema["description"] = summary(cls)
        return schema

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; updated values are validated."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**(self.given_tree() | dict(update)))

    def to_tree(self) -> Tree:
        """Return all keys, defaults included, as plain values."""
        return plain_copy(self.model_dump())

    def given_tree(self) -> Tree:
        """Return the keys that were given, not those left at their defaults, as plain values."""
        return plain_copy(self.model_dump(exclude_unset=True))


class DataConfig(Section):
    """`data:` the examples, and how they are dealt to clients.

    Args:
        name: name of the data set.
        root: folder that holds it; null downloads it into a cache, unless a library has it embedded.
        partition: how the training examples are dealt to clients.
        validation_fraction: share of the training examples for validation, stratified by class.
        server_fraction: share of the training examples that the server itself trains on.
        client_test_fraction: share of each client's examples that is held out before the run, at least one;
            `clients/accuracy_*` are measured on them. With 0 they are measured on the examples that the
            client trains on. A client with a single example trains on it and is not measured.
    """

    name: Annotated[str, Named(DATASETS)] = "digits"
    root: LocalPath | None = None
    partition: Annotated[Choice[PartitionKind], PARTITION] = Field(default_factory=PARTITION.default)
    validation_fraction: UnitInterval = 0.1
    server_fraction: UnitInterval = 0.0
    client_test_fraction: UnitInterval = 0.0


class ResourcesConfig(Section):
    """`clients.resources:` the resources of each actor that hosts clients, for Ray.

    The speed of the simulated devices does not depend on them.

    Args:
        cpu: CPUs, possibly a fraction; null divides the machine's CPUs among the actors.
        gpu: GPUs, possibly a fraction; above 0, clients train on a GPU.
        custom: name of a custom resource → amount.
        labels: Ray's label selector.
        by_device: name of a device → resources of the actors that host its clients.
    """

    cpu: NonNegativeFloat | None = None
    gpu: NonNegativeFloat = 0.0
    custom: dict[str, PositiveFloat] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    by_device: dict[str, "ResourcesConfig"] = Field(default_factory=dict)


class ClientsConfig(Section):
    """`clients:` the population, the cohort of a round, and the actors that host them.

    Args:
        population: number of registered clients.
        cohort: number of clients that train in a round.
        devices: device (or device@link) → weight in the mix.
        jitter: spread of speed and bandwidth among clients of one device: sigma of a log-normal.
        memory: what becomes of a device whose memory cannot hold training (weights, gradients, optimiser, a
            batch and its activations): `refuse` refuses the run, with the numbers; `batch` halves the batches
            of such clients until they fit; `ignore` trains all the same.
        actors: Ray actors that host the clients: `auto` starts one per CPU, or none for a run that is too
            short to pay for their start; `per_client` one per client; 0 none (clients train in the run's
            process).
        resources: resources of each actor, for Ray.
        chunk: clients whose updates are summed together; null makes at most 16 chunks. Changes the last bits
            of a result.
        stack: clients that train together, as one stacked model: `auto` stacks small models on a GPU; 1
            trains one after the other. Changes the last bits of a result.
        deadline_s: simulated seconds after which an update is too late to count.
        sampler: how the cohort is drawn.
        uplink: how the updates of training are written.
        over_selection: share of the cohort drawn in excess, of which only the fastest clients train; short
            for the sampler `fastest` with this option.
        dropout: probability that a client of the cohort never answers, beside its device's own.
        max_failed: share of the asked clients, at most, that may fail: their code raises, or their update is
            malformed, not finite or beyond `max_change`. They are left out and named; a run with more of them
            ends.
        max_change: how far an update may be from the weights that it started from, for it to count: the L2
            norm of the difference, in multiples of the norm of those weights, or of what it would be if each
            were 1. No honest training comes near the default; null sets no bound.
        patience: a client actor counts as hung, and is replaced, after this many times the seconds that its
            clients take by the slowest call so far, at least 30 s; the first call may take ten minutes, or
            longer by the same factor for large models. null waits for ever.
    """

    population: PositiveInt = 100
    cohort: PositiveInt = 10
    devices: dict[str, PositiveFloat] = Field(
        default_factory=lambda: {"phone": 0.6, "raspberry_pi_4": 0.2, "laptop": 0.2}, min_length=1
    )
    jitter: Annotated[NonNegativeFloat, Field(le=10)] = 0.2
    memory: OnShort = "refuse"
    actors: Annotated[Actors, PlainValidator(_actors, json_schema_input_type=Actors)] = "auto"
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    chunk: PositiveInt | None = None
    stack: Annotated[Stack, PlainValidator(_stack, json_schema_input_type=Stack)] = "auto"
    deadline_s: PositiveFloat | None = None
    sampler: Annotated[Choice[Sampler], SAMPLER] = Field(default_factory=SAMPLER.default)
    uplink: Annotated[Choice[UplinkCodec], UPLINK] = Field(default_factory=UPLINK.default)
    over_selection: Annotated[NonNegativeFloat, Field(le=MOST_OVER_SELECTION)] = 0.0
    dropout: UnitInterval = 0.0
    max_failed: Fraction = 0.1
    max_change: PositiveFloat | None = 1000.0
    patience: Annotated[PositiveFloat, Field(ge=1, le=MOST_PATIENCE)] | None = 10.0

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        if self.over_selection and "sampler" not in self.model_fields_set:
            fastest = Fastest(over_selection=self.over_selection)
            self.__dict__["sampler"] = Choice("name", "fastest", fastest)


class TrainConfig(Section):
    """`train:` how clients compute.

    Args:
        precision: `bf16` computes products and convolutions of training in bfloat16, with float32 weights,
            updates and evaluation, on processors and GPUs that have it. Changes results; simulated seconds
            and bytes stay those of float32.
    """

    precision: Precision = "fp32"


class TrackingConfig(Section):
    """`tracking:` the MLflow store of the metrics.

    Args:
        uri: an MLflow store (`sqlite:///…`, `http://…`), or `none`.
        experiment: name of the MLflow experiment.
        also: further trackers, which write into the run's directory: `tensorboard`, `wandb` (offline).
    """

    uri: StoreUri = Field(default_factory=lambda: absolute_uri("sqlite:///runs/mlflow.db"))
    experiment: str = "fedray"
    also: Annotated[tuple[Also, ...], AfterValidator(_usable)] = ()

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        self.__pydantic_fields_set__.add("uri")  # its default depends on the working directory


class Config(Section):
    """A whole config. Every way to make one checks all of it and raises ConfigError.

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
        self._prepare(tree, where)
        try:
            super().__init__(**tree)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), where)) from None
        self.__pydantic_fields_set__.add("tracking")  # see TrackingConfig
        self._complete()
        problems = joined(line(key, text, where) for key, text in self._problems())
        if problems:
            raise ConfigError(problems)

    def _prepare(self, tree: Tree, where: Where) -> None:
        """Prepare for the validation of a plain tree, e.g. import the files that it names."""

    def _complete(self) -> None:
        """Complete a valid config, e.g. with the files of imported modules."""

    def _problems(self) -> Iterable[checks.Problem]:
        """Return every reason why the config cannot run although each key is valid."""
        return ()


class RunConfig(Config):
    """The config of one run.

    Args:
        rounds: number of rounds.
        seed: seed of all random numbers of the run.
        eval_every: rounds between two evaluations on validation data.
        eval_clients: clients, at most, on whose own examples the final model is evaluated
            (`data.client_test_fraction`: on which of them); 0 leaves out `clients/accuracy_*`.
        checkpoint_every: rounds between two checkpoints.
        model: name of the model.
        norm: treatment of batch normalisation: `average` averages it like weights, `local` keeps each
            client's own (FedBN), `static` measures its statistics before each evaluation (HeteroFL), `group`
            replaces it by GroupNorm.
        weight_standardization: whether the weights of convolutions are standardised in every forward pass,
            each output channel over the weights that it holds; null: as the method has it (`fedmef` does).
        prune_first: whether the weight of the first layer may be pruned.
        prune_last: whether the weight of the classifier, the last convolution or linear layer, may be pruned.
        imports: Python files that add methods, models, devices, … to the tables.
        storage: a folder that all nodes share, in which the directories of runs and sweeps are made instead
            of in `runs/`; or a place in an object store (`s3://…`, `gs://…`), below which they are published
            at each checkpoint; null: neither.
        data: the examples, and how they are dealt to clients.
        clients: the population, the cohort of a round, and the actors that host them.
        method: the method and its options.
        train: how clients compute.
        tracking: the MLflow store of the metrics.
    """

    rounds: PositiveInt = 30
    seed: Seed = 0
    eval_every: PositiveInt = 1
    eval_clients: NonNegativeInt = 200
    checkpoint_every: PositiveInt = 10
    model: Annotated[str, Named(MODELS)] = "mlp"
    norm: Norm = "average"
    weight_standardization: bool | None = None
    prune_first: bool = True
    prune_last: bool = False
    imports: tuple[LocalPath, ...] = ()
    storage: Storage | None = None
    data: DataConfig = Field(default_factory=DataConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    method: Annotated[Choice[Method], METHOD] = Field(default_factory=METHOD.default)
    train: TrainConfig = Field(default_factory=TrainConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    def __init__(self, /, **values: Any) -> None:  # else mypy refuses mappings for sections
        super().__init__(**values)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> "RunConfig":
        """Read a YAML file (its `base:` section, or all of it) and apply `key=value` overrides.

        Args:
            path: of the file.
            overrides: of its keys.
            trust: whether to run the Python files that it names under `imports`.

        Raises:
            ConfigError: with every problem found.
        """
        changes = parse_overrides(overrides)
        tree = override_tree(base_of(yaml_text.load(path), path), changes)
        with trusting(trust):
            return cls.from_tree(tree, origin(path, changes))

    def _prepare(self, tree: Tree, where: Where) -> None:
        imports = tree.get("imports")
        if isinstance(imports, list) and all(isinstance(path, str) for path in imports):
            check_trusted(imports, where if isinstance(where, str) else where("imports"))
            import_modules(imports)

    def _complete(self) -> None:
        entries = [TABLES[key][name] for key, name in self.chosen().items() if name in TABLES[key]]
        known = {path.resolve() for path in self.imports}
        missing = [path for path in files_of(entries) if path not in known]
        if missing:
            self.__dict__["imports"] = (*self.imports, *missing)  # `resume` imports them
            self.__pydantic_fields_set__.add("imports")

    def chosen(self) -> dict[str, str]:
        """Return key → the name that the config chooses from its table, for each key of `TABLES`."""
        return {key: attrgetter(key)(self) for key in TABLES}

    def unrecorded(self) -> dict[str, tuple[str, str]]:
        """Return key → name and module of chosen entries whose module `imports` cannot name."""
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
        """Return the config's model for a data set.

        Raises:
            ConfigError: if the model is unknown, or does not take such inputs.
        """
        return build_model(
            self.model,
            input_shape,
            num_classes,
            prune_first=self.prune_first,
            prune_last=self.prune_last,
            norm=self.norm,
            standardize=self.standardizes,
        )

    @property
    def standardizes(self) -> bool:
        """Whether weights are standardised: as the run asks, or else as the method has it."""
        given = self.weight_standardization
        return self.method.options.standardizes if given is None else given

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that identify the keys on which the result depends."""
        tree = decisive(self.to_tree())
        for dotted, value in SINCE.items():
            section, _, key = dotted.rpartition(".")
            part = tree[section] if section else tree
            if part[key] == value:
                del part[key]
        sampler = tree["clients"]["sampler"]
        if sampler["name"] in ("uniform", "fastest"):  # as `over_selection` alone, the older key
            tree["clients"]["over_selection"] = sampler.get("over_selection", 0.0)
            del tree["clients"]["sampler"]
        if tree["clients"]["uplink"]["name"] == "plain":  # all there was before
            del tree["clients"]["uplink"]
        if tree["method"]["min_layer"] == type(self.method.options).min_layer:
            del tree["method"]["min_layer"]
        return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


SINCE: Tree = {
    "norm": "average",
    "weight_standardization": None,
    "prune_first": True,
    "prune_last": False,
    "eval_clients": 200,
    "train": {"precision": "fp32"},
    "clients.stack": "auto",
    "clients.max_change": 1000.0,
    "clients.memory": "refuse",
    "data.client_test_fraction": 0.0,
}
"""Keys that were added after the first results → the value that all runs had before.

A digest leaves them out at that value, so that it stays what it was; and `method.min_layer` at its default.
"""
