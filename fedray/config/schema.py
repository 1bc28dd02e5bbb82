"""A JSON schema of config files, by which editors complete and check YAML: `fedray schema`.

It knows keys, types, ranges, names of tables and descriptions. Whether the parts of a config fit each other,
only fedray checks.
"""

from collections.abc import Mapping
from typing import Any

from fedray.config.messages import keys_of
from fedray.config.run_config import Config, RunConfig
from fedray.config.trees import Tree
from fedray.config.tune_config import VERBS, TuneConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PARTS = ("base", "space", "tune")
"""Keys of a file that describes several runs; a file with none of them is the config of one."""


def file_schema(model: type[Config] = RunConfig) -> Tree:
    """Return the schema of a file: one run's config, or `base`, `space` and `tune`.

    Args:
        model: the config in the file: of a run, or of a training.
    """
    one, tune = model.model_json_schema(), TuneConfig.model_json_schema()
    shared = one.pop("$defs", {}) | tune.pop("$defs", {})
    one["required"] = []
    several = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "base": _or_empty({"$ref": "#/$defs/config"}, "The config of one run; the points change it."),
            "space": _or_empty(_space(model), "Key → verb and list: the changes of the points."),
            "tune": _or_empty({"$ref": "#/$defs/tune"}, "How the points are tried."),
        },
    }
    return {
        "$schema": DIALECT,
        "title": f"fedray: {model.__name__}",
        "if": {"anyOf": [{"required": [part]} for part in PARTS]},
        "then": several,
        "else": {"$ref": "#/$defs/config"},
        "$defs": shared | {"config": one, "tune": tune, "verbs": _verbs()},
    }


def _or_empty(schema: Mapping[str, Any], description: str) -> Tree:
    return {"description": description, "anyOf": [dict(schema), {"type": "null"}]}


def _space(model: type[Config]) -> Tree:
    verbs = {"$ref": "#/$defs/verbs"}
    keys = {key: verbs for key in keys_of(model)}
    return {"type": "object", "properties": keys, "additionalProperties": verbs}


def _verbs() -> Tree:
    lists = {verb: {"type": "array", "minItems": 1, "description": text} for verb, text in VERBS.items()}
    return {
        "type": "object",
        "properties": lists,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
