"""Resuming: config, checkpoint and model belong together, more rounds are possible, and nothing is lost."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.config import plugins
from fedray.config.run_config import SINCE, RunConfig
from fedray.errors import ConfigError, MethodError, RunError
from fedray.experiment.resuming import _differences, check_rounds
from fedray.experiment.run import resume, run
from fedray.methods import METHODS
from fedray.models import MODELS
from fedray.report.reading import load_run
from fedray.storage import checkpoint as stored
from fedray.storage.directory import Lock
from fedray.storage.run_files import RunFiles
from tests.experiment import tiny

STAGED = {"name": "staged", "density": 0.3, "stages": 2}
ROOT = Path(__file__).parents[2]


def stopped(path: Path, changes: dict[str, Any] | None = None, after: int = 2, **more: Any) -> Path:
    """Make a run that was interrupted after a round."""
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(changes, **more), out=path, on_round=tiny.ending(after, KeyboardInterrupt))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def edited(path: Path, old: str, new: str) -> None:
    text = (path / "config.yaml").read_text()
    assert text.count(old) == 1, old
    (path / "config.yaml").write_text(text.replace(old, new))


# ── what a checkpoint belongs to
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after round 2 of 3."""
    return stopped(tmp_path_factory.mktemp("half") / "run", {"method": STAGED})


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  lr: 0.05", "  lr: 0.1", "method.lr: 0.05 in the checkpoint, 0.1 in config.yaml"),
        ("seed: 0", "seed: 1", "seed: 0 in the checkpoint, 1 in config.yaml"),
        ("  density: 0.3", "  density: 0.2", "method.density: 0.3 in the checkpoint, 0.2 in config.yaml"),
        ("    kind: iid", "    kind: dirichlet", "data.partition.kind: iid in the checkpoint, dirichlet in"),
        ("rounds: 3", "rounds: 9", "rounds: 3 in the checkpoint, 9 in config.yaml. Put them back; to change"),
    ],
)
def test_an_edited_config_is_refused_with_what_differs(copy, old, new, told):
    edited(copy, old, new)
    before = contents(copy)
    with pytest.raises(RunError) as caught:
        resume(copy)
    assert told in str(caught.value)
    assert "its values are not those that were written" in str(caught.value)
    assert contents(copy) == before


def test_every_cut_of_a_config_is_refused(copy):
    text = (copy / "config.yaml").read_text()
    lines = text.splitlines(keepends=True)
    before = contents(copy)
    cuts = ["".join(lines[:count]) for count in range(len(lines))] + [
        text[: len(text) // 2],
        "".join(lines[2:]),
    ]
    for cut in cuts:
        (copy / "config.yaml").write_text(cut)
        with pytest.raises((RunError, ConfigError)):
            resume(copy)
    (copy / "config.yaml").write_text(text)
    assert contents(copy) == before


def test_a_comment_or_another_order_is_no_change(copy, half, tmp_path):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(f"# mine\n{text}\n# the end\n")
    assert (
        resume(copy).weights_sha256 == run(tiny.config(method=STAGED), out=tmp_path / "whole").weights_sha256
    )


def test_a_run_can_be_made_again_from_its_config(copy):
    assert RunConfig.load(copy / "config.yaml") == tiny.config(method=STAGED)


def test_a_checkpoint_of_another_run_is_refused(copy, tmp_path):
    other = stopped(tmp_path / "other", {"method": STAGED, "seed": 5})
    for path in (other / "checkpoints").iterdir():
        (copy / "checkpoints" / path.name).write_bytes(path.read_bytes())
    before = contents(copy)
    with pytest.raises(RunError, match=r"cannot be resumed: seed: 5 in the checkpoint, 0 in config\.yaml"):
        resume(copy)
    assert contents(copy) == before


def test_a_checkpoint_of_another_version_is_refused(copy, monkeypatch):
    monkeypatch.setattr("fedray.storage.checkpoint.metadata.version", lambda name: "9.9.9")
    with pytest.raises(RunError, match=r"was written by fedray \S+, and this is fedray 9\.9\.9"):
        resume(copy)


def test_a_checkpoint_of_another_model_is_refused(copy, monkeypatch):
    monkeypatch.setitem(MODELS, "mlp", MODELS["lenet5"])
    with pytest.raises(RunError, match=r"the model is another one: \S+ is (absent|\(.*\)) in the checkpoint"):
        resume(copy)


def test_one_flipped_bit_never_loads_as_another_state(copy):
    """Half of the flips are in the first kilobyte, where the structure is."""
    (newest, older) = RunFiles.open(copy).checkpoints()
    older.unlink()
    whole, rng = newest.read_bytes(), random.Random(0)
    for number in range(120):
        at = rng.randrange(1000 if number % 2 else len(whole)) if number else 0
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(RunError, match=r"cannot be resumed|was written by|has format"):
            RunFiles.open(copy).load()


def test_broken_checkpoints_are_refused_and_nothing_is_rewound(copy):
    for path in (copy / "checkpoints").iterdir():
        path.write_text("broken\n")
    before = contents(copy)
    with pytest.raises(RunError, match=r"(?s)cannot be resumed, and nothing in it was changed:.*is damaged"):
        resume(copy)
    assert contents(copy) == before


def test_a_checkpoint_that_the_disk_does_not_give_is_refused(copy, monkeypatch):
    real = open

    def failing(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(stored.SUFFIX):
            raise OSError(5, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", failing)
    before = sorted(tiny.listing(copy))
    with pytest.raises(RunError, match=r"checkpoint: cannot be read: Input/output error"):
        resume(copy)
    assert sorted(tiny.listing(copy)) == before


def test_a_damaged_newest_checkpoint_costs_rounds_only(tmp_path):
    whole = run(tiny.config(method=STAGED, rounds=6, checkpoint_every=1), out=tmp_path / "whole")
    out = stopped(tmp_path / "run", {"method": STAGED}, after=4, rounds=6, checkpoint_every=1)
    files = RunFiles.open(out)
    files.checkpoints()[0].write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        resume(out, on_round=tiny.ending(5, KeyboardInterrupt))
    assert [line["round"] for line in files.rounds()] == [0, 1, 2, 3, 4, 5]
    history = resume(out)
    assert tiny.figures(out) == tiny.figures(tmp_path / "whole")
    assert history.weights_sha256 == whole.weights_sha256
    assert "could not be used and is now unusable-round-" in (out / "warnings.txt").read_text()


MINE = '''
from dataclasses import dataclass, replace
from fedray.methods import METHODS
from fedray.federation.method import Method


@dataclass(frozen=True)
class Counter:
    """What is remembered."""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """FedAvg that counts."""
    kept: str = "counter"

    def setup(self, state, ctx):
        return replace(state, memory=Counter(ctx.rounds if self.kept == "asked" else 0))

    def client_update(self, task, client):
        if self.kept == "client":
            client.memory["f"] = {"deep": [lambda: 1]}
        return super().client_update(task, client)

    def prune(self, state, cohort, ctx):
        if self.kept == "lambda" and state.round == 2:
            return replace(state, memory={"why": (1, lambda: 2)})
        return replace(state, memory=Counter(state.memory.rounds + 1))


METHODS["mine"] = Mine
'''


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """A file with a method of one's own; the table is as before afterwards."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    before = dict(METHODS)
    yield path
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("change", ["renamed", "another field", "gone"])
def test_a_class_that_is_not_there_any_more_is_named(mine, tmp_path, monkeypatch, change):
    out = stopped(tmp_path / "run", {"imports": [str(mine)], "method": {"name": "mine"}})
    before = contents(out)
    text = {
        "renamed": MINE.replace("Counter", "Tally"),
        "another field": MINE.replace("    rounds: int", "    rounds: int\n    more: int = 0"),
        "gone": MINE.replace("class Counter", "class _Counter"),
    }[change]
    mine.write_text(text)
    forget(monkeypatch)
    with pytest.raises(RunError, match=r"checkpoint: cannot be read: the class \S*Counter"):
        resume(out)
    assert contents(out) == before


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a process that has not imported a method of one's own."""
    for module in plugins.imported_modules():
        monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setattr(plugins, "_imported", {})
    METHODS.pop("mine")


def test_the_file_of_a_method_may_have_moved(mine, tmp_path, monkeypatch):
    out = stopped(tmp_path / "run", {"imports": [str(mine)], "method": {"name": "mine"}})
    (tmp_path / "moved").mkdir()
    moved = mine.rename(tmp_path / "moved" / "mine.py")
    forget(monkeypatch)
    with pytest.raises(ConfigError, match=r"imports: no file"):
        resume(out)
    assert resume(out, [f"imports=[{moved}]"]).result["status"] == "finished"


@pytest.mark.parametrize(
    ("kept", "round", "told"),
    [
        ("lambda", 2, r"mine: state\.memory\['why'\]\[1\] is function; kept can be None, bool"),
        ("client", 1, r"mine: the memory of client \d\['f'\]\['deep'\]\[0\] is function"),
    ],
)
def test_a_memory_that_cannot_be_written_is_refused_in_its_round(mine, tmp_path, kept, round, told):
    config = tiny.config(imports=[str(mine)], method={"name": "mine", "kept": kept}, checkpoint_every=50)
    with pytest.raises(MethodError, match=told):
        run(config, out=tmp_path / "run")
    assert len(RunFiles(tmp_path / "run").rounds()) == round


# ── what may change
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ended", ["finished", "interrupted"])
@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        "snip",
        {"name": "fedlp"},
        {"name": "random_mask", "lr_decay": 0.9},
        {"name": "frlp", "solver": "bisect", "prune_rounds": [1, 3]},
        {"name": "autoflip", "explore_epochs": 1},
    ],
)
def test_more_rounds_end_as_if_they_had_been_planned(tmp_path, method, ended):
    chosen = {"name": method} if isinstance(method, str) else method
    changes = {"method": {**chosen, "batch_size": 50}, "data.server_fraction": 0.1, "eval_every": 2}
    whole = run(tiny.config(changes, rounds=6), out=tmp_path / "whole")
    out = tmp_path / "run"
    if ended == "finished":
        run(tiny.config(changes, rounds=3), out=out)
    else:
        stopped(out, changes, rounds=3)
    longer = resume(out, {"rounds": 6}) if ended == "finished" else resume(out, ["rounds=6"])
    assert longer.weights_sha256 == whole.weights_sha256
    assert longer.result["config_digest"] == whole.result["config_digest"]
    assert [row["round"] for row in longer.rounds] == list(range(7))
    theirs, mine = tiny.figures(tmp_path / "whole"), tiny.figures(out)
    assert mine["result"] == theirs["result"]
    assert mine["clients"] == theirs["clients"]
    assert RunFiles.open(out).read_config()["rounds"] == 6
    assert "with rounds=6; planned were 3" in (out / "warnings.txt").read_text()
    assert (out / "ended-000003" / "result.json").exists() == (ended == "finished")
    assert resume(out) == longer


@pytest.mark.parametrize("name", sorted(set(METHODS)))
def test_a_method_says_whether_it_depends_on_the_planned_rounds(tmp_path, name):
    """What it says is what its hooks have asked."""
    changes: dict[str, Any] = {"method": {"name": name, "batch_size": 50}, "data.server_fraction": 0.1}
    config = tiny.config(changes, rounds=2, model="lenet5" if name in ("pqsu", "fedlp") else "mlp")
    out = tmp_path / "run"
    run(config, out=out)
    found = RunFiles.open(out).load()
    assert found is not None
    assert found.checkpoint.rounds_matter == (config.method.options.depends_on_rounds is not None)
    if config.method.options.depends_on_rounds is None:
        return
    before = contents(out)
    with pytest.raises(
        ConfigError, match=rf"{name} did so far was planned for 2 rounds.*start a new run with ro"
    ):
        resume(out, {"rounds": 4})
    assert contents(out) == before


def test_a_method_that_asked_without_saying_so_is_found_out(mine, tmp_path):
    config = tiny.config(imports=[str(mine)], method={"name": "mine", "kept": "asked"})
    run(config, out=tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"the method has asked how many rounds are planned \(ctx\.rounds\)"
    ):
        resume(tmp_path / "run", {"rounds": 4})


def test_statistics_of_a_last_round_are_not_those_of_a_round_between(tmp_path):
    config = tiny.config(rounds=1, eval_every=2)
    run(config, out=tmp_path / "run")
    found = RunFiles.open(tmp_path / "run").load()
    assert found is not None
    longer = config.override(rounds=2)
    check_rounds(found, longer)
    with pytest.raises(ConfigError, match="round 1 was evaluated as the last one, and norm=static changes"):
        check_rounds(found, tiny.config(rounds=2, eval_every=2, model="resnet18", norm="static"))


def test_what_does_not_change_results_may_change(copy, tmp_path):
    whole = run(tiny.config(method=STAGED), out=tmp_path / "whole")
    changes = ["checkpoint_every=1", "clients.resources.cpu=0.5", "tracking.experiment=other"]
    assert resume(copy, changes).weights_sha256 == whole.weights_sha256
    assert RunFiles.open(copy).read_config()["checkpoint_every"] == 1
    assert not (copy / "warnings.txt").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "method.lr=0.1",
            r"resume cannot change method\.lr from 0\.05 to 0\.1: .*fedray run \S+ method\.lr=0\.1",
        ),
        ("seed=3", r"resume cannot change seed from 0 to 3"),
        ("eval_every=2", r"resume cannot change eval_every from 1 to 2"),
        (
            "clients.cohort=2",
            r"resume cannot change clients\.cohort from 3 to 2.*It can change rounds, check",
        ),
        ("method.lrr=3", r"did you mean 'lr'"),
        ("rounds=1", r"rounds=1: 2 rounds are made already"),
        (
            "rounds=4",
            r"method\.start and method\.until are shares of the run's rounds; start a new run with ro",
        ),
        ("rounds", r"'rounds' is not of the form key=value"),
    ],
)
def test_what_changes_results_is_refused(copy, change, told):
    before = contents(copy)
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        resume(copy, [change])
    assert contents(copy) == before


def test_a_finished_run_has_no_fewer_rounds(tmp_path):
    run(tiny.config(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"rounds=2: \S+ is finished, with 3 rounds"):
        resume(tmp_path / "run", {"rounds": 2})


def test_a_crash_while_a_run_gets_more_rounds_loses_nothing(tmp_path, monkeypatch):
    whole = run(tiny.config(rounds=5), out=tmp_path / "whole")
    out = tmp_path / "run"
    run(tiny.config(rounds=3), out=out)
    for step in ("set_end_aside", "write_config", "warn", "rewind"):

        def crash(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(RunFiles, step, crash)
            resume(out, {"rounds": 5})
        assert len(RunFiles.open(out).rounds()) == 4
    assert resume(out, {"rounds": 5}).weights_sha256 == whole.weights_sha256


# ── one at a time
# ──────────────────────────────────────────────────────────────────────────────────────────


LOCKED = "import time; from pathlib import Path; from fedray.storage.directory import Lock"


def test_a_run_that_is_running_is_not_resumed(tmp_path):
    out, refused = tmp_path / "run", list[str]()

    def second(report: Any) -> None:
        if report.round == 1:
            with pytest.raises(RunError) as caught:
                resume(out)
            refused.append(str(caught.value))
            done = subprocess.run(
                [sys.executable, "-c", f"{LOCKED}\nwith Lock(Path({str(out)!r})): pass"],
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            refused.append(done.stderr.splitlines()[-1])

    history = run(tiny.config(), out=out, on_round=second)
    assert len(refused) == 2
    for told in refused:
        assert f"this run is still running (process {os.getpid()} on " in told
        assert " UTC); wait for its end, or stop it" in told
    assert [row["round"] for row in history.rounds] == [0, 1, 2, 3]
    assert resume(out) == history  # reading needs no lock


def test_a_lock_ends_with_its_process(tmp_path):
    script = f"""
{LOCKED}
with Lock(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(RunError, match=rf"still running \(process {process.pid} on "), Lock(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with Lock(tmp_path), pytest.raises(RunError, match="still running"), Lock(tmp_path):
        pass
    with Lock(tmp_path):
        pass


# ── damage beside the checkpoints
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [b"", b"{ half", b"[1]", b"\xff\xfe"])
def test_a_damaged_result_is_made_again(tmp_path, content):
    out = tmp_path / "run"
    before = run(tiny.config(), out=out)
    (out / "result.json").write_bytes(content)
    again = resume(out)
    assert again.weights_sha256 == before.weights_sha256
    assert json.loads((out / "result.json").read_text())["status"] == "finished"


def test_a_hole_in_the_rounds_is_never_passed_over(tmp_path):
    out = tmp_path / "run"
    run(tiny.config(), out=out)
    lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
    for broken in (lines[:1] + lines[2:], [*lines[:2], *lines[1:]], ["\n", *lines]):
        (out / "rounds.jsonl").write_text("".join(broken))
        for use in (load_run, resume):
            with pytest.raises(RunError, match=r"rounds\.jsonl, line \d: "):
                use(out)


@pytest.mark.parametrize("dotted", SINCE)
def test_a_run_that_was_begun_before_a_key_existed_has_its_old_value(dotted):
    changed, before = tiny.config().to_tree(), tiny.config().to_tree()
    section, _, key = dotted.rpartition(".")
    del (before[section] if section else before)[key]
    assert list(_differences(before, changed)) == []
    (changed[section] if section else changed)[key] = "another"
    assert [key for key, _, _ in _differences(before, changed)] != []
