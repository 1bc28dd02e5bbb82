"""Several trainings as trials of Ray Tune; the best policy among them is kept."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedray.comparing import highest
from fedray.durable import local_path, shown
from fedray.errors import RunError
from fedray.experiment.cluster import start_ray
from fedray.experiment.interrupt import Stop, signals
from fedray.storage.directory import Lock, check_free, take
from fedray.sweeps.tune import end_if_asked, fit
from fedray.tracking.mlflow_run import RunStatus
from fedray.tracking.parent import finish_parent, parent_run
from fedray.tracking.sent import SENT
from fedray.tracking.store import Store, prepare_store
from rllib_pruner.config import Plan
from rllib_pruner.files import Row, TrainFiles
from rllib_pruner.learning_curve import draw_curves
from rllib_pruner.training import resume, send, train

logger = logging.getLogger(__name__)

OnTrial = Callable[[str, Row], None]
"""Called in the driver with a trial's name and an evaluation."""


def train_all(plan: Plan, out: Path, on_evaluation: OnTrial, *, taken: bool = False) -> str:
    """Train every trial of a plan, and keep the best policy.

    Args:
        plan: with a space.
        out: its directory; trials are in `out/trials`, the best policy in `out/policy`.
        on_evaluation: called after each evaluation of a trial.
        taken: whether the caller made the directory, with `trials` in it, with `take_next`.

    Returns:
        The name of the best trial.

    Raises:
        ConfigError: if `out` is not empty.
        RunError: if trials failed; the others are kept.
    """
    out = local_path(out)  # a trial works in a directory of Tune's
    if not taken:
        check_free(out)
    start_ray()  # before anything is left on disk
    if not taken:
        take(out, "trials", "training")
    with Lock(out, "training"), signals() as stop:
        return _train_all(plan, out, on_evaluation, stop)


def _train_all(plan: Plan, out: Path, on_evaluation: OnTrial, stop: Stop) -> str:
    tracking = next(iter(plan.trials.values())).tracking
    store = prepare_store(tracking.uri, tracking.experiment)
    parent = parent_run(store, out.name, {"plan": plan.name}, {"trials": list(plan.trials)})
    TrainFiles(out).write_run_id(parent)  # `fedray sync` continues it
    status: RunStatus = "FAILED"
    try:
        failed = _fit(plan, out, on_evaluation, stop, store, parent)
        status = "FAILED" if failed else "FINISHED"
    finally:
        if stop.signal is not None:
            status = "KILLED"
            hint = f"fedray agent train --resume {shown(out)}/trials/NAME"
            logger.warning("interrupted; `%s` continues a trial", hint)
        for name in plan.trials:
            _settle(out / "trials" / name, store, status)
        finish_parent(store, parent, status)
    stop.check()
    if failed:
        raise RunError("\n".join(f"trial {name} failed: {error}" for name, error in failed.items()))
    trained = {name: TrainFiles.open(out / "trials" / name).progress() for name in plan.trials}
    draw_curves(trained, out / "curve.png", plan.name)
    best = max(plan.trials, key=lambda name: _score(out / "trials" / name))
    shutil.copytree(out / "trials" / best / "policy", out / "policy")
    return best


def _fit(
    plan: Plan, out: Path, on_evaluation: OnTrial, stop: Stop, store: Store, parent: str | None
) -> dict[str, str]:
    """Train every trial under Tune; return errors by name."""
    from ray import tune

    stop.check()
    return fit(
        partial(_trial, plan, out, store, parent),
        {name: out / "trials" / name for name in plan.trials},
        dict.fromkeys(plan.trials, tune.PlacementGroupFactory([{"CPU": 1}])),
        out / ".tune",
        concurrent=plan.concurrent,
        max_failures=plan.max_failures,
        stop=stop,
        on_result=on_evaluation,
    )


def _settle(trial: Path, store: Store, status: RunStatus) -> None:
    """Bring MLflow up to a trial whose process was ended, or that MLflow did not take as a whole."""
    if not (trial / "config.yaml").is_file():
        return
    is_over = (trial / "curve.png").is_file()
    if not is_over or (trial / SENT).exists():
        files = TrainFiles.open(trial)
        send(files, files.config(), store, "FINISHED" if is_over else status)


def _score(path: Path) -> float:
    return highest(row["score"] for row in TrainFiles.open(path).progress())


def _trial(plan: Plan, out: Path, store: Store, parent: str | None, name: str) -> None:
    """Train one agent, or resume its training, and report its evaluations to Tune."""
    from ray import tune

    def report(row: Row) -> None:
        end_if_asked(out)
        tune.report(row)

    path = out / "trials" / name
    if (path / "config.yaml").is_file():
        resume(path, on_evaluation=report, store=store)
    else:
        shutil.rmtree(path, ignore_errors=True)  # an earlier try failed before its start
        train(plan.trials[name], path, on_evaluation=report, store=store, parent=parent)
