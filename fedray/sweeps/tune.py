"""Trials of Ray Tune: one way to run them, for sweeps and for trainings.

All results are in the trials' own directories. Tune's folder is removed at the end.
"""

import logging
import os
import shutil
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedray.durable import FULL, on_disk, replace, shown
from fedray.errors import FedrayError, RunError, without_secrets
from fedray.experiment.cluster import leave_ray
from fedray.experiment.head import ClusterHead
from fedray.experiment.interrupt import Stop
from fedray.experiment.room import missing_now
from fedray.federation.crew import FIRST_LOOK_S, LOOK_S
from fedray.federation.pool import ActorOptions

logger = logging.getLogger(__name__)

ASKS = "asks"
"""In a report: the trial has not trained since its last report, and asks the scheduler whether it may."""

TRACEBACK = "error.txt"
"""File in the directory of a trial: the traceback of the error that ended it."""

GRACE_S = 5.0
"""Seconds that trials have to end by themselves after a signal."""

LATE_S = 20.0
"""Seconds after a signal in which Tune has to end; it waits for minutes where Ray received the signal too."""

TAKE_OVER_S = 600
"""Seconds that a stopped trial has to end before the next one takes over its process."""

Body = Callable[[str], None]
"""Body of a trial, called with its name in a separate process. It can be pickled."""
OnResult = Callable[[str, Any], None]
"""Called in the driver with the name of a trial and its reported metrics."""


def fit(
    body: Body,
    places: Mapping[str, Path],
    rooms: Mapping[str, Any],
    folder: Path,
    *,
    concurrent: int | Callable[[], int] | None,
    max_failures: int,
    stop: Stop,
    scheduler: Any = None,
    search: Any = None,
    on_result: OnResult | None = None,
    reuse: bool = False,
    is_over: Callable[[int], bool] = lambda running: False,
    on_step: Callable[[], None] = lambda: None,
    on_ending: Callable[[bool], None] = lambda is_ending: None,
) -> dict[str, str]:
    """Run trials. A signal ends them after their current rounds, or after `GRACE_S`.

    Args:
        body: the body of each trial; it calls `tune.report`.
        places: name of each trial → its directory.
        rooms: name of each trial → its placement group, a `tune.PlacementGroupFactory`.
        folder: where Tune may keep its own files.
        concurrent: trials at once; a function is asked again and again, since a cluster may grow; None: as
            many as the cluster has room for.
        max_failures: how often a failed trial is retried.
        stop: whether a signal has come.
        scheduler: Tune's; None runs every trial to the end.
        search: a searcher of Tune's that suggests the names of trials; None: all names of `places`. Then
            `places` and `rooms` are only asked for names that it suggested.
        on_result: called with each report.
        reuse: whether a trial may run in the process of an earlier one, which saves its start. A body that
            leaves state behind in its process must not.
        is_over: called with the number of running trials; returns whether they shall end after their current
            rounds, and no other begin.
        on_step: called in the driver after each step of Tune.
        on_ending: called with whether the trials shall end.

    Returns:
        Name → reason, for each failed trial.
    """
    tune = import_tune()

    def trial(sample: Mapping[str, str]) -> None:
        # a stopped trial closes its files before the next one takes over its process
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(TAKE_OVER_S)
        if not _ending(folder.parent).exists():
            attempt(body, sample["name"], places[sample["name"]])

    ending = _stopper(stop, is_over, folder.parent, on_ending)
    tuner = tune.Tuner(
        tune.with_resources(trial, lambda sample: rooms[sample["name"]]),
        param_space={} if search is not None else {"name": tune.grid_search(list(places))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, **_limit(scheduler, concurrent, search), reuse_actors=reuse
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[_callback(on_result, ending, on_step, _Waiting(rooms))],
            stop=ending,
            verbose=0,
        ),
    )
    ask_to_end(folder.parent, False)
    on_ending(False)
    try:
        results = _unless_late(tuner.fit, stop)
    except OSError as error:
        if error.errno not in FULL:
            raise
        with on_disk(folder, f"`fedray resume {shown(folder.parent)}` continues with the other trials"):
            raise
    finally:
        ask_to_end(folder.parent, False)
        on_ending(False)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        result.config["name"]: _reason(result.error)
        for result in results
        if result.error is not None and result.config is not None
    }


def _unless_late(call: Callable[[], Any], stop: Stop) -> Any:
    """Make a call in a thread; stop waiting for it `LATE_S` seconds after a signal, and return nothing then.

    Ray's processes may be gone by then: without them Tune can neither go on nor end, nor can Ray.

    Raises:
        RunError: if the head of the cluster is lost.
    """
    made: Future[Any] = Future()

    def make() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, name="fedray-tune", daemon=True).start()
    head = ClusterHead(lambda: stop.signal is not None)
    since: float | None = None
    while True:
        with suppress(TimeoutError):
            return made.result(timeout=0.1)
        if stop.signal is None:
            head.check()
        else:
            since = since or time.monotonic()
            if time.monotonic() - since > LATE_S:
                leave_ray(128 + stop.signal)
                return ()


def _limit(scheduler: Any, concurrent: int | Callable[[], int] | None, search: Any) -> dict[str, Any]:
    """Return the arguments that limit how many trials run at once.

    Tune's limit is a number, and counts paused trials too, so that the first ones would wait for others that
    cannot start.
    """
    if search is not None:  # it says itself when there are no more samples, and keeps a limit that changes
        fixed = None if callable(concurrent) else concurrent
        return {"search_alg": search, "num_samples": -1, "max_concurrent_trials": fixed}
    pauses = getattr(scheduler, "pauses", False)
    if not pauses and not callable(concurrent):
        return {"max_concurrent_trials": concurrent}
    from ray.tune.search import BasicVariantGenerator

    limit = concurrent if callable(concurrent) else lambda: concurrent or sys.maxsize

    class WithRoom(BasicVariantGenerator):  # type: ignore[misc]  # Ray has no types
        """Adds a trial when there is room for one more; the scheduler does not count those that it paused."""

        def next_trial(self) -> Any:
            if not pauses:
                self.max_concurrent = limit()
            elif not scheduler.has_room():
                return None
            return super().next_trial()

    if pauses:
        scheduler.limit = limit
    return {"search_alg": WithRoom()}


def import_tune() -> Any:
    """Import Ray Tune, after setting the variables that it reads; return the module."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune would end the trials without asking them
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors are reported at the end, once
    return tune


def room(actors: Sequence[ActorOptions]) -> Any:
    """Return the placement group of a trial: a bundle for each of its client actors, none for itself."""
    from ray import tune

    # Ray leaves the trial's own bundle out, since it is empty; the selectors are of those that stay
    labels = [dict(options.labels) for options in actors]
    selectors = {"bundle_label_selector": labels} if any(labels) else {}
    return tune.PlacementGroupFactory([{}, *(options.bundle for options in actors)], **selectors)


def attempt(body: Body, name: str, place: Path) -> None:
    """Run a trial; write the traceback of an error into its directory.

    Raises:
        RunError: for any error; a line that names file and line of the user's own code.
    """
    kept = place / TRACEBACK
    kept.unlink(missing_ok=True)  # of an earlier attempt
    try:
        body(name)
    except Asked:
        return  # in good order; when Tune stops a trial, it raises another SystemExit, and awaits it
    except Exception as error:
        try:
            place.mkdir(parents=True, exist_ok=True)
            replace(kept, without_secrets(traceback.format_exc()).encode())
        except OSError:  # a full disk, perhaps also the cause
            raise RunError(described(error)) from None
        raise RunError(f"{described(error)}; traceback in {kept}") from None


class Asked(SystemExit):
    """The driver has asked the trials to end."""


def end_if_asked(folder: Path) -> None:
    """End the calling trial if the driver has received a signal. Trials call this after each round.

    Args:
        folder: of all trials, the parent of Tune's.

    Raises:
        Asked: if one has.
    """
    if _ending(folder).exists():
        raise Asked


def ask_to_end(folder: Path, is_ending: bool) -> None:
    """Ask the trials that see a folder to end, or no longer."""
    if is_ending:
        _ending(folder).touch()
    else:
        _ending(folder).unlink(missing_ok=True)


def _ending(folder: Path) -> Path:
    return folder / ".ending"


def _stopper(
    stop: Stop, is_over: Callable[[int], bool], folder: Path, on_ending: Callable[[bool], None]
) -> Any:
    """Return a stopper that ends all trials: it asks by a file first; after a signal, it then forces them."""
    from ray import tune
    from ray.tune.stopper import NoopStopper

    class Ending(tune.Stopper):  # type: ignore[misc]  # Ray has no types
        """Tune asks it in every step; a pickled copy stops nothing."""

        asked_at: float | None = None
        running = 0

        def __call__(self, trial_id: str, result: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            stop.look(folder)
            if stop.signal is None and not is_over(self.running):
                return False
            if not _ending(folder).exists():
                ask_to_end(folder, True)
                on_ending(True)
            if stop.signal is None:
                return not self.running
            self.asked_at = self.asked_at or time.monotonic()
            return time.monotonic() - self.asked_at > GRACE_S

        def __reduce__(self) -> tuple[type[NoopStopper], tuple[()]]:
            return NoopStopper, ()

    return Ending()


def described(error: Exception) -> str:
    """Return the message of an error; with type, file and line unless fedray raised it on purpose."""
    if isinstance(error, FedrayError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    frame = (outside or ours or frames)[-1]
    said = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {said} ({frame.filename}, line {frame.lineno}, in {frame.name})"


_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_LIBRARIES = (_OURS, *(sysconfig.get_paths()[name] for name in ("stdlib", "platlib", "purelib")), "<")
"""Files below these are not the user's own."""


def _reason(error: BaseException) -> str:
    """Return the innermost message of the error that ended a trial."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, FedrayError):
        return str(cause)
    lines = [line for line in without_secrets(str(cause)).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__


class _Waiting:
    """Says now and then that no trial runs because other work holds the cluster.

    Args:
        rooms: name of each trial → its placement group.
    """

    def __init__(self, rooms: Mapping[str, Any]) -> None:
        self.rooms = rooms
        self._since = self._look_at = 0.0

    def look(self, trials: Sequence[Any]) -> None:
        """Look at the trials that Tune knows."""
        now, pending = time.monotonic(), [trial for trial in trials if trial.status == "PENDING"]
        if not pending or any(trial.status == "RUNNING" for trial in trials):
            self._since = 0.0
            return
        if not self._since:
            self._since, self._look_at = now, now + FIRST_LOOK_S
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        why = missing_now(self.rooms[pending[0].config["name"]].required_resources)
        if why is not None:
            logger.warning("the trials have waited %.0f s for room: %s", now - self._since, why)


def _callback(on_result: OnResult | None, ending: Any, on_step: Callable[[], None], waiting: _Waiting) -> Any:
    from ray import tune

    class Progress(tune.Callback):  # type: ignore[misc]  # Ray has no types
        """Hands each result to a listener, and counts running trials; Tune pickles it, but not these."""

        listener = staticmethod(on_result) if on_result is not None else None

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if self.listener is not None and not result.get(ASKS):
                self.listener(trial.config["name"], result)

        def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
            ending.running = sum(trial.status == "RUNNING" for trial in trials)
            waiting.look(trials)
            on_step()

        def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
            return tune.Callback, ()

    return Progress()
