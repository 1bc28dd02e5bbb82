"""The one config path: defaults ← `base:` ← overrides; and what of it names a result."""

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedray.config.overrides import SECTIONS, base_of
from fedray.config.run_config import RunConfig
from fedray.data import DATASETS, PARTITIONS
from fedray.data.partition import Iid
from fedray.methods import METHODS
from fedray.methods.fedavg import FedAvg
from fedray.methods.frlp import FRLP
from fedray.methods.snip import SNIP
from fedray.sweeps.space import Sweep

TUNE_CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))
    if not path.stem.startswith("rl_")  # trainings of agents: tests/rllib_pruner/test_config.py
]


# ── where a config comes from
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_a_run_on_the_embedded_digits():
    config = RunConfig()
    assert config == RunConfig.from_tree({})
    assert (config.data.name, config.model, config.method.name) == ("digits", "mlp", "fedavg")
    assert config.method.options == FedAvg()
    assert config.data.partition.options == Iid()
    assert config.clients.cohort <= config.clients.population


def test_load_reads_the_base_of_a_sweep_file(write_yaml):
    path = write_yaml(
        "base: {rounds: 7, method: {name: snip, density: 0.3}}\n"
        "space: {seed: {grid: [1, 2]}}\ntune: {mode: min}\n"
    )
    config = RunConfig.load(path)
    assert (config.rounds, config.seed, config.method.options) == (7, 0, SNIP(density=0.3))


@pytest.mark.parametrize("text", ["rounds: 7\nmodel: cnn\n", "base:\n  rounds: 7\n  model: cnn\n"])
def test_load_reads_the_config_of_one_run(write_yaml, text):
    config = RunConfig.load(write_yaml(text), ["model=lenet5"])
    assert (config.rounds, config.model) == (7, "lenet5")


@pytest.mark.parametrize("text", ["", "# nothing\n", "base:\n", "space: {seed: {grid: [1]}}\n"])
def test_what_a_file_leaves_out_is_the_default(write_yaml, text):
    assert RunConfig.load(write_yaml(text)) == RunConfig()


def test_anchors_and_merges_are_read(write_yaml):
    path = write_yaml(
        "data: &d {validation_fraction: 0.2}\nclients:\n  <<: {population: 20, cohort: 5}\n  cohort: 4\n"
    )
    config = RunConfig.load(path)
    assert (config.clients.population, config.clients.cohort) == (20, 4)


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


def test_data_need_not_be_there_until_a_run_starts(monkeypatch):
    def load(root: Path | None) -> Any:
        raise AssertionError("a config was validated by loading data")

    for name, spec in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(spec, load=load))
        RunConfig().override({"data.name": name, "model": "char_transformer" if spec.tokens else "mlp"})


def test_frozen():
    config = RunConfig()
    for section, key in ((config, "seed"), (config.clients, "cohort"), (config.data, "root")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)
    with pytest.raises(AttributeError):
        config.method.options.lr = 1.0  # type: ignore[misc]


# ── what names a result
# ──────────────────────────────────────────────────────────────────────────────────────────

NOT_IN_THE_RESULT = {
    "clients.actors": 3,
    "clients.resources.cpu": 2,
    "clients.resources.custom": {"tpu": 1},
    "clients.resources.labels": {"tier": "fast"},
    "clients.max_failed": 0.2,
    "clients.patience": 20.0,
    "tracking.uri": "none",
    "tracking.experiment": "other",
    "tracking.also": ["tensorboard"],
    "data.root": "/",
    "checkpoint_every": 3,
    "storage": "s3://bucket/runs",
}
IN_THE_RESULT = {
    "rounds": 31,
    "seed": 1,
    "eval_every": 2,
    "eval_clients": 0,
    "model": "cnn",
    "data.name": "fashion_mnist",
    "data.partition.kind": "quantity_skew",
    "data.partition.alpha": 0.4,
    "data.validation_fraction": 0.2,
    "data.server_fraction": 0.1,
    "data.client_test_fraction": 0.2,
    "clients.population": 99,
    "clients.cohort": 9,
    "clients.devices": {"phone": 1},
    "clients.jitter": 0.1,
    "clients.resources.by_device": {"phone": {"cpu": 1}},
    "clients.chunk": 3,
    "clients.stack": 3,
    "clients.deadline_s": 9,
    "clients.over_selection": 0.1,
    "clients.sampler.name": "oort",
    "clients.uplink.name": "topk",
    "clients.dropout": 0.1,
    "clients.max_change": None,
    "clients.memory": "batch",
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
    # norm: test_norm_field.py; what may be pruned: test_prunable.py; precision: test_precision.py;
    # weight_standardization: federation/test_standardization.py
    elsewhere = {"imports", "clients.resources.gpu", "norm", "prune_first", "prune_last", "train.precision"}
    elsewhere |= {"weight_standardization"}
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
    assert written.digest == "49d7c4b9e8c1"  # as in version 0.2
    assert written == RunConfig()  # computing the digest changed nothing


# ── the files that come with the house
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_loads_and_all_its_points_are_valid(path):
    assert base_of({}, path) == {}
    RunConfig.load(path)
    assert len(Sweep.load(path).configs) > 1


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_begins_with_the_command_that_runs_it(path, in_tmp):
    """And every command in its comments is one that could be run."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# fedray sweep tune_configs/{path.name}")
    for command in re.findall(r"^# +fedray ((?:run|sweep) .+)$", text, flags=re.MULTILINE):
        verb, file, *overrides = shlex.split(command)
        assert file == f"tune_configs/{path.name}"
        known = [argument for argument in overrides if "=PATH_" not in argument]
        (RunConfig.load if verb == "run" else Sweep.load)(path, known)


def test_frlp_in_the_quickstart_has_server_data():
    (quickstart,) = (path for path in TUNE_CONFIGS if path.stem == "quickstart")
    options = {point.config.method.name: point.config for point in Sweep.load(quickstart).points}
    assert isinstance(options["frlp"].method.options, FRLP)
    assert options["frlp"].data.server_fraction > 0
