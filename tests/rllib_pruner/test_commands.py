"""The commands of `fedray agent`, and the same as `python -m rllib_pruner.…`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray import cli
from fedray.errors import ConfigError, DataError, RunError
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
    error: BaseException, status: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_app(fail)
    assert ended.value.code == status
    assert capsys.readouterr().err.strip() == shown
