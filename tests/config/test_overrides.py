"""Dotted overrides: what an argument says, what it changes and what it leaves; no text crashes it."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config.overrides import SECTIONS, SHARED, override_tree, parse_overrides
from fedray.config.run_config import RunConfig, Section
from fedray.config.trees import CHOICES
from fedray.data.partition import Dirichlet
from fedray.errors import ConfigError
from fedray.federation.method import Method
from fedray.methods.fedavg import FedAvg
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged

# ── what an argument says
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


@pytest.mark.parametrize("argument", ["seed", "=3", "", " =3"])
def test_an_argument_must_have_a_key_and_a_value(argument):
    with pytest.raises(ConfigError, match=r"is not of the form key=value, e\.g\. method\.lr=0\.1"):
        parse_overrides([argument])


def test_an_override_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match=r"^override clients\.devices, line 1: not YAML: "):
        parse_overrides(["clients.devices={phone: 1"])


# ── what it changes
# ──────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_key_below_a_value():
    with pytest.raises(ConfigError, match=r"^method\.name\.x: name is 'snip', not a section with keys"):
        RunConfig(method={"name": "snip"}).override({"method.name.x": 1})
    with pytest.raises(ConfigError, match=r"^method\.name \(override\): unknown method"):
        RunConfig().override({"method.name.x": 1})


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


# ── another choice
# ──────────────────────────────────────────────────────────────────────────────────────────

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
    "min_layer": 2,
}


@pytest.mark.parametrize("how", ["file", "dotted", "section", "argument", "section argument"])
def test_another_method_keeps_the_options_that_all_have(write_yaml, how):
    base = {"method": {"name": "staged", "density": 0.3, "stages": 2, **SHARED_OPTIONS}}
    path = write_yaml(f"method: {base['method']}")
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
