"""YAML as 1.2 reads it; and what is written reads back the same, also by a reader of 1.1."""

import codecs
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedray.config import yaml_text
from fedray.config.overrides import parse_overrides
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep
from tests.experiment.tiny import TREE

# ── what a value means
# ──────────────────────────────────────────────────────────────────────────────────────────

VALUES: dict[str, Any] = {
    "010": 10,
    "-007": -7,
    "+12": 12,
    "0o10": 8,
    "0x1F": 31,
    "1e3": 1000.0,
    "1.": 1.0,
    "-.5E-2": -0.005,
    "01.5": 1.5,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "true": True,
    "FALSE": False,
    "~": None,
    "Null": None,
    "": None,
    # text, though YAML 1.1 reads something else
    "1:30": "1:30",
    "1:30.5": "1:30.5",
    "190:20:30": "190:20:30",
    "0b11": "0b11",
    "1_000": "1_000",
    "0x_1": "0x_1",
    "yes": "yes",
    "No": "No",
    "on": "on",
    "OFF": "OFF",
    "2001-01-01": "2001-01-01",
    "2001-12-14t21:59:43.10-05:00": "2001-12-14t21:59:43.10-05:00",
    "=": "=",
    "tRue": "tRue",
    "nULL": "nULL",
    "0o8": "0o8",
    "inf": "inf",
    "nan": "nan",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_is_what_yaml_1_2_says(text):
    value = yaml_text.parse(text, "x")
    assert (value, type(value)) == (VALUES[text], type(VALUES[text]))
    assert yaml_text.parse(f"'{text}'", "x") == text
    assert yaml_text.parse(f"{{{text or '~'}: 1}}", "x") == {VALUES[text]: 1}


def test_not_a_number():
    assert math.isnan(yaml_text.parse(".NaN", "x"))


@pytest.mark.parametrize(
    "tag",
    ["!!timestamp 2001-01-01", "!!binary aaaa", "!!set {a}", "!!omap [a: 1]", "!!int 1:30", "!!float x"],
)
def test_no_tag_makes_what_a_config_cannot_hold(tag):
    with pytest.raises(ConfigError, match=r"^x"):
        yaml_text.parse(tag, "x")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed=010", 10),
        ("clients.deadline_s=90.0", 90.0),
        ("rounds=0x10", 16),
        ("tracking.experiment=on", "on"),
    ],
)
def test_a_config_means_the_same_on_the_command_line_and_in_a_file(write_yaml, argument, value):
    key, _, text = argument.partition("=")
    *sections, last = key.split(".")
    path = write_yaml(f"{sections[0]}: {{{last}: {text}}}" if sections else f"{last}: {text}")
    for config in (RunConfig.load(path), RunConfig.load(write_yaml(""), [argument])):
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


# ── what is written
# ──────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.one_of(
    st.sampled_from(
        [*VALUES, "y", "N", "<<", ".nan", "1e3", "- a", "a: b", "# a", " a", "a ", "\n", "'", "@"]
    ),
    st.from_regex(r"\A[-+.0-9eExob_:fi]{1,8}\Z"),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
TREES = st.recursive(
    st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def typed(value: Any) -> Any:
    """Return a value with its types, since 1 == 1.0 == True."""
    match value:
        case dict():
            return {key: typed(inner) for key, inner in value.items()}
        case list():
            return [typed(inner) for inner in value]
    return type(value), value


@settings(deadline=None, max_examples=100)
@given(TREES)
@example("1e3")
@example("\x85")
@example("a\u2028 b\r")
@example({"off": "010", "1:30": "1e3", "0o10": ["y", "=", "<<"]})
def test_what_is_written_reads_back_the_same(tree):
    written = yaml_text.dump(tree)
    assert typed(yaml_text.parse(written, "x")) == typed(tree)
    assert typed(pyyaml.safe_load(written)) == typed(tree)  # by a reader of YAML 1.1


# ── files
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_file_is_read_in_the_encoding_of_its_mark(tmp_path: Path, mark, encoding):
    (tmp_path / "x.yaml").write_bytes(mark + "tracking: {experiment: Grüße}\r\nseed: 3\r\n".encode(encoding))
    assert yaml_text.load(tmp_path / "x.yaml") == {"tracking": {"experiment": "Grüße"}, "seed": 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "a: ü".encode("latin-1"),
            "is not a text file in UTF-8: the bytes from line 1 on are not; save it as",
        ),
        (b"a: 1\nb: \xff", "is not a text file in UTF-8: the bytes from line 2 on are not; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "is not a text file in UTF-16: its bytes are not; save it as UTF-8"),
        ("seed: 1".encode("utf-16-le"), "is not a text file in UTF-8 (UTF-16 has a mark); save it as UTF-8"),
        (
            b"\x89PNG\r\n\x1a\n\0",
            "is not a text file in UTF-8: the bytes from line 1 on are not; save it as UTF-8",
        ),
    ],
)
def test_a_file_in_another_encoding_is_named(in_tmp: Path, data, message):
    (in_tmp / "x.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        yaml_text.load("x.yaml")
    assert str(caught.value).startswith(f"x.yaml: {message}")


# ── a colon without a space
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("tune.stop={val/accuracy:0.9}", "{val/accuracy: 0.9}"),
        ("tune.stop={val/accuracy :0.9}", "{val/accuracy: 0.9}"),
        ("tune.stop={val/accuracy=0.9}", "{val/accuracy: 0.9}"),
        ('tune.stop={"val/accuracy": 0.9, round:3}', "{round: 3}"),
        ("tune.objectives={val/accuracy:max, total/bytes/up:min}", "{val/accuracy: max}"),
        ('tune.constraints={density/global:"<= 0.1"}', '{density/global: "<= 0.1"}'),
        ("tune.constraints={density/global<=0.1}", "{density/global: <=0.1}"),
        ("tune={stop:{round:3}}", "{round: 3}"),
        ("tune.points_to_evaluate=[{method.lr:0.1}]", "{method.lr: 0.1}"),
        ("method={name:snip}", "{name: snip}"),
        ("clients.resources.by_device={phone:{cpu:1}}", "{cpu: 1}"),
        ("tracking={uri:none}", "{uri: none}"),
        ("tracking={uri:http://me:s3cr3t@host}", "{uri: http://host}"),
    ],
)
def test_a_colon_without_a_space_is_named_in_arguments_and_files(in_tmp: Path, given, written):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([given])
    assert str(caught.value).endswith(f"write a space after the colon: {written}")
    key, _, value = given.partition("=")
    (in_tmp / "x.yaml").write_text(f"seed: 1\n{key}: {value}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml, line 2: write a space after the colon: "):
        yaml_text.load("x.yaml")


def test_a_key_that_holds_a_colon_and_a_key_without_a_value_are_read():
    text = '{a:b: 1, "c:d": , e: , f, "g:h", j:{k: 1}}'
    read = {"a:b": 1, "c:d": None, "e": None, "f": None, "g:h": None, "j": {"k": 1}}
    assert yaml_text.parse(text, "x") == read


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("tune.stop=val/accuracy:0.9", "tune.stop={val/accuracy: 0.9}"),
        ("tune.stop=[val/accuracy:0.9]", "tune.stop={val/accuracy: 0.9}"),
        ("tune.stop=val/accuracy=0.9", "tune.stop={val/accuracy: 0.9}"),
        ("tune.constraints=density/global<=0.1", "tune.constraints={density/global: <=0.1}"),
        ("clients=cohort:3", "clients={cohort: 3}"),
        ("clients.devices=phone:1", "clients.devices={phone: 1}"),
    ],
)
def test_a_mapping_without_braces_is_shown_with_them(given, written):
    tree = {"base": TREE, "space": {"seed": {"grid": [0, 1]}}}
    with pytest.raises(ConfigError, match=f"; write {re.escape(written)}"):
        Sweep.read(tree, "x.yaml", "x", parse_overrides([given]))
