"""benchmarks.peers: the line to a framework, who is timed and who is not, the table; with fake frameworks."""

import io
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.peers import environments, frameworks, line, table
from benchmarks.peers.environments import NotInstalledError, python_of
from benchmarks.peers.measuring import Row, check, judge, time_rounds
from benchmarks.peers.session import FrameworkError, Session
from benchmarks.peers.task import CountedLoss, Task, load
from benchmarks.peers.workloads import WORKLOADS, examples_of, run_config, task_of
from benchmarks.processes import tree
from benchmarks.round import CONTENDERS

FAKE = Path(__file__).with_name("fake_peer.py")
EXAMPLES = range(100, 101)


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], Session]:
    return lambda behaviour: Session([sys.executable, str(FAKE), behaviour], tmp_path / "log", {})


def test_a_session_makes_rounds_and_leaves_no_process(start):
    with start("good") as session:
        assert session.versions == {"fake": "1.0"}
        made = session.round()
        assert made.seconds > 0
        assert made.cpu_s >= 0
        assert made.examples == 100
        assert session.accuracy() == 0.95
        assert session.memory_bytes() > 1e6
        pid = session.process.pid
    assert not tree(pid)


def test_a_framework_that_dies_says_why_in_its_last_words(start):
    with pytest.raises(FrameworkError, match="no module named flwr"):
        start("dies")


def test_a_framework_that_reports_an_error(start):
    with start("fails") as session, pytest.raises(FrameworkError, match=r"^ValueError: a client failed$"):
        session.round()


def test_only_frameworks_that_do_the_same_work_are_timed(start):
    rows = {name: Row(name) for name in ("good", "dull", "lazy", "fails", "dies")}
    for name, row in rows.items():
        check(row, partial(start, name), rounds=2, examples=EXAMPLES)
    judge(rows.values(), rows["good"], tolerance=0.03)
    time_rounds(rows, start, warm_up=1, rounds=3, examples=EXAMPLES)

    assert rows["good"].refused == ""
    assert len(rows["good"].seconds) == len(rows["good"].cpu_s) == 3
    assert rows["good"].memory_bytes > 1e6
    assert rows["dull"].refused == "not timed: accuracy 0.500, the plain loop's is 0.950 (tolerance 0.03)"
    assert rows["lazy"].refused == "not timed: 50 examples in a round, not 100"
    assert rows["fails"].refused == "failed: ValueError: a client failed"
    assert rows["dies"].refused == "failed: ended: no module named flwr"
    assert not any(row.seconds for name, row in rows.items() if name != "good")


def test_a_framework_that_stops_doing_its_work_loses_its_time(start):
    row = Row("lazy", accuracy=0.95)
    time_rounds({"lazy": row}, start, warm_up=1, rounds=2, examples=EXAMPLES)
    assert row.refused
    assert row.median is None


def test_without_the_reference_there_is_nothing_to_compare():
    with pytest.raises(SystemExit, match="plain loop: failed: x"):
        judge([], Row("plain loop", refused="failed: x"), tolerance=0.03)


def test_the_table_divides_by_flower_and_by_the_plain_loop():
    flower = Row("Flower", 0.95, [3.0, 2.0, 4.0], [4.0, 4.0, 4.0], 2_000_000_000, {"flwr": "1.0"})
    plain = Row("plain loop", 0.95, [1.0, 1.5, 0.5], [1.0, 1.0, 1.0], 500_000_000)
    missing = Row("fluke", refused="not installed: no network")
    head, *rows = table.lines([flower, plain, missing], flower, plain)
    assert head.split()[-1] == "accuracy"
    assert " ".join(rows[0].split()) == "Flower 3.000 2.000 … 4.000 4.000 1.00 0.33 2,000 0.950"
    assert " ".join(rows[1].split()) == "plain loop 1.000 0.500 … 1.500 1.000 3.00 1.00 500 0.950"
    assert " ".join(rows[2].split()) == "fluke not installed: no network"
    assert table.lines([plain], None, plain)[1].split()[-4:] == ["–", "1.00", "500", "0.950"]
    assert table.versions([flower, plain]) == ["Flower: flwr 1.0"]
    assert "core" in table.processor()


def test_a_peer_that_cannot_be_installed_gets_a_row_and_the_rest_runs(tmp_path, monkeypatch, start):
    def no_network(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Resolving\nerror: Could not connect\n  hint: x\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    fluke = frameworks.FRAMEWORKS["fluke"]
    row, good = Row(fluke.title), Row("good")

    def install() -> Session:
        fluke.command(tmp_path, tmp_path / "environments")
        raise AssertionError

    check(row, install, rounds=1, examples=EXAMPLES)
    check(good, lambda: start("good"), rounds=1, examples=EXAMPLES)
    assert row.refused == "not installed: error: Could not connect"
    assert good.accuracy == 0.95


def test_an_environment_is_made_once_and_anew_when_the_versions_change(tmp_path, monkeypatch, capsys):
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        if "venv" in command:
            venv.create(command[-1], with_pip=False)

    monkeypatch.setattr(environments, "_run", run)
    wanted = tmp_path / "peer.txt"
    wanted.write_text("peer==1\n", encoding="utf-8")
    python = python_of(wanted, tmp_path / "all")
    assert python == tmp_path / "all" / "peer" / "bin" / "python"
    assert commands[1][-2:] == ["-r", str(wanted)]
    assert python_of(wanted, tmp_path / "all") == python
    assert len(commands) == 2
    wanted.write_text("peer==2\n", encoding="utf-8")
    python_of(wanted, tmp_path / "all")
    assert len(commands) == 4


def test_an_installer_that_is_not_there(monkeypatch):
    with pytest.raises(NotInstalledError, match="no/such"):
        environments._run(["no/such/installer"])


@pytest.mark.parametrize("name", ["flower", "pfl", "fluke"])
def test_every_peer_has_exact_versions_and_our_torch(name):
    requirements = frameworks.FRAMEWORKS[name].requirements
    assert requirements is not None
    lines = requirements.read_text(encoding="utf-8").splitlines()
    pins = [one for one in lines if not one.startswith("#")]
    assert pins and all("==" in pin for pin in pins)
    assert f"torch=={torch.__version__.partition('+')[0]}" in pins


def test_the_frameworks_end_of_the_line(monkeypatch):
    asked = io.StringIO('{"ask": "accuracy"}\n{"ask": "round"}\n{"ask": "end"}\n')
    monkeypatch.setattr(sys, "stdin", asked)
    end = line.Line.__new__(line.Line)
    end._out = io.StringIO()  # type: ignore[assignment]
    end.ready(["torch"])
    end.wait_for_round(lambda: 0.5)
    with pytest.raises(line.Ended):
        end.wait_for_round(lambda: 0.5)
    with pytest.raises(line.Ended):  # the measuring process has gone
        end.wait_for_round(lambda: 0.5)
    ready, accuracy = map(json.loads, end._out.getvalue().splitlines())  # type: ignore[attr-defined]
    assert ready == {"ready": {"torch": version("torch")}}
    assert accuracy == {"accuracy": 0.5}


def test_all_frameworks_get_the_same_federation(tmp_path):
    task = task_of("mlp", checking=True)
    task.save(tmp_path)
    read = load(str(tmp_path))
    assert isinstance(read, Task)
    assert torch.equal(read.x, task.x)
    workload = WORKLOADS["mlp"]
    assert len(read.clients) == workload.check_population
    assert read.accuracy(read.model) == task.accuracy(task.model) < 0.5
    assert read.model.training
    assert torch.cat(list(read.clients)).unique().numel() == len(read.x)

    loop = CONTENDERS["plain loop, 1 process"](run_config("mlp", checking=True))
    fedray = CONTENDERS["fedray, in process"](run_config("mlp", checking=True))
    for contender in (loop, fedray):
        for name, value in contender.model().state_dict().items():
            assert torch.equal(value, task.model.state_dict()[name])
        for number in range(8):
            assert contender.round(number) in examples_of(task)
        assert task.accuracy(contender.model()) > 0.8
        contender.close()


def test_the_counted_loss_counts_what_it_sees():
    CountedLoss.take()
    loss_of = CountedLoss()
    loss_of(torch.zeros(20, 10), torch.zeros(20, dtype=torch.long))
    assert CountedLoss.take() == 20
    assert CountedLoss.take() == 0
