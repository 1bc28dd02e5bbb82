"""The command line: what it shows, its exit status, and what it leaves behind.

In this process where that tells all; in one of its own where a signal or an import counts.
"""

import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.config import yaml_text
from fedray.costs.devices import DEVICES
from fedray.costs.differences import CODECS
from fedray.costs.links import LINKS
from fedray.data import DATASETS, PARTITIONS
from fedray.experiment.run import run
from fedray.federation.method import Method
from fedray.federation.sampling import SAMPLERS
from fedray.methods import METHODS
from fedray.models import MODELS
from tests.experiment import tiny

HOLDING = '''
"""FedAvg whose clients wait.

As long as there is a file `hold` in the working directory, from round 2 on.
"""
import time
from dataclasses import dataclass
from pathlib import Path
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.types import Task


@dataclass(frozen=True, kw_only=True)
class Holding(Method):
    """One more option."""
    patience: int = 3

    def configure(self, state, client):
        return Task(state.params, state.mask, extras={"may_hold": state.round > 1})

    def client_update(self, task, client):
        while task.extras["may_hold"] and Path("hold").exists():
            Path("held").touch()
            time.sleep(0.01)
        if Path("break").exists():
            raise RuntimeError("out of [battery]")
        return super().client_update(task, client)


METHODS["holding"] = Holding
'''


class Done(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def fedray(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """A function that runs a command in this process, in a folder with `x.yaml` and `holding.py`."""
    (in_tmp / "x.yaml").write_text(yaml_text.dump(tiny.TREE), encoding="utf-8")
    (in_tmp / "holding.py").write_text(HOLDING, encoding="utf-8")
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", 300)
    before, level = dict(METHODS), logging.getLogger("fedray").level

    def command(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fedray", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, captured.out, captured.err)

    yield command
    METHODS.clear()
    METHODS.update(before)
    logging.getLogger("fedray").setLevel(level)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything starts Ray."""

    def start_ray(meanwhile: object = None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("fedray.experiment.placement.start_ray", start_ray)
    monkeypatch.setattr("fedray.sweeps.sweep.start_ray", start_ray)


def listed(*arguments: str) -> str:
    """Return what a command that lists something shows."""
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


# ── run
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_run_makes_a_run_and_says_what_came_of_it(fedray, in_tmp):
    done = fedray("run", "x.yaml", "method.name=snip", "method.density=0.25", "seed=4")
    assert done.status == 0
    (path,) = (in_tmp / "runs").iterdir()
    assert path.name == "snip-digits-mlp-s4-001"
    result = json.loads((path / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["density/global"] == pytest.approx(0.25, abs=1e-3)
    assert f"{result['test/accuracy']:.3f}" in done.out
    assert [line.partition(":")[0] for line in done.err.splitlines()] == [
        f"round {k} of 3" for k in (1, 2, 3)
    ]
    files = "Files: runs/snip-digits-mlp-s4-001   Pictures: fedray report runs/snip-digits-mlp-s4-001"
    assert files in done.out.splitlines()  # not tracked: no word of MLflow
    changes = {"method": {"name": "snip", "density": 0.25}, "seed": 4}
    assert result["weights_sha256"] == run(tiny.config(changes), out=in_tmp / "same").weights_sha256


def test_run_into_a_directory_of_its_own(fedray, in_tmp):
    assert fedray("run", "x.yaml", "rounds=1", "--out", "mine").status == 0
    assert (in_tmp / "mine" / "result.json").is_file()
    assert not (in_tmp / "runs").exists()
    before = tiny.listing(in_tmp)
    again = fedray("run", "x.yaml", "rounds=1", "--out", "mine")
    assert (again.status, again.out) == (2, "")
    assert "cannot run: mine is not empty: a run needs an empty directory; choose another one" in again.err
    assert tiny.listing(in_tmp) == before


def test_run_of_a_sweep_s_file_says_that_it_makes_the_base_only(fedray, in_tmp):
    (in_tmp / "sweep.yaml").write_text(
        yaml_text.dump({"base": tiny.TREE | {"rounds": 1}, "space": {"seed": {"grid": [1, 2]}}}),
        encoding="utf-8",
    )
    done = fedray("run", "sweep.yaml", "--out", "mine")
    assert done.status == 0
    assert done.err.startswith(
        "sweep.yaml is a sweep: this runs its base only; `fedray sweep sweep.yaml` tries its points\n"
    )
    assert "is a sweep" not in fedray("run", "x.yaml", "rounds=1", "--out", "other").err


def test_a_sweep_names_its_best_trial_and_ends_with_how_to_resume(fedray, in_tmp, monkeypatch):
    """Also where trials were cut short from outside, so that there is no error to tell."""
    from fedray.sweeps.outcome import SweepResult, Trial
    from fedray.sweeps.space import Sweep

    (in_tmp / "s.yaml").write_text(
        yaml_text.dump({"base": tiny.TREE, "space": {"method.lr": {"grid": [0.1, 1e-6, 0.2]}}}),
        encoding="utf-8",
    )
    found: list[tuple[int, int]] = []
    points = Sweep.load("s.yaml", on_point=lambda done, total: found.append((done, total))).points
    assert found == [(1, 3), (2, 3), (3, 3)]
    places = [in_tmp / "sweep" / "trials" / point.name for point in points]
    for point, place in zip(points[:2], places[:2], strict=True):
        run(point.config, out=place)
    trials = (
        Trial(points[0], places[0], "finished"),
        Trial(points[1], places[1], "finished"),
        Trial(points[2], places[2], "missing"),
    )

    def made(metric: str, direction: str) -> Done:
        result = SweepResult(in_tmp / "sweep", trials, metric, direction)  # type: ignore[arg-type]
        monkeypatch.setattr("fedray.sweeps.sweep.sweep", lambda plan, **options: result)
        shown: Done = fedray("sweep", "s.yaml")
        return shown

    done = made("val/accuracy", "max")
    assert done.status == 1
    accuracy = json.loads((places[0] / "result.json").read_text())["val/accuracy"]
    assert f"Best val/accuracy: {accuracy:.4g}, of 00-lr=0.1: fedray run sweep/best.yaml\n" in done.out
    assert done.err.splitlines()[-2:] == [
        "02-lr=0.2 missing: interrupted",
        "`fedray resume sweep` resumes them from their checkpoints",
    ]
    assert "of 01-lr=1e-06" in made("val/accuracy", "min").out
    assert "Best" not in made("val/auc", "max").out


def test_without_a_terminal_progress_is_a_few_lines(fedray):
    done = fedray("run", "x.yaml", "rounds=50", "eval_every=50", "method.batch_size=500", "--out", "mine")
    rounds = [int(number) for number in re.findall(r"^round (\d+) of 50: ", done.err, flags=re.M)]
    assert rounds == sorted(set(rounds))
    assert len(rounds) == cli.LINES
    assert rounds[-1] == 50


def test_run_shows_what_a_reader_should_know(fedray):
    done = fedray("run", "x.yaml", "rounds=1", "method.lr=1e18", "clients.max_failed=1", "--out", "mine")
    assert done.status == 0
    assert re.search(r"^round 1 of 1: accuracy 0\.\d{3}  density 1\.00  0\.\d MB$", done.err, flags=re.M)
    assert re.search(
        r"^mine: round 1: \d update\(s\) left out as non-finite: clients \[", done.err, flags=re.M
    )


def test_a_run_that_diverges_exits_with_1_and_says_how_to_continue(fedray):
    done = fedray("run", "x.yaml", "rounds=1", "method.lr=1e18", "--out", "mine")
    assert done.status == 1
    assert "round 1: " in done.err and "clients.max_failed lets none fail: non-finite: clients [" in done.err
    assert fedray("resume", "mine", "clients.max_failed=1").status == 0


BAD = [
    (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    (["run", "x.yaml", "rounds=0"], "rounds (override): got 0; must be greater than 0"),
    (["run", "x.yaml", "rounds"], "'rounds' is not of the form key=value, e.g. method.lr=0.1"),
    (
        ["run", "x.yaml", "method.name=fedavgg"],
        "method.name (override): unknown method 'fedavgg'; did you mean",
    ),
    (["run", "x.yaml", "model=vgg11"], "model (override): vgg11 does not take digits: "),
    (
        ["run", "x.yaml", "data.name=mnist", "data.root=/nowhere"],
        "data.root (override): '/nowhere' is not a folder",
    ),
    (
        ["run", "x.yaml", "data.partition={kind: shards, classes_per_client: 11}"],
        "data.partition.classes_per_client=11 for clients.population=6 makes 66 shards",
    ),
    (["run", "x.yaml", "--import", "nowhere.py"], "imports: no file 'nowhere.py' (looked for "),
    (
        ["sweep", "x.yaml", "space.seed={grd: [1]}"],
        "space.seed (override): unknown verb 'grd'; did you mean 'grid'?",
    ),
    (
        ["sweep", "x.yaml", "space.rounds={grid: [1, 0]}"],
        "rounds (x.yaml): got 0; must be greater than 0 [rounds=0]",
    ),
    (["sweep", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    (["resume", "nowhere"], "nowhere is not the directory of a run: it has no config.yaml"),
    (["resume", "."], ". is not the directory of a run: it has no config.yaml"),
    (["report", "nowhere"], "nowhere"),
    (["runs"], "no runs found: "),
    (["runs", "."], "holds holding.py, x.yaml. A run's directory holds config.yaml"),
    (["plan", "holding.py"], "holding.py"),
    (["plan", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    (["plan", "x.yaml", "rounds=0"], "rounds (override): got 0; must be greater than 0"),
    (["compare", "x.yaml"], "no runs found: "),
    (["watch"], "nothing runs below runs: `fedray runs` lists what is there"),
    (["watch", "."], ". is not the directory of a run or a sweep"),
    (["run", "x.yaml", "--address", "auto"], "--address 'auto': with clients.actors=0 the clients train in"),
    (["run", "x.yaml", "--address", "there"], "--address 'there': with clients.actors=0 the clients train"),
    (["sweep", "x.yaml", "--address", "there"], "no Ray cluster at --address 'there': an address is HOST:"),
    (["resume", ".", "--address", ""], "no config.yaml"),
    (["watch", "--json"], "nothing runs below runs: `fedray runs` lists what is there"),
    (["stop", "nowhere"], "nowhere is not the directory of a run or a sweep: it has no config.yaml"),
    (["methods", "--import", "nowhere.py"], "imports: no file 'nowhere.py' (looked for "),
    (["ui"], "/runs/mlflow.db; run something first"),
    (["ui", "--uri", "http://a:5000"], "the UI needs an SQLite store"),
    (["ui", "--uri", "mysql://a"], "tracking.uri: 'mysql://a': unknown scheme 'mysql'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_cannot_run_is_said_and_leaves_nothing(fedray, in_tmp, no_ray, arguments, message):
    before = tiny.listing(in_tmp)
    done = fedray(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("cannot run: ")
    assert message in done.err
    assert tiny.listing(in_tmp) == before


def test_all_problems_are_said_at_once(fedray):
    done = fedray("run", "x.yaml", "rounds=0", "modle=cnn")
    assert done.err.splitlines() == [
        "cannot run: rounds (override): got 0; must be greater than 0",
        "modle (override): unknown; did you mean 'model'? Keys here: checkpoint_every, clients, data, "
        "eval_clients, eval_every, imports, method, model, norm, prune_first, prune_last, rounds, seed, "
        "storage, tracking, train, weight_standardization",
    ]


def test_a_long_message_is_not_broken_into_lines(fedray, monkeypatch):
    """A path in two parts cannot be copied."""
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", 40)
    assert len(fedray("run", "x.yaml", "data.name=mnist", "data.root=/nowhere").err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["runn"], ["run"], ["ui", "--port", "0"], ["run", "x.yaml", "--output", "y"]]
)
def test_a_command_that_there_is_not(fedray, in_tmp, arguments):
    before = tiny.listing(in_tmp)
    done = fedray(*arguments)
    assert done.status == 2
    assert "Usage: " in done.err
    assert tiny.listing(in_tmp) == before


# ── files of one's own
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_method_of_ones_own(fedray, in_tmp):
    arguments = ("run", "x.yaml", "method.name=holding", "rounds=1", "--out", "mine")
    assert "unknown method 'holding'" in fedray(*arguments).err
    assert fedray(*arguments, "--import", "holding.py").status == 0
    kept = yaml_text.load(in_tmp / "mine" / "config.yaml")
    assert kept["imports"] == [str(in_tmp / "holding.py")]
    assert kept["method"]["patience"] == 3


def test_files_named_in_the_config_stay(fedray, in_tmp):
    (in_tmp / "y.yaml").write_text(yaml_text.dump(tiny.TREE | {"imports": ["holding.py"]}), encoding="utf-8")
    (in_tmp / "it's more.py").write_text("", encoding="utf-8")
    arguments = ("run", "y.yaml", "rounds=1", "method.name=holding")
    assert (
        fedray(*arguments, "--import", "it's more.py", "--import", "holding.py", "--out", "mine").status == 0
    )
    kept = yaml_text.load(in_tmp / "mine" / "config.yaml")
    assert kept["imports"] == [str(in_tmp / "holding.py"), str(in_tmp / "it's more.py")]
    (in_tmp / "z.yaml").write_text("imports: holding.py", encoding="utf-8")
    refused = fedray("run", "z.yaml", "--import", "it's more.py")
    assert (refused.status, refused.err) == (
        2,
        "cannot run: imports (z.yaml): got 'holding.py'; must be a list\n",
    )


def test_an_error_of_a_client_ends_with_status_1_and_can_be_mended(fedray, in_tmp):
    (in_tmp / "break").touch()
    done = fedray("run", "x.yaml", "method.name=holding", "--import", "holding.py", "--out", "mine")
    assert done.status == 1
    assert re.search(r"^failed: client \d failed in round 1: ", done.err, flags=re.M)
    assert "out of [battery]" in done.err
    (in_tmp / "break").unlink()
    assert fedray("resume", "mine").status == 0
    assert json.loads((in_tmp / "mine" / "result.json").read_text())["status"] == "finished"


# ── resume
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_resume_goes_on_and_a_finished_run_is_only_shown(fedray, in_tmp):
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), out="mine", on_round=tiny.ending(2, KeyboardInterrupt))
    done = fedray("resume", "mine")
    assert done.status == 0
    assert "Files: mine" in done.out
    shas = [json.loads((in_tmp / "mine" / "result.json").read_text())["weights_sha256"]]
    shas += [run(tiny.config(), out="whole").weights_sha256]
    assert shas[0] == shas[1]
    before = {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*")}
    again = fedray("resume", "mine")
    assert again.status == 0
    assert "mine is finished: nothing was run. More rounds: fedray resume mine rounds=N" in again.out
    assert {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*")} == before


def test_resume_takes_more_rounds_and_refuses_what_changes_results(fedray, in_tmp):
    run(tiny.config(), out="mine")
    refused = fedray("resume", "mine", "method.lr=0.3")
    assert refused.status == 2
    assert "resume cannot change method.lr from 0.05 to 0.3" in refused.err
    done = fedray("resume", "mine", "rounds=4")
    assert done.status == 0
    assert "nothing was run" not in done.out
    assert json.loads((in_tmp / "mine" / "result.json").read_text())["rounds"] == 4
    assert "mine: resumed after round 3 with rounds=4; planned were 3" in done.err
    same = run(tiny.config(rounds=4), out="whole").weights_sha256
    assert json.loads((in_tmp / "mine" / "result.json").read_text())["weights_sha256"] == same


def test_ctrl_c_ends_with_status_130_and_resume_finishes_with_the_same_weights(fedray, in_tmp):
    """While a client trains, in the second round."""
    (in_tmp / "hold").touch()
    arguments = ["run", "x.yaml", "method.name=holding", "checkpoint_every=1", "--out", "mine"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedray.cli", *arguments, "--import", "holding.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (in_tmp / "held").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted; `fedray resume mine` continues from the last checkpoint" in err
    assert "Traceback" not in out + err
    assert not (in_tmp / "mine" / "result.json").exists()
    (in_tmp / "hold").unlink()
    assert fedray("resume", "mine").status == 0
    resumed = tiny.figures(in_tmp / "mine")
    config = tiny.config({"method.name": "holding", "checkpoint_every": 1})
    run(config, out="whole")
    assert resumed == tiny.figures(in_tmp / "whole")


# ── what there is
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_methods():
    text = listed("methods")
    for name, method in METHODS.items():
        (line,) = (line for line in text.splitlines() if re.match(rf"[│|] {name} ", line))
        assert method.citation.split(",")[0] in line
        assert ("data.server_fraction" in line) == method.uses_server_data
    assert "Every method has: local_epochs=1, steps=None, lr=0.05, lr_decay=1.0" in text


def test_methods_of_ones_own(fedray):
    done = fedray("methods", "--import", "holding.py")
    assert done.status == 0
    assert re.search(r"holding .* FedAvg whose clients wait\.", done.out)
    assert "method.patience=3" in fedray("methods", "holding", "--import", "holding.py").out


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_method_are_told_with_their_defaults(name):
    text, shared = listed("methods", name), {field.name for field in fields(Method)}
    assert text.startswith(f"{name}: ") and METHODS[name].citation in text
    for field in fields(METHODS[name]):
        if field.name not in shared:
            assert f"method.{field.name}={field.default}" in text
            assert f"    {field.name}: " in text  # what it means


def test_samplers():
    text = listed("samplers")
    for name, sampler in SAMPLERS.items():
        (line,) = (line for line in text.splitlines() if re.match(rf"[│|] {name} ", line))
        assert sampler.citation in line
    for name, sampler in SAMPLERS.items():
        text = listed("samplers", name)
        assert text.startswith(f"{name}: ") and sampler.citation in text
        for field in fields(sampler):
            assert f"clients.sampler.{field.name}={field.default}" in text and f"    {field.name}: " in text


def test_codecs():
    text = listed("codecs")
    for name, codec in CODECS.items():
        (line,) = (line for line in text.splitlines() if re.match(rf"[│|] {name} ", line))
        assert codec.citation in line
    assert "clients.uplink.share=0.01" in listed("codecs", "topk") and "    share: " in listed(
        "codecs", "topk"
    )


def test_a_sampler_of_ones_own(fedray, in_tmp):
    (in_tmp / "few.py").write_text(
        """from dataclasses import dataclass
import fedray
@dataclass(frozen=True, kw_only=True)
class Few(fedray.Sampler):
    \"\"\"The first clients.\"\"\"
    most: int = 2
    def draw(self, memory, ctx):
        return tuple(range(self.most))
fedray.SAMPLERS["few"] = Few
"""
    )
    listing = fedray("samplers", "--import", "few.py").out
    (line,) = (line for line in listing.splitlines() if re.match(r"[│|] few ", line))
    assert "The first clients." in line and "McMahan" not in line
    assert "clients.sampler.most=2" in fedray("samplers", "few", "--import", "few.py").out
    arguments = ("clients.sampler.name=few", "clients.sampler.most=1", "rounds=1", "--import", "few.py")
    assert fedray("run", "x.yaml", *arguments, "--out", "r").status == 0
    (record,) = (in_tmp / "r" / "rounds.jsonl").read_text().splitlines()[1:]
    assert json.loads(record)["metrics"]["clients/selected"] == 1
    assert fedray("resume", "r", "rounds=2").status == 0  # config.yaml names the file


def test_a_sampler_that_there_is_not_is_refused_with_the_nearest(fedray):
    done = fedray("samplers", "ort")
    assert done.status == 2
    assert "unknown sampler 'ort'; did you mean 'oort'?" in done.err


def test_a_method_that_there_is_not_is_refused_with_the_nearest(fedray):
    done = fedray("methods", "prunfl")
    assert done.status == 2
    assert "unknown method 'prunfl'" in done.err and "prunefl" in done.err


def test_models():
    text = listed("models")
    for name in MODELS:
        assert re.search(rf"^[│|] {name} ", text, flags=re.M)
    (mlp,) = (line for line in text.splitlines() if re.match(r"[│|] mlp ", line))
    assert re.search(r"\d{2},\d{3} ", mlp)
    (vgg,) = (line for line in text.splitlines() if re.match(r"[│|] vgg11 ", line))
    assert "—" in vgg  # not on 8×8 digits


def test_datasets():
    text = listed("datasets")
    for name, spec in DATASETS.items():
        (line,) = (line for line in text.splitlines() if re.match(rf"[│|] {name} ", line))
        assert ("by files" if spec.train_examples is None else f"{spec.train_examples:,}") in line
        assert "×".join(map(str, spec.input_shape)) in line


def test_devices():
    text = listed("devices")
    for name, device in DEVICES.items():
        assert re.search(rf"^[│|] {name} ", text, flags=re.M)
        for source in device.sources.values():
            assert source.split()[0] in text
    assert all(link in text.split("Links: ")[1] for link in LINKS)
    short = listed("devices", "--no-sources")
    assert len(short.splitlines()) < len(text.splitlines())


TABLES_OF_MINE = """
from dataclasses import dataclass, replace
import numpy as np
import fedray

@dataclass(frozen=True)
class Blocks:
    '''Neighbouring rows to one client.

    Args:
        gap: rows between two clients.
    '''
    gap: fedray.PositiveInt = 7

    def split(self, labels, writers, rows, population, seed):
        return fedray.Dealt(rows, np.arange(len(rows)) * population // len(rows), population)

fedray.PARTITIONS["blocks"] = Blocks
fedray.DEVICES["esp32"] = fedray.DeviceProfile("esp32", 6e7, 1e5, 1e5, 0.1, 2**22)
fedray.HARDWARE["board"] = fedray.HARDWARE["phone"]
fedray.LINKS["pigeon"] = fedray.LINKS["lte"]
fedray.MODELS["tiny"] = fedray.MODELS["mlp"]
fedray.DATASETS["mine"] = fedray.DATASETS["digits"]
"""


def test_partitions():
    text = listed("partitions")
    for name, kind in PARTITIONS.items():
        assert re.search(rf"^[│|] {name} ", text, flags=re.M)
        for field in fields(kind):  # type: ignore[arg-type]
            assert f"{field.name}={field.default}" in text
            full = listed("partitions", name)
            assert f"data.partition.{field.name}={field.default}" in full and f"    {field.name}: " in full
    assert "data.partition.kind=NAME" in text


def test_the_tables_of_a_file_are_listed(fedray, in_tmp):
    (in_tmp / "tables.py").write_text(TABLES_OF_MINE)
    for command, names in {
        "partitions": ["blocks"],
        "devices": ["esp32", "board"],
        "models": ["tiny"],
        "datasets": ["mine"],
    }.items():
        done = fedray(command, "--import", "tables.py")
        assert done.status == 0, done.err
        for name in names:
            assert re.search(rf"^[│|] {name} ", done.out, flags=re.M), (command, name)
    assert "pigeon" in fedray("devices", "--import", "tables.py").out.split("Links: ")[1]
    assert "gap: rows between" in fedray("partitions", "blocks", "--import", "tables.py").out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["partitions", "blokcs", "--import", "tables.py"],
            "unknown partition 'blokcs'; did you mean 'blocks'?",
        ),
        (["partitions", "--import", "nowhere.py"], "imports: no file 'nowhere.py'"),
        (["devices", "--import", "nowhere.py"], "imports: no file 'nowhere.py'"),
    ],
)
def test_a_listing_that_cannot_be_made(fedray, in_tmp, command, message):
    (in_tmp / "tables.py").write_text(TABLES_OF_MINE)
    done = fedray(*command)
    assert (done.status, done.out) == (2, "") and message in done.err


def test_a_run_with_the_tables_of_a_file(fedray, in_tmp):
    (in_tmp / "tables.py").write_text(TABLES_OF_MINE)
    changes = [
        "rounds=1",
        "clients.devices={esp32: 1, esp32@pigeon: 1, board: 1}",
        "data.partition.kind=blocks",
    ]
    done = fedray(
        "run", "x.yaml", *changes, "data.name=mine", "model=tiny", "--import", "tables.py", "--out", "r"
    )
    assert done.status == 0, done.err
    assert (in_tmp / "r" / "result.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ("methods",),
        ("models",),
        ("datasets",),
        ("partitions",),
        ("devices", "--no-sources"),
        ("methods", "staged"),
        ("samplers",),
        ("codecs",),
    ],
)
def test_without_a_terminal_a_table_is_as_wide_as_it_needs(fedray, monkeypatch, command):
    """Of a pipe, a row is a line: `fedray devices | grep raspberry_pi_4`."""
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", None)
    monkeypatch.setenv("COLUMNS", "30")
    done = fedray(*command)
    rows = [line for line in done.out.splitlines() if line.startswith("│")]
    tables = {"methods": METHODS, "models": MODELS, "datasets": DATASETS, "devices": DEVICES}
    tables |= {"partitions": PARTITIONS, "samplers": SAMPLERS, "codecs": CODECS}
    names = [*map(str, tables[command[0]])]  # type: ignore[call-overload]
    if len(command) == 1 or command[0] == "devices":
        assert [row.split()[1] for row in rows] == names
    else:
        (line,) = (line for line in done.out.splitlines() if line.startswith("Defaults: "))
        assert "method.until=" in line and "method.rollback=" in line
    assert max(map(len, done.out.splitlines())) < 2000


def test_what_is_not_tracked_is_not_said_to_be_in_mlflow(fedray, in_tmp):
    def last(*arguments: str) -> str:
        return str(fedray("run", "x.yaml", "rounds=1", *arguments).out.splitlines()[-1])

    assert last("tracking.uri=none", "--out", "a") == "Files: a   Pictures: fedray report a"
    assert last("tracking.uri=http://127.0.0.1:1", "--out", "b") == "Files: b   Pictures: fedray report b"
    line = last("tracking.uri=sqlite:///my.db", "--out", "c")
    assert line == "Files: c   Pictures: fedray report c   MLflow: fedray ui c"


def test_resume_takes_a_file_of_ones_own(fedray, in_tmp):
    assert fedray("run", "x.yaml", "rounds=1", "--out", "mine").status == 0
    done = fedray("resume", "mine", "--import", "nowhere.py")
    assert (done.status, done.out) == (2, "")
    assert "imports: no file 'nowhere.py'" in done.err
    assert fedray("resume", "mine", "--import", "holding.py").status == 0


def test_report_draws_a_finished_run(fedray, in_tmp):
    run(tiny.config(rounds=1), out="mine")
    run(tiny.config(rounds=1, seed=1), out="other")
    done = fedray("report", "mine", "other", "--out", "pictures", "--target", "0.1")
    assert done.status == 0
    written = tiny.listing(in_tmp / "pictures")
    assert any(name.endswith((".png", ".svg", ".pdf")) for name in written)
    for name in written:
        assert f"pictures/{name}" in done.out


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands of MLflow's UI; instead of each, a process that ends with status 3 is started."""
    commands: list[list[str]] = []
    real = subprocess.Popen

    def popen(command: list[str], *arguments: Any, **options: Any) -> Any:
        if "mlflow" not in command:
            return real(command, *arguments, **options)
        commands.append(command)
        return real([sys.executable, "-c", "raise SystemExit(3)"], *arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return commands


def test_ui_starts_mlflow_and_ends_as_it_does(fedray, in_tmp, started):
    import sqlite3

    sqlite3.connect(in_tmp / "mlflow.db").close()
    (in_tmp / "mlflow.db").touch()
    done = fedray("ui", "--uri", "sqlite:///mlflow.db", "--port", "5009")
    assert done.status == 3
    assert "http://127.0.0.1:5009" in done.out
    (command,) = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5009"


def test_ui_opens_on_the_comparison_of_given_runs(fedray, in_tmp, started):
    store = f"tracking.uri=sqlite:///{in_tmp}/my.db"
    for name in ("a", "b"):
        assert fedray("run", "x.yaml", "rounds=1", store, "--out", name).status == 0
    known = [json.loads((in_tmp / name / "mlflow.json").read_text()) for name in ("a", "b")]
    (first, second), (experiment,) = (k["run_id"] for k in known), {k["experiment_id"] for k in known}
    shown = fedray("ui", "a", "b", "--port", "5009").out
    listed = f"runs=%5B%22{first}%22%2C%22{second}%22%5D&experiments=%5B%22{experiment}%22%5D"
    machine_learning = "workflowType=machine_learning"
    page = "MLflow's UI: http://127.0.0.1:5009/#"
    assert f"{page}/compare-runs?{listed}&{machine_learning} (Ctrl-C ends it)\n" in shown
    assert (
        f"{page}/experiments/{experiment}/runs/{first}?{machine_learning} "
        in fedray("ui", "a", "--port", "5009").out
    )
    assert all(f"sqlite:///{in_tmp}/my.db" in command for command in started)
    assert "Compare them in MLflow: fedray ui a b\n" in fedray("report", "a", "b").out


def test_ui_refuses_runs_that_it_cannot_show_together(fedray, in_tmp, started):
    for name, store in (("a", "none"), ("b", "sqlite:///b.db"), ("c", "sqlite:///c.db")):
        assert fedray("run", "x.yaml", "rounds=1", f"tracking.uri={store}", "--out", name).status == 0
    assert "a: MLflow tracks none of these runs; `fedray sync`" in fedray("ui", "a").err
    assert "b, c: their runs are in 2 stores" in fedray("ui", "b", "c").err
    assert "nowhere" in fedray("ui", "nowhere").err
    assert not started
    assert "MLflow" not in fedray("report", "a").out


def test_help_is_quick():
    """It waits for none of what a run needs."""
    code = """
import sys
from fedray.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("HEAVY", *({"torch", "numpy", "ray", "pandas", "mlflow", "sklearn", "fedray.types"} & set(sys.modules)))
"""
    for arguments in (["--help"], ["run", "--help"], ["methods"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1].split() == ["HEAVY"]
        assert ("prunefl" if arguments == ["methods"] else "Usage: ") in done.stdout


def test_help_names_every_command():
    text = listed("--help")
    listings = ("methods", "models", "datasets", "partitions", "samplers", "codecs", "devices")
    for command in ("run", "sweep", "report", "resume", "sync", "ui", *listings):
        assert re.search(rf"^[│|] {command} ", text, flags=re.M), command
