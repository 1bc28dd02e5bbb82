"""Sweeps: the points of a `Sweep` as trials of Ray Tune, each of which is `run()`.

A trial is a server. Its client actors live in its placement group, so that two trials on two cores cannot
wait for each other's actors. All results are in the trials' own directories: a resumed sweep runs exactly
the missing points.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedray.config import plugins, sealed
from fedray.config.overrides import origin, override_tree, parse_overrides
from fedray.config.places import is_place
from fedray.config.run_config import RunConfig
from fedray.config.schedulers import Pbt
from fedray.config.trees import Tree
from fedray.config.trust import IMPORTED, IMPORTS, record, recorded, trusting
from fedray.config.tune_config import first_rung, tune_config
from fedray.durable import local_path, on_disk, shown
from fedray.errors import ConfigError, RunError
from fedray.experiment.cluster import start_ray
from fedray.experiment.dealing import check_data
from fedray.experiment.given import MAPPING, changes_of, tree_of
from fedray.experiment.homes import Home, brought, publish_rest, published
from fedray.experiment.interrupt import Stop, signals
from fedray.experiment.placement import actors_for, groups_for
from fedray.experiment.progress import SweepProgress, watched
from fedray.experiment.room import check_room, cluster_cpus, trials_at_once
from fedray.report.reading import TRACKED, moved_store
from fedray.storage.directory import Lock
from fedray.storage.run_files import RunFiles
from fedray.sweeps.judging import judge_of
from fedray.sweeps.nodes import Disk, Places, Steady
from fedray.sweeps.outcome import (
    Status,
    SweepResult,
    Trial,
    finish_sweep,
    record_best,
    record_pareto,
    status_of,
)
from fedray.sweeps.searchers import proposer
from fedray.sweeps.space import OnPoint, Point, Sweep
from fedray.sweeps.stopping import SPENT, Budget, lacks_note
from fedray.sweeps.suggesting import Suggestions, Trees, is_open, now, search_ended
from fedray.sweeps.trial import Job, entries_of, trial
from fedray.sweeps.tune import fit, import_tune, room
from fedray.tracking.catching_up import config_of, mend
from fedray.tracking.mlflow_run import MLflowTracker, RunStatus
from fedray.tracking.shown import shown_params, trial_names
from fedray.tracking.store import import_mlflow, prepare_store
from fedray.tracking.tracked import Tracking

logger = logging.getLogger(__name__)

OnTrialRound = Callable[[str, Mapping[str, Any]], None]
"""Called in the driver with a trial's name and the metrics of a round."""


def sweep(
    plan: Sweep | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    on_round: OnTrialRound | None = None,
    progress: bool | None = None,
    trust: bool = False,
) -> SweepResult:
    """Run all points of a sweep.

    Args:
        plan: a sweep; or the path of a YAML file, or a mapping with its `base`, `space` and `tune`.
        overrides: changes of the file or mapping: `{"tune.concurrent": 2}` or `["tune.concurrent=2"]`.
        out: the sweep's directory, empty or absent; None: the next free one under `runs/`, or in the folder
            that `storage` names.
        on_round: called for each evaluated round that a trial reports.
        progress: whether to show a bar; None: in a notebook or at Python's prompt, without an `on_round`.
        trust: whether to run the Python files that a file names under `imports`.

    Raises:
        ConfigError, DataError: if a point cannot run; then nothing has started, and nothing is on disk.
    """
    with trusting(trust):
        plan = _planned(plan, overrides)
    home = Home.of(_storage(plan), out)
    check_data(plan.configs)
    start_ray(partial(_import_all, plan))
    _check_rooms(plan)
    path, place = home.make(plan.name, "trials", "sweep")
    rounds = {point.name: point.config.rounds for point in plan.points}
    with (
        Lock(path, "sweep"),
        published(path, place, is_new=True) as publish,
        watched(progress, on_round, partial(SweepProgress, rounds)) as on_round,
    ):
        with on_disk(path / "sweep.yaml"):
            sealed.write(path / "sweep.yaml", _written(plan))
        _record_imports(plan, path)
        publish()
        return _run_all(plan, Disk.of_driver(path, place), on_round, publish)


def _planned(
    given: Sweep | Mapping[str, Any] | str | Path, overrides: Sequence[str] | Mapping[str, Any]
) -> Sweep:
    changes = changes_of(overrides)
    if isinstance(given, Sweep):
        if changes:
            raise ConfigError("overrides: the points of a Sweep are drawn already; give them to Sweep.load")
        return given
    tree, source = tree_of(given, "sweep takes a sweep", "Sweep")
    return Sweep.read(tree, source, Path(source).stem if source != MAPPING else "sweep", changes)


MAY_CHANGE = ("time_budget_s", "concurrent", "max_failures")
"""Keys of `tune` that a resumed sweep may change."""


def load_sweep(
    path: str | Path,
    on_point: OnPoint | None = None,
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
) -> Sweep:
    """Read the directory of a sweep and validate its points again, calling `on_point` for each.

    Args:
        path: the directory.
        on_point: called as points are validated.
        overrides: changes of `storage` and of the keys `MAY_CHANGE`, e.g. `tune.time_budget_s=3600`.
        trust: whether to run Python files of `imports` that the sweep has not recorded, or that have changed.

    Raises:
        ConfigError: if it is not the directory of a sweep, a point cannot run any more, or another key is
            changed.
    """
    written = local_path(path) / "sweep.yaml"
    tree = sealed.load(written)
    if not {"name", "points", "base"} <= tree.keys():
        raise ConfigError(f"{written} was not written by a sweep: it has no name, points or base")
    changes, name = tree.pop("points"), tree.pop("name")
    given = parse_overrides(overrides)
    tunes = {key.removeprefix("tune."): value for key, value in given.items() if key.startswith("tune.")}
    fixed = [key for key in given if key != "storage" and key.removeprefix("tune.") not in MAY_CHANGE]
    fixed += [key for key in given if key in MAY_CHANGE]
    if fixed:
        raise ConfigError(
            f"{shown(local_path(path))} is a sweep, whose points do not change: got {', '.join(fixed)}; "
            f"resume can change {', '.join(f'tune.{key}' for key in MAY_CHANGE)} and storage. Resume one of "
            "its runs, in trials/, or start another sweep"
        )
    tree["tune"] = {**(tree.get("tune") or {}), **tunes}
    if "storage" in given:
        tree["base"] = {**tree["base"], "storage": given["storage"]}
    where = origin(str(written), given)
    tune = tune_config(dict(tree["tune"]), where)
    with trusting(trust), recorded(IMPORTED.read(local_path(path))):
        if tune.is_searching:
            return now(Sweep.searching(name, tree, tune, where, on_point), local_path(path))
        return Sweep.of(name, tree, tune, changes, where, on_point)


def resume_sweep(
    path: str | Path, plan: Sweep | None = None, *, on_round: OnTrialRound | None = None
) -> SweepResult:
    """Resume a sweep: finished and stopped trials stay, the others continue from their checkpoints.

    Args:
        path: the sweep's directory; or the address where it is published: then in a copy below `runs/`.
        plan: the sweep, as `load_sweep` returns it; None: read it now.
        on_round: as of `sweep`.
    """
    place, address = brought(path, {} if plan is None else {"storage": plan.configs[0].storage})
    plan = plan or load_sweep(place)
    with Lock(place, "sweep"), published(place, address) as publish:
        if lacks_note(place, plan.tune.time_budget_s):
            logger.warning("%s: is missing: the time budget begins anew", place / SPENT)
        if Budget(place, plan.tune.time_budget_s).left_s <= 0 and _is_left(plan, place):
            spent = Budget(place, None).spent_s
            raise ConfigError(
                f"tune.time_budget_s: the trials of {shown(place)} have run {spent:.0f} s of "
                f"{plan.tune.time_budget_s:g} s; to continue: fedray resume {shown(place)} "
                "tune.time_budget_s=N"
            )
        if _written(plan) != sealed.load(place / "sweep.yaml"):
            with on_disk(place / "sweep.yaml"):
                sealed.write(place / "sweep.yaml", _written(plan))
        _record_imports(plan, place)
        publish()
        return _run_all(plan, Disk.of_driver(place, address), on_round, publish)


def _waiting(plan: Sweep, path: Path) -> list[Point]:
    """Return the points, of those that are known, that are neither finished nor stopped."""
    done = ("finished", "stopped")
    return [point for point in plan.points if status_of(_trial_path(path, point)) not in done]


def _is_left(plan: Sweep, path: Path) -> bool:
    """Tell whether there are trials to run, or points to be suggested."""
    return bool(_waiting(plan, path)) or is_open(plan, path)


def _record_imports(plan: Sweep, path: Path) -> None:
    """Record the Python files that the sweep has imported, unless there are none or they are recorded."""
    files, digests = RunFiles(path), record([file for config in plan.configs for file in config.imports])
    if digests and digests != IMPORTED.read(path):
        files.write_json(IMPORTS, digests)


def _written(plan: Sweep) -> Tree:
    """Return the content of `sweep.yaml`: the points as drawn, with absolute paths."""
    imports = dict.fromkeys(str(path) for config in plan.configs for path in config.imports)
    first = plan.configs[0]
    paths: Tree = {"tracking.uri": first.tracking.uri}
    if first.storage is not None:
        paths["storage"] = first.storage
    base = override_tree(plan.tree["base"], paths | ({"imports": list(imports)} if imports else {}))
    points = [] if plan.sample else [dict(point.changes) for point in plan.points]
    return plan.tree | {"base": base, "name": plan.name, "points": points}


def _storage(plan: Sweep) -> str | None:
    """Return the sweep's `storage`.

    Raises:
        ConfigError: if its scheduler needs a folder that all nodes see.
    """
    storage = plan.configs[0].storage
    if is_place(storage) and isinstance(plan.tune.rules, Pbt):
        raise ConfigError(
            f"storage: {storage}: pbt copies checkpoints from trial to trial in the sweep's directory, which "
            "all nodes must see: set storage to a shared folder, or another tune.scheduler"
        )
    return storage


def _run_all(
    plan: Sweep, disk: Disk, on_round: OnTrialRound | None, publish: Callable[[], object]
) -> SweepResult:
    path = disk.path
    disk.mirror(point.name for point in now(plan, path).points)
    with signals() as stop:
        budget = Budget(path, plan.tune.time_budget_s)
        judge = judge_of(plan, path, lambda: stop.signal is not None or budget.is_over, disk.mirror)
        waiting = _waiting(plan, path)
        is_done = not (_is_left(plan, path) or _lacks_outcome(plan, path))
        errors = {} if is_done else _run_tracked(plan, waiting, disk, on_round, stop, judge, budget, publish)
    plan = now(plan, path)
    _publish_trials(plan, disk)
    result = _result(plan, path, errors)
    if is_done:
        _record_best(plan, path, result)  # the files may have been damaged since
    if budget.is_over and _is_left(plan, path):
        result = replace(result, ended=f"the time budget of {plan.tune.time_budget_s:g} s is spent")
    return result


def _result(plan: Sweep, path: Path, errors: Mapping[str, str]) -> SweepResult:
    """Read the outcome of a sweep from its files."""
    trials = [
        Trial(p, _trial_path(path, p), status_of(_trial_path(path, p)), errors.get(p.name))
        for p in plan.points
    ]
    tune = plan.tune
    several = tune.directions if tune.objectives else {}
    note = search_ended(path)
    return SweepResult(path, tuple(trials), tune.metric, tune.direction, None, several, tune.limits, note)


def _run_tracked(
    plan: Sweep,
    waiting: Sequence[Point],
    disk: Disk,
    on_round: OnTrialRound | None,
    stop: Stop,
    judge: Any,
    budget: Budget,
    publish: Callable[[], object],
) -> dict[str, str]:
    """Run the remaining points and record the sweep's outcome in MLflow; return errors by name."""
    path = disk.path
    is_left = _is_left(plan, path)
    if is_left:
        with stop.cuts():
            start_ray(partial(_import_all, plan))
            _check_rooms(replace(plan, points=tuple(waiting)))
    where = plan.configs[0].tracking
    store = prepare_store(moved_store(where.uri, path, _parent_of(path)), where.experiment)
    parent = MLflowTracker(
        store,
        run_name=path.name,
        params=shown_params(_written(plan)),
        tags={"sweep": plan.name},
        resume=_parent_of(path),
        folder=path,
        on_open=lambda _, run_id: RunFiles(path).write_json(TRACKED.name, {"run_id": run_id}),
    )
    tracking = Tracking(store=store, parent=parent.run_id)
    errors: dict[str, str] = {}
    early: RunStatus | None = "FAILED"
    try:
        stop.check()
        if is_left:
            errors = _fit(plan, waiting, disk, tracking, on_round, stop, judge, budget, publish)
        early = None
    finally:
        budget.note()
        parent.settle()  # it may not have answered before
        parent.close()
        tracking = replace(tracking, parent=parent.run_id)
        is_cut = stop.signal is not None or (budget.is_over and not errors)
        _mirror_all(plan, disk)
        _record_outcomes(plan, path, tracking, "KILLED" if is_cut else early)
    stop.check()
    return errors


def _fit(
    plan: Sweep,
    points: Sequence[Point],
    disk: Disk,
    tracking: Tracking,
    on_round: OnTrialRound | None,
    stop: Stop,
    judge: Any,
    budget: Budget,
    publish: Callable[[], object],
) -> dict[str, str]:
    """Run the points as Tune trials; return the errors by name."""
    path = disk.path
    running = replace(plan, points=tuple(points))
    cpus, _ = _shares(plan, running.most)
    limit = plan.tune.concurrent or partial(trials_at_once, cpus, running.most)
    trees = Trees(path, plan.tree["base"], {point.name: point.config.to_tree() for point in points})
    job = Job(
        trees=trees,
        sources=plugins.sources(),
        entries=entries_of(running.configs),
        names=trees.each(partial(_shown_name, _changes(plan))),
        disk=disk,
        cpus=cpus,
        tracking=tracking,
        tune=plan.tune,
        needed_by=first_rung(plan.tune, plan.configs) if judge is not None else None,
    )
    search = None
    if plan.sample:
        from fedray.sweeps.suggester import Suggester

        suggestions = Suggestions(
            plan, path, proposer(plan.tune, plan.tree["space"]), partial(_check_point, cpus)
        )
        changing = {"limit": limit} if callable(limit) else {}  # Tune keeps a number
        is_ending = lambda: stop.signal is not None or budget.is_over  # noqa: E731
        search = Suggester(suggestions, is_ending, mirror=disk.mirror, **changing)
    return fit(
        partial(trial, job),
        Places(disk, trees),
        trees.each(partial(_room, cpus)),
        path / ".tune",
        concurrent=limit,
        max_failures=plan.tune.max_failures,
        stop=stop,
        scheduler=judge,
        search=search,
        is_over=budget.check,
        on_result=on_round,
        on_step=Steady(path, publish),
        on_ending=disk.ask_to_end,
        # a user's modules may keep state from trial to trial; the package keeps none
        reuse=not job.sources and all(plugins.home(entry) is None for entry in job.entries.values()),
    )


def _check_point(cpus: float, point: Point) -> None:
    """Check what a config alone does not tell of a suggested point: its data and the room for its actors.

    Raises:
        ConfigError, DataError: if it cannot run.
    """
    check_data([point.config])
    if point.config.clients.actors != 0:
        check_room(groups_for(point.config, cpus), f"trial {point.name}")


def _changes(plan: Sweep) -> list[Mapping[str, Any]]:
    """Return changes of which the keys are those that tell the trials apart."""
    if not plan.sample:
        return [point.changes for point in plan.points]
    lists = {key: next(iter(spec.values())) for key, spec in plan.tree["space"].items()}
    seeds: list[Mapping[str, Any]] = [{"seed": seed} for seed in plan.tune.repeat]
    return [*({key: value} for key, values in lists.items() for value in values), *seeds]


def _shown_name(changes: Sequence[Mapping[str, Any]], name: str, tree: Tree) -> str:
    """Return the name of a trial in MLflow."""
    return trial_names(changes, {name: RunConfig.from_tree(tree, name)})[name]


def _room(cpus: float, name: str, tree: Tree) -> Any:
    """Return the placement group of a trial."""
    return room(actors_for(RunConfig.from_tree(tree, name), cpus))


def _import_all(plan: Sweep) -> None:
    """Import the libraries of a sweep, which takes seconds."""
    import_mlflow(plan.configs[0].tracking.uri)
    import_tune()


def _shares(plan: Sweep, trials: int) -> tuple[float, int]:
    """Return the CPUs of each trial, and how many run at once."""
    cpus = cluster_cpus()
    concurrent = min(trials, plan.tune.concurrent or max(1, int(cpus)))
    return cpus / concurrent, concurrent


def _check_rooms(plan: Sweep) -> None:
    """Refuse a point for whose client actors the cluster has no room.

    Raises:
        ConfigError: with the first such point.
    """
    cpus, _ = _shares(plan, plan.most)
    named = [(f"trial {point.name}", point.config) for point in plan.points]
    for name, config in [*named, *(("a point of space", config) for config in plan.sample)]:
        if config.clients.actors != 0:
            check_room(groups_for(config, cpus), name)


# ── files of a sweep
# ──────────────────────────────────────────────────────────────────────────────────────────


def _trial_path(path: Path, point: Point) -> Path:
    return path / "trials" / point.name


def _mirror_all(plan: Sweep, disk: Disk) -> None:
    """Fetch what the trials have published; what the store does not give is missing here, and is said."""
    try:
        disk.mirror(point.name for point in now(plan, disk.path).points)
    except RunError as error:
        logger.warning("trials of other nodes may be missing here: %s", error)


def _publish_trials(plan: Sweep, disk: Disk) -> None:
    """Publish the outcomes of trials that the driver has recorded."""
    if disk.place is None:
        return
    try:
        for point in plan.points:
            place = _trial_path(disk.path, point)
            if (place / "config.yaml").exists():
                publish_rest(place, disk.place_of(point.name))
    except RunError as error:
        logger.warning("%s", error)


def _record_outcomes(plan: Sweep, path: Path, tracking: Tracking, early: RunStatus | None) -> None:
    """Record the outcome of every trial and of the sweep, on disk and in MLflow.

    Args:
        plan: the sweep.
        path: its directory.
        tracking: its MLflow run.
        early: how the sweep ended if not by itself.
    """
    plan = now(plan, path)
    is_reached, names = (
        True,
        trial_names(_changes(plan), {p.name: p.config for p in plan.points}),
    )
    for point in plan.points:
        place = _trial_path(path, point)
        _record_stop(place)
        # once the store is out of reach, each further trial would wait for it
        is_reached = is_reached and _record_outcome(
            place, replace(tracking, name=names[point.name]), early or "FAILED"
        )
    became: Counter[Status] = Counter(status_of(_trial_path(path, point)) for point in plan.points)
    is_done = became["finished"] + became["stopped"] == len(plan.points) and not is_open(plan, path)
    status: RunStatus = "FINISHED" if is_done else early or "FAILED"
    _record_best(plan, path, _result(plan, path, {}))
    assert tracking.store is not None
    if finish_sweep(tracking.store, tracking.parent, status, path, became):
        RunFiles(path).write_json(TRACKED.name, {"run_id": tracking.parent, "is_complete": True})
    if early is not None:
        how = "interrupted" if early == "KILLED" else "failed"
        logger.warning("%s; `fedray resume %s` continues with the trials that are missing", how, shown(path))


def _record_best(plan: Sweep, path: Path, result: SweepResult) -> None:
    """Write the best point of a sweep and its Pareto set, if it has any."""
    if result.best is not None:
        record_best(path, result.best, plan.tune.metric)
        record_pareto(path, result)


def _record_stop(place: Path) -> None:
    """Write the result of a trial that the scheduler stopped, unless it is there."""
    files = RunFiles(place)
    if status_of(place) == "stopped" and files.result() is None and (rounds := files.rounds()):
        last = rounds[-1]
        files.write_json("result.json", {**last["metrics"], "rounds": last["round"], "status": "stopped"})


def _record_outcome(place: Path, tracking: Tracking, cut: RunStatus) -> bool:
    """Bring MLflow up to a trial's files; `cut` is the outcome of an interrupted one.

    Returns:
        Whether MLflow has everything now.
    """
    became = status_of(place)
    if became == "missing":
        return True
    files = RunFiles(place)
    # PBT may have changed the point's config
    return mend(files, config_of(files), tracking, cut if became == "failed" else None)


def _lacks_outcome(plan: Sweep, path: Path) -> bool:
    """Tell whether MLflow may lack the outcome of a sweep whose points are all done."""
    if plan.configs[0].tracking.uri == "none":
        return False
    places = [path, *(_trial_path(path, point) for point in plan.points)]
    return not all((TRACKED.read(place) or {}).get("is_complete") for place in places)


def _parent_of(path: Path) -> str | None:
    return (TRACKED.read(path) or {}).get("run_id")
