"""Sweeps: the points of a `Sweep` as trials of Ray Tune, each of which is `run()`.

A trial is a server; its client actors live in its placement group, so that two trials on two cores cannot
wait for each other's actors. What matters is in the trials' own directories: a sweep that was interrupted
goes on with the very points that are missing.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedray.durable import local_path, on_disk
from fedray.errors import ConfigError, FedrayError, RunError
from fedray.experiment import sealed
from fedray.experiment.cluster import cluster_cpus, start_ray
from fedray.experiment.config import RunConfig
from fedray.experiment.directory import Lock, check_free, take, take_next
from fedray.experiment.files import RunFiles
from fedray.experiment.messages import shortened
from fedray.experiment.overrides import Tree, override_tree
from fedray.experiment.placement import groups_for, pool_for
from fedray.experiment.run import RUNS, Federation, resume, run
from fedray.experiment.space import Point, Sweep
from fedray.experiment.tracked import Tracking
from fedray.experiment.tracking import finish_parent, parent_run, prepare_store
from fedray.experiment.tune_config import tune_config
from fedray.federation.pool import ActorOptions
from fedray.types import RoundReport

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long a trial that is tried again waits for the process of the try before."""

Status = Literal["finished", "stopped", "failed", "missing"]


@dataclass(frozen=True)
class Trial:
    """What became of a point."""

    point: Point
    path: Path
    status: Status
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left: its directory, and what became of each point."""

    path: Path
    trials: tuple[Trial, ...]

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Trials that broke."""
        return tuple(trial for trial in self.trials if trial.status in ("failed", "missing"))


OnTrialRound = Callable[[str, Mapping[str, Any]], None]
"""Called in the driver with a trial's name and the metrics of a round."""


def sweep(plan: Sweep, *, out: str | Path | None = None, on_round: OnTrialRound | None = None) -> SweepResult:
    """Try all points of a sweep.

    Args:
        plan: a validated sweep.
        out: its directory, empty or absent; None: the next free one under `runs/`.
        on_round: called as the trials report evaluated rounds.

    Raises:
        ConfigError, DataError: if a point cannot run; nothing was started then, and nothing is left on disk.
    """
    if not isinstance(plan, Sweep):
        raise ConfigError(f"sweep takes a Sweep, not {shortened(plan)}: Sweep.load(FILE) reads one")
    path = None if out is None else local_path(out)
    if path is not None:
        check_free(path)
    for config in _different_data(plan.points):
        Federation.of(config)  # data that cannot be dealt as asked shows here, before anything is started
    start_ray()
    if path is None:
        path = take_next(local_path(RUNS), plan.name, "trials", "sweep")
    else:
        take(path, "trials", "sweep")
    with Lock(path, "sweep"):
        with on_disk(path / "sweep.yaml"):
            sealed.write(path / "sweep.yaml", _written(plan))
        return _try_all(plan, path, on_round)


def resume_sweep(path: str | Path, *, on_round: OnTrialRound | None = None) -> SweepResult:
    """Go on with a sweep: finished and stopped trials stay, the others go on from their checkpoints."""
    place = local_path(path)
    written = place / "sweep.yaml"
    tree = sealed.load(written)
    if not {"name", "points", "base"} <= tree.keys():
        raise ConfigError(f"{written} was not written by a sweep: it has no name, points or base")
    changes, name = tree.pop("points"), tree.pop("name")
    tune = tune_config(dict(tree.get("tune") or {}), str(written))
    plan = Sweep.of(name, tree, tune, changes, str(written))
    with Lock(place, "sweep"):
        return _try_all(plan, place, on_round)


def _written(plan: Sweep) -> Tree:
    """Return what `sweep.yaml` holds: the points as they were drawn, and paths that hold from anywhere."""
    config = plan.points[0].config
    imports = dict.fromkeys(str(path) for point in plan.points for path in point.config.imports)
    paths: Tree = {"tracking.uri": config.tracking.uri} | ({"imports": list(imports)} if imports else {})
    if config.data.root is not None:
        paths["data.root"] = str(config.data.root)
    base = override_tree(plan.tree["base"], paths)
    points = [dict(point.changes) for point in plan.points]
    return plan.tree | {"base": base, "name": plan.name, "points": points}


def _try_all(plan: Sweep, path: Path, on_round: OnTrialRound | None) -> SweepResult:
    waiting = [point for point in plan.points if _status(_place(path, point)) not in ("finished", "stopped")]
    if waiting:
        start_ray()
        tracking = plan.points[0].config.tracking
        store = prepare_store(tracking.uri, tracking.experiment)
        known = _parent_of(path)
        parent = known or parent_run(store, path.name, {"sweep": plan.name}, plan.tree)
        if parent:
            RunFiles(path).write_json("mlflow.json", {"run_id": parent})
        errors, stopped = _fit(plan, waiting, path, Tracking(store=store, parent=parent), on_round)
        for point in waiting:
            if point.name in stopped:
                _settle(_place(path, point), Tracking(store=store, parent=parent))
        finish_parent(store, parent, "FINISHED", [path / "sweep.yaml"])
    else:
        errors = {}
    trials = [Trial(p, _place(path, p), _status(_place(path, p)), errors.get(p.name)) for p in plan.points]
    return SweepResult(path, tuple(trials))


def _fit(
    plan: Sweep, points: Sequence[Point], path: Path, tracking: Tracking, on_round: OnTrialRound | None
) -> tuple[dict[str, str], set[str]]:
    """Run the points as Tune trials; return the errors by name, and whom the scheduler stopped."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what breaks is reported at the end, once
    by_name = {point.name: point for point in points}
    cpus, concurrent = _shares(plan, len(points))
    stopped: set[str] = set()
    actors = _actors([point.config for point in points], cpus)
    # Ray leaves the trial's own bundle out, since it is empty; the selectors are of those that stay
    labels = [dict(options.labels) for options in actors]
    selectors = {"bundle_label_selector": labels} if any(labels) else {}
    room = tune.PlacementGroupFactory([{}, *(options.bundle for options in actors)], **selectors)

    def trial(sample: Tree) -> None:
        _trial(by_name[sample["name"]], path, cpus, tracking)

    tuner = tune.Tuner(
        tune.with_resources(trial, room),
        param_space={"name": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            metric=plan.tune.metric,
            mode=plan.tune.direction,
            scheduler=_scheduler(plan, stopped),
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(path / ".tune"),
            failure_config=tune.FailureConfig(max_failures=plan.tune.max_failures),
            callbacks=[_callback(on_round)],
            verbose=0,
        ),
    )
    grid = tuner.fit()
    shutil.rmtree(path / ".tune", ignore_errors=True)  # all that matters is in the trials' own directories
    errors = {
        result.config["name"]: _reason(result.error)
        for result in grid
        if result.error is not None and result.config is not None
    }
    return errors, stopped - errors.keys()


def _trial(point: Point, path: Path, cpus: float, tracking: Tracking) -> None:
    """Be the server of one trial: start or go on, and tell Tune about each evaluated round.

    The last round is reported when everything is written: a scheduler may end the trial with any report.
    """
    from ray import tune

    last: dict[str, float] = {}

    def report(round: RoundReport) -> None:
        metrics = {"round": round.round, **round.metrics}
        if round.round == point.config.rounds:
            last.update(metrics)
        elif "val/accuracy" in metrics:
            tune.report(metrics)

    place = _place(path, point)
    tracking, pool = replace(tracking, name=point.name), pool_for(point.config, cpus)
    if (place / "config.yaml").exists():
        # the process of an earlier try may take a moment to die
        resume(place, on_round=report, pool=pool, tracking=tracking, patience_s=PATIENCE_S)
    else:
        shutil.rmtree(place, ignore_errors=True)  # it broke before it had begun
        run(point.config, out=place, on_round=report, pool=pool, tracking=tracking)
    if last:
        tune.report(last)


def _shares(plan: Sweep, trials: int) -> tuple[float, int]:
    """Return the CPUs of each trial, and how many run at once."""
    cpus = cluster_cpus()
    concurrent = min(trials, plan.tune.concurrent or max(1, int(cpus)))
    return cpus / concurrent, concurrent


def _actors(configs: Sequence[RunConfig], cpus: float) -> list[ActorOptions]:
    """Return what the actors of the most demanding point ask of Ray: a bundle for each in a trial's group."""
    in_process = [ActorOptions(cpu=min(1.0, cpus))]
    needs = [
        [group.options for group in groups_for(config, cpus) for _ in range(group.actors)]
        if config.clients.actors != 0
        else in_process
        for config in configs
    ]
    most = max(needs, key=lambda actors: (sum(options.cpu for options in actors), len(actors)))
    _check_room([options.bundle for options in most])
    return most


def _check_room(bundles: Sequence[Mapping[str, float]]) -> None:
    import ray

    have = ray.cluster_resources()
    for name in sorted({name for bundle in bundles for name in bundle}):
        need = sum(bundle.get(name, 0.0) for bundle in bundles)
        if need > have.get(name, 0.0) + 1e-6:
            raise RunError(
                f"a trial needs {need:g} × {name} for its client actors, but the cluster has "
                f"{have.get(name, 0):g}; lower clients.actors or clients.resources"
            )


def _scheduler(plan: Sweep, stopped: set[str]) -> Any:
    """Return Tune's scheduler; it writes down whom it stops.

    A trial that ended without finishing may also have been cut short with the whole sweep, for Tune catches
    signals; from outside the two look alike.
    """
    if plan.tune.scheduler == "fifo":
        return None
    from ray.tune.schedulers import ASHAScheduler

    class Noting(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
        def on_trial_result(self, controller: Any, trial: Any, result: Any) -> str:
            decision: str = super().on_trial_result(controller, trial, result)
            if decision == self.STOP:
                stopped.add(trial.config["name"])
            return decision

    return Noting(
        time_attr="round",
        max_t=plan.rounds,
        grace_period=min(plan.rounds, plan.tune.grace_rounds or max(1, plan.rounds // 4)),
        reduction_factor=plan.tune.reduction,
    )


def _callback(on_round: OnTrialRound | None) -> Any:
    from ray import tune

    class Progress(tune.Callback):  # type: ignore[misc]  # Ray has no types
        """Hands each reported round to whoever shows it; Tune pickles it, but not the listener."""

        listener = staticmethod(on_round) if on_round is not None else None

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if self.listener is not None:
                self.listener(trial.config["name"], result)

        def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
            return tune.Callback, ()

    return Progress()


# ── what is on disk
# ──────────────────────────────────────────────────────────────────────────────────────────


def _place(path: Path, point: Point) -> Path:
    return path / "trials" / point.name


def _status(place: Path) -> Status:
    if not (place / "config.yaml").exists():
        return "missing"
    result = RunFiles(place).read_json("result.json")
    status: Status = result["status"] if result else "failed"
    return status


def _settle(place: Path, tracking: Tracking) -> None:
    """Write down that the scheduler stopped a trial, unless it had finished.

    It was ended from outside, and could not do so itself.
    """
    if _status(place) != "failed":
        return
    files = RunFiles(place)
    rounds = files.rounds()
    if rounds:
        last = rounds[-1]
        files.write_json("result.json", {**last["metrics"], "rounds": last["round"], "status": "stopped"})
    known = files.read_json("mlflow.json")
    if known and tracking.store is not None:
        finish_parent(tracking.store, known["run_id"], "KILLED")


def _parent_of(path: Path) -> str | None:
    known = RunFiles(path).read_json("mlflow.json")
    return known["run_id"] if known else None


def _different_data(points: Sequence[Point]) -> list[RunConfig]:
    found: dict[str, RunConfig] = {}
    for point in points:
        found.setdefault(f"{point.config.data!r} {point.config.clients.population}", point.config)
    return list(found.values())


def _reason(error: BaseException) -> str:
    """Return the innermost message of a trial's error."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    if isinstance(cause, FedrayError):
        return str(cause)
    return lines[-1] if lines else type(cause).__name__
