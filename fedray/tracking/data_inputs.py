"""The data set of a run as MLflow's Dataset column shows it.

`describe` is called where the data is at hand; its result is the run's `data.json`. `dataset_inputs`
makes of it what MLflow takes, also when a run is sent later.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedray.data import DATASETS, Dataset, Examples, Splits
from fedray.records import Record, Shape

DATA = "data.json"
"""File in the directory of a run."""

DESCRIBED = Record(
    DATA,
    Shape(
        {"name": str, "source": str, "parts": dict},
        items={"parts": Shape({"examples": int, "shape": list, "dtype": str, "digest": str})},
    ),
    "or remove it: then MLflow's run names no data set",
)

LOOKED_AT = 1000
"""Examples whose inputs count in a digest, evenly spaced; the labels of all count."""


def describe(name: str, dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """Return name and source of a data set, and for each of its parts the examples, shape, type and digest.

    The parts are `training` (all examples of clients), `validation`, `server` and `test`; an empty part
    is left out.
    """
    rows = {"training": splits.train, "validation": splits.validation, "server": splits.server}
    parts = {part: _part(dataset.train, chosen) for part, chosen in rows.items() if len(chosen)}
    parts["test"] = _part(dataset.test, np.arange(len(dataset.test.y)))
    spec = DATASETS.get(name)
    return {"name": name, "source": spec.source if spec is not None else "", "parts": parts}


def _part(examples: Examples, rows: np.ndarray) -> dict[str, Any]:
    sample = rows[:: max(1, len(rows) // LOOKED_AT)]
    x, y = np.ascontiguousarray(examples.x[sample]), np.ascontiguousarray(examples.y[rows])
    shape = [int(size) for size in examples.x.shape[1:]]
    sha256 = hashlib.sha256(json.dumps([len(rows), shape, str(x.dtype), str(y.dtype)]).encode())
    sha256.update(x.tobytes())
    sha256.update(y.tobytes())
    digest = sha256.hexdigest()[:12]
    return {"examples": len(rows), "shape": shape, "dtype": str(x.dtype), "digest": digest}


def dataset_inputs(described: Mapping[str, Any]) -> list[Any]:
    """Return the parts of a described data set as MLflow's inputs, with the part as their context."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    source = json.dumps({"tags": {"mlflow.source.name": described["source"], "mlflow.source.type": "LOCAL"}})
    inputs = []
    for part, about in described["parts"].items():
        tensor = {"dtype": about["dtype"], "shape": [-1, *about["shape"]]}
        features = json.dumps([{"type": "tensor", "tensor-spec": tensor}])
        entity = Entity(
            name=described["name"],
            digest=about["digest"],
            source_type="code",
            source=source,
            schema=json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}}),
            profile=json.dumps({"num_rows": about["examples"], "shape": about["shape"]}),
        )
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", part)]))
    return inputs
