"""The one config path: defaults ← `base:` ← overrides; and what is said of what cannot be run."""

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedray.data import DATASETS, PARTITIONS
from fedray.data.partition import Dirichlet, Iid
from fedray.errors import ConfigError
from fedray.experiment.config import (
    CHOICES,
    SECTIONS,
    SHARED,
    RunConfig,
    Section,
    base_of,
    override_tree,
    parse_overrides,
)
from fedray.experiment.space import Sweep
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.methods.fedavg import FedAvg
from fedray.methods.frlp import FRLP
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged

TUNE_CONFIGS = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))


@pytest.fixture
def write(in_tmp):
    """Return a function that writes `x.yaml` in the working directory and returns its name."""

    def write(text: str) -> str:
        (in_tmp / "x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write


def refused(*overrides: str, tree: dict[str, Any] | None = None) -> str:
    """Return the message for a tree with overrides, as the command line would show it."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_tree(override_tree(tree or {}, parse_overrides(overrides)), "x.yaml")
    return str(caught.value)


# ── where a config comes from
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_a_run_on_the_embedded_digits():
    config = RunConfig()
    assert config == RunConfig.from_tree({})
    assert (config.data.name, config.model, config.method.name) == ("digits", "mlp", "fedavg")
    assert config.method.options == FedAvg()
    assert config.data.partition.options == Iid()
    assert config.clients.cohort <= config.clients.population


def test_load_reads_the_base_of_a_sweep_file(write):
    path = write(
        "base: {rounds: 7, method: {name: snip, density: 0.3}}\n"
        "space: {seed: {grid: [1, 2]}}\ntune: {mode: min}\n"
    )
    config = RunConfig.load(path)
    assert (config.rounds, config.seed, config.method.options) == (7, 0, SNIP(density=0.3))


@pytest.mark.parametrize("text", ["rounds: 7\nmodel: cnn\n", "base:\n  rounds: 7\n  model: cnn\n"])
def test_load_reads_the_config_of_one_run(write, text):
    config = RunConfig.load(write(text), ["model=lenet5"])
    assert (config.rounds, config.model) == (7, "lenet5")


@pytest.mark.parametrize("text", ["", "# nothing\n", "base:\n", "space: {seed: {grid: [1]}}\n"])
def test_what_a_file_leaves_out_is_the_default(write, text):
    assert RunConfig.load(write(text)) == RunConfig()


def test_a_tree_round_trips():
    config = RunConfig.from_tree(
        {
            "imports": [],
            "data": {"name": "mnist", "root": "/", "partition": {"kind": "shards"}, "server_fraction": 0.1},
            "clients": {"devices": {"phone@lte": 1}, "actors": "per_client", "deadline_s": 3},
            "method": {"name": "frlp", "prune_rounds": [3, 5], "uplink_values": "int8"},
        }
    )
    tree = config.to_tree()
    assert RunConfig.from_tree(tree) == config
    assert RunConfig.from_tree(tree).to_tree() == tree
    assert tree["method"]["prune_rounds"] == [3, 5]
    assert tree["data"]["partition"] == {"kind": "shards", "classes_per_client": 2}
    assert (tree["data"]["root"], tree["clients"]["deadline_s"]) == ("/", 3.0)


def test_every_option_of_every_method_and_partition_is_in_the_tree():
    for name, method in METHODS.items():
        config = RunConfig().override({"method.name": name, "data.server_fraction": 0.1})
        assert set(config.to_tree()["method"]) == {"name", *(field.name for field in fields(method))}
    for kind in PARTITIONS:
        config = RunConfig().override({"data.partition.kind": kind, "data.name": "mnist"})
        assert config.to_tree()["data"]["partition"] == {"kind": kind} | vars(config.data.partition.options)


def test_paths_are_those_of_where_the_config_was_read(in_tmp, monkeypatch):
    """A run goes on, and a trial works, in another directory."""
    monkeypatch.setenv("HOME", "/home/me")
    (in_tmp / "mine.py").write_text("")
    config = RunConfig.from_tree({"imports": ["mine.py"], "data": {"root": "there"}})
    assert (config.imports, config.data.root) == ((in_tmp / "mine.py",), in_tmp / "there")
    assert RunConfig().override({"data.root": "~/there"}).data.root == Path("/home/me/there")
    monkeypatch.chdir("/")
    assert RunConfig.from_tree(config.to_tree()) == config


def test_frozen():
    config = RunConfig()
    for section, key in ((config, "seed"), (config.clients, "cohort"), (config.data, "root")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)
    with pytest.raises(AttributeError):
        config.method.options.lr = 1.0  # type: ignore[misc]


# ── overrides
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("method.lr=1e-3", "method.lr", 0.001),
        ("method.lr=1E+3", "method.lr", 1000.0),
        ("method.lr=-.5e-2", "method.lr", -0.005),
        ("method.lr=2.", "method.lr", 2.0),
        ("model=cnn", "model", "cnn"),
        ("model=1e-3x", "model", "1e-3x"),
        ("model='1e-3'", "model", "1e-3"),
        ("clients.chunk=", "clients.chunk", None),
        ("clients.chunk=null", "clients.chunk", None),
        ("method.broadcast_finetuned=false", "method.broadcast_finetuned", False),
        ("method.prune_rounds=[3, 5]", "method.prune_rounds", [3, 5]),
        ("clients.devices={phone: 1, laptop: 2.5}", "clients.devices", {"phone": 1, "laptop": 2.5}),
        ("tracking.uri=http://a:1/?x=y", "tracking.uri", "http://a:1/?x=y"),
        (" seed = 3", "seed", 3),
    ],
)
def test_values_of_overrides_are_yaml(argument, key, value):
    ((found_key, found),) = parse_overrides([argument]).items()
    assert (found_key, found, type(found)) == (key, value, type(value))


def test_the_last_of_two_overrides_counts():
    assert parse_overrides(["seed=1", "model=cnn", "seed=2"]) == {"seed": 2, "model": "cnn"}


def test_dotted_keys_change_that_key_alone():
    before = RunConfig.from_tree({"clients": {"cohort": 4}, "data": {"validation_fraction": 0.2}})
    after = before.override({"clients.population": 50, "method.lr": 1}, seed=5)
    assert after.clients == before.clients.model_copy(update={"population": 50})
    assert after.data == before.data
    assert (after.seed, after.method.options) == (5, FedAvg(lr=1.0))
    assert (before.seed, before.clients.population) == (0, 100)


def test_a_section_given_whole_changes_the_keys_it_names():
    before = RunConfig.from_tree({"clients": {"population": 50}, "data": {"name": "mnist"}})
    after = before.override(
        clients={"cohort": 5, "resources": {"cpu": 2}}, data={"partition": {"kind": "shards"}}
    )
    assert (after.clients.population, after.clients.cohort, after.clients.resources.cpu) == (50, 5, 2)
    assert (after.data.name, after.data.partition.kind) == ("mnist", "shards")


def test_a_table_given_whole_is_replaced():
    config = RunConfig().override({"clients.devices": {"laptop": 1}, "clients.resources.custom": {"tpu": 1}})
    assert config.clients.devices == {"laptop": 1}
    assert config.override(clients={"resources": {"custom": {"npu": 2}}}).clients.resources.custom == {
        "npu": 2
    }


def test_one_entry_of_a_table_can_be_changed():
    config = RunConfig().override({"clients.devices": {"laptop": 1, "phone": 1}})
    assert config.override({"clients.devices.phone": 3}).clients.devices == {"laptop": 1, "phone": 3}


def test_the_sections_are_those_of_the_config():
    """Else a mapping for one of them would replace it, and its other keys fall back to their defaults."""

    def sections(model: Any, above: str = "") -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= {above + name} | sections(kind, f"{above}{name}.")
        return found

    assert sections(RunConfig) | set(CHOICES) == SECTIONS


SHARED_OPTIONS: dict[str, Any] = {
    "local_epochs": 3,
    "steps": 4,
    "lr": 0.2,
    "lr_decay": 0.9,
    "optimizer": "sgd",
    "batch_size": 7,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "uplink_values": "fp16",
    "downlink_values": "int8",
}


@pytest.mark.parametrize("how", ["file", "dotted", "section", "argument", "section argument"])
def test_another_method_keeps_the_options_that_all_have(write, how):
    base = {"method": {"name": "staged", "density": 0.3, "stages": 2, **SHARED_OPTIONS}}
    path = write(f"method: {base['method']}")
    match how:
        case "file":
            config = RunConfig.from_tree(override_tree(base, {"method.name": "snip"}))
        case "dotted":
            config = RunConfig.load(path).override({"method.name": "snip"})
        case "section":
            config = RunConfig.load(path).override(method={"name": "snip"})
        case "argument":
            config = RunConfig.load(path, ["method.name=snip"])
        case _:
            config = RunConfig.load(path, ["method={name: snip}"])
    assert set(SHARED_OPTIONS) == SHARED["method"] == {field.name for field in fields(Method)}
    assert config.method.name == "snip"
    assert config.method.options == SNIP(**SHARED_OPTIONS)  # density is the default again


@pytest.mark.parametrize("order", [1, -1])
def test_options_given_with_another_method_are_its_own(order):
    config = RunConfig.from_tree({"method": {"name": "snip", "density": 0.3, "lr": 0.2}})
    changes = dict([("name", "staged"), ("stages", 2), ("momentum", 0.4)][::order])
    wanted = Staged(stages=2, lr=0.2, momentum=0.4)
    assert config.override(method=changes).method.options == wanted
    assert (
        config.override({f"method.{key}": value for key, value in changes.items()}).method.options == wanted
    )


def test_the_same_method_again_keeps_everything():
    config = RunConfig.from_tree({"method": {"name": "snip", "density": 0.3}})
    assert config.override({"method.name": "snip"}) == config
    assert config.override(method={"name": "snip", "scorers": 3}).method.options == SNIP(
        density=0.3, scorers=3
    )


def test_another_partition_drops_the_options_of_the_old_one():
    config = RunConfig.from_tree({"data": {"partition": {"kind": "dirichlet", "alpha": 0.1}}})
    assert config.override({"data.partition.kind": "quantity_skew"}).data.partition.options.alpha == 0.5  # type: ignore[attr-defined]
    assert config.override({"data.partition.kind": "dirichlet"}) == config
    back = config.override({"data.partition": {"kind": "iid"}}).override({"data.partition.kind": "dirichlet"})
    assert back.data.partition.options == Dirichlet()
    assert back.data.name == "digits"


# ── what names a result
# ──────────────────────────────────────────────────────────────────────────────────────────

NOT_IN_THE_RESULT = {
    "clients.actors": 3,
    "clients.resources.cpu": 2,
    "clients.resources.custom": {"tpu": 1},
    "clients.resources.labels": {"tier": "fast"},
    "tracking.uri": "none",
    "tracking.experiment": "other",
    "data.root": "/",
    "checkpoint_every": 3,
}
IN_THE_RESULT = {
    "rounds": 31,
    "seed": 1,
    "eval_every": 2,
    "model": "cnn",
    "data.name": "fashion_mnist",
    "data.partition.kind": "quantity_skew",
    "data.partition.alpha": 0.4,
    "data.validation_fraction": 0.2,
    "data.server_fraction": 0.1,
    "clients.population": 99,
    "clients.cohort": 9,
    "clients.devices": {"phone": 1},
    "clients.jitter": 0.1,
    "clients.resources.by_device": {"phone": {"cpu": 1}},
    "clients.chunk": 3,
    "clients.deadline_s": 9,
    "clients.over_selection": 0.1,
    "clients.dropout": 0.1,
    "method.name": "staged",
    "method.lr": 0.1,
    "method.density": 0.2,
    "method.uplink_values": "fp16",
}
BASE = RunConfig.from_tree(
    {"data": {"name": "mnist", "partition": {"kind": "dirichlet"}}, "method": {"name": "snip"}}
)


def test_the_digest_names_what_determines_the_result():
    assert re.fullmatch("[0-9a-f]{12}", BASE.digest)
    same = [BASE.override({key: value}) for key, value in NOT_IN_THE_RESULT.items()]
    assert all(config != BASE for config in same)
    assert {config.digest for config in same} == {BASE.digest}
    other = {key: BASE.override({key: value}).digest for key, value in IN_THE_RESULT.items()}
    assert len({BASE.digest, *other.values()}) == 1 + len(IN_THE_RESULT), other


def test_every_key_is_in_the_digest_or_knowingly_not():
    elsewhere = {"imports", "clients.resources.gpu", "norm"}  # norm: test_norm_field.py
    tested = {*NOT_IN_THE_RESULT, *IN_THE_RESULT, *elsewhere}

    def keys(tree: dict[str, Any], above: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            dotted = above + key
            below = isinstance(value, dict) and dotted in SECTIONS - {"method", "data.partition"}
            found |= keys(value, f"{dotted}.") if below else {dotted}
        return found

    assert keys(BASE.to_tree()) - {"method", "data.partition"} == {
        key for key in tested if not key.startswith(("method.", "data.partition."))
    }


def test_a_digest_does_not_depend_on_how_the_config_was_written():
    """And stays what it is: results are compared by it across versions."""
    written = RunConfig.from_tree({"method": {"lr": 0.05}, "seed": 0})
    assert written.digest == RunConfig().digest
    assert written == RunConfig()  # computing the digest changed nothing


# ── bad input: one message, with the key, what was given, what is allowed or nearest, and where
# ──────────────────────────────────────────────────────────────────────────────────────────

BAD = r"""
# keys that there are not

$ roundz=3
roundz (x.yaml): unknown; did you mean 'rounds'? Keys here: checkpoint_every, clients, data, eval_every,
imports, method, model, norm, rounds, seed, tracking

$ zzz=3
zzz (x.yaml): unknown. Keys here: checkpoint_every, …

$ lr=0.1
lr (x.yaml): unknown; did you mean 'method.lr'? Keys here: …

$ partition=iid
partition (x.yaml): unknown; did you mean 'data.partition'? Keys here: …

$ client.cohort=3
client (x.yaml): unknown; did you mean 'clients'? Keys here: …

$ clients.cohrt=3
clients.cohrt (x.yaml): unknown; did you mean 'cohort'? Keys here: actors, chunk, cohort, deadline_s, devices,
dropout, jitter, over_selection, population, resources

$ clients.=3
clients. (x.yaml): unknown. Keys here: actors, …

$ clients.resources.by_device.phone.cpuu=1
clients.resources.by_device.phone.cpuu (x.yaml): unknown; did you mean 'cpu'? Keys here: by_device, cpu,
custom, gpu, labels

$ method.name=snip  method.densty=0.2
method.densty (x.yaml): snip has no such option; did you mean 'density'? Keys here: batch_size, density,
downlink_values, local_epochs, lr, lr_decay, momentum, name, optimizer, scorers, steps, uplink_values,
weight_decay

$ method.scorers=3
method.scorers (x.yaml): fedavg has no such option; snip, ceafl can have it. Keys here: batch_size, …

$ data.partition.kind=dirichlet  data.partition.alfa=1
data.partition.alfa (x.yaml): dirichlet has no such option; did you mean 'alpha'? Keys here: alpha, kind

# types

$ rounds=ten
rounds (x.yaml): got 'ten'; must be a whole number

$ rounds="3"
rounds (x.yaml): got '3'; must be a whole number

$ rounds=true
rounds (x.yaml): got True; must be a whole number

$ rounds=3.0
rounds (x.yaml): got 3.0; must be a whole number

$ rounds=
rounds (x.yaml): got None; must be a whole number

$ seed.x=3
seed (x.yaml): got {'x': 3}; must be a whole number

$ model=3
model (x.yaml): got 3; must be text

$ method.lr="0.1"
method.lr (x.yaml): got '0.1'; must be a number

$ method.batch_size=true
method.batch_size (x.yaml): got True; must be a whole number

$ data.partition.kind=shards  data.partition.classes_per_client="2"
data.partition.classes_per_client (x.yaml): got '2'; must be a whole number

$ clients.devices=phone
clients.devices (x.yaml): got 'phone'; must be a mapping of keys to values

$ clients=3
clients (x.yaml): got 3; must be a mapping of keys to values

$ seed={this: [is, a, value, which, is, far, too, long, to, be, told, whole]}
seed (x.yaml): got {'this': ['is', 'a', 'value', 'which', 'is', 'far', 'too'…; must be a whole number

$ imports=mine.py
imports (x.yaml): got 'mine.py'; must be a list

$ imports=[3]
imports.0 (x.yaml): got 3; must be text

# ranges

$ rounds=0
rounds (x.yaml): got 0; must be greater than 0

$ seed=-1
seed (x.yaml): got -1; must be greater than or equal to 0

$ method.lr=0
method.lr (x.yaml): got 0; must be greater than 0

$ method.lr=.inf
method.lr (x.yaml): got inf; must be a finite number

$ method.momentum=1
method.momentum (x.yaml): got 1; must be less than 1

$ clients.dropout=1
clients.dropout (x.yaml): got 1; must be less than 1

$ data.validation_fraction=.nan
data.validation_fraction (x.yaml): got nan; must be less than 1

$ clients.devices.phone=0
clients.devices.phone (x.yaml): got 0; must be greater than 0

$ clients.devices={}
clients.devices (x.yaml): got {}; must have at least one entry

$ clients.actors=autp
clients.actors (x.yaml): got 'autp'; must be auto, per_client, or a whole number of actors (0: in process);
did you mean 'auto'?

$ clients.actors=-1
clients.actors (x.yaml): got -1; must be auto, per_client, or a whole number of actors (0: in process)

$ clients.actors=true
clients.actors (x.yaml): got True; must be auto, per_client, or a whole number of actors (0: in process)

$ method.uplink_values=fp15
method.uplink_values (x.yaml): got 'fp15'; must be 'fp32', 'fp16' or 'int8'; did you mean 'fp16'?

# names that are in no table

$ method=frlp
method (x.yaml): got 'frlp'; must be a mapping of keys to values; to choose one, write method.name=frlp

$ data.partition=iid
data.partition (x.yaml): got 'iid'; must be a mapping of keys to values; to choose one, write
data.partition.kind=iid

$ method=
method (x.yaml): got None; must be a mapping of keys to values

$ method.name=fedavgg
method.name (x.yaml): unknown method 'fedavgg'; did you mean 'fedavg'? Known: autoflip, …

$ method.name=[1]
method.name (x.yaml): unknown method '[1]'. Known: autoflip, …

$ data.partition.kind=irichlet
data.partition.kind (x.yaml): unknown partition 'irichlet'; did you mean 'dirichlet'? Known: bootstrap,
dirichlet, iid, natural, quantity_skew, shards

$ model=cn
model (x.yaml): unknown model 'cn'; did you mean 'cnn'? Known: cnn, …

$ data.name=digts
data.name (x.yaml): unknown data set 'digts'; did you mean 'digits'? Known: cifar10, …

$ clients.devices={phon: 1}
clients.devices (x.yaml): unknown device 'phon'; did you mean 'phone'? Known: …

$ clients.devices={phone@lt: 1}
clients.devices (x.yaml): 'phone@lt': unknown link 'lt'; did you mean 'lte'? Known: …

$ clients.resources.by_device.fone.cpu=1
clients.resources.by_device (x.yaml): unknown device of this run 'fone'; did you mean 'phone'? Known: laptop,
phone, raspberry_pi_4

$ tracking.uri=mysql://x
tracking.uri (x.yaml): 'mysql://x': unknown scheme 'mysql'…

$ tracking.uri=runs
tracking.uri (x.yaml): 'runs': MLflow no longer keeps runs in plain folders; …

# parts that do not fit each other

$ clients.cohort=200
clients.cohort (x.yaml): 200 clients a round of a population of 100; lower clients.cohort or raise
clients.population

$ model=vgg11
model (x.yaml): vgg11 does not take digits: vgg11 halves the image five times and needs at least 32×32, or
28×28, which it pads; got 8×8

$ data.name=mnist  data.root=/nowhere
data.root (x.yaml): '/nowhere' is not a folder; mnist needs one with MNIST/raw/…

$ data.name=mnist  data.root=~nobody-here/x
data.root (x.yaml): got '~nobody-here/x'; must be a path: Could not determine home directory.

$ method.name=frlp
data.server_fraction (x.yaml): 0, but frlp trains on the server's own examples; set it, e.g.
data.server_fraction=0.02

$ method.name=staged  method.start=0.9
method (x.yaml): method.start=0.9 comes after method.until=0.5

$ data.partition.kind=natural
data.partition.kind (x.yaml): natural: digits does not say who made its examples; mnist does

$ clients.population=5000
clients.population (x.yaml): 5,000 clients, but digits leaves about 1,293 training examples for them; lower
it, or use data.partition.kind=bootstrap, where clients share examples

$ data.validation_fraction=0.6  data.server_fraction=0.5
data.validation_fraction (x.yaml): 0.6 for validation and data.server_fraction=0.5 leave nothing for the
clients; the sum must be below 1

$ clients.actors=per_client  clients.population=1000
clients.actors (x.yaml): per_client would start 1,000 processes of some 200 MB each (allowed: 256); use auto,
which hosts any number of clients in a few actors

$ clients.actors=0  clients.resources.gpu=1
clients.resources.gpu (x.yaml): clients in process (clients.actors=0) are not placed by Ray

$ clients.actors=per_client  clients.resources.by_device.phone.cpu=1
clients.resources.by_device (x.yaml): not together with clients.actors=per_client

$ clients.resources.by_device.phone.by_device.phone.cpu=1
clients.resources.by_device.phone.by_device (x.yaml): only one level is allowed

# files of one's own

$ imports=[nowhere.py]
imports: no file 'nowhere.py' (looked for /…

$ imports=[~nobody-here/x.py]
imports: '~nobody-here/x.py' is not the name of a file: Could not determine home directory.

$ imports=["\0"]
imports: '\x00' is not the name of a file: embedded null byte
"""
"""Overrides, two spaces between them, and the message; `…` at its end stands for more."""
CASES = [
    case.split("\n", 1) for case in re.split(r"^\$ ", re.sub("^#.*\n", "", BAD, flags=re.M), flags=re.M)[1:]
]


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[overrides for overrides, _ in CASES])
def test_one_message_says_what_is_wrong(overrides, message):
    found, wanted = refused(*overrides.split("  ")), " ".join(message.split())
    assert "\n" not in found
    assert found == wanted or (wanted.endswith("…") and found.startswith(wanted[:-1].rstrip()))


def test_a_name_that_is_too_long_for_the_system():
    message = refused("data.name=mnist", f"data.root=/{'x' * 300}")
    assert re.fullmatch(
        r"data\.root \(x\.yaml\): '/x{300}' cannot be used: .*File name too long: '/x{300}'", message
    )


def test_all_problems_of_a_go_are_said_at_once():
    message = refused(
        "rounds=0", "seed=-1", "method.lr=-1", "method.x=1", "clients.foo=3", "data.partition.a=1"
    )
    assert [line.split(" (")[0] for line in message.splitlines()] == [
        "rounds",
        "seed",
        "data.partition.a",
        "clients.foo",
        "method.x",
        "method.lr",
    ]
    message = refused(
        "model=cn", "clients.cohort=200", "data.name=mnist", "data.root=/nowhere", "method.name=frlp"
    )
    assert [line.split(" (")[0] for line in message.splitlines()] == [
        "clients.cohort",
        "data.root",
        "model",
        "data.server_fraction",
    ]


def test_the_message_says_whether_the_file_or_an_override_is_to_be_changed(write):
    path = write("rounds: 0\nclients: {cohort: 0}\nmethod: {lr: 0}\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path, ["seed=x", "clients.population=0", "method={lr: -1}"])
    assert str(caught.value).splitlines() == [
        "rounds (x.yaml): got 0; must be greater than 0",
        "seed (override): got 'x'; must be a whole number",
        "clients.population (override): got 0; must be greater than 0",
        "clients.cohort (x.yaml): got 0; must be greater than 0",
        "method.lr (override): got -1; must be greater than 0",
    ]
    with pytest.raises(ConfigError, match=r"^seed \(override\): got -3"):
        RunConfig().override(seed=-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: [1", "x.yaml, line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n b: 2", "x.yaml, line 2: not YAML: mapping values are not allowed here"),
        ("seed: 1\nmodel: mlp\nseed: 2", "x.yaml, line 3: the key 'seed' stands twice"),
        ("data:\n  name: digits\n  name: mnist", "x.yaml, line 3: the key 'name' stands twice"),
        ("- seed", "x.yaml: holds list, not a mapping of keys to values"),
        ("just text", "x.yaml: holds str, not a mapping of keys to values"),
        ("? [1, 2]\n: 3", "x.yaml, line 1: not YAML: found unhashable key"),
        ("seed: 2001-99-99", "x.yaml: a value cannot be read: month must be in 1..12"),
        (
            "seed: &a [*a]",
            "a config holds text, numbers, lists and mappings only: Circular reference detected",
        ),
        ("seed: !!python/object:os.system x", "x.yaml, line 1: not YAML: could not determine a constructor"),
        ("base: 3", "base (x.yaml): got 3; must be a mapping of keys to values"),
        (
            "base: {}\nspac: {}",
            "x.yaml: unknown section 'spac'; did you mean 'space'? Known: base, space, tune",
        ),
        ("base: {}\n1: 2\nzz: 3", "x.yaml: unknown section '1'. Known: base, space, tune"),
        ("1: 2", "1 (x.yaml): unknown. Keys here: checkpoint_every, "),
        ("clients:\n", "clients (x.yaml): got None; must be a mapping of keys to values"),
    ],
)
def test_one_message_says_what_is_wrong_with_a_file(write, text, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(write(text))
    assert str(caught.value).startswith(message)


def test_a_file_that_cannot_be_read(in_tmp):
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot be read: No such file or directory$"):
        RunConfig.load("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        RunConfig.load(in_tmp)
    (in_tmp / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^binary\.yaml: is not a text file$"):
        RunConfig.load("binary.yaml")


def test_anchors_and_merges_are_read(write):
    path = write(
        "data: &d {validation_fraction: 0.2}\nclients:\n  <<: {population: 20, cohort: 5}\n  cohort: 4\n"
    )
    config = RunConfig.load(path)
    assert (config.clients.population, config.clients.cohort) == (20, 4)


@pytest.mark.parametrize("argument", ["seed", "=3", "", " =3"])
def test_an_argument_must_have_a_key_and_a_value(argument):
    with pytest.raises(ConfigError, match=r"is not of the form key=value, e\.g\. method\.lr=0\.1"):
        parse_overrides([argument])


def test_an_override_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match=r"^override clients\.devices, line 1: not YAML: "):
        parse_overrides(["clients.devices={phone: 1"])


def test_a_key_below_a_value():
    with pytest.raises(ConfigError, match=r"^method\.name\.x: name is 'fedavg', not a section with keys"):
        RunConfig().override({"method.name.x": 1})


def test_a_model_too_large_for_a_device(monkeypatch):
    from fedray.costs import devices

    small = replace(devices.DEVICES["phone"], memory_bytes=2.0**20)
    monkeypatch.setitem(devices.DEVICES, "phone", small)
    message = refused("clients.devices={phone: 1, laptop: 1}", "model=cnn", "data.name=mnist")
    assert re.fullmatch(
        r"clients\.devices \(x\.yaml\): phone has 1 MiB for training, but cnn needs \d+ MiB; "
        "take it out of the mix or use a smaller model",
        message,
    )


def test_data_need_not_be_there_until_a_run_starts(monkeypatch):
    def load(root: Path | None) -> Any:
        raise AssertionError("a config was validated by loading data")

    for name, spec in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(spec, load=load))
        RunConfig().override({"data.name": name})


# ── no text crashes it
# ──────────────────────────────────────────────────────────────────────────────────────────


def _keys(tree: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += [above + key, *(_keys(value, f"{above}{key}.") if isinstance(value, dict) else [])]
    return found


KEYS = st.one_of(
    st.sampled_from([*_keys(RunConfig().to_tree()), "method.density", "data.partition.alpha", "base"]),
    st.text(max_size=8),
    st.builds("{}.{}".format, st.sampled_from(_keys(RunConfig().to_tree())), st.text(max_size=4)),
)
TRAPS = r"""
~ true -1 1e-3 1e400 .nan -.inf 0b_ 1_0 1:30 2001-99-99 frlp snip none mnist cnn @ *a % | --- ? {<<:1} ~zz =
"\ud800" "\0" !!int !!bool !!binary !!timestamp !!omap !!set&a sqlite:/// http://[ http://x:99999 file:x
"""
SCALARS = st.one_of(
    st.sampled_from(
        [*TRAPS.split(), "", "&a 1", "!!bool x", "!!omap [a: 1]", "{<<: 1}", "9" * 4400, "[" * 999]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(
            st.one_of(st.sampled_from(["name", "kind", "lr", "phone"]), SCALARS), inner, max_size=3
        ).map(lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"),
    ),
    max_leaves=5,
)
ARGUMENTS = st.one_of(st.builds("{}={}".format, KEYS, VALUES), st.text(max_size=20))


@settings(deadline=None, max_examples=150)
@given(st.lists(ARGUMENTS, min_size=1, max_size=2))
def test_no_override_crashes_with_anything_but_a_message(arguments):
    try:
        config = RunConfig.from_tree(override_tree({"method": {"name": "snip"}}, parse_overrides(arguments)))
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert RunConfig.from_tree(config.to_tree()) == config


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_no_file_crashes_with_anything_but_a_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        RunConfig.load(path)
    except ConfigError as error:
        assert str(path) in str(error)


# ── the files that come with the house
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_loads_and_all_its_points_are_valid(path):
    assert base_of({}, path) == {}
    RunConfig.load(path)
    assert len(Sweep.load(path).points) > 1


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_begins_with_the_command_that_runs_it(path, in_tmp):
    """And every command in its comments is one that could be run."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# fedray sweep tune_configs/{path.name}")
    for command in re.findall(r"^# +fedray ((?:run|sweep) .+)$", text, flags=re.MULTILINE):
        verb, file, *overrides = shlex.split(command)
        assert file == f"tune_configs/{path.name}"
        known = [argument for argument in overrides if "=PATH_" not in argument]
        {"run": RunConfig.load, "sweep": Sweep.load}[verb](path, known)


def test_frlp_in_the_quickstart_has_server_data():
    (quickstart,) = (path for path in TUNE_CONFIGS if path.stem == "quickstart")
    options = {point.config.method.name: point.config for point in Sweep.load(quickstart).points}
    assert isinstance(options["frlp"].method.options, FRLP)
    assert options["frlp"].data.server_fraction > 0
