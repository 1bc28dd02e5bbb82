"""Ctrl-C, a closed terminal and the signals of a scheduler, on real processes at a real terminal.

A run and a sweep keep every complete round, end as KILLED in MLflow, say how to resume, and leave no process.
"""

import re
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.overview.summary import summary
from fedray.storage.run_files import RunFiles
from fedray.tracking.store import prepare_store
from tests.experiment import tiny
from tests.terminal import FEDRAY, Terminal

pytestmark = pytest.mark.slow
Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command of fedray at a terminal; what runs at the end of a test is killed."""
    begun: list[Terminal] = []

    def begin(*words: str, command: tuple[str, ...] = FEDRAY) -> Terminal:
        begun.append(Terminal([*command, *words], tmp_path))
        return begun[-1]

    yield begin
    for terminal in begun:
        terminal.kill()


def write(folder: Path, changes: dict[str, Any] | None = None, **more: Any) -> None:
    """Write `x.yaml`: rounds without end, a checkpoint at the first one and every 1000."""
    endless = {"rounds": 100_000, "checkpoint_every": 1000, "tracking.uri": "sqlite:///m.db"}
    base = override_tree(tiny.TREE, endless | (changes or {}))
    (folder / "x.yaml").write_text(yaml_text.dump({"base": base} | more))


TRIALS = ("r/trials/00-seed=0", "r/trials/01-seed=1")


def write_sweep(folder: Path, actors: int) -> None:
    write(folder, {"clients.actors": actors}, space={"seed": {"grid": [0, 1]}}, tune={"concurrent": 2})


def have_rounds(folder: Path, *names: str) -> Callable[[], bool]:
    logs = [folder / name / "rounds.jsonl" for name in names]
    return lambda: all(log.exists() and log.read_text().count("\n") > 5 for log in logs)


def check_kept(path: Path) -> None:
    """Check that no complete round is lost, and that the run can be resumed from it."""
    files = RunFiles.open(path)
    found = files.load()
    assert found is not None and found.done == files.rounds()[-1]["round"] >= 5
    assert summary(path).status == "interrupted"


def statuses(folder: Path) -> list[str]:
    store = sqlite3.connect(folder / "m.db")
    try:
        return [status for (status,) in store.execute("SELECT status FROM runs")]
    finally:
        store.close()


WAYS: dict[str, tuple[Callable[[Terminal], None], int]] = {
    "ctrl-c": (Terminal.press_ctrl_c, 130),
    "group-sigterm": (lambda terminal: terminal.send(signal.SIGTERM), 143),
    "hang-up": (Terminal.hang_up, 129),
}


@pytest.mark.parametrize("actors", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_run(way: str, actors: int, start: Start, tmp_path: Path) -> None:
    write(tmp_path, {"clients.actors": actors})
    terminal = start("run", "x.yaml", "--out", "r")
    terminal.until(have_rounds(tmp_path, "r"))
    end, status = WAYS[way]
    end(terminal)
    assert terminal.ended(30) == status, terminal.said
    assert "Traceback" not in terminal.said
    assert way == "hang-up" or "interrupted; `fedray resume r` continues" in terminal.said
    check_kept(tmp_path / "r")
    assert statuses(tmp_path) == ["KILLED"]


@pytest.mark.parametrize(("way", "actors"), [("ctrl-c", 0), *((way, 1) for way in WAYS)])
def test_a_sweep(way: str, actors: int, start: Start, tmp_path: Path) -> None:
    write_sweep(tmp_path, actors)
    terminal = start("sweep", "x.yaml", "--out", "r")
    terminal.until(have_rounds(tmp_path, *TRIALS))
    end, status = WAYS[way]
    end(terminal)
    assert terminal.ended(60) == status, terminal.said
    assert "Traceback" not in terminal.said and "failed" not in terminal.said
    assert way == "hang-up" or "interrupted; `fedray resume r` continues" in terminal.said
    for name in TRIALS:
        check_kept(tmp_path / name)
    assert statuses(tmp_path) == ["KILLED"] * 3
    assert not (tmp_path / "r" / ".ending").exists()


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_ctrl_c_twice_ends_at_once_and_leaves_what_can_be_resumed(
    kind: str, start: Start, tmp_path: Path
) -> None:
    write_sweep(tmp_path, 1)
    (tmp_path / "slow.py").write_text(
        "import time\nfrom fedray.storage.run_files import RunFiles\n"
        "save = RunFiles.save\n"
        "def slowly(self, found, tree):\n"
        "    if found.state.round > 9:\n        (self.path / 'saving').touch()\n        time.sleep(300)\n"
        "    save(self, found, tree)\n"
        "RunFiles.save = slowly\n"
    )
    terminal = start(kind, "x.yaml", "checkpoint_every=5", "--out", "r", "--import", "slow.py")
    names = ["r"] if kind == "run" else list(TRIALS)
    terminal.until(lambda: all((tmp_path / name / "saving").exists() for name in names))
    terminal.press_ctrl_c()
    time.sleep(1)
    assert terminal.process.poll() is None  # it waits for the checkpoint
    before = time.monotonic()
    terminal.press_ctrl_c()
    assert terminal.ended(10) == -signal.SIGINT  # 130 in a shell
    assert time.monotonic() - before < 10 and "Traceback" not in terminal.said
    for name in names:
        found = RunFiles.open(tmp_path / name).load()
        assert found is not None and found.done == 5


@pytest.mark.parametrize("words", [("run", "--out", "r"), ("sweep", "--out", "r"), ("plan",)])
@pytest.mark.parametrize("way", ["ctrl-c", "group-sigterm"])
def test_before_anything_has_started(words: tuple[str, ...], way: str, start: Start, tmp_path: Path) -> None:
    write_sweep(tmp_path, 0)
    # what interrupts an import may be taken for its failure
    (tmp_path / "slow.py").write_text(
        "import time\nopen('importing', 'x').close()\n"
        "try:\n    time.sleep(300)\nexcept BaseException:\n    raise ImportError('half a module')\n"
    )
    terminal = start(words[0], "x.yaml", *words[1:], "--import", "slow.py")
    terminal.until((tmp_path / "importing").exists)
    end, status = WAYS[way]
    end(terminal)
    assert terminal.ended(20) == status
    assert "Traceback" not in terminal.said and "cannot run" not in terminal.said
    assert not (tmp_path / "r").exists()


def catches_sigterm(terminal: Terminal) -> bool:
    """Tell whether a process has a handler of SIGTERM: its command has begun."""
    status = Path(f"/proc/{terminal.process.pid}/status").read_text()
    (caught,) = re.findall(r"SigCgt:\t(\w+)", status)
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0])
def test_at_any_moment_of_the_start(after_s: float, start: Start, tmp_path: Path) -> None:
    write(tmp_path)
    terminal = start("run", "x.yaml", "--out", "r")
    terminal.until(lambda: catches_sigterm(terminal))
    time.sleep(after_s)
    terminal.press_ctrl_c()
    assert terminal.ended(30) == 130
    assert "Traceback" not in terminal.said and "Error" not in terminal.said


@pytest.mark.parametrize("when", ["start", "end"])
def test_while_it_waits_for_an_mlflow_server_that_does_not_answer(
    when: str, start: Start, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        write(tmp_path, {"rounds": 2, "tracking.uri": uri})
        terminal = start("run", "x.yaml", "--out", "r")
        wanted = "result.json" if when == "end" else "config.yaml"
        terminal.until((tmp_path / "r" / wanted).exists)
        terminal.press_ctrl_c()
        assert terminal.ended(25) == 130  # a single request of MLflow's waits for 30 s
        assert "Traceback" not in terminal.said
    assert summary(tmp_path / "r").status == ("finished" if when == "end" else "interrupted")


def test_at_pythons_prompt(start: Start, tmp_path: Path) -> None:
    write(tmp_path)
    terminal = start(command=(sys.executable, "-q", "-i"))
    terminal.write("import fedray\n")
    terminal.write("fedray.run('x.yaml', out='r')\n")
    terminal.until(have_rounds(tmp_path, "r"))
    terminal.press_ctrl_c()
    terminal.until(lambda: "KeyboardInterrupt" in terminal.said and terminal.said.rstrip().endswith(">>>"))
    check_kept(tmp_path / "r")
    terminal.write("print(6 * 7, fedray.resume('r', {'rounds': 100001}, until=lambda *_: 'enough').path)\n")
    terminal.until((tmp_path / "r" / "result.json").exists)
    terminal.until(lambda: "42 " in terminal.said)
    terminal.write("exit()\n")
    assert terminal.ended(20) == 0


def test_a_training_of_an_agent(start: Start, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "process: {name: rate_search}\nalgorithm: {name: dqn}\ntracking: {uri: none}\n"
        "budget: {env_steps: 10000000, evaluate_every: 200}\n"
    )
    terminal = start("agent", "train", "t.yaml", "--out", "t")
    terminal.until(lambda: "score" in terminal.said)
    terminal.press_ctrl_c()
    assert terminal.ended(60) == 130
    assert "interrupted; `fedray agent train --resume t` continues" in terminal.said
    assert "Traceback" not in terminal.said


@pytest.mark.parametrize(("way", "status"), [("ctrl-c", 0), ("group-sigterm", 143), ("hang-up", 129)])
def test_the_ui_of_mlflow_ends_with_its_command(way: str, status: int, start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert prepare_store(f"sqlite:///{tmp_path}/m.db", "fedray").problem is None
    terminal = start("ui", "--uri", "sqlite:///m.db", "--port", str(port))

    def answers() -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", port)) == 0

    terminal.until(answers)
    WAYS[way][0](terminal)
    assert terminal.ended(30) == status, terminal.said
    assert not answers()
