"""The final model of a run as a torch module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.config.trust import IMPORTED, recorded, trusting
from fedray.data import DATASETS
from fedray.durable import local_path, shown
from fedray.errors import RunError
from fedray.parquet import read_table
from fedray.report.reading import advising
from fedray.storage.run_files import MODEL, SHA256, RunFiles
from fedray.types import Layout, Params


def load_model(path: str | Path, *, trust: bool = False) -> Any:
    """Return the final model of a finished run as a plain `torch.nn.Module`, in evaluation mode.

    With `norm=local` and `norm=static`, docs/architecture.md says which statistics its batch normalisation
    has. The run's `imports` are imported: those that it has recorded and that have not changed; with `trust`,
    all of them.

    Raises:
        ConfigError: if the run's config is no longer valid.
        RunError: if the directory holds no run, or no final model yet, or if the model is damaged.
    """
    files = RunFiles.open(local_path(path))
    if not (files.path / MODEL).is_file():
        folder = shown(files.path)
        raise RunError(f"{folder}: no model.safetensors: the run is not finished; fedray resume {folder}")
    with trusting(trust), recorded(IMPORTED.read(files.path)):
        config = RunConfig.from_tree(files.read_config(), str(files.path / "config.yaml"))
    with advising(files.path):
        return load_module(config, files).eval()


def damage_of(config: RunConfig, files: RunFiles, result: Mapping[str, Any]) -> str | None:
    """Return which of the files that a finished run ends with is damaged or missing; None: all are sound.

    Args:
        config: of the run.
        files: of the run.
        result: content of `result.json`.
    """
    try:
        files.rounds()
        load_module(config, files)
        accuracy = files.path / "client_accuracy.parquet"
        if read_table(accuracy) is None and "clients/accuracy_mean" in result:
            return f"{accuracy}: is missing"
    except RunError as error:
        return str(error)
    return None


def load_module(config: RunConfig, files: RunFiles) -> Any:
    """Return the final model of a run with this config.

    Raises:
        RunError: if the file is damaged, or of another model.
    """
    data = DATASETS[config.data.name]
    model = config.build_model(data.input_shape, data.num_classes)
    params = _read(files.path / MODEL, model.layout)
    result = files.result() or {}
    if result.get("weights_sha256", params.sha256) != params.sha256:
        raise RunError(f"{files.path / MODEL}: is not the model of result.json: its SHA-256 is another")
    return model.bind(params.flat)


def _read(path: Path, layout: Layout) -> Params:
    """Read a vector that `RunFiles.write_model` wrote, and check it."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(SHA256)  # an earlier version wrote none
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != layout.shape_of or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise RunError(f"{path}: is damaged, or of another model than that of config.yaml")
    params = Params(torch.cat([tensors[name].flatten() for name in layout.names]), layout)
    if written is not None and written != params.sha256:
        raise RunError(f"{path}: is damaged: its SHA-256 does not match")
    return params
