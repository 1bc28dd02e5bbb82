"""From a config to a run: build the federation, run its rounds, keep the results.

    config → data, partition, devices, model → pool of clients → server → rounds → result

`run` starts a run. `resume` continues one that was interrupted, or adds rounds. Both end with the same files
and the same weights.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedray.config.places import Place
from fedray.config.run_config import RunConfig
from fedray.config.trees import Tree
from fedray.config.trust import IMPORTED, IMPORTS, record, trusting
from fedray.costs.devices import DEVICES
from fedray.costs.flops import FlopModel
from fedray.data import Dataset, Examples, Partition
from fedray.durable import remove_partials, shown
from fedray.errors import ConfigError, FedrayError, RunError
from fedray.experiment.dealing import Deal, check_memory, check_pairs, dealt, fleet_of, loaded, memory_of
from fedray.experiment.given import run_config
from fedray.experiment.history import History
from fedray.experiment.homes import Home, brought, publish_rest, published
from fedray.experiment.interrupt import INTERRUPTS, Stop, signals
from fedray.experiment.makers import note_maker
from fedray.experiment.placement import placed, stack_of
from fedray.experiment.progress import RunProgress, watched
from fedray.experiment.resuming import REGISTERED, check_origin, check_rounds, resumed_config
from fedray.federation.pool import ClientPool, PoolFactory
from fedray.federation.population import Population
from fedray.federation.server import Checkpoint, Schedule, Server, ServerSide
from fedray.federation.worker import Rules, Workplace
from fedray.randomness import generator
from fedray.storage import checkpoint as stored
from fedray.storage.checkpoint import Stored
from fedray.storage.directory import Lock, note_actors
from fedray.storage.final_model import damage_of
from fedray.storage.run_files import RunFiles
from fedray.tracking.also import Beside
from fedray.tracking.catching_up import mend
from fedray.tracking.data_inputs import DATA, describe
from fedray.tracking.mlflow_run import MLflowTracker, RunStatus
from fedray.tracking.provenance import declared
from fedray.tracking.store import import_mlflow
from fedray.tracking.tracked import KNOWN, Tracking, close_beside, close_tracker, open_beside, open_tracker
from fedray.types import RoundReport

logger = logging.getLogger(__name__)

OnRound = Callable[[RoundReport], None]

Until = Callable[[int, Mapping[str, Any]], str | None]
"""Called with each round and its metrics: returns why the run ends with it, None if it does not."""


@dataclass(frozen=True)
class Federation:
    """The parts of a run that need no process: data, clients, devices, model."""

    config: RunConfig
    dataset: Dataset
    deal: Deal
    place: Workplace

    @classmethod
    def of(cls, config: RunConfig) -> "Federation":
        """Load the data set and partition it.

        Raises:
            DataError: if the data is missing, or cannot be partitioned as the config asks.
        """
        seed, clients = config.seed, config.clients
        dataset = loaded(config)
        deal = dealt(config, dataset)
        model = config.build_model(dataset.input_shape, dataset.num_classes)
        check_pairs(config, model, deal.partition)
        memory, fleet = memory_of(config, model), fleet_of(config)
        check_memory(config, model.name, memory, fleet, deal.partition)
        place = Workplace(
            model=model,
            flops=FlopModel.trace(
                model.bind(model.init(seed).flat),
                dataset.input_shape,
                model.layout,
                tokens=model.architecture.tokens,
            ),
            dataset=replace(dataset, test=_rows(dataset.test, np.arange(0))),  # out of every method's reach
            population=Population(deal.partition, fleet),
            method=config.method.options,
            rules=Rules(clients.deadline_s, clients.dropout, clients.max_failed, clients.max_change),
            seed=seed,
            codec=clients.uplink.options,
            stack=stack_of(config, model.layout.size),
            precision=config.train.precision,
            memory=memory,
            on_short=clients.memory,
        )
        return cls(config, dataset, deal, place)

    @property
    def schedule(self) -> Schedule:
        """Rounds, cohort size and evaluation interval."""
        clients = self.config.clients
        return Schedule(
            rounds=self.config.rounds,
            cohort=clients.cohort,
            eval_every=self.config.eval_every,
            chunk=clients.chunk,
            groups=tuple(clients.resources.by_device),
            sampler=clients.sampler.options,
        )

    @property
    def side(self) -> ServerSide:
        """The data and the clock of the server."""
        validation = _rows(self.dataset.train, self.deal.splits.validation)
        return ServerSide(DEVICES["server"], self.deal.splits.server, validation)

    @property
    def tested(self) -> Partition:
        """The examples on which clients evaluate the final model: held out, or those that they train on."""
        return self.deal.tested or self.deal.partition

    def sampled_clients(self) -> list[int]:
        """Sample the clients that evaluate the final model, of those that have examples for it."""
        there = np.flatnonzero(self.tested.sizes)
        rng = generator(self.config.seed, "evaluate")
        return sorted(
            there[rng.choice(len(there), min(len(there), self.config.eval_clients), replace=False)].tolist()
        )


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    pool: PoolFactory | None = None,
    tracking: Tracking | None = None,
    until: Until | None = None,
    progress: bool | None = None,
    trust: bool = False,
    place: Place | None = None,
) -> History:
    """Run a federation.

    Args:
        config: a config; or the path of a YAML file, or a mapping as a file holds it, whose keys may be
            dotted. Of a sweep, its `base` is run.
        overrides: changes of the config: `{"method.lr": 0.1}` or `["method.lr=0.1"]`.
        out: the run's directory, which must be empty or absent; None: the next free one under `runs/`, or in
            the folder that `storage` names.
        on_round: called after each round, for progress and Tune.
        pool: makes the pool of clients; None: as `clients.actors` says.
        tracking: where to track the run; None: as the config's `tracking` says.
        until: ends the run, as finished, before its last round.
        progress: whether to show a bar; None: in a notebook or at Python's prompt, without an `on_round`.
        trust: whether to run the Python files that a config file names under `imports`.
        place: where the directory is published; None: as the config's `storage` says.

    Raises:
        ConfigError, DataError: if the config cannot run; then nothing has started, and nothing is on disk.
        RunError, ClientError, MethodError: if the run failed; `resume` may continue it.
    """
    with trusting(trust):
        config = run_config(config, overrides)
    home = Home.of(config.storage if place is None else None, out)
    federation = Federation.of(config)
    pool = pool or placed(config, federation.place, partial(import_mlflow, config.tracking.uri))
    with signals(), watched(progress, on_round, partial(RunProgress, config.rounds)) as on_round:
        path, below = home.make(_stem(config), "checkpoints", "run")
        files = RunFiles(path)
        with Lock(path), published(path, place or below, is_new=place is None) as publish:
            files.on_saved = publish
            _record_imports(files, config)
            files.write_config(config.to_tree())
            _describe_data(files, federation)
            if foreign := config.unrecorded():
                files.write_json(REGISTERED, foreign)
            files.warn(federation.dataset.warnings)
            publish()
            return _run_rounds_tracked(federation, files, None, on_round, pool, tracking or Tracking(), until)


def resume(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    on_round: OnRound | None = None,
    pool: PoolFactory | None = None,
    tracking: Tracking | None = None,
    patience_s: float = 0.0,
    until: Until | None = None,
    place: Place | None = None,
    trust: bool = False,
) -> History:
    """Resume a run from its last checkpoint. It ends with the weights of an uninterrupted run.

    A finished run is only read, unless `overrides` add rounds.

    Args:
        path: the run's directory; or the address where it is published: then in a copy below `runs/`.
        overrides: changes of the config: `["rounds=200"]` or `{"rounds": 200}`. Allowed are `rounds`, where
            the method's schedule does not depend on it, and keys that do not change results.
        on_round: as for `run`.
        pool: as for `run`.
        tracking: as for `run`.
        patience_s: seconds to wait for a process that is leaving the run.
        until: as for `run`.
        place: as for `run`.
        trust: whether to run Python files of `imports` that the run has not recorded, or that have changed.

    Raises:
        ConfigError, DataError, ClientError, MethodError: as for `run`.
        RunError: if the run failed; or if it cannot be resumed: another process works on it, or no sound
            checkpoint of its config, model and version exists. Nothing has changed then.
    """
    path, place = brought(path, overrides, place, patience_s)
    files = RunFiles.open(path)
    with trusting(trust):
        before, config = resumed_config(files, overrides)
    result = _sound_result(files, config)
    if result is not None:
        mend(files, config, tracking or Tracking())
        if (fault := files.rows_fault()) is not None:
            logger.warning("%s", fault)
        publish_rest(path, place)
        return History(files.path, _history(files), result)
    federation = Federation.of(config)
    with Lock(path, patience_s=patience_s), published(path, place) as publish:
        files.on_saved = publish
        result = _sound_result(files, config)  # another process may have finished it meanwhile
        if result is not None:
            return History(files.path, _history(files), result)
        pool = pool or placed(config, federation.place, partial(import_mlflow, config.tracking.uri))
        found = files.load()
        if found is not None:
            check_origin(files, found, config, federation.place.model.layout)
            check_rounds(found, config)
        files.read_json(KNOWN)  # a damaged one is refused before anything changes
        _describe_data(files, federation)
        if before != config.to_tree():
            _change(files, before, config, found)
        if "ended" in (files.result() or {}):  # by `until`
            files.set_end_aside(found.done if found is not None else 0)
        remove_partials(files.path)
        _record_imports(files, config)
        return _run_rounds_tracked(federation, files, found, on_round, pool, tracking or Tracking(), until)


def _sound_result(files: RunFiles, config: RunConfig) -> dict[str, Any] | None:
    """Return `result.json` of a finished run; None also if a file beside it is damaged: it is made again."""
    result = finished_result(files, config)
    damage = damage_of(config, files, result) if result is not None else None
    if damage is not None:
        logger.warning("%s; made again from a checkpoint", damage)
        return None
    return result


def finished_result(files: RunFiles, config: RunConfig) -> dict[str, Any] | None:
    """Return `result.json` if the run has all rounds of its config; otherwise None.

    Raises:
        ConfigError: if the run has more rounds than the config.
    """
    result = files.result()
    if result is None or result.get("status") != "finished":
        return None
    completed = result.get("rounds", config.rounds)
    if completed > config.rounds:
        raise ConfigError(f"rounds={config.rounds}: {shown(files.path)} is finished, with {completed} rounds")
    return result if completed == config.rounds else None


def _record_imports(files: RunFiles, config: RunConfig) -> None:
    """Record the Python files that the run has imported, unless there are none or they are recorded."""
    digests = record(config.imports)
    if digests and digests != IMPORTED.read(files.path):
        files.write_json(IMPORTS, digests)


def _describe_data(files: RunFiles, federation: Federation) -> None:
    """Write `data.json`, unless it is there and sound."""
    described = None
    try:
        described = files.read_json(DATA)
    except RunError as error:
        logger.warning("%s; made again from the data set", error)
    if described is None:
        name, dataset = federation.config.data.name, federation.dataset
        files.write_json(DATA, describe(name, dataset, federation.deal.splits))


def _change(files: RunFiles, before: Tree, after: RunConfig, found: Stored | None) -> None:
    """Record the changes of a resumed run; set the results of a finished run aside."""
    done = found.done if found is not None else 0
    is_extended = after.rounds != before["rounds"]
    if is_extended:
        files.set_end_aside(done)
    files.write_config(after.to_tree())
    if is_extended:
        planned = before["rounds"]
        files.warn([f"resumed after round {done} with rounds={after.rounds}; planned were {planned}"])


def _run_rounds_tracked(
    federation: Federation,
    files: RunFiles,
    found: Stored | None,
    on_round: OnRound | None,
    pool_factory: PoolFactory,
    tracking: Tracking,
    until: Until | None,
) -> History:
    config, checkpoint = federation.config, found.checkpoint if found is not None else None
    status: RunStatus = "FAILED"
    with signals() as stop:
        files.rewind(found)
        note_maker(files, found.done if found is not None else -1)
        tracker: MLflowTracker | None = None
        beside: Beside | None = None
        try:
            with stop.cuts():
                pool = pool_factory(federation.place)
            with _opened(pool):
                tracker = open_tracker(config, files, tracking)  # while the client actors start
                beside = open_beside(config, files)
                server = Server(federation.place, pool, federation.schedule, federation.side, checkpoint)
                ended = _ended(files, until)
                with closing(_rounds(server, files, config, stop)) as rounds:
                    for report in rounds if ended is None else ():
                        tracker.log_round(report)
                        beside.log_round(report)
                        note_actors(files.path, len(getattr(pool, "actors", ())))
                        logger.info("round %d of %d: %s", report.round, config.rounds, _headline(report))
                        if on_round is not None:
                            on_round(report)
                        ended = until(report.round, report.metrics) if until is not None else None
                        if ended is not None:
                            break
                with stop.cuts():
                    result = _finish(federation, server, files, ended)
            status = "FINISHED"
        except BaseException as error:
            # an error after a signal is due to it: Ray's processes may have received it too
            if isinstance(error, INTERRUPTS) or stop.signal is not None:
                status = "KILLED"
            elif isinstance(error, FedrayError):
                with suppress(RunError):  # the disk may have failed
                    files.warn([f"failed: {error}"])
            raise
        finally:
            close_tracker(tracker or open_tracker(config, files, tracking), config, files, status)
            close_beside(beside, files, status)
            if status != "FINISHED":
                done, path = "interrupted" if status == "KILLED" else "failed", shown(files.path)
                logger.warning("%s; `fedray resume %s` continues from the last checkpoint", done, path)
    return History(files.path, _history(files), result)


def _ended(files: RunFiles, until: Until | None) -> str | None:
    """Return why the rounds so far end a run: an earlier process may have died before it could end it."""
    ended = None
    for line in files.rounds() if until is not None else ():
        ended = until(line["round"], line["metrics"])  # type: ignore[misc]
    return ended


def _rounds(server: Server, files: RunFiles, config: RunConfig, stop: Stop) -> Generator[RoundReport]:
    """Run the set-up, unless it is done, and the remaining rounds, and write each to disk.

    At the end, also after an error or a signal, the last complete round has a checkpoint. A round in progress
    is dropped.
    """
    tree = config.to_tree()
    unsaved: Checkpoint | None = None
    try:
        while server.state.round <= config.rounds:
            with stop.cuts():
                report = server.setup() if server.state.round == 0 else server.step()
            stored.check(server.checkpoint, config.method.name, {record.client for record in report.clients})
            files.append(report)
            unsaved = server.checkpoint.snapshot()
            if report.round % config.checkpoint_every == 0 or report.round == config.rounds:
                files.save(unsaved, tree)
                unsaved = None
            files.warn(f"round {report.round}: {note}" for note in report.notes)
            yield report
            if report.round < config.rounds:
                stop.look(files.path)
            stop.check()
    finally:
        if unsaved is not None:
            with suppress(Exception):  # the error that ended the run matters more
                files.save(unsaved, tree)


@contextmanager
def _opened(pool: ClientPool) -> Iterator[ClientPool]:
    try:
        yield pool
    finally:
        with suppress(Exception):  # an earlier error matters more
            pool.close()


def _finish(federation: Federation, server: Server, files: RunFiles, ended: str | None) -> dict[str, Any]:
    """Read the test set, once; evaluate the model on clients' own examples; write the result.

    Args:
        federation: of the run.
        server: after the last round.
        files: of the run.
        ended: why the run ends before its planned rounds; None: it does not.
    """
    test = server.evaluate(federation.dataset.test)
    of_clients = _of_clients(federation, server, files) if federation.config.eval_clients else {}
    files.write_model(server.model)
    last = files.rounds()[-1]
    result = {
        **last["metrics"],
        "test/accuracy": test.accuracy,
        "test/loss": test.loss,
        **of_clients,
        "rounds": last["round"],
        "weights_sha256": server.model.sha256,
        **declared(federation.config),
        "config_digest": federation.config.digest,
        "status": "finished",
        **({} if ended is None or last["round"] == federation.config.rounds else {"ended": ended}),
    }
    files.write_json("result.json", result)
    return result


def _of_clients(federation: Federation, server: Server, files: RunFiles) -> dict[str, float]:
    """Write the model's accuracy on the examples of each sampled client; return the final metrics of it.

    Where examples are held out, `clients/without_test` counts the clients that have too few.
    """
    clients, population = federation.sampled_clients(), federation.place.population
    rows = [federation.tested.rows(client) for client in clients]
    accuracy = _own_accuracy(federation, server, clients, rows)
    missing = int(np.count_nonzero(np.asarray(federation.tested.sizes) == 0))
    files.write_client_accuracy(
        {
            "client": clients,
            "device": [population[client].profile.name for client in clients],
            "num_examples": [len(r) for r in rows],
            "accuracy": accuracy,
        }
    )
    return {
        "clients/accuracy_mean": float(np.mean(accuracy)),
        "clients/accuracy_std": float(np.std(accuracy)),
        "clients/accuracy_worst_decile": float(np.mean(np.sort(accuracy)[: -(-len(accuracy) // 10)])),
    } | ({"clients/without_test": missing} if federation.deal.tested else {})


def _own_accuracy(
    federation: Federation, server: Server, clients: Sequence[int], rows: Sequence[np.ndarray]
) -> list[float]:
    """Return the model's accuracy on each client's examples, with the client's own norms if it has any."""
    train = federation.dataset.train
    if federation.place.model.norms.private:
        return [server.evaluate(_rows(train, r), k).accuracy for k, r in zip(clients, rows, strict=True)]
    own = server.evaluate(_rows(train, np.concatenate(rows)))
    ends = np.cumsum([len(r) for r in rows])
    return [float(part.mean()) for part in np.split(own.right, ends[:-1])]


# ── small things
# ─────────────────────────────────────────────────────────────────────────────────────────────


def _rows(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(examples.x[rows], examples.y[rows])


def _history(files: RunFiles) -> tuple[dict[str, Any], ...]:
    return tuple({"round": line["round"], **line["metrics"]} for line in files.rounds())


def _stem(config: RunConfig) -> str:
    return f"{config.method.name}-{config.data.name}-{config.model}-s{config.seed}"


def _headline(report: RoundReport) -> str:
    shown = ("val/accuracy", "train/loss", "density/global", "bytes/up", "time/simulated_s")
    return "  ".join(f"{name}={report.metrics[name]:.4g}" for name in shown if name in report.metrics)
