"""Several trainings at once, as trials of Ray Tune; the best policy among them is kept."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedray.comparing import highest
from fedray.durable import local_path
from fedray.errors import RunError
from fedray.experiment.cluster import start_ray
from fedray.experiment.directory import Lock, check_free, take
from fedray.experiment.tracking import finish_parent, parent_run, prepare_store
from rllib_pruner.config import Plan
from rllib_pruner.files import Row, TrainFiles
from rllib_pruner.learning_curve import draw_curves
from rllib_pruner.training import resume, train

OnTrial = Callable[[str, Row], None]
"""Called in the driver with a trial's name and an evaluation."""


def train_all(plan: Plan, out: Path, on_evaluation: OnTrial, *, taken: bool = False) -> str:
    """Train every trial of a plan; those that are there already are gone on with.

    Args:
        plan: with a space.
        out: its directory; trials are in `out/trials`, the best policy of all in `out/policy`.
        on_evaluation: called as the trials evaluate.
        taken: whether the caller made the directory, with `trials` in it, by `take_next`.

    Returns:
        The name of the best trial.

    Raises:
        ConfigError: if there is something in `out`.
        RunError: if trials broke; the others are kept.
    """
    out = local_path(out)  # a trial works in a directory of Tune's
    if not taken:
        check_free(out)
    start_ray()  # before anything is left on disk
    if not taken:
        take(out, "trials", "training")
    with Lock(out, "training"):
        return _train_all(plan, out, on_evaluation)


def _train_all(plan: Plan, out: Path, on_evaluation: OnTrial) -> str:
    tracking = next(iter(plan.trials.values())).tracking
    store = prepare_store(tracking.uri, tracking.experiment)
    parent = parent_run(store, out.name, {"plan": plan.name}, {"trials": list(plan.trials)})

    def trial(sample: dict[str, str]) -> None:
        from ray import tune

        name = sample["name"]
        place = out / "trials" / name
        if (place / "config.yaml").is_file():
            resume(place, on_evaluation=tune.report, store=store)
        else:
            train(plan.trials[name], place, on_evaluation=tune.report, store=store, parent=parent)

    broken = _fit(trial, plan, out, on_evaluation)
    finish_parent(store, parent, "FAILED" if broken else "FINISHED")
    if broken:
        raise RunError("\n".join(f"trial {name} broke: {error}" for name, error in broken.items()))
    trained = {name: TrainFiles.open(out / "trials" / name).progress() for name in plan.trials}
    draw_curves(trained, out / "curve.png", plan.name)
    best = max(plan.trials, key=lambda name: _score(out / "trials" / name))
    shutil.copytree(out / "trials" / best / "policy", out / "policy")
    return best


def _score(path: Path) -> float:
    return highest(row["score"] for row in TrainFiles.open(path).progress())


def _fit(trial: Callable[[Any], None], plan: Plan, out: Path, on_evaluation: OnTrial) -> dict[str, str]:
    """Run the trials, one CPU each; return the errors by name."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what breaks is reported at the end, once

    tuner = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([{"CPU": 1}])),
        param_space={"name": tune.grid_search(list(plan.trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=plan.concurrent),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out / ".tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_callback(on_evaluation)],
            verbose=0,
        ),
    )
    results = tuner.fit()
    shutil.rmtree(out / ".tune", ignore_errors=True)  # all that matters is in the trials' own directories
    return {result.config["name"]: str(result.error) for result in results if result.error is not None}


def _callback(on_evaluation: OnTrial) -> Any:
    from ray import tune

    class Progress(tune.Callback):  # type: ignore[misc]  # Ray has no types
        """Hands each evaluation to whoever shows it; Tune pickles it, but not the listener."""

        listener = staticmethod(on_evaluation)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            self.listener(trial.config["name"], result)

        def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
            return tune.Callback, ()

    return Progress()
