"""PBT without a cluster: who continues from whom, the same after a resume; forks of runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedray.config.overrides import override_tree
from fedray.errors import ConfigError, RunError
from fedray.experiment import forking
from fedray.experiment.forking import fork, keep, lineage, spent
from fedray.experiment.run import resume, run
from fedray.report.reading import load_run
from fedray.storage import checkpoint
from fedray.storage.run_files import RunFiles
from fedray.sweeps.pbt import Exploit, PbtRule
from fedray.sweeps.space import Sweep
from tests.experiment.tiny import TREE, config, ending
from tests.sweeps.test_schedulers import CURVES, World

RATES = {name: {"method.lr": 0.1 * (number + 1)} for number, name in enumerate(CURVES)}


def world(folder: Path, log: dict[int, list[Exploit]], every: int = 5, **more: Any) -> World:
    """Return a population whose perturbations are noted in `log`; a resumed one takes them from it."""

    def make() -> PbtRule:
        return PbtRule(
            every=every,
            quantile=0.25,
            resample=0.0,
            mutations={"method.lr": [0.1 * number for number in range(1, 12)]},
            seed=0,
            configs=RATES,
            on_perturb=lambda round, drawn: log.setdefault(round, drawn),
        )

    return World(make, CURVES, folder, **more)


def test_the_worst_continue_from_the_best_and_nan_is_the_worst(tmp_path):
    log: dict[int, list[Exploit]] = {}
    population = world(tmp_path, log)
    population.session()
    assert not population.stopped and all(population.is_finished(name) for name in CURVES)
    assert sorted(log) == [5, 10, 15]
    for drawn in log.values():
        assert {one.trial for one in drawn} == {"e", "b", "j"}  # the highest losses
        assert {one.parent for one in drawn} <= {"c", "g", "a"}


def test_nobody_passes_a_perturbation_before_all_are_there(tmp_path):
    population = world(tmp_path, {})
    population.session()
    rounds = [round for _, round in population.order]
    for bound in (5, 10, 15):
        first = next(number for number, round in enumerate(rounds) if round > bound)
        assert all(round <= bound for round in rounds[:first])
        assert sum(round == bound for round in rounds[:first]) == len(CURVES)


@pytest.mark.parametrize("cut", [3, 59, 60, 61, 110, 140])
def test_a_resumed_population_perturbs_as_an_undisturbed_one(tmp_path, cut):
    whole: dict[int, list[Exploit]] = {}
    world(tmp_path, whole).session()
    folder = tmp_path / "cut"
    folder.mkdir()
    log: dict[int, list[Exploit]] = {}
    population = world(folder, log)
    population.session(cut)
    population.session(2)
    population.session()
    assert log == whole


@pytest.mark.parametrize("round", [3, 5, 9])
def test_a_trial_that_fails_keeps_no_other_waiting(tmp_path, round):
    population = world(tmp_path, {}, fails={"d": round, "j": round})
    population.session()
    population.fails = {}
    population.session()
    assert all(population.is_finished(name) for name in CURVES)


# ── forks
# ──────────────────────────────────────────────────────────────────────────────────────────


def two(folder: Path) -> tuple[Path, Path]:
    """Return two runs that were cut after round 2."""
    for name, rate in (("a", 0.1), ("b", 0.01)):
        with pytest.raises(KeyboardInterrupt):
            changed = config({"method.lr": rate}, rounds=4)
            run(changed, out=folder / name, on_round=ending(2, KeyboardInterrupt))
    return folder / "a", folder / "b"


def test_a_forked_run_has_its_parent_s_rounds_and_says_so(tmp_path):
    a, b = two(tmp_path)
    own = RunFiles(b).rounds()
    keep(a, 2, tmp_path / "kept")
    fork(b, tmp_path / "kept", 2, "a", {"method.lr": 0.1})
    assert RunFiles(b).rounds() == RunFiles(a).rounds()
    made, parent = resume(b), resume(a)
    assert made.weights_sha256 == parent.weights_sha256  # nothing was changed but the name
    assert made.result["total/bytes/up"] == parent.result["total/bytes/up"]
    (entry,) = lineage(b)
    assert (entry["round"], entry["from"]) == (2, "a")
    assert entry["changes"] == {"method.lr": [0.1, 0.1]}
    assert entry["spent"]["total/bytes/up"] == own[-1]["metrics"]["total/bytes/up"] > 0
    later = made.result["total/bytes/up"] - RunFiles(b).rounds()[2]["metrics"]["total/bytes/up"]
    assert spent(b)["total/bytes/up"] == entry["spent"]["total/bytes/up"] + later
    assert spent(a)["total/bytes/up"] == parent.result["total/bytes/up"]
    clients = load_run(b).clients
    assert clients is not None and sorted(clients["round"].unique()) == [1, 2, 3, 4]
    assert RunFiles(b / "before-000002").rounds() == own


def test_a_forked_run_continues_with_the_changed_option(tmp_path):
    a, b = two(tmp_path)
    keep(a, 2, tmp_path / "kept")
    fork(b, tmp_path / "kept", 2, "a", {"method.lr": 0.3})
    assert RunFiles(b).read_config()["method"]["lr"] == 0.3
    made = resume(b)
    assert made.weights_sha256 != resume(a).weights_sha256
    assert lineage(b)[0]["changes"] == {"method.lr": [0.1, 0.3]}
    with pytest.raises(ConfigError, match=r"resume cannot change method\.lr"):
        resume(b, ["method.lr=0.1"])


@pytest.mark.parametrize("step", ["write", "replace_file", "append_lines"])
def test_a_fork_that_was_cut_is_made_again(tmp_path, monkeypatch, step):
    a, b = two(tmp_path)
    keep(a, 2, tmp_path / "kept")
    with monkeypatch.context() as patch:

        def die(*arguments: Any, **more: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(checkpoint if step == "write" else forking, step, die)
        with pytest.raises(KeyboardInterrupt):
            fork(b, tmp_path / "kept", 2, "a", {"method.lr": 0.3})
    assert not lineage(b)
    for _ in range(2):  # the second call does nothing
        fork(b, tmp_path / "kept", 2, "a", {"method.lr": 0.3})
    assert len(lineage(b)) == 1
    assert RunFiles(b).rounds() == RunFiles(a).rounds()
    assert lineage(b)[0]["spent"]["total/bytes/up"] > 0
    assert resume(b).result["status"] == "finished"


def test_a_run_without_the_checkpoint_is_nobody_s_parent(tmp_path):
    a, _ = two(tmp_path)
    with pytest.raises(RunError, match="has no checkpoint after round 1, from which"):
        keep(a, 1, tmp_path / "kept")


# ── what is refused
# ──────────────────────────────────────────────────────────────────────────────────────────

GRID = {"method.lr": {"grid": [0.1, 0.2]}}
GOOD = {"name": "pbt", "perturb_every": 2, "mutations": {"method.lr": {"loguniform": [0.01, 1.0]}}}


@pytest.mark.parametrize(
    "change, space, base, message",
    [
        ({"mutations": {}}, GRID, {}, "tune.scheduler.mutations (x.yaml): missing; name what is perturbed"),
        (
            {"mutations": {"method.batch_size": {"choice": [10, 20]}}},
            {"method.batch_size": {"grid": [10, 20]}},
            {},
            "tune.scheduler.mutations.method.batch_size (x.yaml): cannot change in a running fedavg",
        ),
        (
            {"mutations": {"method.density": {"uniform": [0.1, 0.9]}}},
            {"method.density": {"grid": [0.1, 0.2]}},
            {"method": {"name": "snip"}},
            "tune.scheduler.mutations.method.density (x.yaml): cannot change in a running snip",
        ),
        (
            {"mutations": {"method.threshold": {"uniform": [0.1, 0.9]}}},
            {"method.threshold": {"grid": [None, 0.2]}},
            {"method": {"name": "staged"}},
            "tune.scheduler.mutations.method.threshold (x.yaml): method.threshold is null",
        ),
        ({}, GRID | {"seed": {"grid": [0, 1]}}, {}, "space.seed (x.yaml): pbt copies a trial's whole config"),
        ({}, {}, {}, "tune.scheduler (x.yaml): pbt needs two trials or more"),
        (
            {"perturb_every": 6},
            GRID,
            {},
            "tune.scheduler.perturb_every (x.yaml): 6 is not below the",
        ),
        (
            {"perturb_every": 3},
            GRID,
            {"eval_every": 2},
            "tune.scheduler.perturb_every (x.yaml): got 3, but",
        ),
        (
            {"perturb_every": 3},
            GRID,
            {},
            "tune.scheduler.perturb_every (x.yaml): got 3, and trials continue from checkpoints, but",
        ),
        (
            {"quantile": 0.7},
            GRID,
            {},
            "tune.scheduler.quantile (x.yaml): got 0.7; must be less than",
        ),
        (
            {"mutations": {"method.lr": {"lognormal": [0.1, 1]}}},
            GRID,
            {},
            "tune.scheduler.mutations.method.lr (x.yaml): unknown verb 'lognormal'",
        ),
        (
            {"mutations": {"method.lr": {"loguniform": [0, 1]}}},
            GRID,
            {},
            "tune.scheduler.mutations.method.lr.loguniform (x.yaml): got [0, 1]; loguniform",
        ),
    ],
)
def test_what_cannot_be_perturbed_is_refused(in_tmp, change, space, base, message):
    tree = {
        "base": override_tree(TREE, {"rounds": 6}) | base,
        "space": space,
        "tune": {"scheduler": GOOD | change},
    }
    (in_tmp / "x.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        Sweep.load("x.yaml")
    assert str(caught.value).startswith(message)


def test_a_good_population_is_taken(in_tmp):
    tree = {"base": override_tree(TREE, {"rounds": 6}), "space": GRID, "tune": {"scheduler": GOOD}}
    (in_tmp / "x.yaml").write_text(json.dumps(tree))
    assert len(Sweep.load("x.yaml").points) == 2
