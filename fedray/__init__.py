"""Federated learning with model pruning on Ray.

    import fedray
    history = fedray.run("tune_configs/quickstart.yaml", overrides={"seed": 1})
    history.to_pandas()
    model = history.model()
    result = fedray.sweep("tune_configs/quickstart.yaml")
    result.table()
    fedray.write_report([result.path])

A name is imported when it is first used: `fedray --help` does not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray import report
    from fedray.config.run_config import RunConfig
    from fedray.costs.devices import DEVICES
    from fedray.costs.differences import CODECS, DeltaCodec, UplinkCodec
    from fedray.costs.hardware import HARDWARE, Hardware
    from fedray.costs.links import LINKS, Link
    from fedray.data import DATASETS, PARTITIONS, Dataset, DatasetSpec, Examples, Partition, PartitionKind
    from fedray.data.partition import Dealt
    from fedray.errors import (
        ClientError,
        ConfigError,
        DataError,
        FedrayError,
        MethodError,
        RunError,
        WireError,
    )
    from fedray.experiment.history import History
    from fedray.experiment.run import Federation, resume, run
    from fedray.federation.aggregate import CohortUpdate
    from fedray.federation.client import Client, Step
    from fedray.federation.method import Method, ServerContext, Setting
    from fedray.federation.sampling import SAMPLERS, Sampler, SamplerContext
    from fedray.federation.server import Server
    from fedray.methods import METHODS
    from fedray.models import MODELS, Architecture, ModelSpec
    from fedray.report.reading import RunData, find_runs, load_run
    from fedray.report.table import write_report
    from fedray.storage.final_model import load_model
    from fedray.sweeps.outcome import Best, SweepResult, Trial
    from fedray.sweeps.space import Sweep
    from fedray.sweeps.sweep import load_sweep, resume_sweep, sweep
    from fedray.types import (
        ClientRecord,
        ClientUpdate,
        Cost,
        Density,
        DeviceProfile,
        Fraction,
        Layout,
        Mask,
        NonNegativeFloat,
        NonNegativeInt,
        Params,
        PositiveFloat,
        PositiveInt,
        RoundReport,
        ServerState,
        Task,
    )

__all__ = [
    "CODECS",
    "DATASETS",
    "DEVICES",
    "HARDWARE",
    "LINKS",
    "METHODS",
    "MODELS",
    "PARTITIONS",
    "SAMPLERS",
    "Architecture",
    "Best",
    "Client",
    "ClientError",
    "ClientRecord",
    "ClientUpdate",
    "CohortUpdate",
    "ConfigError",
    "Cost",
    "DataError",
    "Dataset",
    "DatasetSpec",
    "Dealt",
    "DeltaCodec",
    "Density",
    "DeviceProfile",
    "Examples",
    "Federation",
    "FedrayError",
    "Fraction",
    "Hardware",
    "History",
    "Layout",
    "Link",
    "Mask",
    "Method",
    "MethodError",
    "ModelSpec",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Params",
    "Partition",
    "PartitionKind",
    "PositiveFloat",
    "PositiveInt",
    "RoundReport",
    "RunConfig",
    "RunData",
    "RunError",
    "Sampler",
    "SamplerContext",
    "Server",
    "ServerContext",
    "ServerState",
    "Setting",
    "Step",
    "Sweep",
    "SweepResult",
    "Task",
    "Trial",
    "UplinkCodec",
    "WireError",
    "find_runs",
    "load_model",
    "load_run",
    "load_sweep",
    "report",
    "resume",
    "resume_sweep",
    "run",
    "sweep",
    "write_report",
]

__version__: str

# MLflow and Ray send usage statistics by default. Switched off here, since every process that imports one of
# them for us (a trial, a client actor, the UI) imports fedray first or inherits this environment.
for _name, _off in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("RAY_USAGE_STATS_ENABLED", "0")):
    os.environ.setdefault(_name, _off)

_MODULES = {
    "fedray.config.run_config": "RunConfig",
    "fedray.costs.devices": "DEVICES",
    "fedray.costs.hardware": "HARDWARE Hardware",
    "fedray.costs.links": "LINKS Link",
    "fedray.costs.differences": "CODECS DeltaCodec UplinkCodec",
    "fedray.data": "DATASETS PARTITIONS Dataset DatasetSpec Examples Partition PartitionKind",
    "fedray.data.partition": "Dealt",
    "fedray.errors": "ClientError ConfigError DataError FedrayError MethodError RunError WireError",
    "fedray.storage.final_model": "load_model",
    "fedray.experiment.history": "History",
    "fedray.experiment.run": "Federation resume run",
    "fedray.sweeps.space": "Sweep",
    "fedray.sweeps.outcome": "Best SweepResult Trial",
    "fedray.sweeps.sweep": "load_sweep resume_sweep sweep",
    "fedray.federation.aggregate": "CohortUpdate",
    "fedray.federation.client": "Client Step",
    "fedray.federation.method": "Method ServerContext Setting",
    "fedray.federation.sampling": "SAMPLERS Sampler SamplerContext",
    "fedray.federation.server": "Server",
    "fedray.methods": "METHODS",
    "fedray.models": "MODELS Architecture ModelSpec",
    "fedray.report.reading": "RunData find_runs load_run",
    "fedray.report.table": "write_report",
    "fedray.types": "ClientRecord ClientUpdate Cost DeviceProfile Layout Mask Params RoundReport ServerState "
    "Task Density Fraction NonNegativeFloat NonNegativeInt PositiveFloat PositiveInt",
}
"""Module → the public names that live there. `fedray.report` is the package of reports itself."""

_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
_HOMES["report"] = "fedray.report"


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it; `__version__` is the installed one."""
    if name == "__version__":
        return import_module("importlib.metadata").version("fedray")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if name == "report" else getattr(module, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
