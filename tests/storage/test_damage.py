"""Every file of a run, a sweep and a training, damaged in many ways: what reads it is right, or names it."""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fedray
from fedray import cli
from fedray.config import sealed
from fedray.durable import append_lines
from fedray.errors import FedrayError, RunError
from fedray.experiment.run import resume, run
from fedray.overview.comparing import sides_of, to_json
from fedray.overview.summary import plain, summaries
from fedray.overview.watching import look
from fedray.policies.network import Network
from fedray.policies.trained import PolicyInterface, TrainedPolicy
from fedray.policies.trained import save as save_policy
from fedray.report.reading import find_runs, load_run
from fedray.report.table import comparison
from fedray.storage.run_files import RunFiles
from fedray.sweeps import sweep as sweeps
from fedray.sweeps.outcome import record_best
from fedray.sweeps.space import Sweep
from rllib_pruner.config import TrainConfig
from rllib_pruner.files import TrainFiles
from tests.experiment import tiny
from tests.storage.damage import copied, damages

COUNT = int(os.environ.get("FEDRAY_DAMAGES", "6"))
"""Cuts and flips of each file."""

BY_COMMAND = 10
"""One variant of so many is shown to the commands themselves; the others to what they call."""

CONFIG = {
    "method": {"name": "staged", "density": 0.3, "stages": 2},
    "rounds": 4,
    "checkpoint_every": 2,
    "clients.dropout": 0.2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a killed one, and another to compare them with."""
    home = tmp_path_factory.mktemp("damage")
    run(tiny.config(CONFIG), out=home / "finished")
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(CONFIG), out=home / "killed", on_round=tiny.ending(3, KeyboardInterrupt))
    run(tiny.config(CONFIG | {"method.density": 0.5}), out=home / "other")
    return home


Look = Callable[[Path, Path], Any]
"""Folder, and another one → what a user sees of the first."""


def steady(value: Any) -> Any:
    """Return JSON without what depends on the moment and the place."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in ("when", "path", "paths", "name")}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def _report(place: Path, other: Path) -> Any:
    return comparison([load_run(path) for path in find_runs([place])]).to_csv()


LOOKS: dict[str, Look] = {
    "report": _report,
    "runs": lambda place, other: steady([one.to_json() for one in summaries([place])]),
    "compare": lambda place, other: steady(plain(to_json(sides_of([place, other])))),
    "watch": lambda place, other: steady(look(place).to_json()),
}
COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "report": lambda place, other: ["report", place, "--no-pictures", "--out", place.parent / "report"],
    "runs": lambda place, other: ["runs", place],
    "compare": lambda place, other: ["compare", place, other],
    "watch --once": lambda place, other: ["watch", place, "--once"],
}


def by_command(words: list[Any]) -> None:
    """Run a command.

    Raises:
        FedrayError: what it refuses.
    """
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception


def problem_of(seen: Any) -> str:
    """Return the problems that a list of runs, or a view of a run or a sweep, names."""
    runs = seen.get("trials", []) if isinstance(seen, dict) else seen
    damaged = [run for run in runs if isinstance(run, dict) and run.get("status") == "damaged"]
    return " ".join(str(run["problem"]) for run in damaged)


def names(message: str, file: str) -> bool:
    """Tell whether a message names a file, or the folder of files that it is a part of."""
    path = Path(file)
    parents = [parent for parent in path.parts[:-1] if "." in parent or parent == "policy"]
    return any(name in message for name in (path.name, *parents))


class Heard(logging.Handler):
    """The warnings of one variant."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.text += f"{record.getMessage()}\n"


class Damaging:
    """Damages the files of a folder, and shows it to all that read it.

    Args:
        whole: the sound folder.
        other: a run to compare it with.
        to: where copies are damaged.
        resumed: resumes a copy whose named file was damaged; returns what is wrong with it then.
    """

    def __init__(
        self, whole: Path, other: Path, to: Path, resumed: Callable[[Path, str], str | None]
    ) -> None:
        self.whole, self.other, self.place, self.resumed = whole, other, to / whole.name, resumed
        self.count, self.wrong, self.heard = 0, list[str](), Heard()
        copied(whole, self.place)
        self.expected = {name: self.seen(see) for name, see in LOOKS.items()}

    def seen(self, see: Look) -> Any:
        """Return what is seen; a refusal as text."""
        try:
            return see(self.place, self.other)
        except FedrayError as error:
            return f"refused: {error}"

    def all(self, pattern: str = "**/*") -> None:
        """Damage each file that fits a pattern in every way."""
        files = sorted(path for path in self.whole.glob(pattern) if path.is_file() and path.name != ".lock")
        logging.getLogger("fedray").addHandler(self.heard)
        for number, path in enumerate(files):
            file = str(path.relative_to(self.whole))
            for how, spoil in damages(path, number, COUNT):
                copied(self.whole, self.place)
                self.heard.text = ""
                spoil(self.place / file)
                found = self.one(file)
                self.wrong += [f"{self.whole.name}/{file}, {how}: {problem}"[:700] for problem in found]
        logging.getLogger("fedray").removeHandler(self.heard)

    def one(self, file: str) -> list[str]:
        """Return what is wrong with all that reads a folder with a damaged file."""
        self.count += 1
        found = [(name, self.problem(file, partial(self.look, name, file))) for name in LOOKS]
        if self.count % BY_COMMAND == 0:
            for name, words in COMMANDS.items():
                found.append((name, self.problem(file, partial(by_command, words(self.place, self.other)))))
        found.append(("resume", self.problem(file, partial(self.resumed, self.place, file))))
        return [f"{name}: {problem}" for name, problem in found if problem is not None]

    def problem(self, file: str, use: Callable[[], str | None]) -> str | None:
        """Return what is wrong with a use of the folder; to refuse it with the file's name is right."""
        try:
            return use()
        except FedrayError as error:
            if names(str(error), file) or f"refused: {error}" in self.expected.values():
                return None
            is_open = self.has_no_result(file) and "unfinished" in str(error)
            return None if is_open else f"names no file: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"

    def look(self, name: str, file: str) -> str | None:
        """Return what is wrong with a view of the folder."""
        seen, expected = LOOKS[name](self.place, self.other), self.expected[name]
        if seen == expected or self.has_no_result(file):
            return None
        problem = problem_of(seen) if not isinstance(seen, str) else self.heard.text
        if names(problem, file):
            return None
        return f"another result in silence: {seen} for {expected}"

    def has_no_result(self, file: str) -> bool:
        """Tell whether the file is the result: a run without it has not ended yet, and all say so."""
        return file.endswith("result.json") and not (self.place / file).exists()

    def check(self, least: int) -> None:
        """Assert that nothing was wrong, and that there were enough."""
        assert not self.wrong, f"{len(self.wrong)} of {self.count}:\n" + "\n".join(self.wrong)
        assert self.count >= least


# ── runs
# ──────────────────────────────────────────────────────────────────────────────────────────


def same_run(place: Path, file: str, reference: Mapping[str, Any]) -> str | None:
    """Resume a run; return what is wrong with it then."""
    history = resume(place)
    if history.weights_sha256 != reference["model"]:
        return "other weights"
    fedray.load_model(place)
    found = load_run(place)
    assert found.clients is not None or not (place / "clients.parquet").exists()
    figures, warnings = tiny.figures(place), place / "warnings.txt"
    told = warnings.read_text("utf-8", "replace") if warnings.is_file() else ""
    for key in ("rounds", "result", "model", "clients"):
        if figures[key] != reference[key] and not (key == "clients" and "lost" in told):
            return f"other {key}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("what", ["finished", "killed"])
def test_a_damaged_file_of_a_run_is_mended_or_named(home: Path, tmp_path: Path, what: str) -> None:
    reference = tiny.figures(home / "finished")
    damaging = Damaging(
        home / what, home / "other", tmp_path, lambda place, file: same_run(place, file, reference)
    )
    damaging.all()
    damaging.check(30 * COUNT)


# ── sweeps
# ──────────────────────────────────────────────────────────────────────────────────────────

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


@pytest.mark.parametrize("content", [b"{", b"[1]", None])
def test_a_damaged_description_of_the_data_is_made_again(
    home: Path, tmp_path: Path, content: bytes | None
) -> None:
    place = copied(home / "killed", tmp_path / "run")
    before = (place / "data.json").read_bytes()
    (place / "data.json").unlink() if content is None else (place / "data.json").write_bytes(content)
    resume(place)
    assert (place / "data.json").read_bytes() == before


def test_a_damaged_record_of_mlflow_is_refused_before_anything_changes(home: Path, tmp_path: Path) -> None:
    place = copied(home / "killed", tmp_path / "run")
    (place / "mlflow.json").write_text("{")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"mlflow\.json"):
        resume(place)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


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
    found = [trial.status for trial in made.trials], made.best.mean
    return None if found == expected else f"another outcome: {found} for {expected}"


@pytest.mark.slow
def test_a_damaged_file_of_a_sweep_is_mended_or_named(
    home: Path, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: Any) -> None:
        raise Anew("trials")

    made = sweeps.resume_sweep(sweep)
    assert made.best is not None
    expected = [trial.status for trial in made.trials], made.best.mean
    monkeypatch.setattr(sweeps, "start_ray", no_ray)
    damaging = Damaging(
        sweep, home / "other", tmp_path / "copies", lambda place, file: same_sweep(place, file, expected)
    )
    for pattern in ("*", "trials/*/config.yaml", "trials/*/*.json"):  # runs' other files: see above
        damaging.all(pattern)
    damaging.check(25 * COUNT)


# ── trainings
# ──────────────────────────────────────────────────────────────────────────────────────────


class Learner:
    """An algorithm of RLlib, as far as a checkpoint goes."""

    def save_to_path(self, path: str) -> None:
        """Write something."""
        (Path(path) / "module").mkdir(parents=True)
        (Path(path) / "module" / "state.pkl").write_bytes(bytes(range(256)))


def test_a_damaged_file_of_a_training_is_mended_or_named(tmp_path: Path) -> None:
    config = TrainConfig.from_tree({})
    files = TrainFiles.create(tmp_path / "whole", config)
    rows = [{"iteration": n, "env_steps": 10.0 * n, "score": 0.1 * n} for n in (1, 2)]
    for row in rows:
        files.save(Learner(), int(row["iteration"]))
        files.append(row)
    files.write_run_id("abc")
    interface = PolicyInterface("made up", 1, 2, ("a", "b"))
    layers = {"encoder": [(torch.ones(4, 2), torch.ones(4))], "head": [(torch.ones(2, 4), torch.ones(2))]}
    save_policy(Network(layers), files.policy, vars(interface) | {"algorithm": "ppo"})
    wrong, tried = [], 0
    for number, path in enumerate(sorted(path for path in files.path.rglob("*") if path.is_file())):
        file = str(path.relative_to(files.path))
        for how, spoil in damages(path, number, COUNT):
            tried += 1
            place = copied(files.path, tmp_path / "copy")
            spoil(place / file)
            try:
                problem = same_training(place, config, rows, interface)
            except FedrayError as error:
                unnamed = not names(str(error), file) and "no checkpoint is as it was written" not in str(
                    error
                )
                problem = f"names no file: {error}" if unnamed else None
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            wrong += [] if problem is None else [f"{file}, {how}: {problem}"]
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 20 * COUNT


def same_training(
    place: Path, config: TrainConfig, rows: list[dict[str, Any]], interface: PolicyInterface
) -> str | None:
    """Go back to the last sound checkpoint of a training; return what is wrong with it then."""
    files = TrainFiles.open(place)
    if files.config() != config:
        return "another config"
    if files.run_id() not in ("abc", None):
        return "another run of MLflow"
    policy = TrainedPolicy.load(files.policy, interface)
    if policy.network(torch.ones(1, 2)).tolist() != [[13.0, 13.0]]:
        return "another policy"
    left, checkpoint = files.rewind()
    if left != rows[: len(left)] or (checkpoint is None) != (not left):
        return f"other evaluations: {left}"
    return None
