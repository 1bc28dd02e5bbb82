"""What commands write for programs: `--json`, `--quiet`, `--version`, completion; and options anywhere."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedray import cli
from fedray.config import yaml_text
from fedray.durable import read_mapping
from fedray.errors import ConfigError
from fedray.experiment.run import run
from fedray.methods import METHODS
from fedray.report.table import write_report
from tests.experiment import tiny


@pytest.fixture(autouse=True)
def _as_before(in_tmp: Path) -> Iterator[None]:
    (in_tmp / "x.yaml").write_text(yaml_text.dump(tiny.TREE))
    level = logging.getLogger("fedray").level
    yield
    logging.getLogger("fedray").setLevel(level)
    cli.out.quiet = False


def fedray(*words: str) -> Result:
    done = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_json_is_all_of_stdout(in_tmp: Path) -> None:
    made = json.loads(fedray("run", "x.yaml", "rounds=1", "--out", "r", "--json").stdout)
    assert made == (read_mapping(in_tmp / "r" / "result.json") or {}) | {"path": str(in_tmp / "r")}
    more = json.loads(fedray("resume", "r", "rounds=2", "--json").stdout)
    assert more["rounds"] == 2
    assert json.loads(fedray("resume", "r", "--json").stdout) == more  # it is finished: nothing was run
    told = json.loads(fedray("report", "r", "--json", "--no-pictures").stdout)
    assert told["settings"][0]["test − FedAvg"] is None  # NaN
    assert told["settings"][0]["rounds"] == 2 and str(in_tmp / "r" / "report" / "table.md") in told["files"]


def test_quiet_prints_the_directory_only() -> None:
    done = fedray("run", "x.yaml", "rounds=1", "--out", "r", "--quiet")
    assert (done.stdout, done.stderr) == ("r\n", "")
    assert fedray("-q", "report", "r", "--no-pictures").stdout == "r/report\n"
    assert fedray("report", "r", "--no-pictures").stdout != "r/report\n"


@pytest.mark.parametrize(
    "words", [("-v", "run", "x.yaml"), ("run", "-v", "x.yaml"), ("run", "x.yaml", "--verbose")]
)
def test_options_of_all_commands_stand_anywhere(words: tuple[str, ...]) -> None:
    fedray(*words, "rounds=1", "--out", "r")
    assert logging.getLogger("fedray").level == logging.INFO


def test_version() -> None:
    from importlib.metadata import version

    assert fedray("--version").stdout == f"fedray {version('fedray')}\n"


def completed(line: str) -> list[str]:
    """Return what a shell shows for a line that ends at the cursor."""
    env = os.environ | {
        "_FEDRAY_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    code = "import sys; sys.argv[0] = 'fedray'; from fedray.cli import app; app(prog_name='fedray')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return done.stdout.split()


def test_a_shell_completes_commands_keys_and_names() -> None:
    assert {"report", "resume", "run", "runs"} <= set(completed("fedray r"))
    assert "method.lr=" in completed("fedray run x.yaml method.l")
    assert completed("fedray methods prunef") == ["prunefl"]
    listed = cli.listing()
    assert listed["choices"]["method.name"] == sorted(METHODS)
    assert "clients.uplink.share" in listed["keys"]
    from fedray.cli.completion import completed_key

    assert completed_key("method.name=prunef") == ["method.name=prunefl"]


def test_a_report_without_pictures_has_tables_only(in_tmp: Path) -> None:
    run(tiny.config(rounds=1), out="r")
    fedray("report", "r")
    assert list((in_tmp / "r" / "report").glob("*.png"))
    fedray("report", "r", "--no-pictures")
    assert tiny.listing(in_tmp / "r" / "report") == ["report.json", "table.csv", "table.md"]


def test_a_report_never_overwrites_another_one(in_tmp: Path) -> None:
    for seed, name in enumerate("abc"):
        run(tiny.config(rounds=1, seed=seed), out=f"runs/{name}")

    def folder(*words: str) -> str:
        return str(write_report([f"runs/{w}" for w in words], pictures=False).path.relative_to(in_tmp))

    assert folder("a", "b") == "runs/report"
    assert folder("a", "c") == "runs/report-2"
    assert folder("a", "b") == "runs/report"  # its own again
    assert folder("a") == "runs/a/report"
    assert write_report(["runs"], pictures=False).path.name == "report-3"
    before = (in_tmp / "runs" / "report" / "table.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"holds another report, on .*a, .*b; choose another with --out"):
        write_report(["runs/c"], "runs/report", pictures=False)
    assert (in_tmp / "runs" / "report" / "table.csv").read_bytes() == before
    (in_tmp / "runs" / "report" / "report.json").unlink()  # as an earlier version left it
    with pytest.raises(ConfigError, match="holds another report"):
        write_report(["runs/c"], "runs/report", pictures=False)
