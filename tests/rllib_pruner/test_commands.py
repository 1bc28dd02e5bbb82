"""The commands of `fedray agent`, and the same as `python -m rllib_pruner.…`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.errors import ConfigError, DataError, RunError
from fedray.experiment.interrupt import SIGNALS
from rllib_pruner.commands import run_app
from tests.report.rundirs import write_run

ROOT = Path(__file__).parents[2]
MODULES = sorted(cli.AGENT_COMMANDS.items())


def agent(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["agent", *words], env={"COLUMNS": "200"})


def test_the_group_lists_its_commands() -> None:
    shown = agent("--help").output
    assert all(name in shown for name in ("train", "evaluate", "judge"))


@pytest.mark.parametrize(("name", "module"), MODULES)
def test_a_module_is_the_same_command(name: str, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    shown = agent(name, "--help")
    assert shown.exit_code == 0
    options = {word for word in shown.output.split() if word.startswith("--")}
    assert {"--help"} < options == {word for word in done.stdout.split() if word.startswith("--")}


def test_an_agent_is_judged_from_the_files_of_a_sweep(tmp_path: Path) -> None:
    staged = {"name": "staged", "lr": 0.1}
    for policy, accuracy in (("schedule", 0.8), ("agent", 0.7)):
        write_run(tmp_path / policy, {"seed": 0, "method": staged | {"policy": policy}}, test=accuracy)
    done = agent("judge", str(tmp_path), "--out", str(tmp_path / "table.md"))
    assert done.exit_code == 0, done.output
    assert "Against the front of fixed schedules" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_an_agent_is_evaluated_beside_its_controls(tmp_path: Path) -> None:
    done = agent(
        "evaluate", "rate_search", "--problems", "2", "--no-cost", "--out", str(tmp_path / "table.md")
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "monotone, dqn" in text and "monotone, scan" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "give either a YAML file, or --resume"),
        (["train", "x.yaml", "--resume", "y"], "give either a YAML file, or --resume"),
        (["train", "--resume", "nowhere"], "is not the directory of a training"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "stage"], "unknown process 'stage'; did you mean 'stages'?"),
        (["judge", "nowhere"], "no runs found"),
    ],
)
def test_a_command_that_cannot_run_starts_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = agent(*words)
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put back the handlers of signals: after a command, only the end of its process follows."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (ConfigError("[x] is wrong"), 2, "cannot run: [x] is wrong"),
        (DataError("no data"), 2, "cannot run: no data"),
        (RunError("out of space"), 1, "failed: out of space"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_a_message_and_an_exit_status(
    error: BaseException, status: int, shown: str, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_app(fail)
    assert ended.value.code == status
    assert capsys.readouterr().err.strip() == shown


def test_an_error_after_a_signal_is_due_to_it(capsys: pytest.CaptureFixture[str], handlers: None) -> None:
    def fail() -> None:
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        raise RunError("Ray is gone")

    with pytest.raises(SystemExit) as ended:
        run_app(fail)
    assert ended.value.code == 143
    assert "Ray is gone" not in capsys.readouterr().err


LEAVING = """
import atexit, os, signal, sys
from fedray.errors import RunError
from rllib_pruner import commands

def hit(*_):
    os.kill(os.getpid(), signal.{name})

def at_exit():
    atexit.register(hit)
    print("done", end="")

def in_message():
    commands.err.print = hit
    raise RunError("failed")

commands.run_app({moment})
"""


@pytest.mark.parametrize("moment", ["at_exit", "in_message"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_command_leaves_has_its_status_and_no_traceback(name: str, moment: str) -> None:
    code = LEAVING.format(name=name, moment=moment)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ("done" if moment == "at_exit" else "")
