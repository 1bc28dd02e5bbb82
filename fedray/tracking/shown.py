"""What a run is called in MLflow, and which parameters stand beside it."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree, flatten
from fedray.report.series import label_of


def run_name(config: RunConfig) -> str:
    """Return the name of a run that stands alone: method, data set, model and seed."""
    return f"{config.method.name} {config.data.name} {config.model} s{config.seed}"


def trial_names(points: Iterable[Mapping[str, Any]], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Return directory → name of a sweep's trials, such as `staged density=0.1 s0`.

    Args:
        points: the changes of all points; their keys are what the names tell.
        configs: directory of each trial → its config.
    """
    keys = list(dict.fromkeys(key for point in points for key in _keys(point)))
    return {name: label_of(config.to_tree(), keys) for name, config in configs.items()}


def _keys(changes: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            found += [f"{key}.{inner}" for inner in flatten(dict(value))]
        else:
            found.append(key)
    return found


def shown_params(tree: Mapping[str, Any]) -> Tree:
    """Return a config without the options that are null or empty: they say nothing, and fill a page."""
    kept: Tree = {}
    for key, value in tree.items():
        inner = shown_params(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            kept[key] = inner
    return kept
