"""A run's final model as a LoggedModel of MLflow, listed in its Models tab with the run's last metrics."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

MODEL = "model"
"""Name of every logged model: `runs:/<run_id>/model` then leads to it, and its run tells them apart."""

SHA256 = "weights_sha256"
"""Tag of runs and of logged models."""


def save_module(module: nn.Module, folder: Path, run_id: str | None) -> None:
    """Save a module as MLflow keeps it.

    Raises:
        Exception: what pickle raises for a module that cannot be saved.
    """
    import mlflow.pytorch
    from mlflow.models import Model

    # requirements are given, for MLflow would start a process to infer them; pickle, since its other
    # format traces the network and needs an example for that
    needs = [f"{name}=={metadata.version(name)}" for name in ("torch", "fedray")]
    about = Model(artifact_path=MODEL, run_id=run_id)
    mlflow.pytorch.save_model(
        module, folder, mlflow_model=about, pip_requirements=needs, serialization_format="pickle"
    )


def log_model(client: Any, run_id: str, folder: Path, beat: Callable[[], None] = lambda: None) -> None:
    """Log a saved module as the model of a run, with the last value of each of the run's metrics.

    May be repeated after a failure: a model of the same weights is completed, or left as it is.

    Args:
        client: of MLflow.
        run_id: of the run, which has all its metrics and the tag `weights_sha256`.
        folder: written by `save_module`.
        beat: called after each call of MLflow that succeeded.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    run = client.get_run(run_id)
    model = _earlier(client, run)
    if model is not None and model.status == LoggedModelStatus.READY:
        return
    if model is None:
        tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
        model = client.create_logged_model(
            run.info.experiment_id, name=MODEL, source_run_id=run_id, tags=tags, model_type="torch.nn.Module"
        )
        beat()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            to = file.parent.relative_to(folder).as_posix()
            client.log_model_artifact(model.model_id, str(file), None if to == "." else to)
            beat()
    # the points that the run has, with their own times: the run gets no second one
    last = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=model.model_id)
        for point in run.data._metric_objs
    ]
    client.log_batch(run_id, metrics=last, synchronous=True)
    beat()
    step = max((point.step for point in last), default=0)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")


def _earlier(client: Any, run: Any) -> Any:
    """Return the logged model of a run's very weights; None if there is none."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    weights = run.data.tags.get(SHA256)
    return next((model for model in found if model.tags.get(SHA256) == weights), None)
