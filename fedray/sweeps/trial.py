"""One trial of a sweep, in a process of Tune: it starts or resumes the run, and reports its rounds."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedray.config import plugins
from fedray.config.run_config import RunConfig
from fedray.config.stop_rules import Targets
from fedray.config.tables import TABLES
from fedray.config.trust import trusting
from fedray.config.tune_config import OWN, TuneConfig
from fedray.costs import devices
from fedray.errors import RunError, nearest
from fedray.experiment.placement import pool_for
from fedray.experiment.run import resume, run
from fedray.storage.heartbeat import SILENT_S
from fedray.sweeps.nodes import Disk
from fedray.sweeps.outcome import status_of
from fedray.sweeps.perturbing import fork_if_due
from fedray.sweeps.reports import Reports
from fedray.sweeps.suggesting import Trees
from fedray.tracking.tracked import Tracking

PATIENCE_S = SILENT_S + 30.0
"""Seconds that a retried trial waits for the process of its earlier try; it may have died with its host."""


@dataclass(frozen=True)
class Job:
    """The message to a trial's process: plain values, from which it builds its config.

    Args:
        trees: name of each trial → its config.
        sources: files that add to the tables, to be imported first.
        names: directory of each trial → its name in MLflow.
        entries: (key, name) → table entry that a script, or a module without a file, added.
        disk: where the sweep's files are.
        cpus: that a trial may use.
        tracking: where trials are tracked.
        tune: how trials are compared and stopped.
        needed_by: the round by which the metric must have been reported; None: never.
    """

    trees: Trees
    sources: tuple[plugins.Source, ...]
    entries: Mapping[tuple[str, str], Any]
    names: Mapping[str, str]
    disk: Disk
    cpus: float
    tracking: Tracking
    tune: TuneConfig
    needed_by: int | None

    def config(self, name: str) -> RunConfig:
        """Return a trial's config, after adding to the tables what it chooses from."""
        plugins.take_over(self.sources)
        self.trees.path = self.disk.here  # points that were suggested later are in a file there
        for (key, named), entry in self.entries.items():
            _tables()[key][named] = entry
        return RunConfig.from_tree(self.trees[name], name)

    def check(self, seen: Mapping[str, Any], round: int) -> None:
        """Fail when the metric is due and has not been reported.

        Raises:
            RunError: if none of the metrics `seen` is the one to compare, and it is needed by this round.
        """
        if self.needed_by is None or round < self.needed_by or self.tune.metric in seen:
            return
        metric, scheduler = self.tune.metric, self.tune.scheduler.name
        own = sorted(name for name in seen if name.startswith(OWN))
        raise RunError(
            f"tune.metric {metric!r}: no round up to {round}, where {scheduler} compares, reported "
            f"it{nearest(metric, seen)} Beside costs they report {', '.join(own) or 'nothing'}; start a "
            "sweep with another tune.metric, or with later tune.grace_rounds"
        )


def trial(job: Job, name: str) -> None:
    """Run the server of one trial: start or resume it, and report its rounds to Tune."""
    job.disk.bring(name)
    with trusting(), job.disk.heeding():  # the sweep has checked what it sent
        _run(job, name, job.disk.here)


def _run(job: Job, name: str, path: Path) -> None:
    config = job.config(name)
    place = path / "trials" / name
    targets = Targets(job.tune.stop, job.tune.direction_of, config.eval_every)
    reports = Reports(path, place, config, job.tune.metric, targets, job.check)
    tracking, pool = replace(job.tracking, name=job.names[name]), pool_for(config, job.cpus)
    how: dict[str, Any] = {
        "pool": pool,
        "tracking": tracking,
        "on_round": reports.round,
        "until": reports.ended,
        "place": job.disk.place_of(name),
    }
    if status_of(place) == "finished":
        return  # it was asked to wait with its last report
    fork_if_due(path, name, PATIENCE_S)
    if (place / "config.yaml").exists():
        reports.before(name, place, asks=job.needed_by is not None)
        # the process of an earlier try may take a moment to die
        resume(place, patience_s=PATIENCE_S, **how)
    else:
        shutil.rmtree(place, ignore_errors=True)  # it failed before it began
        run(config, out=place, **how)
    reports.last()


def entries_of(configs: Sequence[RunConfig]) -> dict[tuple[str, str], Any]:
    """Return the entries of tables that configs use and that no file provides; they are pickled by value."""
    import ray

    found: dict[tuple[str, str], Any] = {}
    for config in configs:
        for key, (name, _) in config.unrecorded().items():
            found[key, name] = TABLES[key][name]
        for device in (*config.clients.devices, "server"):
            found |= {entry: devices.TABLES[entry[0]][entry[1]] for entry in devices.entries_of(device)}
    for entry in found.values():
        module = plugins.home(entry)
        if module is not None and module.__name__ != "__main__":  # Ray pickles their classes by itself
            ray.cloudpickle.register_pickle_by_value(module)
    return found


def _tables() -> dict[str, Any]:
    return {**TABLES, **devices.TABLES}
