"""Bad input gets one message: with the key, what was given, what is allowed or nearest, and where."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config.overrides import override_tree, parse_overrides
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep


def refused(*overrides: str, tree: dict[str, Any] | None = None) -> str:
    """Return the message for a tree with overrides, as the command line would show it."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_tree(override_tree(tree or {}, parse_overrides(overrides)), "x.yaml")
    return str(caught.value)


# ── a table of them
# ──────────────────────────────────────────────────────────────────────────────────────────

BAD = r"""
# keys that there are not

$ roundz=3
roundz (x.yaml): unknown; did you mean 'rounds'? Keys here: checkpoint_every, clients, data, eval_clients,
eval_every, imports, method, model, norm, prune_first, prune_last, rounds, seed, storage, tracking, train,
weight_standardization

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
dropout, jitter, max_change, max_failed, memory, over_selection, patience, population, resources, sampler,
stack, uplink

$ clients.=3
clients. (x.yaml): unknown. Keys here: actors, …

$ clients.resources.by_device.phone.cpuu=1
clients.resources.by_device.phone.cpuu (x.yaml): unknown; did you mean 'cpu'? Keys here: by_device, cpu,
custom, gpu, labels

$ method.name=snip  method.densty=0.2
method.densty (x.yaml): snip has no such option; did you mean 'density'? Keys here: batch_size, density,
downlink_values, local_epochs, lr, …

$ method.scorers=3
method.scorers (x.yaml): fedavg has no such option; snip, ceafl can have it. Keys here: batch_size, …

$ data.partition.kind=dirichlet  data.partition.alfa=1
data.partition.alfa (x.yaml): dirichlet has no such option; did you mean 'alpha'? Keys here: alpha, kind

# words of other tools

$ density=0.1
density (x.yaml): unknown; did you mean 'method.density'? Keys here: checkpoint_every, …

$ clients.lr=0.1
clients.lr (x.yaml): unknown; did you mean 'method.lr'? Keys here: actors, …

$ method.name=snip  method.sparsity=0.9
method.sparsity (x.yaml): snip has no such option; did you mean 'method.density' (density = 1 − sparsity:
method.density=0.1)? Keys here: batch_size, …

$ sparsity=0.75
sparsity (x.yaml): unknown; did you mean 'method.density' (density = 1 − sparsity: method.density=0.25)? Keys
here: …

$ method.learning_rate=0.1
method.learning_rate (x.yaml): fedavg has no such option; did you mean 'method.lr'? Keys here: batch_size, …

$ learning-rate=0.1
learning-rate (x.yaml): unknown; did you mean 'method.lr'? Keys here: …

$ method.cohort=3
method.cohort (x.yaml): fedavg has no such option; did you mean 'clients.cohort'? Keys here: …

$ clients.num_clients=3
clients.num_clients (x.yaml): unknown; did you mean 'clients.population'? Keys here: …

$ clients.fraction_fit=0.1
clients.fraction_fit (x.yaml): unknown; did you mean 'clients.cohort' (a number of clients: share ×
clients.population)? Keys here: …

$ num_rounds=3
num_rounds (x.yaml): unknown; did you mean 'rounds'? Keys here: …

$ epochs=0.5
epochs (x.yaml): unknown; did you mean 'method.local_epochs' (of a client in a round; rounds says how many
rounds), or, for part of an epoch, 'method.steps'? Keys here: …

$ data.dataset=mnist
data.dataset (x.yaml): unknown; did you mean 'data.name'? Keys here: …

$ data.alpha=0.1
data.alpha (x.yaml): unknown; did you mean 'data.partition.alpha'…

$ clients.gpus=1
clients.gpus (x.yaml): unknown; did you mean 'clients.resources.gpu'? Keys here: …

$ device=cuda
device (x.yaml): unknown; did you mean 'clients.devices' (the simulated devices; for a GPU of this machine
set clients.resources.gpu=1)? Keys here: …

# other notations

$ method.local_epochs=0.5
method.local_epochs (x.yaml): got 0.5; must be a whole number; for part of an epoch set method.steps, e.g.
method.steps=10

$ rounds=1e3
rounds (x.yaml): got 1000.0; must be a whole number; write rounds=1000

$ rounds=1_000
rounds (x.yaml): got '1_000'; must be a whole number; write rounds=1000

$ rounds=2.5
rounds (x.yaml): got 2.5; must be a whole number

$ clients.deadline_s=1:30
clients.deadline_s (x.yaml): got '1:30'; must be a number; write clients.deadline_s=90

$ clients.dropout=5%
clients.dropout (x.yaml): got '5%'; must be a number; write clients.dropout=0.05

$ prune_first=off
prune_first (x.yaml): got 'off'; must be true or false; write prune_first=false

$ prune_last=1
prune_last (x.yaml): got 1; must be true or false; write prune_last=true

$ model=off
model (x.yaml): unknown model 'off'. Known: char_transformer, …

$ model=true
model (x.yaml): got True; must be text; known: char_transformer, …

$ data.name=
data.name (x.yaml): got None; must be text; known: cifar10, …

# types

$ rounds=ten
rounds (x.yaml): got 'ten'; must be a whole number

$ rounds="3"
rounds (x.yaml): got '3'; must be a whole number; write rounds=3

$ rounds=true
rounds (x.yaml): got True; must be a whole number

$ rounds=3.0
rounds (x.yaml): got 3.0; must be a whole number; write rounds=3

$ rounds=
rounds (x.yaml): got None; must be a whole number

$ seed.x=3
seed (x.yaml): got {'x': 3}; must be a whole number

$ model=3
model (x.yaml): got 3; must be text; known: char_transformer, …

$ method.lr="0.1"
method.lr (x.yaml): got '0.1'; must be a number; write method.lr=0.1

$ method.batch_size=true
method.batch_size (x.yaml): got True; must be a whole number

$ data.partition.kind=shards  data.partition.classes_per_client="2"
data.partition.classes_per_client (x.yaml): got '2'; must be a whole number; write
data.partition.classes_per_client=2

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

$ method.lr=1e39
method.lr (x.yaml): got 1e+39; must be less than or equal to 1000000000000000000

$ method.weight_decay=1e308
method.weight_decay (x.yaml): got 1e+308; must be less than or equal to 1000000000000000000

$ clients.population=1000000000  data.partition.kind=bootstrap
clients.population (x.yaml): 1,000,000,000; a run keeps some bytes for each client, of at most 100,000,000

$ data.partition.kind=bootstrap  data.partition.examples=1000000000
data.partition.examples (x.yaml): got 1000000000; must be less than or equal to 10000000

$ clients.actors=1000000000
clients.actors (x.yaml): 1,000,000,000 processes of some 200 MB each; at most 10,000

$ clients.jitter=1e308
clients.jitter (x.yaml): got 1e+308; must be less than or equal to 10

$ clients.over_selection=1e308
clients.over_selection (x.yaml): got 1e+308; must be less than or equal to 1000

$ seed=18446744073709551616
seed (x.yaml): got 18446744073709551616; must be less than or equal to 18446744073709551615

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

$ clients.stack=atuo
clients.stack (x.yaml): got 'atuo'; must be auto, or a whole number of clients, 1 to 1024 (1: one after the
other); did you mean 'auto'?

$ clients.stack=0
clients.stack (x.yaml): got 0; must be auto, or a whole number of clients, 1 to 1024 (1: one after the other)

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
model (x.yaml): unknown model 'cn'; did you mean 'cnn'? Known: char_transformer, …

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
data.partition.kind (x.yaml): natural: digits does not name the writers of its examples; these do: femnist, …

$ clients.population=5000
clients.population (x.yaml): 5,000 clients, but digits leaves about 1,293 training examples for them; lower
it, or use data.partition.kind=bootstrap, where clients share examples

$ data.validation_fraction=0.6  data.server_fraction=0.5
data.validation_fraction (x.yaml): 0.6 for validation and data.server_fraction=0.5 leave nothing for the
clients; the sum must be below 1

$ clients.actors=per_client  clients.population=1000
clients.actors (x.yaml): per_client would start 1,000 processes of some 200 MB each (allowed: 256); use auto,
which hosts any number of clients in a few actors

$ clients.actors=per_client  clients.stack=4
clients.stack (x.yaml): 4, but with clients.actors=per_client each client trains alone in its actor; set
clients.stack=1, or another clients.actors

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


# ── what does not fit in the table
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_that_is_too_long_for_the_system():
    message = refused("data.name=mnist", f"data.root=/{'x' * 300}")
    assert re.fullmatch(
        r"data\.root \(x\.yaml\): '/x{300}' cannot be used: .*File name too long: '/x{300}'", message
    )


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


def test_the_message_says_whether_the_file_or_an_override_is_to_be_changed(write_yaml):
    path = write_yaml("rounds: 0\nclients: {cohort: 0}\nmethod: {lr: 0}\n")
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


# ── files
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: [1", "x.yaml, line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n b: 2", "x.yaml, line 2: not YAML: mapping values are not allowed here"),
        ("seed: 1\nmodel: mlp\nseed: 2", "x.yaml, line 3: duplicate key 'seed'"),
        ("data:\n  name: digits\n  name: mnist", "x.yaml, line 3: duplicate key 'name'"),
        ("- seed", "x.yaml: holds list, not a mapping of keys to values"),
        ("just text", "x.yaml: holds str, not a mapping of keys to values"),
        ("? [1, 2]\n: 3", "x.yaml, line 1: not YAML: found unhashable key"),
        ("seed: 2001-99-99", "seed (x.yaml): got '2001-99-99'; must be a whole number"),
        (
            "seed: &a [*a]",
            "a config holds no value that contains itself, and no endless nesting",
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
def test_one_message_says_what_is_wrong_with_a_file(write_yaml, text, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(write_yaml(text))
    assert str(caught.value).startswith(message)


def test_a_file_that_cannot_be_read(in_tmp):
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot be read: No such file or directory$"):
        RunConfig.load("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        RunConfig.load(in_tmp)
    (in_tmp / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^binary\.yaml: is not a text file in UTF-16: "):
        RunConfig.load("binary.yaml")


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_no_file_crashes_with_anything_but_a_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        RunConfig.load(path)
    except ConfigError as error:
        assert str(path) in str(error)


MANY = {f"key{number}": 1 for number in range(5_000)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "tree",
    [
        MANY,
        {"clients": MANY},
        {"method": {"name": "staged", **MANY}},
        {"clients": {"devices": MANY}},
        {"clients": {"resources": {"by_device": {key: {"cpu": 1} for key in MANY}}}},
    ],
    ids=["top", "section", "options", "devices", "by_device"],
)
def test_a_file_with_thousands_of_strange_keys_is_refused_at_once(tree):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_tree(tree, "x.yaml")
    assert len(str(error.value).splitlines()) == 51
    assert "key0" in str(error.value) and str(error.value).endswith("are these the keys of fedray?")


@pytest.mark.parametrize("depth", [100, 400, 900, 5000])
def test_a_value_of_endless_nesting_is_one_message(depth):
    deep: object = 1
    for _ in range(depth):
        deep = {"a": [deep]}
    for tree in ({"rounds": deep}, {"method": {"name": "fedavg", "lr": deep}}):
        with pytest.raises(ConfigError):
            RunConfig.from_tree(tree)
    for sweep in ({"space": {"seed": deep}}, {"space": {"seed": {"grid": deep}}}, {"tune": {"stop": deep}}):
        with pytest.raises(ConfigError):
            Sweep.read({"base": {}, "space": {"seed": {"grid": [1]}}, **sweep}, "x", "x", {})
