"""docs/config.md and the JSON schemas are what the docstrings and types of the code say."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from docs import reference
from fedray import cli
from fedray.config import yaml_text
from fedray.config.docstrings import arguments
from fedray.config.messages import keys_of
from fedray.config.run_config import RunConfig
from fedray.config.schema import file_schema
from fedray.config.tables import OPTIONS
from fedray.config.trees import CHOICES
from fedray.config.tune_config import TuneConfig
from fedray.methods import METHODS
from rllib_pruner.config import TrainConfig

ROOT = Path(__file__).parents[1]
TUNE_CONFIGS = sorted((ROOT / "tune_configs").glob("*.yaml"))


def problems(tree: Any, schema: dict[str, Any] | None = None) -> list[str]:
    """Return the messages of a schema about a file's tree."""
    validator = jsonschema.Draft202012Validator(schema or file_schema())
    return [error.message for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("name", reference.written())
def test_the_generated_files_are_current(name: str):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == reference.written()[name], "run `make docs`"


def test_the_page_has_every_key_with_a_description():
    page = reference.config_page()
    sections = {"data", "data.partition", "clients", "clients.resources", "method", "train", "tracking"}
    sections |= {key.rpartition(".")[0] for key in keys_of(RunConfig) if key.count(".") > 1}
    chosen = {f"{section}.{key}" for section, key in CHOICES.items()}
    for key in (*keys_of(RunConfig), *(f"tune.{key}" for key in TuneConfig.model_fields)):
        if key not in sections | chosen and not key.startswith("clients.devices."):
            rows = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
            assert rows and all(row.split(" | ")[-1].strip(" |") for row in rows), key


def test_every_option_of_a_table_is_described():
    for table in OPTIONS.values():
        for kind in table.values():
            assert {option.name for option in fields(kind)} <= set(arguments(kind))


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_files_fit_the_schema_that_they_name(path: Path):
    text = path.read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "yaml-language-server" in line)
    schema = path.parent / line.rpartition("$schema=")[2]
    assert problems(yaml_text.load(path), json.loads(schema.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("model", [RunConfig, TrainConfig])
def test_a_whole_config_fits_the_schema(model: Any):
    schema = file_schema(model)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert problems(model().to_tree(), schema) == problems({}, schema) == []
    assert problems({"base": None, "space": {}, "tune": {}}, schema) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_all_its_options_fits_the_schema(name: str):
    tree = {"method": METHODS[name]().__dict__ | {"name": name}}
    assert problems(json.loads(json.dumps(tree, default=str))) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"rounds": 0},
        {"round": 1},
        {"model": "mpl"},
        {"data": {"name": "minst"}},
        {"method": {"name": "snap"}},
        {"method": {"name": "snip", "densty": 0.1}},
        {"method": {"density": 0.1}},
        {"method": {"name": "snip", "density": 2}},
        {"data": {"partition": {"kind": "iid", "alpha": 1}}},
        {"clients": {"actors": "many"}},
        {"clients": {"resources": {"by_device": {"phone": {"gpus": 1}}}}},
        {"base": {"clients": {"cohort": "3"}}},
        {"base": {}, "rounds": 3},
        {"space": {"seed": {"gird": [1]}}},
        {"space": {"seed": [1, 2]}},
        {"tune": {"scheduler": "hyperbond"}},
        {"tune": {"scheduler": {"name": "median", "reduction": 3}}},
        {"tune": {"scheduler": {"name": "asha", "reduction": 1}}},
    ],
)
def test_the_schema_finds_mistakes(tree: dict[str, Any]):
    assert problems(tree)


MINE = """
from dataclasses import dataclass
import fedray

@dataclass(frozen=True, kw_only=True)
class Mine(fedray.Method):
    '''FedAvg.

    Args:
        share: of something.
    '''
    share: fedray.Fraction = 0.5

fedray.METHODS["mine"] = Mine
fedray.MODELS["my_mlp"] = fedray.MODELS["mlp"]
"""


def test_the_command_prints_a_schema_that_knows_a_users_tables(in_tmp):
    (in_tmp / "mine_for_schema.py").write_text(MINE)
    tree = {"model": "my_mlp", "method": {"name": "mine", "share": 0.1}, "imports": ["mine_for_schema.py"]}
    assert len(problems(tree)) == 2
    done = CliRunner().invoke(cli.app, ["schema", "--import", "mine_for_schema.py"], catch_exceptions=False)
    schema = json.loads(done.stdout)
    assert problems(tree, schema) == []
    assert problems({"method": {"name": "mine", "share": 2}}, schema)
    training = CliRunner().invoke(cli.app, ["schema", "--training"], catch_exceptions=False)
    assert problems({"budget": {"env_steps": 5}}, json.loads(training.stdout)) == []
