"""Directories as runs leave them, written by hand: numbers that a reader can work out."""

import json

import numpy as np
import pandas as pd

from fedray.config import yaml_text

CONFIG = {
    "rounds": 2,
    "seed": 0,
    "model": "cnn",
    "data": {"name": "digits", "root": None, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "clients": {"population": 10, "cohort": 2, "devices": {"phone": 0.6, "laptop": 0.4}, "actors": "auto"},
    "method": {"name": "fedavg", "lr": 0.1},
    "tracking": {"uri": "none"},
}


def config_of(changes):
    tree = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[last] = value
    return tree


def lines_of(accuracies, up, density=1.0):
    """A line per round: 0 costs nothing, each later one `up` bytes, twice that down, and 1e12 FLOPs.

    2e12 are executed, in 10 s and with 3,000 J; it takes 40 s on slow devices, 5 s on a slow link.
    """
    lines = []
    for round, accuracy in enumerate(accuracies):
        metrics = {
            "density/global": density,
            "total/bytes/up": float(up * round),
            "total/bytes/down": float(2 * up * round),
            "total/flops/clients": 1e12 * round,
            "total/flops/executed": 2e12 * round,
            "total/energy/clients_j": 3000.0 * round,
            "total/time/simulated_s": 10.0 * round,
            "total/time/compute_bound_s": 40.0 * round,
            "total/time/network_bound_s": 5.0 * round,
        }
        if accuracy is not None:
            metrics["val/accuracy"] = accuracy
        lines.append({"round": round, "metrics": metrics, "notes": []})
    return lines


def write_run(
    path,
    changes=(),
    accuracies=(0.1, 0.5, 0.8),
    up=50e6,
    density=1.0,
    test=0.75,
    status="finished",
    clients=8,
):
    """Make a run's directory as `fedray.storage.run_files` would; `status=None` is a run that goes on."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml_text.dump(config_of(dict(changes))), encoding="utf-8")
    lines = lines_of(accuracies, up, density)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "rounds.jsonl").write_text(text, encoding="utf-8")
    if status is not None:
        result = {**lines[-1]["metrics"], "rounds": len(lines) - 1, "status": status}
        if status == "finished":
            result["test/accuracy"] = test
            accuracy = np.linspace(0.5, 1.0, clients)
            pd.DataFrame({"client": range(clients), "accuracy": accuracy}).to_parquet(
                path / "client_accuracy.parquet"
            )
        (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return path


def staged(**more):
    return {"method": {"name": "staged", "lr": 0.1, "threshold": 0.5, "stages": 4} | more}
