"""The training of one agent: RLlib learns, the process judges, and the best policy so far is kept.

    build → (train evaluate_every steps → judge → keep the best → checkpoint → report)* → curve

A resumed training starts from its last checkpoint. RLlib's checkpoints leave out the replay buffer: DQN
refills it before it learns, so the result differs from that of an uninterrupted training.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedray.comparing import as_gain, highest
from fedray.durable import shown
from fedray.experiment.cluster import start_ray
from fedray.experiment.interrupt import INTERRUPTS, Stop, signals
from fedray.policies.trained import TrainedPolicy, save
from fedray.storage.directory import Lock, check_free
from fedray.tracking.also import Beside
from fedray.tracking.mlflow_run import PARENT, MLflowTracker, RunStatus
from fedray.tracking.provenance import git_revision
from fedray.tracking.sent import SENT
from fedray.tracking.store import Store, prepare_store
from fedray.types import RoundReport
from rllib_pruner.config import TrainConfig
from rllib_pruner.files import Row, TrainFiles, as_row
from rllib_pruner.learning_curve import draw_curves
from rllib_pruner.networks import network_of, quiet

logger = logging.getLogger(__name__)

SHIPPED = ("policy", "progress.jsonl", "curve.png")
"""What MLflow gets of a training's directory."""

OnEvaluation = Callable[[Row], None]


def train(
    config: TrainConfig,
    out: Path,
    *,
    on_evaluation: OnEvaluation | None = None,
    store: Store | None = None,
    parent: str | None = None,
    taken: bool = False,
) -> list[Row]:
    """Train an agent.

    Args:
        config: of the training.
        out: its directory, empty or absent.
        on_evaluation: called after each evaluation.
        store: MLflow's; None: the config's.
        parent: the parent run in MLflow.
        taken: whether the caller made `out` with `take_next`.

    Returns:
        All evaluations; the best policy is in `out/policy`.

    Raises:
        ConfigError: if `out` is not empty.
    """
    if not taken:
        check_free(out)
    start_ray()  # before anything is left on disk
    files = TrainFiles.create(out, config, taken=taken)
    with Lock(files.path, "training"):
        return _track(config, files, [], on_evaluation, store, parent)


def resume(
    path: Path,
    *,
    on_evaluation: OnEvaluation | None = None,
    store: Store | None = None,
    patience_s: float = 0.0,
) -> list[Row]:
    """Resume an interrupted training; a finished one stays as it is.

    Args:
        path: its directory.
        on_evaluation: as for `train`.
        store: as for `train`.
        patience_s: how long to wait for another process that is ending its work on the training.

    Raises:
        ConfigError: if `path` is not the directory of a training.
        RunError: if another process works on it, or its files are damaged.
    """
    files = TrainFiles.open(path)
    config = files.config()
    with Lock(files.path, "training", patience_s):
        start_ray()  # before anything is changed on disk
        rows, checkpoint = files.rewind()
        if is_over(config, rows):
            if (files.path / SENT).exists():
                send(files, config, store, "FINISHED")
            return rows
        return _track(config, files, rows, on_evaluation, store, None, checkpoint)


def as_report(row: Row) -> RoundReport:
    """Return an evaluation as trackers take it, with the steps of the environment as step."""
    return RoundReport(int(row["env_steps"]), row)


def send(
    files: TrainFiles,
    config: TrainConfig,
    store: Store | None,
    status: RunStatus,
    *,
    parent: str | None = None,
    answer_s: float | None = None,
) -> MLflowTracker:
    """Bring MLflow up to the evaluations of a training that has ended; a failure is a warning of the log.

    Args:
        files: of the training.
        config: of the training.
        store: MLflow's; None: the config's.
        status: how the training ended.
        parent: the parent run in MLflow; None: as it is.
        answer_s: seconds to wait for an answer of the store; None: as a run does.

    Returns:
        Its tracker, which has ended.
    """
    tracker = MLflowTracker(
        store or prepare_store(config.tracking.uri, config.tracking.experiment),
        run_name=files.path.name,
        params=config.to_tree(),
        tags=_tags(config),
        resume=files.run_id(),
        folder=files.path,
        on_open=lambda _, run_id: files.write_run_id(run_id),
        is_running=False,
        answer_s=answer_s,
    )
    if parent is not None:
        tracker.tag({PARENT: parent})
    for row in files.progress():
        tracker.log_round(as_report(row))
    tracker.finish(status, [files.path / name for name in SHIPPED] if status == "FINISHED" else [])
    return tracker


def _tags(config: TrainConfig) -> dict[str, str]:
    return {
        "process": config.process.name,
        "algorithm": config.algorithm.name,
        "config_digest": config.digest,
    }


def is_over(config: TrainConfig, rows: Sequence[Row]) -> bool:
    """Whether training ends with the last of these evaluations."""
    budget = config.budget

    def is_good(row: Row) -> bool:
        measures = {name: value for name, value in row.items() if name not in ("iteration", "env_steps")}
        reached = budget.stop_score is not None and row["score"] >= budget.stop_score
        return reached or config.process.options.good_enough(measures)

    if not rows:
        return False
    lasts = len(rows) >= budget.in_a_row and all(map(is_good, rows[-budget.in_a_row :]))
    return lasts or rows[-1]["env_steps"] >= budget.env_steps


def _track(
    config: TrainConfig,
    files: TrainFiles,
    rows: list[Row],
    on_evaluation: OnEvaluation | None,
    store: Store | None,
    parent: str | None,
    checkpoint: Path | None = None,
) -> list[Row]:
    """Learn, and report to MLflow, also the end of a failed training."""
    tags = _tags(config)
    revision = git_revision()
    tracker = MLflowTracker(
        store or prepare_store(config.tracking.uri, config.tracking.experiment),
        run_name=files.path.name,
        params=config.to_tree(),
        tags=tags if revision is None else tags | {"git_revision": revision},
        parent_run_id=parent,
        resume=files.run_id(),
        folder=files.path,
        on_open=lambda _, run_id: files.write_run_id(run_id),
    )
    beside = Beside(config.tracking.also, files.path, config.to_tree(), map(as_report, rows))

    def report(row: Row) -> None:
        tracker.log_round(as_report(row))
        beside.log_round(as_report(row))
        if on_evaluation is not None:
            on_evaluation(row)

    for row in rows:  # MLflow may have missed some
        tracker.log_round(as_report(row))
    status: RunStatus = "FAILED"
    with signals() as stop:
        try:
            rows = _learn(config, files, rows, report, checkpoint, stop)
            draw_curves({config.algorithm.name: rows}, files.path / "curve.png", config.process.name)
            status = "FINISHED"
        except BaseException as error:
            if isinstance(error, INTERRUPTS) or stop.signal is not None:
                status = "KILLED"
            raise
        finally:
            tracker.finish(status, [files.path / name for name in SHIPPED])
            beside.finish(status, None, {})
            if status != "FINISHED":
                done, path = "interrupted" if status == "KILLED" else "failed", shown(files.path)
                command = f"fedray agent train --resume {path}"
                logger.warning("%s; `%s` continues from the last evaluation", done, command)
    return rows


def _learn(
    config: TrainConfig,
    files: TrainFiles,
    rows: list[Row],
    report: OnEvaluation,
    checkpoint: Path | None,
    stop: Stop,
) -> list[Row]:
    """Train and judge in turn; a signal discards the training since the last evaluation."""
    with stop.cuts():
        algorithm = _build(config)
    try:
        if checkpoint is not None:
            with quiet():
                algorithm.restore_from_path(str(checkpoint))
        best = highest(row["score"] for row in rows)
        while not is_over(config, rows):
            with stop.cuts():
                with quiet():
                    result = algorithm.train()
                    network = network_of(algorithm.get_module())
                about = _about(config, int(result["num_env_steps_sampled_lifetime"]))
                measures = config.process.options.judge(TrainedPolicy(network, about).acts)
            iteration = int(result["training_iteration"])
            row = as_row(iteration, about["env_steps"], result["env_runners"], measures)
            if as_gain(row["score"]) >= best:  # of equals the later one
                best = as_gain(row["score"])
                with files.writing("policy"):
                    save(network, files.policy, about | {"measures": measures})
            with quiet():
                files.save(algorithm, iteration)
            files.append(row)
            rows.append(row)
            report(row)
            stop.look(files.path)
            stop.check()
    finally:
        with quiet():
            algorithm.stop()
    return rows


def _build(config: TrainConfig) -> Any:
    with quiet():
        environment = config.process.options.environment()
        learner = config.algorithm.options.rllib(environment, config.seed, config.budget.evaluate_every)
        algorithm = learner.build_algo()
    replay = algorithm.local_replay_buffer
    if replay is not None:
        replay.rng = np.random.default_rng(config.seed)  # RLlib does not seed it
    return algorithm


def _about(config: TrainConfig, env_steps: int) -> dict[str, Any]:
    """Return the content of `policy.json` without the entries that `save` adds; nothing of the machine."""
    return {
        **asdict(config.process.options.interface),
        "algorithm": config.algorithm.name,
        "seed": config.seed,
        "env_steps": env_steps,
        "config_digest": config.digest,
        "config": config.portable(),
    }
