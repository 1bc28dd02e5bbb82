"""The scheduler of a sweep, as its files have it: rule, journal, and which trials were stopped."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from fedray.config.schedulers import Asha, Fifo, HyperBand, Median, Pbt
from fedray.config.tune_config import first_rung
from fedray.durable import append_lines, as_lines, replace, scan_lines
from fedray.records import Records, Shape
from fedray.storage.run_files import RunFiles
from fedray.sweeps.drawing import mutations_of
from fedray.sweeps.outcome import STOP_RECORD, STOPPED, status_of, writing
from fedray.sweeps.perturbing import recorded
from fedray.sweeps.space import Sweep
from fedray.sweeps.tune import import_tune

logger = logging.getLogger(__name__)

JUDGED = "judged.jsonl"
"""File in the directory of a sweep: the reports that its scheduler has judged, in their order."""

_LINES = Records(
    JUDGED,
    {
        "ended": Shape({"trial": str, "ended": str}),
        "trial": Shape({"trial": str, "round": int, "value": (float, type(None))}),
    },
)


def judge_of(
    plan: Sweep,
    path: Path,
    is_ending: Callable[[], bool],
    mirror: Callable[[list[str]], None] = lambda names: None,
) -> Any:
    """Return the scheduler of a sweep, with all that it has judged before; None for `fifo`.

    It notes which trials it stops. Without that note, a stopped trial looks like an interrupted one: Tune
    catches signals.

    Args:
        plan: the sweep.
        path: its directory.
        is_ending: whether the sweep is ending.
        mirror: brings the directories of trials that ran on other nodes up to date.
    """
    if isinstance(plan.tune.rules, Fifo):
        return None
    import_tune()
    from fedray.sweeps.schedulers import Journal, Judge

    names = [point.name for point in plan.points]
    places = {name: path / "trials" / name for name in names}

    def stopped(name: str, round: int) -> None:
        mirror([name])
        files = RunFiles(path / "trials" / name)  # a searcher suggests names that were not there at the start
        if round < files.read_config()["rounds"] and status_of(files.path) != "finished":
            files.write_json(STOPPED, {"round": round})

    judge = Judge(
        _rule(plan, path),
        names,
        plan.tune.metric,
        plan.tune.direction,
        Journal(path / JUDGED),
        on_stop=stopped,
        is_finished=lambda name: status_of(path / "trials" / name) in ("finished", "stopped"),
        is_ending=is_ending,
    )
    begun = {name: place for name, place in places.items() if (place / "config.yaml").exists()}
    if begun and not (path / JUDGED).exists():
        _write_anew(path / JUDGED, begun, plan.tune.metric)
    _cut_damage(path / JUDGED)
    _add_finished(path, begun, plan.tune.metric)
    judge.recall(begun)
    return judge


def _rule(plan: Sweep, path: Path) -> Any:
    """Return the rule that the options describe."""
    tune, configs = plan.tune, plan.configs
    from fedray.sweeps.hyperband import HyperBandRule
    from fedray.sweeps.schedulers import AshaRule, MedianRule

    options, first, last = tune.rules, first_rung(tune, configs), max(config.rounds for config in configs)
    if isinstance(options, Asha):
        return AshaRule(first=first, last=last, reduction=options.reduction)
    if isinstance(options, Median):
        return MedianRule(first=first, min_trials=options.min_trials)
    if isinstance(options, Pbt):
        return _population(plan, options, path)
    assert isinstance(options, HyperBand)
    return HyperBandRule(last=last, reduction=options.reduction)


def _population(plan: Sweep, options: Pbt, path: Path) -> Any:
    """Return the rule of PBT."""
    from fedray.sweeps.pbt import PbtRule

    return PbtRule(
        every=options.perturb_every,
        quantile=options.quantile,
        resample=options.resample_probability,
        mutations=mutations_of(options, plan.name),
        seed=plan.tune.seed,
        configs={
            point.name: {
                key: getattr(point.config.method.options, key.partition(".")[2]) for key in options.mutations
            }
            for point in plan.points
        },
        on_perturb=partial(recorded, path, plan.points[0].config),
    )


def rounds_of(place: Path) -> list[dict[str, Any]]:
    """Return `round` and metrics of each complete round of a trial."""
    if not (place / "config.yaml").exists():
        return []
    return [{"round": line["round"], **line["metrics"]} for line in RunFiles(place).rounds()]


def _cut_damage(journal: Path) -> None:
    """Cut a journal before its first damaged line; the reports after it are judged again."""
    lines, problem = scan_lines(journal)
    sound = list(takewhile(lambda line: _LINES.fault(line) is None, lines))
    if len(sound) < len(lines):
        fault = _LINES.fault(lines[len(sound)])
        lines, problem = sound, f"{journal}, line {len(sound) + 1}: is damaged: {fault}"
    if problem is not None:
        logger.warning("%s; the reports from there on are judged again", problem)
        with writing(journal):
            replace(journal, as_lines(lines))


def last_judged(path: Path, name: str) -> int | None:
    """Return the round of a trial's last judged report in a sweep's directory; None if there is none."""
    lines, _ = scan_lines(path / JUDGED)
    return max((line["round"] for line in lines if line["trial"] == name and "round" in line), default=None)


def _add_finished(path: Path, places: Mapping[str, Path], metric: str) -> None:
    """Add the last reports of finished trials that the driver was killed before it could judge."""
    for name, place in places.items():
        if status_of(place) == "finished":
            judged = last_judged(path, name)
            more = [line for line in rounds_of(place) if judged is None or line["round"] > judged]
            with writing(path / JUDGED):
                append_lines(path / JUDGED, [_entry(name, line, metric) for line in more if metric in line])


def _entry(name: str, line: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {"trial": name, "round": line["round"], "value": line[metric]}


def _write_anew(journal: Path, places: Mapping[str, Path], metric: str) -> None:
    """Write the journal of a sweep that began before there were journals, round by round.

    The last report of an interrupted trial is left out: it will be judged when the trial starts again.
    """
    found = []
    for number, (name, place) in enumerate(places.items()):
        status, rounds = status_of(place), rounds_of(place)
        stopped = STOP_RECORD.read(place)
        rounds = [line for line in rounds if stopped is None or line["round"] <= stopped["round"]]
        rounds = [line for line in rounds if metric in line]
        for line in rounds if status in ("finished", "stopped") else rounds[:-1]:
            found.append((line["round"], number, _entry(name, line, metric)))
    with writing(journal):
        append_lines(journal, [entry for _, _, entry in sorted(found, key=lambda item: item[:2])])
