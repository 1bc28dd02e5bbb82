"""Federated learning with model pruning on Ray.

    import fedray
    history = fedray.run(fedray.RunConfig.load("tune_configs/quickstart.yaml").override(seed=1))
    history.to_pandas()

Names are imported when they are first used: `fedray --help` does not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.config.run_config import RunConfig
    from fedray.costs.devices import DEVICES
    from fedray.data import DATASETS
    from fedray.errors import FedrayError
    from fedray.experiment.run import History, resume, run
    from fedray.federation.method import Method
    from fedray.methods import METHODS
    from fedray.models import MODELS

__all__ = [
    "DATASETS",
    "DEVICES",
    "METHODS",
    "MODELS",
    "FedrayError",
    "History",
    "Method",
    "RunConfig",
    "resume",
    "run",
]

__version__ = "0.1.0"

# MLflow and Ray report how they are used unless told not to. Set here, since every process that imports one
# of them for us (a trial, a client actor, the UI) imports fedray first or inherits this environment.
for _name, _off in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("RAY_USAGE_STATS_ENABLED", "0")):
    os.environ.setdefault(_name, _off)

_HOMES = {
    "DATASETS": "fedray.data",
    "DEVICES": "fedray.costs.devices",
    "FedrayError": "fedray.errors",
    "History": "fedray.experiment.run",
    "METHODS": "fedray.methods",
    "MODELS": "fedray.models",
    "Method": "fedray.federation.method",
    "RunConfig": "fedray.config.run_config",
    "resume": "fedray.experiment.run",
    "run": "fedray.experiment.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
