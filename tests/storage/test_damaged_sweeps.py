"""Every file of a sweep, damaged in many ways: what reads it is right, or names it."""

from pathlib import Path
from typing import Any

import pytest

from fedray.config import sealed, yaml_text
from fedray.config.run_config import RunConfig
from fedray.durable import append_lines, read_mapping
from fedray.errors import FedrayError, RunError
from fedray.experiment.forking import fork, keep, lineage, spent
from fedray.experiment.run import run
from fedray.storage.run_files import RunFiles
from fedray.sweeps import sweep as sweeps
from fedray.sweeps.outcome import SweepResult, record_best
from fedray.sweeps.searchers import proposer
from fedray.sweeps.space import Sweep
from fedray.sweeps.suggesting import Suggestions
from tests.experiment import tiny
from tests.storage.damage import COUNT, TRIED, Damaging, as_any_user, copied, damages, names


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to compare with."""
    place = tmp_path_factory.mktemp("other") / "other"
    run(tiny.config({"rounds": 2}), out=place)
    return place


SWEEP = {
    "base": tiny.TREE | {"rounds": 2, "method": {"name": "fedavg"}},
    "space": {"method.lr": {"grid": [0.1, 0.2]}},
    "tune": {
        "scheduler": "asha",
        "time_budget_s": 1e6,
    },
}


class Anew(FedrayError):
    """Trials would be made again, on Ray."""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep that has ended, made without Ray; one of its two trials was stopped."""
    plan = Sweep.read(SWEEP, "x.yaml", "x", {})
    place = tmp_path / "sweep"
    first, second = (place / "trials" / point.name for point in plan.points)
    run(plan.points[0].config, out=first)
    with pytest.raises(KeyboardInterrupt):
        run(plan.points[1].config, out=second, on_round=tiny.ending(1, KeyboardInterrupt))
    RunFiles(second).write_json("stopped.json", {"round": 1})
    sweeps._record_stop(second)
    sealed.write(place / "sweep.yaml", sweeps._written(plan))
    lines = [
        {"trial": trial.name, "round": row["round"], "value": row["metrics"]["val/accuracy"]}
        for trial in (first, second)
        for row in RunFiles(trial).rounds()
    ]
    append_lines(place / "judged.jsonl", lines)
    RunFiles(place).write_json("spent.json", {"spent_s": 12.5})
    made = sweeps.resume_sweep(place, plan)
    assert made.best is not None
    record_best(place, made.best, "val/accuracy")
    return place


def same_sweep(place: Path, file: str, expected: Any) -> str | None:
    """Resume a sweep; return what is wrong with it then."""
    try:
        made = sweeps.resume_sweep(place)
    except Anew:
        return None if file.startswith("trials/") else "makes its trials anew"
    assert made.best is not None
    found = outcome_of(made)
    return None if found == expected else f"another outcome: {found} for {expected}"


def outcome_of(made: SweepResult) -> Any:
    """Return the outcome of a sweep, with the files that name its best points."""
    assert made.best is not None
    files = [read_mapping(made.path / name) for name in ("best.json", "pareto.json")]
    best = RunConfig.from_tree(yaml_text.load(made.path / "best.yaml")).digest
    return [trial.status for trial in made.trials], made.best.mean, best, files


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_file_of_a_sweep_is_mended_or_named(
    other: Path, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: Any) -> None:
        raise Anew("trials")

    expected = outcome_of(sweeps.resume_sweep(sweep))
    monkeypatch.setattr(sweeps, "start_ray", no_ray)
    damaging = Damaging(
        sweep, other, tmp_path / "copies", lambda place, file: same_sweep(place, file, expected)
    )
    for pattern in ("*", "trials/*/config.yaml", "trials/*/*.json"):  # runs' other files: see above
        damaging.all(pattern)
    damaging.check(25 * COUNT)


# ── sweeps that search
# ──────────────────────────────────────────────────────────────────────────────────────────

SEARCH = {
    "base": tiny.TREE | {"rounds": 1, "method": {"name": "fedavg"}},
    "space": {"method.lr": {"loguniform": [0.01, 0.3]}},
    "tune": {
        "search": {"name": "optuna", "population_size": 2},
        "num_samples": 3,
        "objectives": {"val/accuracy": "max", "total/bytes/up": None},
    },
}


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A sweep that searched and has ended, made without Ray."""
    plan = Sweep.read(SEARCH, "x.yaml", "x", {})
    place = tmp_path / "search"
    place.mkdir()
    sealed.write(place / "sweep.yaml", sweeps._written(plan))
    suggestions = Suggestions(plan, place, proposer(plan.tune, plan.tree["space"]))
    while (point := suggestions.next()) is not None:
        run(point.config, out=place / "trials" / point.name)
        suggestions.ended(point.name)
    sweeps.resume_sweep(place)
    return place


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_file_of_a_search_is_mended_or_named(
    other: Path, search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: Any) -> None:
        raise Anew("trials")

    expected = outcome_of(sweeps.resume_sweep(search))
    assert read_mapping(search / "pareto.json") is not None
    monkeypatch.setattr(sweeps, "start_ray", no_ray)
    damaging = Damaging(
        search, other, tmp_path / "copies", lambda place, file: same_sweep(place, file, expected)
    )
    damaging.all("*")
    damaging.check(15 * COUNT)


# ── forks
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_lineage_is_named(other: Path, tmp_path: Path) -> None:
    """The trial was forked twice, and has ended."""
    run(tiny.config({"rounds": 3, "checkpoint_every": 1}), out=tmp_path / "parent")
    trial = tmp_path / "trial"
    run(tiny.config({"rounds": 3, "checkpoint_every": 1}), out=trial)
    (trial / "result.json").rename(tmp_path / "result.json")
    for round in (2, 3):
        keep(tmp_path / "parent", round, tmp_path / f"kept-{round}")
        fork(trial, tmp_path / f"kept-{round}", round, "parent", {"method.lr": 0.1 * round})
    (tmp_path / "result.json").rename(trial / "result.json")
    expected = lineage(trial), spent(trial)
    assert len(expected[0]) == 2
    wrong = []
    for how, spoil in damages(trial / "lineage.jsonl", 0, COUNT):
        place = copied(trial, tmp_path / "copy")
        spoil(place / "lineage.jsonl")
        TRIED["lineage"] += 1
        try:
            with as_any_user():
                is_wrong = (lineage(place), spent(place)) != expected
        except RunError as error:
            is_wrong = not names(str(error), "lineage.jsonl") or "restore it" not in str(error)
        wrong += [how] if is_wrong else []
    assert not wrong
