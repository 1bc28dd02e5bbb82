"""A view of runs that MLflow's UI opens: accuracy against bytes and seconds, and the columns that matter.

MLflow keeps what its own Share button shares in a tag of the experiment, and opens it by the key of the tag.
"""

import base64
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

TAG = "mlflow.sharedViewState."
"""Prefix of MLflow's tags for shared views."""

X_AXES = ("total/bytes/up", "total/time/simulated_s", "total/flops/clients", "total/energy/clients_j")
"""Metrics against which accuracy is drawn."""

COLUMNS = ("val/accuracy", "test/accuracy", "density/global", "total/bytes/up", "total/time/simulated_s")
"""Metrics that the table of runs shows first."""

_TAG_LENGTH, _SECTION = 5000, "fedray"


def keep_view(database: Path, experiment: str, runs: Sequence[str]) -> str | None:
    """Keep the view of some runs in a store; return its key, None if the store cannot keep it.

    Args:
        database: of an SQLite store.
        experiment: id of the experiment of all runs.
        runs: their ids.
    """
    text = base64.b64encode(zlib.compress(json.dumps(_state(runs)).encode(), 9)).decode()
    key, value = hashlib.sha256(text.encode()).hexdigest()[:16], f"deflate;{text}"
    if len(value) > _TAG_LENGTH:
        return None
    try:
        with closing(sqlite3.connect(database, timeout=30.0)) as store, store:
            row = [f"{TAG}{key}", value, int(experiment)]
            store.execute(
                "INSERT OR REPLACE INTO experiment_tags (key, value, experiment_id) VALUES (?, ?, ?)", row
            )
    except sqlite3.Error:  # read-only, or of another version: the comparison opens all the same
        return None
    return key


def _state(runs: Sequence[str]) -> dict[str, Any]:
    chosen = ", ".join(f"'{run}'" for run in runs)
    return {
        "searchFilter": f"attributes.run_id IN ({chosen})",
        "orderByKey": "metrics.`val/accuracy`",  # by start time, trials would be folded under their sweep
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["attributes.`Dataset`", *(f"metrics.`{name}`" for name in COLUMNS)],
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,
        "compareRunCharts": [_chart(axis) for axis in X_AXES],
        "compareRunSections": [
            {"uuid": _SECTION, "name": "Accuracy against costs", "display": True, "isReordered": True}
        ],
    }


def _chart(axis: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"{_SECTION}-{axis}",
        "runsCountToCompare": 20,
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
        "metricKey": "val/accuracy",
        "selectedMetricKeys": ["val/accuracy"],
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": axis,
        "useGlobalXaxisKey": False,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "selectedYAxisMetricKey": "metric",
        "yAxisExpressions": [],
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
        "ignoreOutliers": False,
        "range": {},
    }
