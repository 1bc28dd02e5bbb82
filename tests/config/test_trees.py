"""Dotted keys of nested mappings, and the keys that no result depends on."""

from pathlib import Path
from typing import Any

import pytest

from fedray.config.choice import Choice, Chooser
from fedray.config.overrides import SECTIONS
from fedray.config.run_config import METHOD, PARTITION, RunConfig, Section
from fedray.config.tables import OPTIONS, TABLES
from fedray.config.trees import CHOICES, INDECISIVE, decisive, dotted_keys, flat_text, flatten
from fedray.errors import ConfigError
from fedray.experiment.resuming import MAY_CHANGE

TREE = {"a": {"b": {"c": True}, "d": "text"}, "e": {}, "f": Path("x/y"), "g.h": {"i": [1]}}


def test_flatten():
    whole = {"a.b.c": True, "a.d": "text", "e": {}, "f": Path("x/y"), "g.h.i": [1]}
    assert flatten(TREE) == whole and list(flatten(TREE)) == list(whole)
    assert flatten(TREE, {"a"}.__contains__) == {
        "a.b": {"c": True},
        "a.d": "text",
        "e": {},
        "f": Path("x/y"),
        "g.h": {"i": [1]},
    }
    assert flatten({}) == {}


def test_flat_text():
    assert flat_text(TREE) == {"a.b.c": "true", "a.d": "text", "e": "{}", "f": "x/y", "g.h.i": "[1]"}


def test_dotted_keys_have_each_section_before_its_keys():
    assert dotted_keys(TREE) == ["a", "a.b", "a.b.c", "a.d", "e", "f", "g", "g.h", "g.h.i"]


def test_no_result_depends_on_what_is_left_out():
    config = RunConfig.from_tree({"data": {"root": "/x"}, "clients": {"actors": 2, "resources": {"gpu": 1}}})
    flat, left = flatten(config.to_tree()), flatten(decisive(config.to_tree()))
    renamed = {"clients.over_selection"}  # `clients.sampler` says the same
    gone = [[o for o in INDECISIVE if f"{key}.".startswith(f"{o}.")] for key in flat.keys() - left - renamed]
    assert {other for (other,) in gone} == set(INDECISIVE)
    assert {key: flat[key] for key in left} == left
    assert flatten(config.to_tree()) == flat  # the tree itself is as before


def test_resources_by_device_decide_which_clients_are_folded_together():
    tree = RunConfig.from_tree({"clients": {"resources": {"by_device": {"phone": {"cpu": 1}}}}}).to_tree()
    assert decisive(tree)["clients"]["resources"] == tree["clients"]["resources"]


@pytest.mark.parametrize("tree", [{}, {"clients": None}, {"data": {"name": "x"}, "clients": 3}])
def test_a_config_of_another_version_may_lack_sections(tree: dict[str, Any]):
    assert decisive(tree) == tree


def test_the_digest_and_resume_read_the_same_list():
    for key in INDECISIVE:
        assert key in MAY_CHANGE


# ── choices
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_choice_of_the_config_has_its_table():
    def choosers(model: Any, above: str = "") -> dict[str, Chooser[Any]]:
        found: dict[str, Chooser[Any]] = {}
        for name, field in model.model_fields.items():
            found.update((above + name, mark) for mark in field.metadata if isinstance(mark, Chooser))
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= choosers(field.annotation, f"{above}{name}.")
        return found

    found = choosers(RunConfig)
    assert {section: chooser.key for section, chooser in found.items()} == CHOICES
    assert all(
        found[section].section == section and found[section].table is OPTIONS[section] for section in found
    )
    assert set(OPTIONS) == set(CHOICES) < SECTIONS
    assert all(TABLES[f"{section}.{key}"] is OPTIONS[section] for section, key in CHOICES.items())


@pytest.mark.parametrize("chooser", [METHOD, PARTITION])
def test_a_choice_writes_what_it_reads(chooser: Chooser[Any]):
    for name in chooser.table:
        choice = chooser.read({chooser.key: name})
        assert choice.given_tree() == {chooser.key: name}
        assert chooser.read(choice.to_tree()) == choice and chooser.read(choice) is choice
        assert (choice.name, choice.kind) == (name, name)
    assert chooser.default() == chooser.read({chooser.key: chooser.first})


def test_an_option_that_was_given_stays_though_it_is_the_default():
    choice: Choice[Any] = METHOD.read({"name": "snip", "lr": METHOD.read({}).options.lr})
    assert choice.given_tree() == {"name": "snip", "lr": choice.options.lr}
    assert choice == METHOD.read({"name": "snip"})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": "snip"}, r"^method \(config\): got 'snip'; must be a mapping .* write method.name=snip$"),
        (
            {"method": {"name": "snap"}},
            r"^method.name \(config\): unknown method 'snap'; did you mean 'snip'",
        ),
        (
            {"method": {"name": "snip", "stages": 2}},
            r"snip has no such option; staged.* can have it",
        ),
        (
            {"data": {"partition": {"kind": "iid", "alpha": 2}}},
            r"iid has no such option; dirichlet,",
        ),
        ({"method": {"population": 3}}, r"no such option; did you mean 'clients.population'\? Keys here"),
    ],
)
def test_messages_of_a_choice(tree: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_tree(tree)
