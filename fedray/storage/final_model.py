"""The final model of a run as a torch module."""

from pathlib import Path
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.data import DATASETS
from fedray.durable import local_path, shown
from fedray.errors import RunError
from fedray.storage.run_files import RunFiles


def load_model(path: str | Path) -> Any:
    """Return the final model of a finished run as a plain `torch.nn.Module`, in evaluation mode.

    With `norm=local` and `norm=static`, docs/architecture.md says which statistics its batch normalisation
    has. The run's `imports` are imported.

    Raises:
        ConfigError: if the run's config is no longer valid.
        RunError: if the directory holds no run, or no final model yet.
    """
    files = RunFiles.open(local_path(path))
    if not (files.path / "model.safetensors").is_file():
        folder = shown(files.path)
        raise RunError(f"{folder}: no model.safetensors: the run is not finished; fedray resume {folder}")
    config = RunConfig.from_tree(files.read_config(), str(files.path / "config.yaml"))
    return load_module(config, files).eval()


def load_module(config: RunConfig, files: RunFiles) -> Any:
    """Return the final model of a run with this config."""
    import torch
    from safetensors.torch import load_file

    data = DATASETS[config.data.name]
    model = config.build_model(data.input_shape, data.num_classes)
    tensors = load_file(files.path / "model.safetensors")
    return model.bind(torch.cat([tensors[name].flatten() for name in model.layout.names]))
