"""A config made in Python is checked as one from a file, and means the same on every path."""

import pickle
import re
import sys
import types
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedray
from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.config.run_config import ClientsConfig, DataConfig, RunConfig
from fedray.config.trees import flatten
from fedray.data.partition import Dirichlet
from fedray.errors import ConfigError
from fedray.experiment import given, progress
from fedray.methods.pqsu import PQSU
from fedray.methods.snip import SNIP
from fedray.sweeps.outcome import SweepResult, Trial
from fedray.sweeps.space import Point, Sweep
from fedray.sweeps.sweep import sweep
from tests.experiment import tiny

# ── what is wrong is said, however the config is made
# ──────────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[dict[str, Any], str]] = [
    ({"clients": {"cohort": 500}}, "clients.cohort (RunConfig): 500 clients a round of a population of 100"),
    ({"data": {"name": "nope"}}, "data.name (RunConfig): unknown data set 'nope'"),
    ({"model": "nope"}, "model (RunConfig): unknown model 'nope'"),
    ({"method": {"name": "nope"}}, "method.name (RunConfig): unknown method 'nope'"),
    (
        {"method": {"name": "frlp"}},
        "data.server_fraction (RunConfig): 0, but frlp trains on the server's own",
    ),
    ({"rounds": "3"}, "rounds (RunConfig): got '3'; must be a whole number"),
    ({"rounds": True}, "rounds (RunConfig): got True; must be a whole number"),
    (
        {"seed": 2**64},
        "seed (RunConfig): got 18446744073709551616; must be less than or equal to 18446744073",
    ),
    ({"rounds": 2**63}, "rounds (RunConfig): got 9223372036854775808; must be less than or equal to 92233"),
    ({"roundz": 3}, "roundz (RunConfig): unknown; did you mean 'rounds'?"),
    ({"self": 3}, "self (RunConfig): unknown"),
    ({"seed": {1, 2}}, "seed: got {1, 2}; a config holds text, numbers, lists and mappings only, not set"),
    ({"seed": Decimal(1)}, "seed: got Decimal('1'); a config holds text, numbers"),
    ({"data": {"root": object}}, "data.root: got <class 'object'>; a config holds"),
    ({"clients": {"devices": {1: 1, "1": 2}}}, "clients.devices: duplicate key '1'"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_one_message_on_every_path(values, message):
    ways = {
        "RunConfig": lambda: RunConfig(**values),
        "model_validate": lambda: RunConfig.model_validate(values),
        "model_copy": lambda: RunConfig().model_copy(update=values),
        "override": lambda: RunConfig().override(values),
        "from_tree": lambda: RunConfig.from_tree(values),
    }
    for name, make in ways.items():
        with pytest.raises(ConfigError) as caught:
            make()
        where = {"override": "override", "from_tree": "config"}.get(name, "RunConfig")
        assert str(caught.value).startswith(message.replace("(RunConfig)", f"({where})")), name


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        RunConfig(rounds=0, clients={"cohort": 0}, method={"lr": -1})
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "rounds",
        "clients.cohort",
        "method.lr",
    ]


# ── Python's values
# ──────────────────────────────────────────────────────────────────────────────────────────


class Colour(Enum):
    """Names a model."""

    MLP = "mlp"


class Many(IntEnum):
    """A whole number."""

    ROUNDS = 7


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("seed", np.int64(1), 1),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", np.array(3), 3),
        ("seed", torch.tensor(4), 4),
        ("rounds", Many.ROUNDS, 7),
        ("model", Colour.MLP, "mlp"),
        ("model", np.str_("mlp"), "mlp"),
        ("prune_first", np.bool_(False), False),
        ("method.lr", np.float64(0.25), 0.25),
        ("method.lr", np.float32(0.25), 0.25),
        ("method.name", np.str_("snip"), "snip"),
        ("data.root", Path("/"), Path("/")),
        ("clients.deadline_s", np.int32(9), 9.0),
        ("clients.devices", {np.str_("phone"): np.float32(1)}, {"phone": 1.0}),
        ("imports", (), ()),
        ("imports", range(0), ()),
    ],
)
def test_a_value_with_an_obvious_plain_one_is_taken(key, value, plain):
    *sections, last = key.split(".")
    tree: Any = {last: value}
    for section in reversed(sections):
        tree = {section: tree}
    for config in (RunConfig(**tree), RunConfig().override({key: value}), RunConfig.from_tree(tree)):
        found: Any = config
        for part in key.replace("method.lr", "method.options.lr").split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (plain, type(plain))


@pytest.mark.parametrize("prune_rounds", [(3, 5), np.array([3, 5]), range(3, 6, 2)])
def test_lists(prune_rounds):
    method = {"name": "frlp", "prune_rounds": prune_rounds}
    config = RunConfig(method=method, data={"server_fraction": 0.1})
    assert config.method.options.prune_rounds == (3, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "word"), [(np.float64(1), "1.0"), (np.nan, "nan"), (np.bool_(True), "True")]
)
def test_a_value_of_another_kind_is_not(value, word):
    with pytest.raises(ConfigError, match=rf"^seed \(RunConfig\): got {word}; must be a"):
        RunConfig(seed=value)


def test_sections_methods_and_partitions_may_be_objects():
    wanted = RunConfig.from_tree(
        {
            "clients": {"cohort": 3},
            "data": {"name": "digits", "partition": {"kind": "dirichlet", "alpha": 0.2}},
            "method": {"name": "snip", "density": 0.2},
        }
    )
    data = DataConfig(name="digits", partition=Dirichlet(0.2))  # type: ignore[arg-type]
    made = RunConfig(clients=ClientsConfig(cohort=3), data=data, method=SNIP(density=0.2))
    assert made == wanted
    assert made.given_tree() == wanted.given_tree()
    assert RunConfig(method=wanted.method, data=wanted.data, clients=wanted.clients) == wanted
    with pytest.raises(ConfigError, match=r"^clients\.cohort \(RunConfig\): 500"):
        RunConfig(clients=ClientsConfig(cohort=500))


# ── what was given, and what is a default
# ──────────────────────────────────────────────────────────────────────────────────────────

SHORT: dict[str, Any] = {"rounds": 3, "method": {"lr": 0.1}, "data": {"server_fraction": 0.1}, "model": "cnn"}


def ways(write_yaml: Any, change: dict[str, Any]) -> dict[str, RunConfig]:
    """Return the config that `change` makes of SHORT, on every path."""
    path = write_yaml("rounds: 3\nmodel: cnn\nmethod: {lr: 0.1}\ndata: {server_fraction: 0.1}\n")
    base = RunConfig.load(path)
    ((key, value),) = change.items()
    (point,) = Sweep.load(write_yaml(f"base: {SHORT}\nspace: {{{key}: {{grid: [{value}]}}}}")).points
    return {
        "command line": RunConfig.load(path, [f"{key}={value}"]),
        "override": base.override(change),
        "tree": RunConfig.from_tree(override_tree(SHORT, change)),
        "given": RunConfig.from_tree(base.given_tree()).override(change),
        "constructor": RunConfig(**SHORT).override(change),
        "pickled": pickle.loads(pickle.dumps(base)).override(change),
        "copied": base.model_copy().override(change),
        "copied with an update": RunConfig(**SHORT | {"rounds": 9})
        .model_copy(update={"rounds": 3})
        .override(change),
        "twice": base.override({"method.name": "snip"}).override(change),
        "sweep": point.config,
    }


@pytest.mark.parametrize(
    "change",
    [{"method.name": "pqsu"}, {"method.name": "fedmef"}, {"data.partition.kind": "dirichlet"}, {"seed": 4}],
    ids=str,
)
def test_a_default_stays_a_default_on_every_path(write_yaml, change):
    found = ways(write_yaml, change)
    first = found["command line"]
    if change == {"method.name": "pqsu"}:
        assert first.method.options == PQSU(lr=0.1)
        assert first.method.options.uplink_values == "int8"
    if change != {"method.name": "pqsu"} and "method.name" in change:
        assert first.method.options.lr == 0.1
    assert {name: config for name, config in found.items() if name != "twice" and config != first} == {}
    if "method.name" in change:
        assert found["twice"] == first
    assert {config.digest for name, config in found.items() if name != "twice"} == {first.digest}


def test_what_was_given_stays(write_yaml):
    given = RunConfig.load(
        write_yaml("method: {uplink_values: fp32}\nmodel: cnn\ndata: {server_fraction: 0.1}")
    )
    for config in (given, given.override(seed=3), RunConfig(**given.given_tree())):
        assert config.override({"method.name": "pqsu"}).method.options.uplink_values == "fp32"
    # config.yaml of a run states every option: all of them count as given
    whole = RunConfig.from_tree(
        RunConfig.load(write_yaml("model: cnn\ndata: {server_fraction: 0.1}")).to_tree()
    )
    assert whole.override({"method.name": "pqsu"}).method.options.uplink_values == "fp32"


def test_the_digest_does_not_depend_on_what_was_given():
    config = RunConfig()
    whole = RunConfig.from_tree(config.to_tree())
    assert (whole, whole.digest) == (config, config.digest)
    assert config.given_tree().keys() == {"tracking"}


# ── what is run
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given", [None, 3, ["rounds=3"], ClientsConfig()], ids=["None", "3", "list", "section"]
)
def test_what_is_not_a_config_is_not_run(in_tmp, given):
    with pytest.raises(ConfigError, match=r"^run takes a config, not .*: the path of a YAML file, a mapping"):
        fedray.run(given)
    with pytest.raises(
        ConfigError, match=r"^sweep takes a sweep, not .*: the path of a YAML file, a mapping"
    ):
        sweep(given)
    assert not list(in_tmp.iterdir())


WAYS: dict[str, Any] = {
    "path": lambda path: path,
    "text": str,
    "mapping": lambda path: yaml_text.load(path),
    "dotted": lambda path: flatten(yaml_text.load(path)),
    "config": RunConfig.load,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "overrides", [{"method.lr": 0.2, "seed": 3}, ["method.lr=0.2", "seed=3"]], ids=["map", "list"]
)
def test_a_run_takes_a_path_a_mapping_or_a_config(in_tmp, write_yaml, way, overrides):
    path = write_yaml(yaml_text.dump(tiny.TREE | {"rounds": 1}))
    wanted = RunConfig.load(path, ["method.lr=0.2", "seed=3"])
    assert given.run_config(WAYS[way](path), overrides) == wanted


def test_wrong_input_has_the_messages_of_the_command_line(in_tmp, write_yaml):
    path = write_yaml("rounds: 0")
    cases = {
        r"^rounds \(.*\.yaml\): got 0": lambda: fedray.run(path),
        r"^rounds \(mapping\): got 0": lambda: fedray.run({"rounds": 0}),
        r"^method\.lr \(override\): got -1": lambda: fedray.run({}, overrides={"method.lr": -1}),
        r"^method\.nope \(override\): fedavg has no such option": lambda: fedray.run(
            RunConfig(), overrides=["method.nope=1"]
        ),
        r"^overrides: got 'seed=1'; write them as": lambda: fedray.run({}, overrides="seed=1"),
        r"^'seed' is not of the form key=value": lambda: fedray.run({}, overrides=["seed"]),
        r"^nope\.yaml: cannot be read": lambda: fedray.run("nope.yaml"),
        r"^mapping: unknown section 'spce'": lambda: fedray.sweep({"base": {}, "spce": {}}),
        r"^rounds \(mapping\): got 0.*": lambda: fedray.sweep({"base": {"rounds": 0}, "space": {}}),
        r"^space\.seed \(mapping\): ": lambda: fedray.sweep({"space": {"seed": {"gird": [1]}}}),
    }
    before = sorted(in_tmp.iterdir())
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message):
            call()
    assert sorted(in_tmp.iterdir()) == before


def test_of_a_sweep_s_file_run_makes_the_base_and_says_so(write_yaml, caplog):
    tree = {"base": {"rounds": 2}, "space": {"seed": {"grid": [1, 2]}}}
    assert given.run_config(tree).rounds == 2
    assert "mapping is a sweep: run makes its base only" in caplog.text
    plan = Sweep.read(tree, "mapping", "mine", {"method.lr": 0.3})
    assert [point.config.seed for point in plan.points] == [1, 2]
    assert {point.config.method.options.lr for point in plan.points} == {0.3}


# ── what is shown
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_history_is_short_and_has_a_table_a_picture_and_a_model(in_tmp, capsys):
    history = fedray.run(tiny.config(), out="mine")
    assert repr(history) == f"History('mine', 3 rounds, test/accuracy={history.result['test/accuracy']:.4f})"
    assert capsys.readouterr() == ("", "")  # a script stays quiet
    html = history._repr_html_()
    assert html.count("<tr>") == 2 and "data:image/png;base64," in html and "fedavg" in html
    assert history.table()["test accuracy"].tolist() == [pytest.approx(history.result["test/accuracy"])]
    assert not history.model().training
    fedray.run(tiny.config(), out="shown", progress=True)
    assert "round 3 of 3: accuracy" in capsys.readouterr().err


def test_a_sweep_s_result_is_short_and_has_a_table(in_tmp):
    configs = [tiny.config(seed=seed) for seed in (0, 1)]
    points = [Point(f"0{k}-seed={k}", {"seed": k}, config) for k, config in enumerate(configs)]
    histories = [fedray.run(point.config, out=point.name) for point in points]
    trials = [Trial(point, Path(point.name), "finished") for point in points]
    lost = Trial(Point("02-seed=2", {"seed": 2}, configs[0]), Path("lost"), "missing")
    result = SweepResult(Path("all"), (*trials, lost), "val/accuracy", "max")
    assert repr(result).startswith("SweepResult('all', 2 finished, 1 missing; best val/accuracy=")
    assert len(repr(result)) < 120
    table = result.table()
    assert table.index.tolist() == ["00-seed=0", "01-seed=1", "02-seed=2"]
    assert table["seed"].tolist() == [0, 1, 2]
    assert table["test/accuracy"].tolist()[:2] == [history.result["test/accuracy"] for history in histories]
    assert "data:image/png;base64," in result._repr_html_()


def test_progress_in_a_notebook_is_one_output(monkeypatch):
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html.data)

    display = types.ModuleType("IPython.display")
    display.HTML = lambda text: types.SimpleNamespace(data=text)  # type: ignore[attr-defined]
    display.display = lambda html, display_id: Handle()  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    metrics = {"val/accuracy": 0.5, "density/global": 1.0, "total/bytes/up": 2e6}
    with progress.watched(None, None, lambda: progress.RunProgress(4)) as on_round:
        assert on_round is not None
        on_round(types.SimpleNamespace(round=2, metrics=metrics))
    (line,) = shown
    assert 'value="2" max="4"' in line and "accuracy 0.500  density 1.00  2.0 MB" in line


@pytest.mark.parametrize("width", [60, 80, 200])
def test_in_a_narrow_terminal_the_numbers_of_the_bar_stay(width):
    import io

    from rich.console import Console

    from fedray.experiment.progress import SweepProgress

    screen = io.StringIO()
    trial = "00-threshold=0.6586,initial_density=0.426,stages=4"
    metrics = {"round": 3, "val/accuracy": 0.7, "density/global": 0.4, "total/bytes/up": 5e6}
    with SweepProgress(
        {f"{n}": 4 for n in range(8)}, Console(file=screen, width=width, force_terminal=True)
    ) as bar:
        bar.show(trial, metrics)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert last.startswith("rounds ") and " 3/32 " in last and "accuracy 0.7" in last
    assert (trial in last) == (width == 200) and len(last) <= width
